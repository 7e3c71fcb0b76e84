"""SmoothQuant's smoothing: scales from calibrated maxima, folded into the float weights.

Dividing a norm's output channels by s and multiplying the input channels of the Linears
that read it by s leaves the function as it was; the activations become easier to
quantize and the weights harder. Works from the calibration file alone.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from helpers.quantization.layer_groups import SmoothingGroup, smoothing_groups
from helpers.study.errors import StudyError
from helpers.study.schema import Smooth, Variant

SMALLEST = 1e-5  # floor of maxima and scales, so that a dead channel divides nothing by zero


@dataclass(frozen=True)
class SmoothedGroup:
    """A group and the scales that were folded into it; scales: (in_features,)."""

    group: SmoothingGroup
    scales: Tensor


def smoothing_scales(act_absmax: Tensor, weight_absmax: Tensor, *, alpha: float) -> Tensor:
    """Per-channel s_j = max|X_j|^alpha / max|W_j|^(1 - alpha).

    SmoothQuant, arXiv:2211.10438, eq. 4. Maxima below 1e-5 count as 1e-5.

    Args:
        act_absmax: (in_features,) calibrated abs-max of the shared input.
        weight_absmax: (in_features,) abs-max over all Linears reading that input.
        alpha: migration strength in [0, 1]; 1 moves all difficulty to the weights.

    Raises:
        ValueError: shapes differ, or alpha is outside [0, 1].
    """
    if act_absmax.shape != weight_absmax.shape:
        raise ValueError(
            f"act_absmax has shape {tuple(act_absmax.shape)} but weight_absmax "
            f"{tuple(weight_absmax.shape)}; both are one number per input channel"
        )
    if not 0.0 <= alpha <= 1.0:
        raise ValueError(f"alpha = {alpha} is outside [0, 1]")
    act = act_absmax.float().clamp(min=SMALLEST)
    weight = weight_absmax.float().clamp(min=SMALLEST)
    return (act.pow(alpha) / weight.pow(1.0 - alpha)).clamp(min=SMALLEST)


@torch.no_grad()
def fold_scales_(producer: nn.Module, consumers: list[nn.Linear], scales: Tensor) -> None:
    """Divide the producer's output channels by s, multiply the consumers' input channels by s.

    Args:
        producer: a norm with a (features,) weight, or a Linear; its bias is divided too.
        consumers: Linears whose in_features are the producer's channels.
        scales: (features,) positive and finite.

    Raises:
        ValueError: a scale is not positive and finite, or a shape does not fit.
    """
    if not (torch.isfinite(scales).all() and (scales > 0).all()):
        raise ValueError("scales hold a value that is not positive and finite; check calibration")
    if producer.weight.shape[0] != len(scales):
        raise ValueError(f"{len(scales)} scales for {producer.weight.shape[0]} producer channels")
    divisor = scales.to(producer.weight)
    producer.weight.div_(divisor if producer.weight.ndim == 1 else divisor[:, None])
    if getattr(producer, "bias", None) is not None:
        producer.bias.div_(divisor)
    for consumer in consumers:
        consumer.weight.mul_(scales.to(consumer.weight))  # (out_features, in_features) * (in,)


def smooth_(model, act_absmax: dict[str, Tensor], smooth: Smooth) -> list[SmoothedGroup]:
    """Smooth a float model in place, and return what was folded where.

    Args:
        model: the float model; it is changed.
        act_absmax: Linear name to (in_features,) calibrated abs-max of its input.
        smooth: alpha and targets.

    Raises:
        StudyError: a target has no group in this architecture, or a Linear is not calibrated.
    """
    done = []
    for group in smoothing_groups(model, smooth.targets):
        consumers = [model.get_submodule(name) for name in group.consumers]
        if group.consumers[0] not in act_absmax:
            raise StudyError(f"{group.consumers[0]} is not in the calibration; run 01_calibration")
        weight_absmax = torch.stack([c.weight.abs().amax(0) for c in consumers]).amax(0)
        scales = smoothing_scales(
            act_absmax[group.consumers[0]].to(weight_absmax.device),
            weight_absmax,
            alpha=smooth.alpha,
        )
        fold_scales_(model.get_submodule(group.producer), consumers, scales)
        done.append(SmoothedGroup(group, scales.cpu()))
    return done


def smooth_variant_(model, act_absmax: dict[str, Tensor], variant: Variant) -> list[SmoothedGroup]:
    """Smooth the model in place as the variant says; nothing is folded if it does not smooth.

    A recipe of its own (seed) is not smoothing, whatever it takes from `smooth`.
    """
    if variant.smooth is None or variant.recipe:
        return []
    return smooth_(model, act_absmax, variant.smooth)


def smoothed_absmax(act_absmax: dict[str, Tensor], done: list[SmoothedGroup]) -> dict[str, Tensor]:
    """The calibrated maxima as they are after smoothing: divided by s where s was folded."""
    changed = dict(act_absmax)
    for smoothed in done:
        for name in smoothed.group.consumers:
            changed[name] = act_absmax[name] / smoothed.scales
    return changed
