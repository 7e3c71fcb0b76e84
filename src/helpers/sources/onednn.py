"""Float32 products on a CPU by oneDNN, which torch brings along and does not use for Linears.

torch hands float32 to MKL, which on some processors does half of what oneDNN does there
(docs/performance.md has figures). A Linear multiplied here is still a plain `nn.Linear`:
only its `forward` is its own, and what needs a gradient goes the usual way.
"""

from types import MethodType

import torch
from torch import Tensor, nn
from torch.nn.functional import linear


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """(..., outer) x @ weightᵀ + bias, by oneDNN where it can.

    It can on a CPU in float32, outside autograd. Everything else is `linear` of torch.

    Args:
        x: (..., inner).
        weight: (outer, inner).
        bias: (outer,) or None.
    """
    if not _by_onednn(x, weight):
        return linear(x, weight, bias)
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    found = torch.ops.mkldnn._linear_pointwise(rows, weight, bias, "none", [], "")
    return found.reshape(*x.shape[:-1], len(weight))


def _by_onednn(x: Tensor, weight: Tensor) -> bool:
    return (
        x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and x.numel() > 0
        and weight.is_contiguous()
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
        and torch.backends.mkldnn.is_available()
    )


def multiplied_by_onednn(model):
    """The model, its Linears multiplied by `product` unless they have a forward of their own."""
    for module in model.modules():
        if type(module) is nn.Linear and "forward" not in vars(module):
            module.forward = MethodType(_forward, module)
    return model


def _forward(module: nn.Linear, input: Tensor) -> Tensor:
    return product(input, module.weight, module.bias)
