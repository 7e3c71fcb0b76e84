"""Which Linear inputs a single int8 scale cannot hold, read from the calibration.

With one scale for the whole tensor, a step is the largest value / 127. A channel that
never exceeds half a step is rounded to zero. Where that befalls most channels, the
Linear reads little but its outlier.
"""

from dataclasses import dataclass

import numpy as np

from helpers.quantization.channel_maxima import channel_maxima
from helpers.report.results import Results
from helpers.report.results_data import CalibrationResults, VariantResults

HALF_STEPS = 2 * 127  # half steps from zero to the end of a symmetric int8 scale


@dataclass(frozen=True)
class LinearInput:
    """One Linear's input: its largest channel, and the effect of a single scale.

    Attributes:
        ratio: largest channel / median channel, of their abs-max; None if the median is 0.
        rounded_away: share of channels that never exceed half a step.
    """

    linear: str
    channel: int
    largest: float
    median: float
    ratio: float | None
    rounded_away: float

    @property
    def name(self) -> str:
        return self.linear.removeprefix("model.layers.")


def linear_inputs(calibrated: CalibrationResults) -> list[LinearInput]:
    """Every Linear's input, the one with the largest ratio first; those without one last."""
    inputs = []
    for linear, absmax in calibrated.absmax.items():
        maxima = channel_maxima(absmax)
        rounded_away = float(np.mean(absmax < maxima.largest / HALF_STEPS))
        inputs.append(LinearInput(linear, *maxima, rounded_away))
    return sorted(inputs, key=lambda i: (i.ratio is None, -(i.ratio or i.largest), i.linear))


def outlier_dominated_inputs(calibrated: CalibrationResults) -> list[LinearInput]:
    """Inputs of which one scale per tensor rounds most channels to zero."""
    return [i for i in linear_inputs(calibrated) if i.rounded_away > 0.5]


def output_sqnr(evaluated: VariantResults) -> dict[str, float]:
    """Output SQNR in dB by Linear of the final variant: the last curve of its record."""
    curves = evaluated.quantization["results"]["sqnr_db"]
    return list(curves.values())[-1] if curves else {}


def zeroed_tokens(calibrated: CalibrationResults) -> tuple[int, int]:
    """(tokens that one scale rounds entirely to zero, all tokens) of the shown input."""
    half_step = float(calibrated.absmax[calibrated.surface_of].max()) / HALF_STEPS
    return int((calibrated.surface.max(1) < half_step).sum()), len(calibrated.surface)


def per_tensor_variants(results: Results, model: str) -> list[VariantResults]:
    """The model's quantized variants with one activation scale per tensor."""
    quantized = [e for e in results.compared_variants_of(model) if e.quantization]
    return [e for e in quantized if activation_granularity(results, e.variant).startswith("tensor")]


def per_token_variants(results: Results, model: str) -> list[VariantResults]:
    """The model's quantized variants with one activation scale per token."""
    quantized = [e for e in results.compared_variants_of(model) if e.quantization]
    return [e for e in quantized if activation_granularity(results, e.variant).startswith("token")]


def activation_granularity(results: Results, variant: str) -> str:
    """The study file's word for its activation scales; empty if it quantizes none."""
    scheme = results.study.variants[variant].scheme
    return scheme[1] if scheme else ""
