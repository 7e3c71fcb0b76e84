"""Figures in one house style: one model or variant, variants side by side, and smoothing.

One model or one variant in figures: losses, activations, errors by layer. Variants side by side:
differences with intervals, KL, α; they keep their colour and marker from figure to figure of a
study. What smoothing does to the worst channel: equation 4 with its numbers, which come from
`helpers.quantization.smoothing` as plain numbers and arrays. Axes name their units, and a figure's
title is the claim it shows. Returns figures; shows nothing.
"""

import base64
import io
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from IPython.display import Markdown
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from helpers.report.markdown import code
from helpers.report.pages import NARROW

SURFACE_CHANNELS = 96  # of a surface: more would hide each other
INK, QUIET, ALARM = "#1f3a5f", "#9fb3c8", "#c8553d"
STYLE = {
    "figure.dpi": 110,
    "savefig.bbox": "tight",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 11,
    "legend.frameon": False,
}


def in_house_style(draw: Callable[..., Figure]) -> Callable[..., Figure]:
    """Decorator: draw under the house style, which titles and legends read at creation."""

    @wraps(draw)
    def styled(*args, **options) -> Figure:
        with plt.rc_context(STYLE):
            return draw(*args, **options)

    return styled


def new_figure(width: float, height: float, **options) -> tuple[Figure, "plt.Axes"]:
    """A figure of that size in inches, outside pyplot's registry."""
    figure, axes = plt.subplots(figsize=(width, height), layout="constrained", **options)
    plt.close(figure)
    return figure, axes


@dataclass(frozen=True)
class Picture:
    """A figure of the report, with what it shows in words.

    Attributes:
        alt: what a reader who does not see the figure has to know, its main numbers included;
            plain text.
        narrow: the same for a phone's width; None if the figure only shrinks there.
    """

    figure: Figure
    alt: str
    narrow: Figure | None = None

    def _repr_mimebundle_(self, include=None, exclude=None) -> tuple[dict, dict]:
        """What IPython displays: the PNG, and its alternative text as metadata."""
        data = {"image/png": _png(self.figure), "text/plain": self.alt}
        if self.narrow is not None:
            data[NARROW] = _png(self.narrow)
        return data, {"image/png": {"alt": self.alt}}


def _png(figure: Figure) -> str:
    """The figure as base64 PNG."""
    stream = io.BytesIO()
    with plt.rc_context(STYLE):
        figure.savefig(stream, format="png")
    return base64.b64encode(stream.getvalue()).decode("ascii")


@in_house_style
def loss_curve(losses: list[float], smoothed: list[float], *, title: str) -> Figure:
    """Training loss by step, in nats per answer token, with its running mean."""
    figure, axes = new_figure(7, 3)
    steps = range(1, len(losses) + 1)
    axes.plot(steps, losses, color=QUIET, linewidth=1, label="one batch")
    axes.plot(steps, smoothed, color=INK, linewidth=2, label="running mean")
    axes.set(xlabel="optimizer step", ylabel="loss [nats / answer token]", title=title)
    axes.legend()
    return figure


@in_house_style
def layer_maxima(
    layers: list[str], maxima: list[float], medians: list[float], *, title: str
) -> Figure:
    """Largest channel against median channel of every Linear input, log scale."""
    figure, axes = new_figure(6.4, 3.2)
    place = np.arange(len(layers))
    axes.vlines(place, medians, maxima, color=QUIET, linewidth=1)
    axes.plot(place, medians, ".", color=INK, label="median channel")
    axes.plot(place, maxima, ".", color=ALARM, label="largest channel")
    for index in np.argsort(maxima)[-2:]:
        axes.annotate(
            layers[index],
            (place[index], maxima[index]),
            xytext=(6, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
        )
    axes.set_yscale("log")
    axes.set(xlabel="Linear input, in layer order", ylabel="abs-max over tokens", title=title)
    axes.legend(loc="upper left")
    axes.margins(x=0.08)
    return figure


@in_house_style
def outlier_surface(
    magnitude: np.ndarray, *, title: str, channels: int = SURFACE_CHANNELS
) -> Figure:
    """|x| over tokens × channels of one Linear's input, as a surface.

    Args:
        magnitude: (tokens, in_features).
        channels: how many to show: the largest one, and others evenly spaced.
    """
    peak = int(magnitude.max(0).argmax())
    selected = np.unique(
        np.append(np.linspace(0, magnitude.shape[1] - 1, channels).astype(int), peak)
    )
    figure = plt.figure(figsize=(6.4, 4.4))
    axes = figure.add_subplot(projection="3d")
    plt.close(figure)
    x, y = np.meshgrid(selected, np.arange(len(magnitude)))
    axes.plot_surface(
        x,
        y,
        magnitude[:, selected],
        cmap="viridis",
        rstride=1,
        cstride=1,
        linewidth=0,
        antialiased=False,
    )
    axes.set(xlabel="channel", ylabel="token", zlabel="|x|", title=title)
    axes.view_init(elev=28, azim=-60)
    axes.set_box_aspect((1.4, 1.1, 0.9), zoom=0.9)
    for axis in (axes.xaxis, axes.yaxis, axes.zaxis):
        axis.set_major_locator(MaxNLocator(4))
    return figure


@in_house_style
def sqnr_by_layer(curves: dict[str, dict[str, float]], *, title: str) -> Figure:
    """SQNR in dB of every Linear in layer order, one curve per preparation."""
    figure, axes = new_figure(8, 3.4)
    for place, (name, values) in enumerate(curves.items()):
        color = (QUIET, INK, ALARM)[place % 3]
        axes.plot(list(values.values()), ".-", linewidth=0.8, markersize=4, color=color, label=name)
    axes.set(xlabel="Linear, in layer order", ylabel="output SQNR [dB]", title=title)
    axes.legend(loc="lower left")
    return figure


@in_house_style
def histogram(counts: list[int], log2_edges: list[int], *, title: str) -> Figure:
    """How often each magnitude occurs at one Linear's input, by power of two."""
    figure, axes = new_figure(7, 2.8)
    axes.bar(log2_edges[:-1], np.maximum(counts, 0.5), width=0.9, align="edge", color=INK)
    axes.set_yscale("log")
    axes.set(xlabel="log2 |x|", ylabel="values (sampled tokens)", title=title)
    return figure


def wrapped_title(title: str, width: int = 92) -> str:
    """A title in lines that fit a figure of that many characters."""
    return "\n".join(textwrap.wrap(title, width))


def annotate_lowest(axes, names: list[str], heights: list[float]) -> None:
    """Name the two lowest points, on the side away from the edge; one if they are neighbours."""
    first, *rest = (int(i) for i in np.argsort(heights)[:2])
    apart = [i for i in rest if abs(i - first) > len(names) / 5 or len(names) < 20]
    for index in (first, *apart):
        right = index > 0.6 * len(names)
        axes.annotate(
            names[index].removeprefix("model.layers."),
            (index, heights[index]),
            xytext=(-7 if right else 7, 0),
            textcoords="offset points",
            ha="right" if right else "left",
            va="center",
            fontsize=8,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5, "alpha": 0.7},
        )


