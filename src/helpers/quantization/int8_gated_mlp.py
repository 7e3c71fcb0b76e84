"""The MLP between INT8 Linears: its middle in one pass that also quantizes."""

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from helpers.quantization import int8_cuda, int8_linear, int8_passes
from helpers.quantization.int8_activation_cache import QUANTIZED, Kept
from helpers.quantization.int8_linear import Int8Linear
from helpers.runtime.batching import token_owners


class GatedMLP:
    """down(SiLU(gate(x)) · up(x)), its middle in one pass that also quantizes for `down`."""

    def __init__(self, module: nn.Module):
        self.module, self.activation = module, getattr(module, "act_fn", None)
        self.gate, self.up, self.down = module.gate_proj, module.up_proj, module.down_proj

    def __call__(self, x: Tensor) -> Tensor:
        module = self.module
        parts = (module.gate_proj, module.up_proj, module.down_proj, module.act_fn)
        if parts != (self.gate, self.up, self.down, self.activation):  # exchanged since
            return type(module).forward(module, x)
        gate, up = self.gate(x), self.up(x)
        rows = gate.flatten(0, -2), up.flatten(0, -2)
        if gate.numel() and int8_cuda.fuses_silu(gate.device, gate.dtype):
            return self._on_card(*rows).view(*x.shape[:-1], self.down.out_features)
        if not (int8_linear.is_fused(gate) and gate.dtype == torch.float32 and gate.numel()):
            return self.down(silu(gate) * up)
        mixed, values, scale = int8_passes.silu_times(*rows)
        return self.down(self._keep(mixed.view(gate.shape), values, scale))

    def _on_card(self, gate: Tensor, up: Tensor) -> Tensor:
        """(rows, out_features); the input of `down` is written only if something reads it."""
        down = self.down
        if down._forward_hooks or down._forward_pre_hooks or "forward" in vars(down):
            return self.down(self._keep(*int8_cuda.silu_times(gate, up, needs_mixed=True)))
        _, values, scale = int8_cuda.silu_times(gate, up, needs_mixed=False)
        return self.down.of_quantized(values, scale, gate.dtype)

    def _keep(self, mixed: Tensor, values: Tensor, scale: Tensor) -> Tensor:
        """The input of `down`, with its int8 form on it for `down` to take."""
        why = (self.down.activations, self.down.input_scale, token_owners())
        Kept.of(mixed, QUANTIZED, why, lambda: (values, scale))
        return mixed


@torch.inference_mode()
def fuse_gated_mlps_(model) -> int:
    """Give MLPs that compute as `GatedMLP` does its forward; returns how many.

    Which they are is not told by their class: one is taken if its own forward gives the same
    bits on a random input.
    """
    fused = 0
    for module in model.modules():
        parts = [getattr(module, name, None) for name in ("gate_proj", "up_proj", "down_proj")]
        if not all(isinstance(part, Int8Linear) for part in parts):
            continue
        if parts[2].activations != "token_dynamic" or not hasattr(module, "act_fn"):
            continue
        x = _random_input(model, parts[0])
        on_card = int8_cuda.fuses_silu(x.device, x.dtype)
        if not (on_card or int8_linear.is_fused(x)):
            continue
        gated = GatedMLP(module)
        if torch.equal(module(x), gated(x.clone())):
            module.forward, fused = gated, fused + 1
    return fused


def _random_input(model, gate: Int8Linear) -> Tensor:
    """(1, 16, in_features) where a Linear lies, in the type of the model's floats."""
    x = torch.randn(1, 16, gate.in_features, generator=torch.Generator().manual_seed(0))
    device = gate.weight_scale.device
    if device.type == "cpu":
        return x
    floats = (parameter.dtype for parameter in model.parameters())
    return x.to(device, next((each for each in floats if each.is_floating_point), x.dtype))
