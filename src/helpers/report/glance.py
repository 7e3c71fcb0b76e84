"""The report at a glance: the answer, a card a model, the cost of fine-tuning, and one figure.

The models stand side by side. A card is a column of a table "at a glance", which the HTML page
shows as cards (`helpers.report.pages`). Its verdict is that of the graded scores, pooled over
the informative sets; a study without graded scores has only right and wrong. Speed and bytes of a
model trained here are those of its start model, whose shapes it has.
"""

from collections.abc import Iterator

import matplotlib.pyplot as plt
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from helpers.report import graded_chapter, narrative
from helpers.report.cost_chapter import ratio_text
from helpers.report.estimates import Cost, VariantResults
from helpers.report.figures import QUIET, Picture, in_house_style, variant_looks, wrapped_title
from helpers.report.markdown import (
    MISSING,
    Markup,
    Rows,
    code,
    dataset_name,
    listed,
    markdown_table,
    number,
    percent,
    percent_span,
    points,
)
from helpers.report.pages import AT_A_GLANCE
from helpers.report.results import Results
from helpers.statistics.graded_study import INSIDE_MARGIN, GradedVerdict
from helpers.study.schema import FineTunedModel


def answer_paragraphs(results: Results) -> list[str]:
    """What the study found, before any table: failed controls, graded scores, right or wrong."""
    scores = [
        graded_chapter.score_sentence(results, variant)
        for variant in results.studied_variants
        if _graded(results) and results.study.statistics.primary
    ]
    alarms = narrative.bullets(narrative.failed_control_bullets(results))
    heading = "By right or wrong" if scores else "Answer"
    return [alarms, *scores, narrative.answer_sentences(results, heading)]


def card_tables(results: Results) -> list[str]:
    """For each studied variant, the table whose columns are the models' cards."""
    return [markdown_table(_cards(results, variant)) for variant in results.studied_variants]


def _cards(results: Results, variant: str) -> Rows:
    """Rows are quantities, columns are models; a quantity that no model has is left out."""
    cards = {model: _card(results, results.evaluations[model, variant]) for model in results.models}
    names = dict.fromkeys(name for card in cards.values() for name in card)
    title = Markup(f"{AT_A_GLANCE}: {code(variant)}")
    return [
        {title: name} | {code(model): card.get(name, MISSING) for model, card in cards.items()}
        for name in names
    ]


def _card(results: Results, e: VariantResults) -> dict[str, str]:
    """One card: its quantities by name."""
    card: dict[str, str] = {}
    declared = _declared_counts(results, e)
    if (pooled := results.graded.pooled.get(e.key)) is None:
        card["verdicts on right or wrong"] = declared or MISSING
    else:
        card["verdict by graded scores"] = Markup(verdict_words(pooled.verdict))
        recovered = pooled.recovery
        card["recovery"] = (
            percent_span(recovered.value, recovered.interval) if recovered else MISSING
        )
        comparison = pooled.verdict.comparison
        card["largest loss not excluded"] = (
            f"{graded_chapter.excluded_points(comparison)} points" if comparison else MISSING
        )
        if declared:
            card["verdicts on right or wrong"] = declared
    if (ratio := narrative.kl_over_noise_floor(results, e)) is not None:
        card["KL, against rounding alone"] = f"{number(ratio, 2)}×"
    if speeds := _speeds(results, e):
        card["reads / writes, against float32"] = speeds
    if e.quantization:
        sizes = e.quantization["results"]
        share = sum(sizes["bytes_after"].values()) / sum(sizes["bytes_before"].values())
        card["bytes, against the float model"] = percent(share)
    failed = len(e.failed_gates)
    checks = f"{len(e.gates) - failed} passed, "
    card["checks"] = Markup(checks + (f"**{failed} failed**" if failed else "none failed"))
    return card


def verdict_words(verdict: GradedVerdict) -> str:
    """The pooled verdict of a card."""
    margin = f"±{100 * verdict.margin:g} points"
    if verdict.reason == INSIDE_MARGIN:
        return f"{verdict.kind}, but inside {margin}"
    return f"equivalent within {margin}" if verdict.kind == "equivalent" else verdict.kind


def _declared_counts(results: Results, e: VariantResults) -> str:
    """The declared verdicts against the study's baseline: `1 inconclusive, 3 uninformative`."""
    kinds = [
        verdict.kind
        for c, verdict in results.declared_verdicts()
        if (c.model, c.variant, c.baseline) == (*e.key, results.study.baseline)
    ]
    words = [word for word in narrative.VERDICT_WORDS if word in kinds]
    return ", ".join(f"{kinds.count(word)} {word}" for word in words)


