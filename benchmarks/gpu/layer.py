"""A layer of an 8 B model, its Linears and the SiLU between them, in bfloat16 and in int8.

The modules are those of an evaluation: transformers' MLP, Int8Linears stacked and fused as a
loaded checkpoint has them. Norms and attention, which int8 does not change, are left out.
"""

from functools import partial

import torch
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP

from benchmarks.gpu.part import Part
from benchmarks.gpu.timing import device_seconds
from helpers.quantization import int8_linear
from helpers.quantization.int8_linear import Int8Linear, stack_siblings_

HIDDEN, MIDDLE, KEYS = 4096, 14336, 1024  # of Llama-3.1-8B
DRY = 64, 96, 32


class Layer(nn.Module):
    """The Linears of attention, one after the other, and the MLP."""

    def __init__(self, hidden: int, middle: int, keys: int):
        super().__init__()
        self.q_proj, self.o_proj = (nn.Linear(hidden, hidden, bias=False) for _ in range(2))
        self.k_proj, self.v_proj = (nn.Linear(hidden, keys, bias=False) for _ in range(2))
        self.mlp = LlamaMLP(LlamaConfig(hidden_size=hidden, intermediate_size=middle))

    def forward(self, x: Tensor) -> Tensor:
        """(rows, hidden): keys and values are computed, and read by nobody."""
        q, _, _ = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        return self.mlp(self.o_proj(q))


def measured(part: Part, rows: int) -> dict:
    """Microseconds of a layer by type, and how many times as fast int8 is."""
    sizes = DRY if part.dry else (HIDDEN, MIDDLE, KEYS)
    with torch.device(part.device):
        x = torch.randn(rows, sizes[0], dtype=torch.bfloat16)
        microseconds = {}
        for kind, make in (("bfloat16", _bfloat16), ("int8", _int8)):
            layers = [make(*sizes) for _ in range(2)]
            microseconds[kind] = _microseconds(part, layers, x)
            if kind == "int8":
                fused = isinstance(layers[0].mlp.forward, int8_linear.FusedGatedMLP)
            del layers
    ratio = microseconds["bfloat16"] / microseconds["int8"]
    return {**microseconds, "SiLU · up quantized in one kernel": fused, "times as fast": ratio}


def _bfloat16(*sizes: int) -> Layer:
    return Layer(*sizes).bfloat16()


@torch.inference_mode()
def _int8(*sizes: int) -> Layer:
    layer = _bfloat16(*sizes)
    for name, linear in list(layer.named_modules()):
        if isinstance(linear, nn.Linear):
            weight = torch.randint(-127, 128, linear.weight.shape, dtype=torch.int8)
            scale = torch.full((len(weight), 1), 1e-3)
            quantized = Int8Linear(
                weight, scale, None, activations="token_dynamic", input_scale=None
            )
            parent, _, child = name.rpartition(".")
            setattr(layer.get_submodule(parent), child, quantized)
    stack_siblings_(layer)
    int8_linear.fuse_gated_mlps_(layer)
    return layer


@torch.inference_mode()
def _microseconds(part: Part, layers: list[Layer], x: Tensor) -> float:
    # A new view each time: an input's int8 form is kept on its tensor.
    calls = [partial(lambda layer: layer(x.view_as(x)), layer) for layer in layers]
    return round(1e6 * device_seconds(calls, part.device), 1)
