"""Graded differences of all models side by side, with their margins."""

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from helpers.report.figures import QUIET, in_house_style, wrapped_title
from helpers.report.figures_comparison import variant_looks

AXES = {
    "probability": "difference to the baseline [points]",
    "nats a token": "difference to the baseline [0.01 nats a token]",
}


@in_house_style
def graded_plot(
    rows: list[dict],
    *,
    models: list[str],
    variants: list[str],
    margins: dict[str, float],
    title: str,
) -> Figure:
    """Every set and the pooled answer as intervals: a column a model, a row of panels a unit.

    Args:
        rows: model, variant, dataset, unit, delta, low, high, `kind` of the verdict, and
            `filled` for declared and pooled comparisons.
        variants: all that the study compares, in its order: their colours and markers.
        margins: by unit, shaded.
    """
    units = [unit for unit in AXES if any(row["unit"] == unit for row in rows)]
    sets = {
        unit: list(dict.fromkeys(row["dataset"] for row in rows if row["unit"] == unit))
        for unit in units
    }
    shown = [v for v in variants if any(row["variant"] == v for row in rows)]
    step = 0.75 / len(shown)
    lines = sum(len(names) for names in sets.values()) * len(shown)
    figure, panels = plt.subplots(
        len(units), len(models), figsize=(4.1 * len(models), 1.6 + 0.7 * len(units) + 0.2 * lines),
        sharex="row", sharey="row", squeeze=False, layout="constrained",
        height_ratios=[len(sets[unit]) for unit in units],
    )  # fmt: skip
    plt.close(figure)
    looks = variant_looks(variants)
    for unit, across in zip(units, panels, strict=True):
        for model, axes in zip(models, across, strict=True):
            margin = 100 * margins[unit]
            axes.axvspan(-margin, margin, color=QUIET, alpha=0.22, linewidth=0)
            axes.axvline(0, color="black", linewidth=0.8)
            for row in rows:
                if (row["unit"], row["model"]) == (unit, model):
                    place = sets[unit].index(row["dataset"])
                    place += step * (shown.index(row["variant"]) - (len(shown) - 1) / 2)
                    _draw_interval(axes, row, place, looks[row["variant"]])
            axes.set_yticks(range(len(sets[unit])), sets[unit])
            axes.set_ylim(len(sets[unit]) - 0.45, -0.55)
            axes.set_xlabel(AXES[unit], fontsize=8)
            axes.set_title(model, fontsize=10)
    for name in shown:
        color, marker = looks[name]
        panels[0, 0].plot([], [], marker, color=color, label=name)
    meaning = "filled: declared or pooled, hollow: exploratory, pale: uninformative, ×: invalid"
    figure.suptitle(wrapped_title(title), x=0.01, ha="left", fontsize=11)
    figure.legend(
        loc="outside lower left", ncols=min(4, len(shown)), fontsize=8, title_fontsize=8,
        title=f"{meaning}; shaded: margin", alignment="left",
    )  # fmt: skip
    return figure


def _draw_interval(axes, row: dict, place: float, look: tuple[str, str]) -> None:
    color, marker = look
    marker = "x" if row["kind"] == "invalid" else marker
    opacity = 0.35 if row["kind"] in ("invalid", "uninformative") else 1.0
    low, high, delta = (100 * row[key] for key in ("low", "high", "delta"))
    axes.hlines(place, low, high, color=color, linewidth=1.6, alpha=opacity)
    face = color if row["filled"] else "white"
    axes.plot(delta, place, marker, color=color, markerfacecolor=face, alpha=opacity)
