"""Variants side by side in figures: differences with intervals, KL, α, errors by layer.

Variants keep their colour and marker from figure to figure of a study.
"""

import matplotlib.pyplot as plt
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from helpers.report.figures import QUIET, annotate_lowest, in_house_style, new_figure, wrapped_title

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


def _row_heights(groups: list[str], variants: list[str]) -> dict[tuple[str, str], float]:
    """The height at which each variant of each group is drawn."""
    step = 0.75 / max(1, len(variants))
    return {
        (group, variant): i + step * (j - (len(variants) - 1) / 2)
        for i, group in enumerate(groups)
        for j, variant in enumerate(variants)
    }


def _legend_below(figure: Figure, axes, variants: list[str]) -> None:
    for name, (color, marker) in variant_looks(variants).items():
        axes.plot([], [], marker, color=color, label=name)
    figure.legend(loc="outside lower left", ncols=min(4, len(variants)), fontsize=9)


@in_house_style
def forest_plot(rows: list[dict], *, variants: list[str], margin: float, title: str) -> Figure:
    """Differences with their intervals in points, grouped by evaluation set.

    Args:
        rows: dataset, variant, delta, low, high as fractions; `kind` of the verdict, and
            `filled` for a declared comparison.
        margin: the equivalence margin, shaded.
    """
    datasets = list(dict.fromkeys(row["dataset"] for row in rows))
    looks, places = variant_looks(variants), _row_heights(datasets, variants)
    figure, axes = new_figure(8, 1.7 + 0.22 * len(rows) + 0.1 * len(datasets))
    axes.axvspan(-100 * margin, 100 * margin, color=QUIET, alpha=0.22, linewidth=0)
    axes.axvline(0, color="black", linewidth=0.8)
    for row in rows:
        color, marker = looks[row["variant"]]
        marker = "x" if row["kind"] == "invalid" else marker
        opacity = 0.35 if row["kind"] in ("invalid", "uninformative") else 1.0
        place = places[row["dataset"], row["variant"]]
        low, high, delta = (100 * row[key] for key in ("low", "high", "delta"))
        axes.hlines(place, low, high, color=color, linewidth=1.6, alpha=opacity)
        face = color if row["filled"] else "white"
        axes.plot(delta, place, marker, color=color, markerfacecolor=face, alpha=opacity)
    axes.set_yticks(range(len(datasets)), datasets)
    axes.set_ylim(len(datasets) - 0.45, -0.55)
    meaning = "filled: declared, hollow: exploratory, pale: uninformative, ×: invalid"
    label = f"difference to the baseline [points] ({meaning}; shaded: margin)"
    axes.set_xlabel(label, fontsize=9)
    axes.set_title(wrapped_title(title))
    _legend_below(figure, axes, variants)
    return figure


@in_house_style
def kl_plot(rows: list[dict], *, variants: list[str], floor: float | None, title: str) -> Figure:
    """KL to the float model by model and variant, log scale, with intervals.

    Args:
        rows: model, variant, kl, low, high in nats per token; low and high may be None.
        floor: the KL of the noise floor, drawn as a line; None without one.
    """
    models = list(dict.fromkeys(row["model"] for row in rows))
    looks, places = variant_looks(variants), _row_heights(models, variants)
    figure, axes = new_figure(8, 1.5 + 0.25 * len(rows))
    for row in rows:
        color, marker = looks[row["variant"]]
        place = places[row["model"], row["variant"]]
        if row["low"] is not None:
            axes.hlines(place, row["low"], row["high"], color=color, linewidth=1.6)
        axes.plot(row["kl"], place, marker, color=color)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    values = [row["kl"] for row in rows]
    if floor:
        axes.axvline(floor, color="black", linestyle=":", linewidth=1)
        axes.annotate("noise floor", (floor, 0.02), xycoords=("data", "axes fraction"), fontsize=8)
        values.append(floor)
    axes.set_xlim(min(values) / 2, max(values) * 2)
    axes.set_yticks(range(len(models)), models)
    axes.set_ylim(len(models) - 0.45, -0.55)
    axes.set_xlabel("KL from the float model [nats / token], log scale")
    axes.set_title(wrapped_title(title))
    _legend_below(figure, axes, variants)
    return figure


@in_house_style
def kl_by_alpha(curves: dict[str, list[dict]], *, variants: list[str], title: str) -> Figure:
    """KL from the float model against α, one line per variant, its lowest point marked.

    Args:
        curves: variant to rows of `alpha` and `kl` (nats per token).
    """
    figure, axes = new_figure(6.4, 3.2)
    looks = variant_looks(variants)
    for variant, rows in curves.items():
        color, marker = looks[variant]
        rows = sorted(rows, key=lambda row: row["alpha"])
        alphas, kl = [r["alpha"] for r in rows], [r["kl"] for r in rows]
        axes.plot(alphas, kl, f"{marker}-", color=color, label=variant)
        lowest = min(rows, key=lambda row: row["kl"])
        axes.plot(lowest["alpha"], lowest["kl"], "o", color=color, markersize=11, fillstyle="none")
    axes.set(xlabel="α", ylabel="KL [nats / token]", title=wrapped_title(title))
    axes.set_ylim(0, 1.08 * max(row["kl"] for rows in curves.values() for row in rows))
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
    looks, size = variant_looks(variants), (8, 0.9 + 1.7 * len(curves))
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
    figure.suptitle(wrapped_title(title), x=0.01, ha="left", fontsize=11)
    return figure