def _speeds(results: Results, e: VariantResults) -> str:
    """Reading and writing speed as multiples of float32's, medians; empty if not measured."""
    source = results.study.models[e.model]
    timed = source.finetune.start if isinstance(source, FineTunedModel) else e.model
    cost: Cost | None = results.costs.get(e.model) or results.costs.get(timed)
    way = cost.multiplying_as(e.variant, results.study.variants) if cost else None
    if cost is None or way is None:
        return ""
    ratios = (cost.ratio(way, quantity, cost.reference) for quantity in ("prefill", "decode"))
    return " / ".join(ratio_text(ratio.value) for ratio in ratios)


def made_model_sentences(results: Results) -> list[str]:
    """Whether fine-tuning raises and rotation lowers the cost: by graded scores, or by KL alone."""
    if sentences := graded_chapter.cost_sentences(results):
        return sentences
    return [
        question + narrative.kl_comparison_sentence(results, model, variant)
        for question, models in (
            ("**Does fine-tuning raise the cost?** ", results.training),
            ("**Does rotation lower the cost?** ", results.rotations),
        )
        for model in models
        for variant in results.studied_variants
    ]


POOLED = "pooled"
BEYOND = 1.25  # of the studied variants' largest limit: where an axis ends


def figure_caption(results: Results) -> str:
    """How to read the figure."""
    baseline = code(results.study.baseline)
    what = "of the right answer's probability" if _graded(results) else "in right answers"
    floor = f" Dark: rounding alone ({code(results.noise_floor)})." if results.noise_floor else ""
    return f"Change {what} against {baseline}, and below it the KL. Shaded: the margin.{floor}"


def picture(results: Results) -> list[Picture]:
    """Every set and the pooled answer of all models, with the KL; empty if nothing is compared."""
    statistics = results.study.statistics
    margin = statistics.graded_margins.probability if _graded(results) else statistics.margin
    return _picture(
        results, interval_rows(results), kl_rows(results), figure_title(results), margin
    )


def _graded(results: Results) -> bool:
    return bool(results.graded.comparisons)


def right_or_wrong_picture(results: Results) -> list[Picture]:
    """Every set's difference of right and wrong, all models; empty if nothing is compared."""
    title = narrative.declared_verdicts_title(results)
    return _picture(results, right_or_wrong_rows(results), [], title, results.rules.margin)


def _picture(
    results: Results, rows: list[dict], kls: list[dict], title: str, margin: float
) -> list[Picture]:
    floor = results.noise_floor
    drawn = [row for row in rows if row["variant"] != floor]
    if not drawn:
        return []
    options = {
        "rows": drawn,
        "floors": [row for row in rows if row["variant"] == floor],
        "kl_rows": kls,
        "models": results.models,
        "variants": results.compared,
        "focus": _focus(results),
        "margin": margin,
        "title": title,
    }
    figure, narrow = (interval_plot(**options, stacked=stacked) for stacked in (False, True))
    return [Picture(figure, alternative_text(results, rows, kls, title), narrow)]


def _focus(results: Results) -> list[str]:
    """The variants whose intervals have to be in view: the studied, and the same unsmoothed."""
    twins = [results.unsmoothed_twin(v) for v in results.studied_variants]
    return [*results.studied_variants, *filter(None, twins)]


def right_or_wrong_rows(results: Results) -> list[dict]:
    """Every set's difference of right and wrong against the baseline."""
    shown, names = narrative.headline_variants(results), list(results.study.evaluation.datasets)
    rows = [
        _row(c.model, c.variant, c.dataset, v, v.paired, v.primary)
        for c, v in results.verdicts.items()
        if c.baseline == results.study.baseline and c.variant in shown
    ]
    return sorted(rows, key=lambda row: names.index(row["dataset"]))


def interval_rows(results: Results) -> list[dict]:
    """Every set's difference of graded scores and the pooled one; right and wrong without them."""
    if not _graded(results):
        return right_or_wrong_rows(results)
    shown = narrative.headline_variants(results)
    rows = [
        _row(c.model, c.variant, c.dataset, v, v.comparison, v.declared)
        for c, v in results.graded.comparisons.items()
        if c.baseline == results.study.baseline and c.variant in shown and v.comparison
    ]
    rows += [
        _row(model, variant, POOLED, p.verdict, p.verdict.comparison, True)
        for (model, variant), p in results.graded.pooled.items()
        if variant in shown and p.verdict.comparison
    ]
    names = [POOLED, *results.study.evaluation.datasets]
    return sorted(rows, key=lambda row: names.index(row["dataset"]))


