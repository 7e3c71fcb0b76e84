"""SmoothQuant's smoothing: scales from calibrated maxima, folded into the float weights.

Dividing a norm's output channels by s and multiplying the input channels of the Linears
that read it by s leaves the function as it was; the activations become easier to
quantize and the weights harder. Works from the calibration file alone.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from helpers.core.errors import StudyError
from helpers.quantization.layer_groups import SmoothingGroup, smoothing_groups
from helpers.study.schema_variants import Variant

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


def representable_scales(norm_weight: Tensor, scales: Tensor, *, norm_offset: float) -> Tensor:
    """The nearest scales that a norm of (offset + w) can represent.

    Such a norm stores (offset + w) / s - offset. For a large s that is close to -offset, and
    rounding it to the weight's dtype changes the quotient by far more than one rounding. So
    the Linears are multiplied by the scales that the stored norm really divides by. Without
    an offset the scales are returned unchanged.

    Args:
        norm_weight: (features,) as stored.
        scales: (features,) by equation 4.
        norm_offset: the constant that the norm adds to its weight; 0 for most.

    Returns:
        (features,) float64 on the CPU if there is an offset.
    """
    if not norm_offset:
        return scales
    factor = norm_weight.detach().cpu().double() + norm_offset
    stored = (factor / scales.cpu().double() - norm_offset).to(norm_weight.dtype).double()
    step = torch.finfo(norm_weight.dtype).eps * norm_offset
    lost_channels = (stored == -norm_offset) & (factor != 0)  # the norm would lose the channel
    stored = torch.where(lost_channels, stored + step * factor.sign(), stored)
    return torch.where(factor == 0, scales.cpu().double(), factor / (stored + norm_offset))


@torch.no_grad()
def fold_scales_(
    producer: nn.Module, consumers: list[nn.Module], scales: Tensor, *, norm_offset: float
) -> None:
    """Divide the producer's last output channels by s, multiply the consumers' inputs by s.

    Args:
        producer: a norm with a (features,) weight, or a Linear; its bias is divided too.
            Of a fused Linear the last channels are divided.
        consumers: modules whose (out, features) weights read the producer's channels.
        scales: (features,) positive and finite.
        norm_offset: the constant that a norm adds to its weight before it multiplies.

    Raises:
        ValueError: a scale is not positive and finite, or a shape does not fit.
    """
    if not (torch.isfinite(scales).all() and (scales > 0).all()):
        raise ValueError("scales hold a value that is not positive and finite; check calibration")
    size, weight = len(scales), producer.weight
    if len(weight) < size or (weight.ndim == 1 and len(weight) > size):
        raise ValueError(f"{size} scales for {len(weight)} producer channels")
    divisor = _as_weight(scales, weight)
    if weight.ndim == 1 and norm_offset:
        folded = (weight.cpu().double() + norm_offset) / scales.cpu().double() - norm_offset
        weight.copy_(folded.to(weight.dtype))
    else:
        weight[-size:].div_(divisor if weight.ndim == 1 else divisor[:, None])
    if getattr(producer, "bias", None) is not None:
        producer.bias[-size:].div_(divisor)
    for consumer in consumers:
        consumer.weight.mul_(_as_weight(scales, consumer.weight))  # (out_features, in) * (in,)


def _as_weight(scales: Tensor, weight: Tensor) -> Tensor:
    """The scales in the weight's dtype, then on its device, which may not support float64."""
    return scales.to(weight.dtype).to(weight.device)


def group_scales(
    model, group: SmoothingGroup, act_absmax: dict[str, Tensor], *, alpha: float
) -> Tensor:
    """(in_features,) the scales of one group of a float model that is not smoothed there yet.

    Raises:
        StudyError: a Linear is not in the model, or not calibrated.
    """
    if group.consumers[0] not in act_absmax:
        raise StudyError(f"{group.consumers[0]} is not in the calibration; run 01_calibration")
    weight_absmax = group_weight_absmax(model, group)
    act = act_absmax[group.consumers[0]].to(weight_absmax.device)
    scales = smoothing_scales(act, weight_absmax, alpha=alpha)
    producer = require_submodule(model, group.producer)
    if producer.weight.ndim > 1:
        return scales
    return representable_scales(producer.weight, scales, norm_offset=group.norm_offset)


def group_weight_absmax(model, group: SmoothingGroup) -> Tensor:
    """(in_features,) abs-max over all Linears that read the group's input.

    Raises:
        StudyError: a Linear is not in the model.
    """
    weights = [require_submodule(model, name).weight.detach() for name in group.consumers]
    return torch.stack([weight.abs().amax(0) for weight in weights]).amax(0)


def require_submodule(model, name: str) -> nn.Module:
    """A module of the model by name.

    Raises:
        StudyError: the model lacks a module of its family's entry.
    """
    try:
        return model.get_submodule(name)
    except AttributeError:
        kind = model.config.model_type
        raise StudyError(f"{name} is expected in a {kind} model but is not there") from None


def same_alpha(config, targets: tuple[str, ...], alpha: float) -> dict[str, float]:
    """The same α for every group of the targets, by the group's first consumer."""
    return {group.consumers[0]: alpha for group in smoothing_groups(config, targets)}


def smooth_(
    model, act_absmax: dict[str, Tensor], targets: tuple[str, ...], alphas: dict[str, float]
) -> list[SmoothedGroup]:
    """Smooth a float model in place; return the groups with their folded scales.

    Args:
        model: the float model; it is changed.
        act_absmax: Linear name to (in_features,) calibrated abs-max of its input.
        targets: the study file's words for the places scales are folded into.
        alphas: α of each group, by the name of its first consumer.

    Raises:
        StudyError: a target has no group in this architecture, or a Linear is not calibrated.
    """
    smoothed_groups = []
    for group in smoothing_groups(model.config, targets):
        scales = group_scales(model, group, act_absmax, alpha=alphas[group.consumers[0]])
        readers = [require_submodule(model, name) for name in (*group.consumers, *group.readers)]
        producer = require_submodule(model, group.producer)
        fold_scales_(producer, readers, scales, norm_offset=group.norm_offset)
        smoothed_groups.append(SmoothedGroup(group, scales.cpu()))
    return smoothed_groups


def smooth_variant_(
    model, act_absmax: dict[str, Tensor], variant: Variant, alphas: dict[str, float]
) -> list[SmoothedGroup]:
    """Smooth the model in place if the variant smooths; return the smoothed groups.

    The seed recipe does not smooth, although it uses the settings of `smooth`.
    """
    if variant.smooth is None or variant.recipe:
        return []
    return smooth_(model, act_absmax, variant.smooth.targets, alphas)


def smoothed_absmax(
    act_absmax: dict[str, Tensor], smoothed_groups: list[SmoothedGroup]
) -> dict[str, Tensor]:
    """The calibrated maxima after smoothing: divided by s in every smoothed group."""
    absmax = dict(act_absmax)
    for smoothed in smoothed_groups:
        for name in smoothed.group.consumers:
            absmax[name] = act_absmax[name] / smoothed.scales
    return absmax