# Okabe and Ito's colours, told apart by every kind of colour vision.
VARIANT_COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
MARKERS = "osD^vP"


def variant_looks(variants: list[str]) -> dict[str, tuple[str, str]]:
    """(color, marker) by variant: the same in every figure of a study.

    With more variants than colors, colors repeat with other markers; 36 combinations differ.

    Args:
        variants: all that the study compares with its baseline, in its order.
    """
    colors, markers = len(VARIANT_COLORS), len(MARKERS)
    return {
        name: (VARIANT_COLORS[i % colors], MARKERS[(i + i // colors) % markers])
        for i, name in enumerate(variants)
    }


OPTIONAL = "optional targets too"
WIDE = 10  # largest over smallest value, from which a logarithmic axis shows both


@in_house_style
def kl_by_alpha(curves: dict[str, list[dict]], *, variants: list[str], title: str) -> Figure:
    """KL from the float model against α, one line per variant, its lowest point marked.

    A variant with optional targets has a second line, dashed, with scales folded into them too.

    Args:
        curves: variant to rows of `alpha`, `kl` (nats per token) and, with optional targets,
            `optional`.
    """
    figure, axes = new_figure(6.4, 3.2)
    looks = variant_looks(variants)
    for variant, rows in curves.items():
        color, marker = looks[variant]
        rows = sorted(rows, key=lambda row: row["alpha"])
        for optional in sorted({row.get("optional", False) for row in rows}):
            of_line = [row for row in rows if row.get("optional", False) == optional]
            alphas, kl = [r["alpha"] for r in of_line], [r["kl"] for r in of_line]
            label = f"{variant}, {OPTIONAL}" if optional else variant
            line = f"{marker}--" if optional else f"{marker}-"
            axes.plot(alphas, kl, line, color=color, label=label)
        lowest = min(rows, key=lambda row: row["kl"])
        axes.plot(lowest["alpha"], lowest["kl"], "o", color=color, markersize=11, fillstyle="none")
    axes.set(xlabel="α", ylabel="KL [nats / token]", title=wrapped_title(title))
    kls = [row["kl"] for rows in curves.values() for row in rows]
    if min(kls) > 0 and max(kls) > WIDE * min(kls):
        axes.set_yscale("log")
    else:
        axes.set_ylim(0, 1.08 * max(kls))
    axes.legend(frameon=False)
    return figure


@in_house_style
def sqnr_by_variant(
    curves: dict[str, dict[str, dict[str, float]]], *, variants: list[str], title: str
) -> Figure:
    """Output SQNR of every Linear, one panel per variant: with and without smoothing.

    Args:
        curves: by variant, then by preparation, then by Linear, in dB.
    """
    looks, size = variant_looks(variants), (6.4, 0.9 + 1.6 * len(curves))
    figure, panels = plt.subplots(
        len(curves), figsize=size, sharex=True, sharey=True, squeeze=False, layout="constrained"
    )
    plt.close(figure)
    for axes, (variant, ways) in zip(panels[:, 0], curves.items(), strict=True):
        *before, (_, values) = ways.items()
        for _, plain in before:
            axes.plot(list(plain.values()), "_", color="#999999", markersize=5)
        color, marker = looks[variant]
        axes.plot(list(values.values()), marker, color=color, markersize=3)
        annotate_lowest(axes, list(values), list(values.values()))
        note = " (grey: the same without smoothing)" if before else ""
        axes.set_title(variant + note, fontsize=9, color=looks[variant][0])
        axes.set_ylabel("SQNR [dB]")
        axes.margins(y=0.15)
    panels[-1, 0].set_xlabel("Linear, in layer order")
    figure.suptitle(wrapped_title(title, 76), x=0.01, ha="left", fontsize=11)
    return figure


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