def _row(model, variant, dataset, verdict, comparison, filled) -> dict:
    row = {"model": model, "variant": variant, "dataset": dataset}
    low, high = comparison.interval.low, comparison.interval.high
    row |= {"delta": comparison.delta, "low": low, "high": high}
    return row | {"kind": verdict.kind, "filled": filled}


def kl_rows(results: Results) -> list[dict]:
    """KL of every variant of every model, in nats a token."""
    rows = []
    for model in results.models:
        for e in results.compared_variants_of(model):
            kl = results.token_estimates[e.key]["kl"]
            if not kl.value or e.variant not in narrative.headline_variants(results):
                continue
            low, high = (kl.interval.low, kl.interval.high) if kl.interval else (None, None)
            row = {"model": model, "variant": e.variant, "kl": kl.value, "low": low, "high": high}
            rows.append(row | {"floor": e.variant == results.noise_floor})
    return rows


def figure_title(results: Results) -> str:
    """The title: where a studied variant is found worse, if anywhere."""
    if _graded(results):
        return graded_chapter.figure_title(results)
    return narrative.declared_verdicts_title(results)


def alternative_text(results: Results, rows: list[dict], kls: list[dict], title: str) -> str:
    """The figure in words: the differences of the studied variants and their twins, and the KL."""
    parts = [title]
    for model in results.models:
        for variant in _focus(results):
            mine = [r for r in rows if (r["model"], r["variant"]) == (model, variant)]
            pooled = [r for r in mine if r["dataset"] == POOLED]
            texts = [
                f"{dataset_name(r['dataset'])} {points(r['delta'])} points "
                f"({points(r['low'])} to {points(r['high'])})"
                for r in pooled or mine
            ]
            if texts:
                parts.append(f"{model}, {variant}: {listed(texts)}")
    texts = [f"{row['variant']} {number(row['kl'])} ({row['model']})" for row in kls]
    if texts:
        parts.append(f"KL in nats a token: {', '.join(texts)}")
    return f"{'. '.join(parts)}."


@in_house_style
def interval_plot(
    rows: list[dict],
    floors: list[dict],
    kl_rows: list[dict],
    *,
    models: list[str],
    variants: list[str],
    focus: list[str],
    margin: float,
    title: str,
    stacked: bool,
) -> Figure:
    """Intervals against margin and noise floor, KL under them: a column a model, or all stacked.

    Args:
        rows: model, variant, dataset, delta, low, high (fractions), `kind` of the verdict, and
            `filled` for declared and pooled comparisons.
        floors: the same of the noise floor.
        kl_rows: model, variant, kl, low, high in nats a token, `floor` for the noise floor.
        variants: all that the study compares, in its order: their colours and markers.
        focus: the variants that the axes show whole; another is marked at the edge.
        margin: a fraction, shaded.
    """
    shown = [v for v in variants if any(row["variant"] == v for row in rows)]
    names = list(dict.fromkeys(row["dataset"] for row in rows))
    heights = [0.45 + len(names) * (0.16 * len(shown) + 0.12)]
    if kl_rows:
        heights.append(0.5 + 0.18 * len(shown))
    columns, repeats = (1, len(models)) if stacked else (len(models), 1)
    size = (4.2 * columns, repeats * (sum(heights) + 0.45 * len(heights)) + 1.1)
    figure, panels = plt.subplots(
        len(heights) * repeats, columns, figsize=size, squeeze=False, layout="constrained",
        height_ratios=heights * repeats,
    )  # fmt: skip
    plt.close(figure)
    for place, model in enumerate(models):
        own = panels[place * len(heights) :, 0] if stacked else panels[:, place]
        mine, beneath = ([r for r in side if r["model"] == model] for side in (rows, floors))
        limit = _axis_limit(rows, focus, margin)
        _interval_panel(own[0], mine, beneath, names, shown, variants, margin, limit)
        own[0].set_xlabel("difference to the baseline [points]", fontsize=8)
        own[0].set_title(model, fontsize=10, fontweight="bold")
        if kl_rows:
            _kl_panel(own[1], [r for r in kl_rows if r["model"] == model], shown, variants)
            values = [value for r in kl_rows for value in (r["kl"], r["low"], r["high"]) if value]
            own[1].set_xlim(min(values) / 1.5, max(values) * 1.5)
        for axes in own[: len(heights)] if place and not stacked else ():
            axes.set_yticklabels([])
    for name in shown:
        color, marker = variant_looks(variants)[name]
        panels[0, 0].plot([], [], marker, color=color, label=name)
    title = wrapped_title(title, 46 if stacked else 92)
    figure.suptitle(title, x=0.01, ha="left", fontsize=11)
    meaning = (
        "filled: declared or pooled; hollow: exploratory; pale: uninformative;",
        "×: invalid; arrow: beyond the axis",
    )
    figure.legend(
        loc="outside lower left", ncols=1 if stacked else min(4, len(shown)), fontsize=8,
        title_fontsize=8, title=("\n" if stacked else " ").join(meaning), alignment="left",
    )  # fmt: skip
    return figure


