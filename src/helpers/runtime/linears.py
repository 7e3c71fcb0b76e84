"""The float products of Linears on a CPU, by the library that the processor does them best with.

torch hands float32 to MKL, which on some processors does half of what oneDNN does there
(NOTES.md has figures); oneDNN comes with torch too. bfloat16 on a processor that has no
instructions for it is emulated there at a tenth of float32's speed: the operands are multiplied
in float32 instead, and the sum is rounded to bfloat16 once, as the instructions do. A Linear
multiplied here is still a plain `nn.Linear`, and can be trained; only its `forward` is its own.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from types import MethodType

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear
from torch.overrides import TorchFunctionMode

from helpers.runtime.processors import has_bfloat16_units

NOT_MULTIPLIED = (
    nn.Linear,
    nn.Embedding,
)  # classes with a matrix whose product is not computed here


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """(..., outer) x @ weightᵀ + bias, by oneDNN on a CPU, else by torch's choice.

    Args:
        x: (..., inner).
        weight: (outer, inner).
        bias: (outer,) or None.
    """
    if x.dtype == weight.dtype == torch.bfloat16 and is_emulated(x):
        bias_float32 = None if bias is None else bias.float()
        return product(x.float(), weight.float(), bias_float32).to(torch.bfloat16)
    if not _by_onednn(x, weight):
        return linear(x, weight, bias)
    if torch.is_grad_enabled():
        return _Product.apply(x, weight, bias)
    return _onednn_product(x, weight, bias)


def grouped_product(x: Tensor, weight: Tensor) -> Tensor:
    """(groups, rows, outer) x @ weightᵀ of every group; a row is the same among any 16 or more.

    MKL's batched product depends on the number of rows: with AVX2 always, else if outer = 1.

    Args:
        x: (groups, rows, inner).
        weight: (groups, outer, inner).
    """
    if not _by_onednn(x, weight):
        return x @ weight.transpose(1, 2)
    return torch.stack([product(*pair) for pair in zip(x, weight, strict=True)])


def is_emulated(x: Tensor) -> bool:
    """Whether x is bfloat16 on a CPU that has no instructions for its products."""
    return x.dtype == torch.bfloat16 and x.device.type == "cpu" and not has_bfloat16_units()


def widened(*operands: Tensor) -> tuple[Tensor, ...]:
    """The operands of a product, emulated bfloat16 cast to float32 as `product` does."""
    return tuple(x.float() if is_emulated(x) else x for x in operands)


def _by_onednn(x: Tensor, weight: Tensor) -> bool:
    return (
        x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and x.numel() > 0
        and not torch.is_autocast_enabled("cpu")
        and torch.backends.mkldnn.is_available()
    )


def _onednn_product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    weight = weight.contiguous()
    product = torch.ops.mkldnn._linear_pointwise(rows, weight, bias, "none", [], "")
    return product.reshape(*x.shape[:-1], len(weight))


class _Product(torch.autograd.Function):
    """The product and its gradients, which are products too."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _onednn_product(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        needed = ctx.needs_input_grad
        grads, rows = grad.reshape(-1, len(weight)), x.reshape(-1, x.shape[-1])
        return (
            _onednn_product(grads, weight.t()).reshape(x.shape) if needed[0] else None,
            _onednn_product(grads.t(), rows.t()) if needed[1] else None,
            grads.sum(0) if needed[2] else None,
        )


def use_onednn(model):
    """The model, whose Linears now use `product` unless they have a `forward` of their own.

    Other modules with a matrix, such as routers of mixtures, use it too: with MKL and AVX2 a row
    of their output would depend on the number of rows.
    """
    for module in model.modules():
        if "forward" in vars(module):
            continue
        if type(module) is nn.Linear:
            module.forward = MethodType(_forward, module)
        elif _has_matrix(module):
            module.forward = MethodType(_with_products, module)
    return model


def _has_matrix(module: nn.Module) -> bool:
    matrix = module._parameters.get("weight")
    return matrix is not None and matrix.ndim == 2 and not isinstance(module, NOT_MULTIPLIED)


class _Products(TorchFunctionMode):
    """Inside the context, `torch.nn.functional.linear` is `product`."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        return (product if function is linear else function)(*args, **(kwargs or {}))


def _with_products(module: nn.Module, *args, **kwargs):
    with _Products():
        return type(module).forward(module, *args, **kwargs)


def _forward(module: nn.Linear, input: Tensor) -> Tensor:
    return product(input, module.weight, module.bias)


class _Linear(nn.Linear):
    forward = _forward


@contextmanager
def simulated_by_onednn(model) -> Iterator[None]:
    """Inside the context, the products that compressed-tensors simulates use `product` too.

    It calls the `forward` of a Linear's class, so the class is replaced, and restored at the
    end: only modules of class `nn.Linear` are saved as int8.
    """
    linears = [module for module in model.modules() if type(module) is nn.Linear]
    for module in linears:
        module.__class__ = _Linear
    try:
        yield
    finally:
        for module in linears:
            module.__class__ = nn.Linear
