"""The chapter on graded scores: tables, figure, bullets of the summary, numbers for programs.

Both models stand side by side. A study without graded scores has no such chapter, and none of the
blocks `graded`, `pooled` and `finetuning_cost` of summary.json. There, differences are fractions
0-1 or nats a token, as `unit` says.
"""

from collections.abc import Iterator

import matplotlib.pyplot as plt
from IPython.display import Markdown
from matplotlib.figure import Figure

from helpers.report.executive import headline_variants, variant_label
from helpers.report.figures import QUIET, in_house_style, variant_looks, wrapped_title
from helpers.report.markdown import (
    MISSING,
    Markup,
    Rows,
    code,
    count,
    dataset_name,
    listed,
    markdown_table,
    percent_plain,
    percent_span,
    points,
    signed,
    span,
)
from helpers.report.results import Results
from helpers.statistics.graded_study import (
    INSIDE_MARGIN,
    FineTuningCost,
    GradedStudy,
    GradedVerdict,
    PooledVerdict,
)
from helpers.study.schema import Comparison


def graded_blocks(graded: GradedStudy) -> dict:
    """The three blocks; empty without graded scores."""
    if not graded.comparisons:
        return {}
    abilities = [
        dict(zip(("model", "dataset", "variant"), at, strict=True))
        | {"able": ability.able, "mean": ability.mean, "unit": ability.unit}
        | {"uninformative_because": graded.blind[at]}
        for at, ability in graded.abilities.items()
    ]
    comparisons = [c.model_dump() | verdict_row(v) for c, v in graded.comparisons.items()]
    return {
        "graded": {"abilities": abilities, "comparisons": comparisons},
        "pooled": [_pooled_row(at, pooled) for at, pooled in graded.pooled.items()],
        "finetuning_cost": [_cost_row(cost) for cost in graded.finetuning],
    }


def verdict_row(verdict: GradedVerdict) -> dict:
    """One verdict with its numbers."""
    row = {
        "verdict": verdict.kind,
        "reason": verdict.reason,
        "primary": verdict.declared,
        "margin": verdict.margin,
        "holm_p": verdict.holm_p,
    }
    if (comparison := verdict.comparison) is None:
        return row
    return row | {
        "unit": comparison.unit,
        "n": comparison.n,
        "clusters": comparison.clusters,
        "delta": comparison.delta,
        "low": comparison.interval.low,
        "high": comparison.interval.high,
        "equivalence_low": comparison.equivalence.low,
        "equivalence_high": comparison.equivalence.high,
        "p": None if verdict.kind == "invalid" else comparison.p,
        "smallest_detectable_difference": comparison.detectable,
        "identical_scores": comparison.identical,
    }


def _pooled_row(at: tuple[str, str], pooled: PooledVerdict) -> dict:
    row = {"model": at[0], "variant": at[1], "sets": list(pooled.sets)}
    row |= verdict_row(pooled.verdict) | {"recovery": None}
    if recovered := pooled.recovery:
        low, high = recovered.interval.low, recovered.interval.high
        row["recovery"] = {"value": recovered.value, "low": low, "high": high}
    return row


def _cost_row(cost: FineTuningCost) -> dict:
    return {
        "start": cost.start,
        "finetuned": cost.finetuned,
        "variant": cost.variant,
        "sets": {name: verdict_row(verdict) for name, verdict in cost.sets.items()},
        "pooled_sets": list(cost.pooled_sets),
        "pooled": verdict_row(cost.pooled) if cost.pooled else None,
        "kl": verdict_row(cost.kl) if cost.kl else None,
    }


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


UNITS = {"probability": "points", "nats a token": "0.01 nats"}
COST_WORDS = {"worse": "**higher cost**", "better": "**lower cost**"}


def chapter(results: Results) -> list[Markdown | Figure]:
    """How to read it, every set, the pooled answer, the cost of fine-tuning; empty without any."""
    if not results.graded.comparisons:
        return []
    parts = [
        "## Graded scores",
        reading_paragraph(results),
        markdown_table(comparison_table(results)),
    ]
    if pooled := pooled_table(results):
        about = (
            "**Pooled.** Every informative set with the same weight. Recovery is the score above"
        )
        parts += [f"{about} chance as a share of the float model's.", markdown_table(pooled)]
    shown: list[Markdown | Figure] = [_markdown(parts), *_figure(results)]
    if costs := cost_table(results):
        about = (
            "Quantization's effect on the fine-tuned model minus its effect on the start model. "
        )
        about += "Scores below zero, and KL above zero, mean that fine-tuning raises the cost."
        parts = ["### Does fine-tuning raise the cost?", about, markdown_table(costs)]
        shown.append(_markdown(parts))
    return shown


def _markdown(parts: list[str]) -> Markdown:
    return Markdown("\n\n".join(parts) + "\n")


