"""The broken recipe this project began with, built on purpose: a control that must be flagged.

A report said that SmoothQuant W8A8 costs a 0.6 B model everything. What it had measured
was this. Known, from that report and its files:

- the weights were divided by the smoothing scales, and the activations never scaled, so
  that nothing cancels;
- the weights were rounded per tensor, 197 of them: all 196 Linears of the blocks and the
  tied head it claimed to keep, and so the embeddings;
- activations stayed float at run time, and the checkpoint holds dequantized weights.

Assumed here: scales by the paper's formula with each Linear's own weights, clamped to
[1e-2, 1e2], at the study file's places (the head, which is not calibrated, is rounded
but not divided); symmetric 8 bits whose ±127 reaches the largest weight.
"""

import torch
from torch import Tensor, nn

from helpers.core.errors import StudyError
from helpers.quantization.layer_groups import linear_layers, smoothing_groups
from helpers.quantization.smoothing import smoothing_scales
from helpers.study.schema_variants import Smooth

CLAMP = (1e-2, 1e2)


@torch.no_grad()
def apply_seed_recipe_(model, act_absmax: dict[str, Tensor], smooth: Smooth) -> list[str]:
    """Apply the recipe to the model; return the names of the rounded Linears.

    Raises:
        StudyError: a Linear of a target is not in the calibration.
    """
    for group in smoothing_groups(model.config, smooth.targets):
        for name in group.consumers:
            if name not in act_absmax:
                raise StudyError(f"{name} is not in the calibration; run 01_calibration again")
            linear = model.get_submodule(name)
            weight_absmax = linear.weight.abs().amax(0)
            scales = smoothing_scales(
                act_absmax[name].to(weight_absmax.device), weight_absmax, alpha=smooth.alpha
            )
            linear.weight.div_(
                scales.clamp(*CLAMP).to(linear.weight)
            )  # correct would be to multiply
    linears = linear_layers(model)
    for linear in linears.values():
        _round_(linear)
    return list(linears)


def _round_(linear: nn.Linear) -> None:
    """Round weights to the int8 grid of the whole tensor; a tied weight changes its twin too."""
    step = linear.weight.abs().max().float() / 127
    grid = (linear.weight.float() / step).round().clamp(-127, 127)
    linear.weight.copy_((grid * step).to(linear.weight))
