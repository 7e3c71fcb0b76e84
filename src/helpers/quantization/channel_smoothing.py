"""The worst channel before and after smoothing: SmoothQuant's equation 4 with a model's numbers.

Worked out from calibrated maxima and weights, before anything is folded, to be shown in notebooks;
no checkpoint and no record takes a number from here. The arrays are numpy's, so that figures need
no torch.
"""

from dataclasses import dataclass
from statistics import median_low

import numpy as np
import torch
from torch import Tensor, nn

from helpers.quantization.calibration import log2_histogram
from helpers.quantization.channel_maxima import by_ratio, layer_maxima
from helpers.quantization.layer_groups import SmoothingGroup, smoothing_groups
from helpers.quantization.smoothing import (
    group_scales,
    group_weight_absmax,
    require_submodule,
    same_alpha,
    smoothing_scales,
)
from helpers.study.schema import Study
from helpers.study.schema_variants import Smooth, Variant

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
    found = (v.smooth for v in study.variants.values() if _smooths(v))
    smooth = next(found, PAPER)
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
    wanted = scales = torch.ones_like(weight)
    if alpha is not None:
        wanted = smoothing_scales(act.cpu(), weight, alpha=alpha)
        scales = group_scales(model, groups[name], {name: act}, alpha=alpha).float().cpu()
    return ChannelSmoothing(
        groups[name],
        channel,
        alpha,
        maxima[name],
        weight.numpy(),
        float(wanted[channel]),
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