def reading_paragraph(results: Results) -> str:
    """How the chapter's numbers are made and judged."""
    margins, rules = results.study.statistics.graded_margins, results.rules
    return (
        "Option sets: the right option's probability, in points. Written answers: the right "
        "answer's log-probability, in hundredths of a nat a token. Cells give variant minus "
        f"baseline with the {percent_plain(rules.confidence)} interval. Verdicts on declared "
        "comparisons are adjusted by Holm as a family of their own. All others are exploratory, a "
        "family a variant. "
        f"Margins: ±{100 * margins.probability:g} points, ±{100 * margins.nats:g} hundredths "
        "of a nat. A set is uninformative for a model if it shows no ability there, or if rounding "
        "alone (the noise floor) moves its score by more than the margin."
    )


def _shown(results: Results) -> list[str]:
    return [v for v in results.compared if v in headline_variants(results)]


def _places(results: Results) -> Iterator[tuple[str, str, str]]:
    """(model, baseline, variant) of each row: all shown variants, and every declared one."""
    for model in results.models:
        rows = [(model, results.study.baseline, v) for v in _shown(results)]
        declared = [
            (c.model, c.baseline, c.variant)
            for c, v in results.graded.comparisons.items()
            if v.declared and c.model == model
        ]
        yield from dict.fromkeys([*rows, *declared])


def _graded_sets(results: Results) -> dict[str, str]:
    """Unit of each set that has graded scores."""
    units = {name: a.unit for (_, name, _), a in results.graded.abilities.items()}
    return {name: units[name] for name in results.study.evaluation.datasets if name in units}


def set_column(name: str, unit: str) -> str:
    """`ARC [points]`."""
    return f"{dataset_name(name)} [{UNITS[unit]}]"


def comparison_table(results: Results) -> Rows:
    """Every variant of every model against its baseline, one column a set."""
    rows = []
    for model, baseline, variant in _places(results):
        against = "" if baseline == results.study.baseline else f" vs `{baseline}`"
        label = Markup(f"{variant_label(results, variant)}{against}")
        row = {"graded scores": code(model), "variant": label}
        for name, unit in _graded_sets(results).items():
            c = Comparison(model=model, dataset=name, baseline=baseline, variant=variant)
            row[set_column(name, unit)] = graded_cell(results.graded.comparisons.get(c))
        rows.append(row)
    return rows


def _hundredths(value: float) -> str:
    """KL in hundredths of a nat, with two decimals: `−0.13`."""
    return signed(100 * value, 2)


def graded_cell(
    verdict: GradedVerdict | None, words: dict[str, str] | None = None, show=points
) -> Markup:
    """`−5.6 [−10.9, −0.3] **worse**`."""
    if verdict is None:
        return Markup(MISSING)
    words = words or {"worse": "**worse**", "better": "**better**"}
    word = words.get(verdict.kind, verdict.kind)
    if verdict.comparison is None:
        return Markup(word)
    if verdict.reason == INSIDE_MARGIN:
        word += " (inside the margin)"
    comparison = verdict.comparison
    return Markup(f"{show(comparison.delta)} {span(comparison.interval, show)} {word}")


def pooled_table(results: Results) -> Rows:
    """One answer a model and variant: difference, verdict and recovery."""
    rows = []
    for (model, variant), pooled in results.graded.pooled.items():
        if variant not in _shown(results):
            continue
        recovered = pooled.recovery
        rows.append(
            {
                "pooled": code(model),
                "variant": variant_label(results, variant),
                "informative sets": ", ".join(map(dataset_name, pooled.sets)),
                "difference [points]": graded_cell(pooled.verdict),
                "recovery": percent_span(recovered.value, recovered.interval)
                if recovered
                else MISSING,
            }
        )
    return rows


def cost_table(results: Results) -> Rows:
    """The difference of differences of every variant, set by set, pooled, and of the KL."""
    rows = []
    for cost in results.graded.finetuning:
        if cost.variant not in _shown(results):
            continue
        label = variant_label(results, cost.variant)
        row = {"fine-tuned − start": code(cost.finetuned), "variant": label}
        for name, unit in _graded_sets(results).items():
            row[set_column(name, unit)] = graded_cell(cost.sets.get(name), COST_WORDS)
        row["pooled [points]"] = graded_cell(cost.pooled, COST_WORDS)
        row["KL [0.01 nats]"] = graded_cell(cost.kl, COST_WORDS, _hundredths)
        rows.append(row)
    return rows


def _figure(results: Results) -> list[Figure]:
    margins = results.study.statistics.graded_margins
    rows = [
        _figure_row(c.model, c.variant, dataset_name(c.dataset), v)
        for c, v in results.graded.comparisons.items()
        if c.baseline == results.study.baseline and c.variant in _shown(results) and v.comparison
    ]
    rows += [
        _figure_row(model, variant, "pooled", pooled.verdict)
        for (model, variant), pooled in results.graded.pooled.items()
        if variant in _shown(results) and pooled.verdict.comparison
    ]
    if not rows:
        return []
    order = [*map(dataset_name, _graded_sets(results)), "pooled"]
    rows.sort(key=lambda row: order.index(row["dataset"]))
    return [
        graded_plot(
            rows, models=results.models, variants=results.compared,
            margins={"probability": margins.probability, "nats a token": margins.nats},
            title=_figure_title(results),
        )
    ]  # fmt: skip


