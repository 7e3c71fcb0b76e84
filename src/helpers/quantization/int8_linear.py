"""INT8 Linears: alone, stacked beside their siblings, and in a gated MLP.

They multiply int8 by int8 exactly (`int8_matmul`). Activations are quantized at the granularity
the checkpoint declares, by the rule compressed-tensors uses (scale = abs-max / 127.5, round half
to even, clamp to [-128, 127]), so that the simulated checkpoint and this runtime agree. Weights
are held once, as int8, in the order the kernel reads. What one Linear computed from a tensor (its
quantized values, its stack's product) is kept on the tensor for the next Linear that reads it. The
middle of an MLP between INT8 Linears is one pass that also quantizes.

The compiled passes of `int8_matmul` do the elementwise work where they can; torch's operations,
which stand here, are the rule, and equal to the bit.
"""

from collections.abc import Sequence
from copy import copy, deepcopy
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from helpers.quantization import int8_cuda, int8_matmul
from helpers.runtime.devices import current_sequence_ids

# Names of the tensor attributes that hold the cached results.
QUANTIZED, MULTIPLIED = "_int8_quantized", "_int8_multiplied"


@dataclass(frozen=True)
class CachedResult:
    """A result computed from a tensor, cached for the next Linear that reads the same tensor.

    Attributes:
        value: the result.
        conditions: the other inputs of the computation; equal conditions give an equal result.
    """

    value: object
    conditions: tuple

    @classmethod
    def get_or_compute(cls, x: Tensor, name: str, conditions: tuple, compute):
        """The result cached on x under a name; computed and cached if there is none."""
        version = None if x.is_inference() else x._version  # torch counts changes in place
        conditions = (*conditions, version)
        cached = getattr(x, name, None)
        if cached is None or not all(map(_equal, cached.conditions, conditions)):
            cached = cls(compute(), conditions)
            setattr(x, name, cached)
        return cached.value


def _equal(first, second) -> bool:
    return first is second or (not isinstance(first, Tensor) and first == second)


HALF_RANGE = 127.5  # of 256 levels: compressed-tensors' symmetric int8
SMALLEST_SCALE = torch.finfo(torch.float32).eps
SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))  # Linears with the same input


def quantize_activations(x: Tensor, scale: Tensor) -> Tensor:
    """round(x / scale) as int8, clamped; scale broadcasts against x."""
    return torch.div(x, scale).round_().clamp_(-128, 127).to(torch.int8)


def absmax_scale(absmax: Tensor) -> Tensor:
    """The scale absmax / 127.5; a zero row gets the smallest float32 scale.

    torch on CUDA divides by a number by multiplying with the rounded inverse, which sometimes
    differs from the CPU's quotient. By a tensor it divides.
    """
    scale = absmax / torch.full_like(absmax, HALF_RANGE)
    return torch.where(scale == 0, torch.full_like(scale, SMALLEST_SCALE), scale)


def _tensor_absmax(x: Tensor) -> Tensor:
    """(1,) abs-max of x, or (tokens, 1) abs-max of each token's text if several are packed."""
    owners = current_sequence_ids(x.device)
    if owners is None:
        return x.abs().amax().reshape(1)
    each = x.abs().amax(-1)
    tops = each.new_zeros(int(owners.max()) + 1).scatter_reduce_(0, owners, each, "amax")
    return tops[owners][:, None]


