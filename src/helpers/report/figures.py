"""One model, or one variant of it, in figures: losses, activations, errors by layer.

The house style of every figure is here too. Axes name their units, and a figure's title is
the claim it shows. Returns figures; shows nothing.
"""

import textwrap
from collections.abc import Callable
from functools import wraps

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

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
    figure, axes = new_figure(8, 3.4)
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
    figure = plt.figure(figsize=(7, 4.6))
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


def wrapped_title(title: str) -> str:
    """A title in lines that fit a figure."""
    return "\n".join(textwrap.wrap(title, 92))


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