def _figure_row(model: str, variant: str, name: str, verdict: GradedVerdict) -> dict:
    comparison = verdict.comparison
    row = {"model": model, "variant": variant, "dataset": name, "unit": comparison.unit}
    row |= {
        "delta": comparison.delta,
        "low": comparison.interval.low,
        "high": comparison.interval.high,
    }
    return row | {"kind": verdict.kind, "filled": verdict.declared or name == "pooled"}


def _figure_title(results: Results) -> str:
    variants = results.studied_variants
    worse = [p for v in variants for p in _worse_places(results, v)]
    what = listed([f"{v}" for v in variants])
    if worse:
        return f"Graded scores: {what} found worse in {count(len(worse), 'comparison')}"
    return f"Graded scores: no loss of {what} found"


def _judged(results: Results, variant: str) -> Iterator[tuple[Comparison, GradedVerdict]]:
    """The variant's comparisons with the baseline that say something."""
    for c, verdict in results.graded.comparisons.items():
        if (c.variant, c.baseline) == (variant, results.study.baseline):
            yield c, verdict


def _worse_places(results: Results, variant: str) -> list[str]:
    return [
        f"{dataset_name(c.dataset)} of `{c.model}` ({_amount(v)})"
        for c, v in _judged(results, variant)
        if v.kind == "worse"
    ]


def _amount(verdict: GradedVerdict) -> str:
    comparison = verdict.comparison
    unit = "points" if comparison.unit == "probability" else "hundredths of a nat a token"
    return f"{points(comparison.delta)} {unit}"


def summary_bullets(results: Results) -> list[str]:
    """What graded scores show for the studied variants, and on fine-tuning."""
    if not results.graded.comparisons or not results.declared_verdicts():
        return []
    bullets = [_score_bullet(results, variant) for variant in results.studied_variants]
    costs = [
        cost for v in results.studied_variants for cost in results.graded.finetuning
        if cost.variant == v
    ]  # fmt: skip
    return [*bullets, *(_cost_bullet(cost) for cost in costs)]


def _score_bullet(results: Results, variant: str) -> str:
    """Where a variant is found worse, and the pooled loss that is excluded."""
    worse = _worse_places(results, variant)
    kinds = {
        verdict.kind
        for c, verdict in results.graded.comparisons.items()
        if (c.variant, c.baseline) == (variant, results.study.baseline)
    }
    if worse:
        result = f"worse on {', '.join(worse)}"
    elif kinds <= {"invalid", "uninformative"}:
        result = "no conclusion is possible, every comparison is invalid or uninformative"
    else:
        result = "no loss detected"
    text = f"**Graded scores** of `{variant}`: {result}."
    pooled = {
        model: p.verdict.comparison
        for (model, v), p in results.graded.pooled.items()
        if v == variant and p.verdict.comparison
    }
    if not pooled:
        return f"{text} No set can be pooled."
    (first, estimate), *others = pooled.items()
    limits = [f"{_excluded_points(estimate)} points of probability (`{first}`)"]
    limits += [f"{_excluded_points(c)} (`{model}`)" for model, c in others]
    return f"{text} Pooled over the informative sets, losses above {listed(limits)} are excluded."


def _excluded_points(comparison) -> str:
    return f"{100 * max(0.0, -comparison.interval.low):.1f}"


def _cost_bullet(cost: FineTuningCost) -> str:
    """Whether quantization costs the fine-tuned model more, by scores and by tokens."""
    parts = [_cost_clause(cost.pooled, "score pooled", "points of probability")]
    parts.append(_cost_clause(cost.kl, "KL", "hundredths of a nat a token", _hundredths))
    if not any(parts):
        parts = ["nothing can be said"]
    return (
        f"**Fine-tuning** and the cost of `{cost.variant}` (`{cost.finetuned}` minus "
        f"`{cost.start}`): {'; '.join(filter(None, parts))}."
    )


COST_CLAUSES = {
    "worse": "higher cost",
    "better": "lower cost",
    "equivalent": "the same cost within the margin",
    "inconclusive": "no difference detected",
}


def _cost_clause(verdict: GradedVerdict | None, what: str, unit: str, show=points) -> str:
    if verdict is None or verdict.comparison is None:
        return ""
    comparison = verdict.comparison
    amount = f"{show(comparison.delta)} {span(comparison.interval, show)}"
    return f"by {what}, {COST_CLAUSES[verdict.kind]} ({amount} {unit})"