class LinearStack:
    """The weights of Linears with the same input, stacked into one matrix for one product.

    Args:
        linears: with equal in_features and activation scales, all with or all without bias.
    """

    def __init__(self, linears: Sequence["Int8Linear"]):
        self.linears = list(linears)
        ends = list(accumulate(linear.out_features for linear in linears))
        self.columns = [slice(a, b) for a, b in zip([0, *ends], ends, strict=False)]
        self.packed: tuple[Tensor, ...] = ()

    def __deepcopy__(self, memo: dict) -> "LinearStack":
        """A stack of the copied Linears; it shares the packed weights, which never change."""
        memo[id(self)] = copied = copy(self)
        copied.linears = deepcopy(self.linears, memo)
        return copied

    @torch.inference_mode(False)
    def pack(self) -> None:
        """Pack the weights for the kernel, and free the Linears' own weights."""
        self.packed = int8_matmul.pack(torch.cat([linear.weight for linear in self.linears]))
        self.scales = self._joined("weight_scale")[0]
        self.bias = None if self.linears[0].bias is None else self._joined("bias")
        for linear in self.linears:
            linear.weight = None

    @torch.inference_mode(False)
    def unpack(self) -> None:
        """Restore the Linears' own weights; the next product packs them again."""
        if self.packed:
            weight_t = int8_matmul.unpack(self.packed)
            for linear, columns in zip(self.linears, self.columns, strict=True):
                linear.weight = weight_t[:, columns].t().contiguous()
            self.packed = ()

    def _joined(self, name: str) -> Tensor:
        """(1, all out_features) or (all out_features,) float32; the Linears keep views of it."""
        parts = [getattr(linear, name) for linear in self.linears]
        expanded = [
            part.expand(*part.shape[:-1], linear.out_features).float()
            for part, linear in zip(parts, self.linears, strict=True)
        ]
        joined = torch.cat(expanded, dim=-1) if len(expanded) > 1 else expanded[0].contiguous()
        for part, linear, columns in zip(parts, self.linears, self.columns, strict=True):
            if part.shape[-1] == linear.out_features and part.dtype == joined.dtype:
                setattr(linear, name, joined[..., columns])
        return joined

    def multiplied(self, x: Tensor) -> Tensor:
        """(tokens, all out_features) product in float32 or x's dtype, for x (…, in_features)."""
        values, scale = self.linears[0].quantized(x)
        if int8_cuda.uses_triton(values.device):
            operands = self.packed[0], scale, self.scales, self.bias
            return int8_cuda.rescaled_product(values, *operands, x.dtype)
        product = int8_matmul.multiply(values, self.packed)
        if uses_fused_passes(product):
            y = int8_matmul.rescale_cpu_(product, scale, self.scales)
        else:
            y = product.float().mul_(scale).mul_(self.scales)
        return y if self.bias is None else y.add_(self.bias)