def _axis_limit(rows: list[dict], focus: list[str], margin: float) -> float:
    """The end of an axis: what the studied variants need, and the margin."""
    ends = [abs(row[end]) for row in rows if row["variant"] in focus for end in ("low", "high")]
    return BEYOND * max([margin, *ends])


def _interval_panel(axes, rows, floors, names, shown, variants, margin, limit) -> None:
    """Differences of one model, in points."""
    step, looks = 0.72 / len(shown), variant_looks(variants)
    axes.axvspan(-100 * margin, 100 * margin, color=QUIET, alpha=0.25, linewidth=0)
    for row in floors:
        place = names.index(row["dataset"]) if row["dataset"] in names else None
        if place is not None:
            left, right = 100 * row["low"], 100 * row["high"]
            axes.barh(place, right - left, left=left, height=0.8, color="#55606b", alpha=0.4)
    axes.axvline(0, color="black", linewidth=0.8)
    for row in rows:
        place = names.index(row["dataset"]) + step * (
            shown.index(row["variant"]) - (len(shown) - 1) / 2
        )
        _draw_interval(axes, row, place, looks[row["variant"]], 100 * limit)
    axes.set_xlim(-100 * limit, 100 * limit)
    axes.set_yticks(range(len(names)), [dataset_name(name) for name in names], fontsize=9)
    for label in axes.get_yticklabels():
        label.set_fontweight("bold" if label.get_text() == POOLED else "normal")
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.tick_params(axis="x", labelsize=8)


def _draw_interval(axes, row: dict, place: float, look: tuple[str, str], limit: float) -> None:
    color, marker = look
    opacity = 0.35 if row["kind"] in ("invalid", "uninformative") else 1.0
    low, high, delta = (100 * row[key] for key in ("low", "high", "delta"))
    if abs(delta) > limit:
        arrow, edge = (">", 0.97) if delta > 0 else ("<", -0.97)
        axes.plot(edge * limit, place, arrow, color=color, alpha=opacity)
        side = "right" if delta > 0 else "left"
        axes.annotate(
            f"{points(row['delta'])}", (edge * limit, place), fontsize=7, va="center", ha=side,
            xytext=(-7 if delta > 0 else 7, 0), textcoords="offset points",
        )  # fmt: skip
        return
    width = 2.6 if row["dataset"] == POOLED else 1.5
    axes.hlines(place, low, high, color=color, linewidth=width, alpha=opacity)
    marker = "x" if row["kind"] == "invalid" else marker
    face = color if row["filled"] else "white"
    axes.plot(delta, place, marker, color=color, markerfacecolor=face, alpha=opacity, markersize=5)


def _kl_panel(axes, rows: list[dict], shown: list[str], variants: list[str]) -> None:
    """KL of one model, log scale, with the noise floor as a line."""
    looks = variant_looks(variants)
    for row in rows:
        if row["floor"]:
            axes.axvline(row["kl"], color="#55606b", linestyle=":", linewidth=2)
            continue
        place, (color, marker) = shown.index(row["variant"]), looks[row["variant"]]
        if row["low"] is not None:
            axes.hlines(place, row["low"], row["high"], color=color, linewidth=1.5)
        axes.plot(row["kl"], place, marker, color=color, markersize=5)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1,)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_yticks([(len(shown) - 1) / 2], ["KL"], fontsize=9)
    axes.set_ylim(len(shown) - 0.5, -0.5)
    axes.tick_params(axis="x", labelsize=8)
    axes.set_xlabel("KL [nats a token], log scale; dotted: rounding alone", fontsize=8)


def sections(results: Results) -> Iterator[str | Picture]:
    """What stands before the findings: paragraphs and tables, then the figure."""
    parts = [
        *answer_paragraphs(results),
        *card_tables(results),
        *made_model_sentences(results),
    ]
    pictures = picture(results)
    if pictures:
        parts.append(figure_caption(results))
    yield "\n\n".join(filter(None, parts))
    yield from pictures
