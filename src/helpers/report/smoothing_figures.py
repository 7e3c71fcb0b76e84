"""What smoothing does to the worst channel: equation 4 with its numbers, and figures of it.

What is shown comes from `helpers.quantization.channel_smoothing`, as plain numbers and arrays.
"""

from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from IPython.display import Markdown
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from helpers.report.figures import ALARM, INK, QUIET, in_house_style
from helpers.report.markdown import code

NEIGHBOURS = 12  # channels shown on each side of the worst one: single bars stay visible
DIGITS = 4  # of the numbers in the equation


def equation_4(smoothing: Any) -> Markdown:
    """Equation 4 with the numbers of the worst channel, and both maxima afterwards.

    Args:
        smoothing: a `ChannelSmoothing`.
    """
    c, alpha, scale = smoothing.channel, smoothing.alpha, smoothing.scales[smoothing.channel]
    act, weight = smoothing.act_absmax[c], smoothing.weight_absmax[c]
    where = f"Channel {c} of the input of {code(smoothing.layer)}"
    before = rf"\max|X_{{{c}}}| = {_tex(act)}, \qquad \max|W_{{{c}}}| = {_tex(weight)}"
    if alpha is None:
        return Markdown(f"This variant does not smooth: every s is 1. {where}:\n\n$$ {before} $$\n")
    fraction = rf"\frac{{{_tex(act)}^{{{alpha:g}}}}}{{{_tex(weight)}^{{1 - {alpha:g}}}}}"
    value = rf"s_{{{c}}} = {fraction} = {_tex(smoothing.wanted_scale)}"
    after = rf"\frac{{\max|X_{{{c}}}|}}{{s_{{{c}}}}} = {_tex(act / scale)}, \qquad "
    after += rf"s_{{{c}}} \max|W_{{{c}}}| = {_tex(weight * scale)}"
    folded = ""
    if _tex(scale) != _tex(smoothing.wanted_scale):
        folded = f"The nearest s that the norm can hold is {scale:.{DIGITS}g}. "
    return Markdown(
        f"{where} stands out most among the inputs that are smoothed:\n\n$$ {before} $$\n\n"
        f"$$ {value} $$\n\n{folded}Afterwards:\n\n$$ {after} $$\n"
    )


def _tex(number: float) -> str:
    """A number in LaTeX, with a power of ten where it needs one."""
    digits, _, exponent = f"{number:.{DIGITS}g}".partition("e")
    return rf"{digits} \cdot 10^{{{int(exponent)}}}" if exponent else digits


@in_house_style
def channel_neighbours(smoothing: Any) -> Figure:
    """Abs-max of the worst channel and its neighbours before and after smoothing.

    Activations above, weights below, in median channels, since s changes the unit of both.

    Args:
        smoothing: a `ChannelSmoothing`.
    """
    c, size = smoothing.channel, len(smoothing.act_absmax)
    shown = np.arange(max(0, c - NEIGHBOURS), min(size, c + NEIGHBOURS + 1))
    rows = {
        "activations": (smoothing.act_absmax, smoothing.act_after),
        "weights": (smoothing.weight_absmax, smoothing.weight_after),
    }
    figure, panels = plt.subplots(
        2, 2, figsize=(8, 4.4), sharex=True, sharey="row", layout="constrained"
    )
    plt.close(figure)
    colors = [ALARM if channel == c else QUIET for channel in shown]
    for axes, (name, maxima) in zip(panels, rows.items(), strict=True):
        for panel, values in zip(axes, map(_in_medians, maxima), strict=True):
            panel.bar(shown, values[shown], color=colors)
        axes[0].set_ylabel(f"{name}\n[median channels]", fontsize=9)
    panels[0, 0].set_title("before", fontsize=10)
    panels[0, 1].set_title(f"after, α = {smoothing.alpha:g}", fontsize=10)
    for panel in panels[1]:
        panel.set_xlabel("input channel")
    figure.suptitle(neighbours_claim(smoothing), x=0.01, ha="left", fontsize=11)
    return figure


def neighbours_claim(smoothing: Any) -> str:
    """What the figure of the neighbours shows, as a sentence."""
    before, after = (
        _in_medians(values)[smoothing.channel]
        for values in (smoothing.act_absmax, smoothing.act_after)
    )
    if not np.median(smoothing.act_absmax):
        claim = f"{smoothing.layer}: channel {smoothing.channel} reaches {before:.3g}, "
        return f"{claim}{after:.3g} after smoothing; the median channel is 0"
    return (
        f"{smoothing.layer}: channel {smoothing.channel} is {before:.3g}× the median channel, "
        f"{after:.3g}× after smoothing"
    )


def _in_medians(absmax: np.ndarray) -> np.ndarray:
    """(in_features,) maxima in units of the median channel's; as they are where that one is 0."""
    median = float(np.median(absmax))
    return absmax / median if median > 0 else absmax


@in_house_style
def smoothing_histograms(
    smoothing: Any, counts: dict[str, list[list[int]]], log2_edges: list[int]
) -> Figure:
    """|X| and |W| of the worst channel's Linears by power of two, before and after smoothing.

    Args:
        smoothing: a `ChannelSmoothing`.
        counts: of `activations` and of `weights`, before and after.
        log2_edges: of the bins.
    """
    figure, panels = plt.subplots(1, 2, figsize=(8, 2.9), layout="constrained")
    plt.close(figure)
    for axes, (name, pair) in zip(panels, counts.items(), strict=True):
        filled = np.flatnonzero(np.any(pair, axis=0))
        bins = slice(filled[0], filled[-1] + 1)
        edges = log2_edges[bins.start : bins.stop + 1]
        before, after = (np.maximum(part[bins], 0.5) for part in map(np.array, pair))
        axes.stairs(before, edges, baseline=0.5, color=QUIET, fill=True, label="before")
        if smoothing.alpha is not None:
            axes.stairs(after, edges, baseline=0.5, color=INK, linewidth=1.6, label="after")
            axes.legend(fontsize=9, loc="upper left")
        axes.set_yscale("log")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel("log2 of the magnitude")
        axes.set_title(name, fontsize=10)
    panels[0].set_ylabel("values")
    figure.suptitle(histograms_claim(smoothing), x=0.01, ha="left", fontsize=11)
    return figure


def histograms_claim(smoothing: Any) -> str:
    """What the histograms show, as a sentence."""
    if smoothing.alpha is None:
        return f"{smoothing.layer}: inputs and weights as they are; this variant does not smooth"
    values = (smoothing.act_absmax, smoothing.act_after)
    before, after = (float(v.max()) for v in values)
    weights = (smoothing.weight_absmax, smoothing.weight_after)
    light, heavy = (float(v.max()) for v in weights)
    return (
        f"{smoothing.layer}: the largest input goes from {before:.3g} to {after:.3g}, "
        f"the largest weight from {light:.3g} to {heavy:.3g}"
    )
