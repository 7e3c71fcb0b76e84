"""SmoothQuant's smoothing: scales from calibrated maxima, folded into the float weights.

Dividing a norm's output channels by s and multiplying the input channels of the Linears that read
it by s leaves the function as it was; the activations become easier to quantize and the weights
harder. Works from the calibration file alone.

The worst channel before and after smoothing (equation 4 with a model's numbers) is worked out from
calibrated maxima and weights, before anything is folded, to be shown in notebooks; no checkpoint
and no record takes a number from there. Its arrays are numpy's, so that figures need no torch.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median_low

import numpy as np
import torch
from torch import Tensor, nn

from helpers.core.errors import StudyError
from helpers.quantization.calibration import SmoothingGroup, log2_histogram, smoothing_groups
from helpers.quantization.channel_maxima import by_ratio, layer_maxima
from helpers.sources.model_files import TensorFiles
from helpers.study.schema import Smooth, Study, Variant

SMALLEST = 1e-5  # floor of maxima and scales, so that a dead channel divides nothing by zero


@dataclass
class LinearScales:
    """Smoothing scales of one Linear: divisors of its inputs and of its last outputs."""

    inputs: Tensor | None = None
    outputs: Tensor | None = None


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


def linear_scales(
    model, variant: Variant, act_absmax: dict[str, Tensor], alphas: dict[str, float]
) -> dict[str, LinearScales]:
    """Linear name to the scales that the variant's smoothing folds into it; empty without any."""
    scales_by_name: dict[str, LinearScales] = {}
    for group in smoothing_groups(model.config, variant.smooth.targets) if variant.smooth else ():
        alpha = alphas[group.consumers[0]]
        scales = group_scales(model, group, act_absmax, alpha=alpha).float()
        for name in group.consumers:
            scales_by_name.setdefault(name, LinearScales()).inputs = scales
        scales_by_name.setdefault(group.producer, LinearScales()).outputs = scales
    return scales_by_name


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


def replaced_weights(
    source: Path, smoothed_groups: list[SmoothedGroup], variant: Variant, *, dtype: torch.dtype
) -> Callable[[str], Tensor] | None:
    """A function that gives a Linear's smoothed float weight, read anew from the source's files.

    GPTQ replaces a model's weights, and a second copy of all of them may not fit. None if the
    variant's rounding leaves the model its float weights.
    """
    if variant.rounding != "gptq":
        return None
    files = TensorFiles(source, dtype=dtype)

    def weight_of(name: str) -> Tensor:
        weight = files[f"{name}.weight"].clone()  # (out_features, in_features)
        for smoothed in smoothed_groups:
            scales = _as_weight(smoothed.scales, weight)
            if name in smoothed.group.consumers:
                weight.mul_(scales)
            if name == smoothed.group.producer:
                weight[-len(scales) :].div_(scales[:, None])
        return weight

    return weight_of


# What the paper smooths, and how far where it is not tuned for a model (arXiv:2211.10438, 4.1).
PAPER = Smooth(alpha=0.5, targets=("attention_input", "mlp_input"))


@dataclass(frozen=True)
class ChannelSmoothing:
    """One group's input and weights by channel, and what smoothing makes of them.

    Attributes:
        group: the Linears that read the input, and the producer that s is folded into.
        channel: index of the input's largest channel.
        alpha: None where the variant does not smooth; then every scale is 1.
        act_absmax: (in_features,) calibrated abs-max of the input.
        weight_absmax: (in_features,) abs-max over all Linears of the group.
        wanted_scale: s of the channel by equation 4.
        scales: (in_features,) s as it can be folded into the producer.
    """

    group: SmoothingGroup
    channel: int
    alpha: float | None
    act_absmax: np.ndarray
    weight_absmax: np.ndarray
    wanted_scale: float
    scales: np.ndarray

    @property
    def layer(self) -> str:
        """The first Linear of the group, for display."""
        return self.group.consumers[0].removeprefix("model.layers.")

    @property
    def act_after(self) -> np.ndarray:
        """(in_features,) abs-max of the smoothed input."""
        return self.act_absmax / self.scales

    @property
    def weight_after(self) -> np.ndarray:
        """(in_features,) abs-max of the smoothed weights."""
        return self.weight_absmax * self.scales