class Int8Linear(nn.Module):
    """y = (x_int8 @ w_int8ᵀ) · activation scale · weight scale + bias.

    Linears with the same input tensor (query, key and value; gate and up) share its quantized
    values, and share one product if they are stacked: transformers' layers do not change an
    input between the Linears that read it.

    Args:
        weight: (out_features, in_features) int8.
        weight_scale: (out_features, 1) or (1,) float.
        bias: (out_features,) or None.
        activations: `token_dynamic`, `tensor_dynamic` or `tensor_static`.
        input_scale: (1,) float for `tensor_static`, else None.
    """

    def __init__(self, weight, weight_scale, bias, *, activations: str, input_scale):
        super().__init__()
        if weight.dtype != torch.int8:
            raise ValueError(f"weight is {weight.dtype}; an INT8 Linear needs torch.int8")
        if (activations == "tensor_static") != (input_scale is not None):
            raise ValueError(f"activations = {activations!r} and input_scale do not fit together")
        self.out_features, self.in_features = weight.shape
        self.activations = activations
        self.register_buffer("weight", weight)  # until the first call packs it
        self.register_buffer("weight_scale", weight_scale.float().reshape(1, -1))
        self.register_buffer("input_scale", None if input_scale is None else input_scale.float())
        self.register_buffer("bias", bias)
        self.stack = LinearStack([self])

    @property
    def columns(self) -> slice:
        """This Linear's columns in the stack's product."""
        return self.stack.columns[self.stack.linears.index(self)]

    @property
    def weight_t(self) -> Tensor:
        """(in_features, out_features) int8 weight, transposed."""
        if not self.stack.packed:
            return self.weight.t()
        return int8_matmul.unpack(self.stack.packed)[:, self.columns]

    def held_bytes(self) -> int:
        """Bytes of weights, scales and bias; the first Linear counts the stack's packed weights."""
        tensors = list(self.buffers())
        if self.stack.linears[0] is self:
            tensors += self.stack.packed
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def _apply(self, fn, recurse=True):
        """Unpack before moving to another device, since weights are packed for their device."""
        if fn(self.weight_scale[:0]).device != self.weight_scale.device:
            self.stack.unpack()
        return super()._apply(fn, recurse)

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination.pop(f"{prefix}weight", None)
        destination[f"{prefix}weight_t"] = self.weight_t.contiguous()

    def scale_of(self, x: Tensor) -> Tensor:
        """The activation scale of x (tokens, in_features): (tokens, 1) or (1,).

        With `tensor_dynamic`, each text of a packed row has its own scale.
        """
        if self.activations == "token_dynamic":
            return absmax_scale(x.abs().amax(-1, keepdim=True))
        if self.activations == "tensor_dynamic":
            return absmax_scale(_tensor_absmax(x))
        return self.input_scale.reshape(1)

    def quantized(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """((tokens, in_features) int8, scale) of x (…, in_features), cached on x."""
        conditions = (self.activations, self.input_scale, current_sequence_ids())
        return CachedResult.get_or_compute(x, QUANTIZED, conditions, lambda: self._quantize(x))

    def _quantize(self, x: Tensor) -> tuple[Tensor, Tensor]:
        rows = x.reshape(-1, self.in_features)
        if self.activations == "token_dynamic" and int8_cuda.uses_triton(rows.device):
            return int8_cuda.quantize_rows_cuda(rows)
        rows = rows.float()
        if uses_fused_passes(rows) and self.activations == "token_dynamic":
            return int8_matmul.quantize_rows_cpu(rows)
        scale = self.scale_of(rows)
        quantize = (
            int8_matmul.quantize_with_scales if uses_fused_passes(rows) else quantize_activations
        )
        return quantize(rows, scale), scale

    def forward(self, x: Tensor) -> Tensor:
        if not x.numel():
            return x.new_zeros(*x.shape[:-1], self.out_features)
        stack = self.stack
        if not stack.packed:
            stack.pack()
        if len(stack.linears) == 1:
            y = stack.multiplied(x)
        else:
            conditions = (stack, current_sequence_ids())
            y = CachedResult.get_or_compute(x, MULTIPLIED, conditions, lambda: stack.multiplied(x))[
                :, self.columns
            ]
        return y.to(x.dtype).view(*x.shape[:-1], self.out_features)


def uses_fused_passes(x: Tensor) -> bool:
    return x.device.type == "cpu" and int8_matmul.are_available()


def stack_siblings_(model) -> int:
    """Stack sibling INT8 Linears, which read the same tensor; return the number of stacks."""
    stacks = 0
    for module in model.modules():
        for names in SIBLINGS:
            siblings = [getattr(module, name, None) for name in names]
            if all(isinstance(one, Int8Linear) for one in siblings) and _are_stackable(siblings):
                stack = LinearStack(siblings)
                for linear in siblings:
                    linear.stack = stack
                stacks += 1
    return stacks


def unpack_stacks_(model) -> None:
    """Undo all packing, before a model is distributed over devices."""
    for module in model.modules():
        if isinstance(module, Int8Linear):
            module.stack.unpack()


def _are_stackable(linears: list[Int8Linear]) -> bool:
    """Whether Linears quantize their input equally, and all or none of them have a bias."""
    kinds = {(each.in_features, each.activations, each.bias is None) for each in linears}
    scales = [each.input_scale for each in linears if each.input_scale is not None]
    return len(kinds) == 1 and all(torch.equal(scale, scales[0]) for scale in scales)


class FusedGatedMLP:
    """down(SiLU(gate(x)) · up(x)) with the activation and quantization for `down` in one pass."""

    def __init__(self, module: nn.Module):
        self.module, self.activation = module, getattr(module, "act_fn", None)
        self.gate, self.up, self.down = module.gate_proj, module.up_proj, module.down_proj

    def __call__(self, x: Tensor) -> Tensor:
        module = self.module
        parts = (module.gate_proj, module.up_proj, module.down_proj, module.act_fn)
        if parts != (self.gate, self.up, self.down, self.activation):  # a module was replaced
            return type(module).forward(module, x)
        gate, up = self.gate(x), self.up(x)
        if not (uses_fused_passes(gate) and gate.dtype == torch.float32 and gate.numel()):
            return self.down(silu(gate) * up)
        mixed, values, scale = int8_matmul.gated_silu(gate.flatten(0, -2), up.flatten(0, -2))
        mixed = mixed.view(gate.shape)
        conditions = (self.down.activations, self.down.input_scale, current_sequence_ids())
        CachedResult.get_or_compute(mixed, QUANTIZED, conditions, lambda: (values, scale))
        return self.down(mixed)


@torch.inference_mode()
def fuse_gated_mlps_(model) -> int:
    """Give gated MLPs the forward of `FusedGatedMLP`; return how many.

    An MLP qualifies if its own forward gives the same bits on a random input, whatever its
    class.
    """
    fused = 0
    for module in model.modules():
        parts = [getattr(module, name, None) for name in ("gate_proj", "up_proj", "down_proj")]
        if not all(isinstance(part, Int8Linear) for part in parts):
            continue
        if not uses_fused_passes(parts[0].weight_scale) or parts[2].activations != "token_dynamic":
            continue
        if not hasattr(module, "act_fn"):
            continue
        fused_mlp, generator = FusedGatedMLP(module), torch.Generator().manual_seed(0)
        x = torch.randn(1, 16, parts[0].in_features, generator=generator, device="cpu")
        if torch.equal(module(x), fused_mlp(x.clone())):
            module.forward, fused = fused_mlp, fused + 1
    return fused
