"""How much of each Linear's output survives int8: signal-to-quantization-noise ratio.

Every Linear is looked at alone, on its real float inputs: errors do not accumulate from
layer to layer, so a bad layer is seen where it is.
"""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from helpers.core.activity import Bar
from helpers.core.errors import StudyError
from helpers.quantization.fake_quant import (
    LinearScales,
    SmoothedLinear,
    apply_smoothing,
    linear_scales,
)
from helpers.quantization.layer_groups import quantized_linears
from helpers.runtime.moe_experts import every_expert_reads
from helpers.study.schema_variants import Variant

ITEMS = 4  # calibration items that are read; every Linear computes five times on each


@dataclass
class SquaredSums:
    """Squared signal and noise by Linear."""

    signal: dict[str, float] = field(default_factory=dict)
    noise: dict[str, float] = field(default_factory=dict)

    def add(self, name: str, smoothed: SmoothedLinear, variant: Variant) -> None:
        exact = smoothed.exact()
        noise = (exact - smoothed.rounded(variant)).square().sum().item()
        self.signal[name] = self.signal.get(name, 0.0) + exact.square().sum().item()
        self.noise[name] = self.noise.get(name, 0.0) + noise

    def decibels(self) -> dict[str, float]:
        return {name: decibels(self.signal[name], self.noise[name]) for name in self.signal}


@torch.inference_mode()
def sqnr_with_and_without(
    model,
    items: list[list[int]],
    variant: Variant,
    act_absmax: dict[str, Tensor],
    alphas: dict[str, float],
) -> dict[str, dict[str, float]]:
    """SQNR in dB by Linear, without smoothing and, if the variant smooths, with smoothing.

    For a float variant, the SQNR of int8 per channel and per token. The model is not changed.

    Args:
        model: the float model, not smoothed.
        items: token ids; each is read alone, in a mixture by every expert.
        variant: gives the granularities and the smoothing targets.
        act_absmax: Linear name to (in_features,) calibrated abs-max of its input.
        alphas: α of each group, by the name of its first consumer.

    Raises:
        StudyError: a Linear's output or error is not finite.
    """
    sums_and_scales: dict[str, tuple[SquaredSums, dict[str, LinearScales]]] = {
        "without smoothing": (SquaredSums(), {})
    }
    if variant.smooth and not variant.recipe:
        scales = linear_scales(model, variant, act_absmax, alphas)
        sums_and_scales["with smoothing"] = (SquaredSums(), scales)
    targets = quantized_linears(model, variant.ignore)

    def hook(name: str):
        def observe(module: nn.Linear, args: tuple) -> None:
            for sums, scales in sums_and_scales.values():
                of_linear = scales.get(name, LinearScales())
                sums.add(
                    name,
                    apply_smoothing(module, args[0], act_absmax.get(name), of_linear),
                    variant,
                )

        return observe

    handles = [m.register_forward_pre_hook(hook(n)) for n, m in targets.items()]
    try:
        with every_expert_reads(model):
            for tokens in Bar(items, desc="error of each Linear", unit="item"):
                ids = torch.tensor([tokens], device=model.device)
                model.base_model(input_ids=ids, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    curves = {label: sums.decibels() for label, (sums, _) in sums_and_scales.items()}
    for label, values in curves.items():
        if undefined := [name for name, value in values.items() if math.isnan(value)]:
            raise StudyError(
                f"the output SQNR of {undefined[0]} ({label}) is not a number: its inputs, weights "
                f"or smoothing factors are not finite; {len(undefined)} Linears are like it"
            )
    return curves


def decibels(signal: float, noise: float) -> float:
    """10·log10(signal / noise), limited to 200 dB (no noise) and −200 dB (no signal).

    NaN if either is not a finite number.
    """
    if not (math.isfinite(signal) and math.isfinite(noise)):
        return math.nan
    if noise == 0.0:
        return 200.0
    ratio = signal / noise
    return min(200.0, 10.0 * math.log10(ratio)) if ratio else -200.0