def study_smoothing(study: Study) -> Smooth:
    """The smoothing of the first variant that smooths, with one number as its α.

    Of a grid, whose best value is not known yet, the middle one; the paper's α where it is chosen
    group by group, and all of the paper's settings where no variant smooths.
    """
    settings = (v.smooth for v in study.variants.values() if _smooths(v))
    smooth = next(settings, PAPER)
    alpha = PAPER.alpha if smooth.alpha == "auto" else smooth.alpha
    alpha = median_low(alpha) if isinstance(alpha, tuple) else alpha
    return smooth.model_copy(update={"alpha": alpha})


def worst_channel(model, act_absmax: dict[str, np.ndarray], smooth: Smooth) -> ChannelSmoothing:
    """The worst channel of the inputs that are smoothed with one α everywhere.

    Args:
        model: the float model, not smoothed; it is not changed.
        act_absmax: Linear name to (in_features,) calibrated abs-max of its input.
        smooth: where scales are folded, and one number as α.
    """
    alphas = same_alpha(model.config, smooth.targets, smooth.alpha)
    return _worst(model, act_absmax, smooth.targets, alphas)


def worst_of_variant(
    model, act_absmax: dict[str, Tensor], variant: Variant, alphas: dict[str, float]
) -> ChannelSmoothing:
    """The worst channel of the inputs that a variant smooths, or could smooth.

    Args:
        model: the float model, not smoothed; it is not changed.
        act_absmax: Linear name to (in_features,) calibrated abs-max of its input.
        alphas: α of each group, by the name of its first consumer.
    """
    if _smooths(variant):
        return _worst(model, act_absmax, variant.smooth.targets, alphas)
    return _worst(model, act_absmax, PAPER.targets, {})


def _smooths(variant: Variant) -> bool:
    """A recipe of its own is not smoothing (`helpers.quantization.smoothing`)."""
    return variant.smooth is not None and not variant.recipe


def _worst(model, act_absmax, targets: tuple[str, ...], alphas: dict[str, float]):
    groups = {g.consumers[0]: g for g in smoothing_groups(model.config, targets)}
    maxima = {name: torch.as_tensor(act_absmax[name]).cpu().numpy() for name in groups}
    worst = by_ratio(layer_maxima(maxima))[0]
    name, channel = worst["name"], worst["channel"]
    act, alpha = torch.as_tensor(act_absmax[name]).float(), alphas.get(name)
    weight = group_weight_absmax(model, groups[name]).float().cpu()
    equation_scales = scales = torch.ones_like(weight)
    if alpha is not None:
        equation_scales = smoothing_scales(act.cpu(), weight, alpha=alpha)
        scales = group_scales(model, groups[name], {name: act}, alpha=alpha).float().cpu()
    return ChannelSmoothing(
        groups[name],
        channel,
        alpha,
        maxima[name],
        weight.numpy(),
        float(equation_scales[channel]),
        scales.numpy(),
    )


class SmoothingHistograms:
    """Counts of |X| and |W| of a group by power of two, before and after smoothing.

    Looks on while another pass reads the model, so that no pass is made for a figure.

    Args:
        model: the float model, not smoothed.
        smoothing: of the group that is looked at.
    """

    def __init__(self, model, smoothing: ChannelSmoothing):
        self._scales = torch.from_numpy(smoothing.scales)
        self.weights = self._weights(model, smoothing)
        self.activations = torch.zeros_like(self.weights)
        first = require_submodule(model, smoothing.group.consumers[0])
        self._hook = first.register_forward_pre_hook(self._look)

    def _weights(self, model, smoothing: ChannelSmoothing) -> Tensor:
        weights = [require_submodule(model, name).weight for name in smoothing.group.consumers]
        return sum(self._counted(weight) for weight in weights)

    def _look(self, _module: nn.Module, args: tuple) -> None:
        self.activations += self._counted(args[0], inverse=True)

    @torch.no_grad()
    def _counted(self, values: Tensor, *, inverse: bool = False) -> Tensor:
        """(2, bins) counts of the values as they are, and as smoothed."""
        before, scales = values.float().abs(), self._scales.to(values.device)
        after = before / scales if inverse else before * scales
        return torch.stack([log2_histogram(before).cpu(), log2_histogram(after).cpu()])

    def end(self) -> dict[str, list[list[int]]]:
        """Look no more; counts before and after, of `activations` and of `weights`."""
        self._hook.remove()
        return {"activations": self.activations.tolist(), "weights": self.weights.tolist()}
