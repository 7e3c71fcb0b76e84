"""The MLP between INT8 Linears: its middle in one pass that also quantizes."""

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from helpers.quantization import int8_linear, int8_passes
from helpers.quantization.int8_activation_cache import QUANTIZED, CachedResult
from helpers.quantization.int8_linear import Int8Linear
from helpers.runtime.batching import current_sequence_ids


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
        if not (
            int8_linear.uses_fused_passes(gate) and gate.dtype == torch.float32 and gate.numel()
        ):
            return self.down(silu(gate) * up)
        mixed, values, scale = int8_passes.gated_silu(gate.flatten(0, -2), up.flatten(0, -2))
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
        if (
            not int8_linear.uses_fused_passes(parts[0].weight_scale)
            or parts[2].activations != "token_dynamic"
        ):
            continue
        if not hasattr(module, "act_fn"):
            continue
        fused_mlp, generator = FusedGatedMLP(module), torch.Generator().manual_seed(0)
        x = torch.randn(1, 16, parts[0].in_features, generator=generator, device="cpu")
        if torch.equal(module(x), fused_mlp(x.clone())):
            module.forward, fused = fused_mlp, fused + 1
    return fused
