"""The chapters on graded scores, of one study and of recipes over several checkpoints each.

Graded scores: tables, sentences of the summary, numbers for programs. The models stand in
neighbouring rows, and beside each graded difference that of right and wrong. A study without
graded scores says so, and has none of the blocks `graded`, `pooled`, `finetuning_cost` and
`rotation_cost` of summary.json.

Recipes of which several checkpoints were made: a study without repeated variants has no such
chapter, and no block `draws` in summary.json. Nor has one without named calibrations, or without
rulers beside an int8 variant, a chapter on these.

There, differences are fractions 0-1, and of KL nats a token, as `unit` says.
"""

from collections.abc import Iterator

from IPython.display import Markdown

from helpers.report.markdown import (
    MISSING,
    Markup,
    Rows,
    code,
    count,
    dataset_name,
    folded,
    listed,
    markdown_table,
    percent_plain,
    percent_span,
    points,
    signed,
    span,
    with_span,
)
from helpers.report.narrative import headline_variants, variant_label
from helpers.report.results import Results
from helpers.statistics.graded import EQUIVALENCE_LEVEL
from helpers.statistics.graded_study import (
    INSIDE_MARGIN,
    POOLED,
    GradedStudy,
    GradedVerdict,
    MadeModelCost,
    PooledVerdict,
    Recipe,
    RecipeFigure,
)
from helpers.study.schema import Comparison


def graded_blocks(graded: GradedStudy) -> dict:
    """The blocks; empty without graded scores, and `rotation_cost` only of rotated models."""
    if not graded.comparisons:
        return {}
    abilities = [
        dict(zip(("model", "dataset", "variant"), at, strict=True))
        | {"able": ability.able, "mean": ability.mean}
        | {"uninformative_because": graded.blind[at]}
        for at, ability in graded.abilities.items()
    ]
    comparisons = [c.model_dump() | verdict_row(v) for c, v in graded.comparisons.items()]
    rotation = [_cost_row(cost, "rotated") for cost in graded.rotation]
    return {
        "graded": {"abilities": abilities, "comparisons": comparisons},
        "pooled": [_pooled_row(at, pooled) for at, pooled in graded.pooled.items()],
        "finetuning_cost": [_cost_row(cost, "finetuned") for cost in graded.finetuning],
    } | ({"rotation_cost": rotation} if rotation else {})


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


def _cost_row(cost: MadeModelCost, made: str) -> dict:
    return {
        "start": cost.start,
        made: cost.made,
        "variant": cost.variant,
        "sets": {name: verdict_row(verdict) for name, verdict in cost.sets.items()},
        "pooled_sets": list(cost.pooled_sets),
        "pooled": verdict_row(cost.pooled) if cost.pooled else None,
        "kl": verdict_row(cost.kl) if cost.kl else None,
    }


COST_WORDS = {"worse": "**higher cost**", "better": "**lower cost**"}


HEADING = "## 4. Graded scores"


def chapter(results: Results) -> list[Markdown]:
    """How to read it, every set, the pooled answer, the cost of fine-tuning and of rotation."""
    if not results.graded.comparisons:
        return [_markdown([HEADING, "The answers of this study hold no log-probabilities."])]
    parts = [HEADING, reading_paragraph(results)]
    if declared := comparison_table(results, declared=True):
        parts.append(markdown_table(declared))
    if others := comparison_table(results, declared=False):
        parts.append(folded("Graded scores that nobody declared", markdown_table(others)))
    if pooled := pooled_table(results):
        about = (
            "**Pooled.** Every informative set with the same weight. Recovery is the score above"
        )
        parts += [f"{about} chance as a share of the float model's.", markdown_table(pooled)]
    if costs := cost_table(results, results.graded.finetuning, "fine-tuned"):
        about = (
            "**Fine-tuned minus start.** Quantization's effect on the fine-tuned model minus its "
            "effect on the start model. Scores below zero, and KL above zero, mean that "
            "fine-tuning raises the cost."
        )
        parts += [about, markdown_table(costs)]
    if costs := cost_table(results, results.graded.rotation, "rotated"):
        about = (
            "**Rotated minus start.** Quantization's effect on the rotated model minus its effect "
            "on the start model. Scores above zero, and KL below zero, mean that rotation lowers "
            "the cost."
        )
        parts += [about, markdown_table(costs)]
    return [_markdown(parts)]


def _markdown(parts: list[str]) -> Markdown:
    return Markdown("\n\n".join(parts) + "\n")


def reading_paragraph(results: Results) -> str:
    """How the chapter's numbers are made and judged."""
    margins, rules = results.study.statistics.graded_margins, results.rules
    level = 1 - 2 * EQUIVALENCE_LEVEL * rules.alpha
    return (
        "Option sets: the right option's probability among the options. Written answers: the right "
        "answer's probability, a geometric mean over its tokens, less that of another item's right "
        "answer after the same prompt. All in points. Δ is variant minus baseline with the "
        f"{percent_plain(rules.confidence)} interval; beside it stands the same difference of "
        "right and wrong (accuracy, or exact match). Verdicts on comparisons declared to be judged "
        "by graded scores are adjusted by Holm over all of these. All others are exploratory, a "
        f"family a variant. Equivalent: the {percent_plain(level)} interval lies inside the "
        "margin. "
        f"Margins: ±{100 * margins.probability:g} points, ±{100 * margins.nats:g} hundredths "
        "of a nat a token (KL). A set is uninformative for a model if it shows no ability there, "
        "or if rounding alone (the noise floor) moves its score by more than the margin."
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


def _graded_sets(results: Results) -> list[str]:
    """The sets that have graded scores."""
    names = {name for _, name, _ in results.graded.abilities}
    return [name for name in results.study.evaluation.datasets if name in names]


def set_column(name: str) -> str:
    """`ARC [points]`."""
    return f"{dataset_name(name)} [points]"


def comparison_table(results: Results, *, declared: bool) -> Rows:
    """Variants against their baseline, set by set: a row a model, and right and wrong beside.

    Args:
        declared: the declared comparisons, or all others.
    """
    rows, judged = [], results.study.statistics.declared("graded")
    for name in _graded_sets(results):
        places = sorted(_places(results), key=lambda at: _variant_order(results, *at[1:]))
        for model, baseline, variant in places:
            c = Comparison(model=model, dataset=name, baseline=baseline, variant=variant)
            if (c in judged) != declared:
                continue
            against = "" if baseline == results.study.baseline else f" vs `{baseline}`"
            row = {"graded score": set_column(name)}
            row["variant"] = Markup(f"{variant_label(results, variant)}{against}")
            row |= {"model": code(model)} | _graded_cells(results.graded.comparisons.get(c))
            verdict = results.verdicts.get(c)
            row[RIGHT_OR_WRONG] = (
                with_span(verdict.paired.delta, verdict.paired.interval, points)
                if verdict
                else MISSING
            )
            rows.append(row)
    return rows


RIGHT_OR_WRONG = "Δ right or wrong [points]"


def _variant_order(results: Results, baseline: str, variant: str) -> tuple[int, int]:
    return results.variants.index(variant), results.variants.index(baseline)


def _graded_cells(verdict: GradedVerdict | None) -> dict[str, str]:
    """Difference and verdict of one row."""
    if verdict is None:
        return {"Δ": MISSING, "verdict": MISSING}
    comparison = verdict.comparison
    delta = with_span(comparison.delta, comparison.interval, points) if comparison else MISSING
    return {"Δ": delta, "verdict": Markup(_verdict_word(verdict, WORDS))}


def _verdict_word(verdict: GradedVerdict, words: dict[str, str]) -> str:
    """`**worse**`, `equivalent`; of a difference inside the margin it is said."""
    word = words.get(verdict.kind, verdict.kind)
    return f"{word} (inside the margin)" if verdict.reason == INSIDE_MARGIN else word


WORDS = {"worse": "**worse**", "better": "**better**"}


def _hundredths(value: float) -> str:
    """KL in hundredths of a nat, with two decimals: `−0.13`."""
    return signed(100 * value, 2)


def graded_cell(
    verdict: GradedVerdict | None, words: dict[str, str] | None = None, show=points
) -> Markup:
    """`−5.6 [−10.9, −0.3] **worse**`."""
    if verdict is None:
        return Markup(MISSING)
    word = _verdict_word(verdict, words or WORDS)
    if verdict.comparison is None:
        return Markup(word)
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


def cost_table(results: Results, costs: tuple[MadeModelCost, ...], made: str) -> Rows:
    """The difference of differences of every variant, set by set, pooled, and of the KL.

    Args:
        made: how the models were made, in a word for the title.
    """
    rows = []
    for cost in costs:
        if cost.variant not in _shown(results):
            continue
        label = variant_label(results, cost.variant)
        row = {f"{made} − start": code(cost.made), "variant": label}
        for name in _graded_sets(results):
            row[set_column(name)] = graded_cell(cost.sets.get(name), COST_WORDS)
        row["pooled [points]"] = graded_cell(cost.pooled, COST_WORDS)
        row["KL [0.01 nats]"] = graded_cell(cost.kl, COST_WORDS, _hundredths)
        rows.append(row)
    return rows


def figure_title(results: Results) -> str:
    """The title of the figure at a glance: the variants found worse, if any comparison says so."""
    variants = results.studied_variants
    if worse := {v: places for v in variants if (places := _worse_places(results, v))}:
        places = count(sum(map(len, worse.values())), "comparison")
        return f"Graded scores: {listed(list(worse))} found worse in {places}"
    if pooled := {v: models for v in variants if (models := _worse_pooled(results, v))}:
        places = count(sum(map(len, pooled.values())), "comparison")
        return f"Graded scores: {listed(list(pooled))} found worse in {places} of pooled sets"
    if not (measured := [v for v in variants if _informative(results, v)]):
        return f"Graded scores: nothing can be said about {listed(variants)}"
    return f"Graded scores: no loss of {listed(measured)} found"


def _judged(results: Results, variant: str) -> Iterator[tuple[Comparison, GradedVerdict]]:
    """The variant's comparisons with the baseline that say something."""
    for c, verdict in results.graded.comparisons.items():
        if (c.variant, c.baseline) == (variant, results.study.baseline):
            yield c, verdict


def _informative(results: Results, variant: str) -> list[str]:
    """The verdicts of the variant's comparisons that could have shown a loss."""
    kinds = [verdict.kind for _, verdict in _judged(results, variant)]
    return [kind for kind in kinds if kind not in ("invalid", "uninformative")]


def _worse_places(results: Results, variant: str) -> list[str]:
    return [
        f"{dataset_name(c.dataset)} of `{c.model}` ({_amount(v)})"
        for c, v in _judged(results, variant)
        if v.kind == "worse"
    ]


def _worse_pooled(results: Results, variant: str) -> list[str]:
    """The models in which a variant is worse, pooled over the informative sets, and how much."""
    return [
        f"`{model}` ({_amount(pooled.verdict)})"
        for (model, v), pooled in results.graded.pooled.items()
        if v == variant and pooled.verdict.kind == "worse"
    ]


def _amount(verdict: GradedVerdict) -> str:
    return f"{points(verdict.comparison.delta)} points"


def score_sentence(results: Results, variant: str) -> str:
    """Where a variant is found worse, by set and pooled, and the pooled loss that is excluded."""
    baseline = code(results.study.baseline)
    score = "graded scores (the right answer's probability)"
    result = _score_result(results, variant)
    text = f"**Answer.** {code(variant)} against {baseline}, by {score}: {result}."
    pooled = {
        model: p.verdict.comparison
        for (model, v), p in results.graded.pooled.items()
        if v == variant and p.verdict.comparison
    }
    if not pooled:
        return f"{text} No set can be pooled."
    (first, estimate), *others = pooled.items()
    limits = [f"{excluded_points(estimate)} points of probability (`{first}`)"]
    limits += [f"{excluded_points(c)} (`{model}`)" for model, c in others]
    lower = _worse_pooled(results, variant)
    worse_pooled = f"it is worse on {listed(lower)}, and " if lower else ""
    excluded = f"{worse_pooled}losses above {listed(limits)} are excluded"
    return f"{text} Pooled over the informative sets, {excluded}."


def _score_result(results: Results, variant: str) -> str:
    """Over all sets and models: where it is worse, or how many comparisons could have shown it."""
    kinds = [verdict.kind for _, verdict in _judged(results, variant)]
    informative = _informative(results, variant)
    comparisons = f"{len(informative)} of {count(len(kinds), 'comparison')}"
    if worse := _worse_places(results, variant):
        return f"worse in {len(worse)} of {count(len(kinds), 'comparison')}: {', '.join(worse)}"
    if not informative:
        return "no conclusion is possible, every comparison is invalid or uninformative"
    if set(informative) == {"equivalent"}:
        margin = 100 * results.study.statistics.graded_margins.probability
        return f"equivalent within ±{margin:g} points in {comparisons}"
    return f"no loss detected in the {comparisons} that could show one"


def excluded_points(comparison) -> str:
    """The largest loss inside the interval, in points without a sign."""
    return f"{100 * max(0.0, -comparison.interval.low):.1f}"


def cost_sentences(results: Results) -> list[str]:
    """Whether fine-tuning raises the cost, and whether rotation lowers it.

    A sentence for each studied variant of each model that was made here.
    """
    if not results.graded.comparisons:
        return []
    questions = (
        ("**Does fine-tuning raise the cost?** ", results.graded.finetuning, RAISED),
        ("**Does rotation lower the cost?** ", results.graded.rotation, LOWERED),
    )
    return [
        question + _cost_sentence(cost, answers)
        for question, costs, answers in questions
        for variant in results.studied_variants
        for cost in costs
        if cost.variant == variant
    ]


# The verdict that answers yes, those that answer no, and what is said if neither does.
RAISED = ("worse", {"equivalent", "better"}, "No increase was detected")
LOWERED = ("better", {"equivalent", "worse"}, "No decrease was detected")
Answers = tuple[str, set[str], str]


def _cost_sentence(cost: MadeModelCost, answers: Answers) -> str:
    """The answer in a word, then by scores and by tokens."""
    judged = [verdict for verdict in (cost.pooled, cost.kl) if verdict and verdict.comparison]
    parts = [
        _cost_clause(cost.pooled, "score pooled", "points of probability"),
        _cost_clause(cost.kl, "KL", "hundredths of a nat a token", _hundredths),
    ]
    measures = "; ".join(filter(None, parts)) or "no measure is valid"
    answer = cost_answer({verdict.kind for verdict in judged}, answers)
    return f"{answer}. `{cost.variant}`, `{cost.made}` minus `{cost.start}`: {measures}."


def cost_answer(kinds: set[str], answers: Answers) -> str:
    """Yes or no, from the verdicts by score and by KL."""
    yes, no, undecided = answers
    if not kinds:
        return "Nothing can be said"
    if yes in kinds:
        return "Yes" if kinds == {yes} else "By one of two measures"
    return "No" if kinds <= no else undecided


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


def draws_block(recipes: tuple[Recipe, ...]) -> dict:
    """The block `draws` of summary.json; empty if every variant was made once."""
    if not recipes:
        return {}
    return {
        "draws": [
            {"model": r.model, "variant": r.variant, "start": r.start, "draws": r.draws}
            | {"figures": [_figure_row(figure) for figure in r.figures]}
            for r in recipes
        ]
    }


def _figure_row(figure: RecipeFigure) -> dict:
    row = {"dataset": figure.place, "measure": figure.measure, "unit": figure.unit}
    row["reason"] = figure.reason
    if figure.verdict:
        row |= verdict_row(figure.verdict)
    if (estimate := figure.estimate) is None:
        return row
    first = figure.first.interval(figure.interval.confidence)
    return row | {
        "delta": estimate.mean,
        "low": figure.interval.low,
        "high": figure.interval.high,
        "n": estimate.n,
        "clusters": estimate.clusters,
        "draw_deltas": list(estimate.draw_means),
        "between_draws": estimate.between_draws,
        "draws_error": estimate.draws_error,
        "items_error": estimate.items_error,
        "first_low": first.low,
        "first_high": first.high,
    }


def draws_chapter(results: Results) -> list[Markdown]:
    """How to read it, a sentence a recipe, every figure; empty if every variant was made once."""
    if not results.recipes:
        return []
    parts = [
        "## Draws of a recipe",
        draws_paragraph(results),
        "\n".join(f"- {recipe_sentence(recipe)}" for recipe in results.recipes),
        made_once_sentence(results),
        markdown_table(draws_table(results)),
    ]
    return [Markdown("\n\n".join(filter(None, parts)) + "\n")]


def recipe_bullets(results: Results) -> list[str]:
    """The recipes of the studied variants, and which variants stand for one checkpoint only.

    And what other calibration items change.
    """
    if not results.declared_verdicts():
        return []
    studied = [r for r in results.recipes if r.variant in results.studied_variants]
    once = [made_once_sentence(results)] if results.recipes else []
    return [*map(recipe_sentence, studied), *filter(None, once), *calibration_sentences(results)]


def draws_paragraph(results: Results) -> str:
    """How the chapter's numbers are made and judged."""
    return (
        "A checkpoint is one draw of its recipe. Every checkpoint here was calibrated on items of "
        "its own, passed the same checks, and answered the option sets and the shared text. The "
        f"{percent_plain(results.rules.confidence)} intervals of a recipe hold for items and "
        "checkpoints not seen; those of the first checkpoint hold for items not seen. The spread "
        "between draws is a standard deviation, without what the items' noise adds. Verdicts are "
        "exploratory, adjusted by Holm over the sets and models of a variant. Rows of a fine-tuned "
        "model minus its start say what fine-tuning adds to the cost. All other chapters are about "
        "the first checkpoint of every variant."
    )


UNITS = {"probability": "points", "nats a token": "hundredths of a nat a token"}


def recipe_sentence(recipe: Recipe) -> str:
    """The pooled score and the KL of a recipe, each with its interval and its two spreads."""
    clauses = [
        f"{words} {_shown_figure(figure, figure.estimate.mean)} "
        f"{span(figure.interval, lambda x, f=figure: _shown_figure(f, x))} {UNITS[figure.unit]}, "
        f"{_figure_amount(figure, figure.estimate.between_draws)} between draws"
        for words, figure in _headline_figures(recipe)
    ]
    figures = "; ".join(clauses) or "no figure is valid"
    less = f" minus `{recipe.start}`" if recipe.start else ""
    owner = f"`{recipe.variant}` of `{recipe.model}`{less}"
    return f"**Recipe** {owner}, {recipe.draws} draws: {figures}."


def _headline_figures(recipe: Recipe):
    for words, place, measure in (
        ("pooled score", POOLED, "graded score"),
        ("KL", "shared_text", "KL"),
    ):
        for figure in recipe.figures:
            if (figure.place, figure.measure) == (place, measure) and figure.estimate:
                yield words, figure


def made_once_sentence(results: Results) -> str:
    """Which checkpoints stand for themselves alone; empty if there are none."""
    variants = results.study.variants
    once = [
        v for v in results.compared if variants[v].needs_checkpoint and variants[v].repeats == 1
    ]
    if not once:
        return ""
    names = listed([f"`{name}`" for name in once])
    return f"Made once: {names}. What this report says of them holds for that one checkpoint."


def draws_table(results: Results) -> Rows:
    """Every figure of every recipe: over its draws, of the first one alone, and the spread."""
    return [
        {
            "recipe of": _recipe_owner(recipe),
            "variant": variant_label(results, recipe.variant),
            "figure": _figure_name(figure),
            "unit": "points" if figure.unit == "probability" else "0.01 nats",
            **_figure_cells(figure),
        }
        for recipe in results.recipes
        for figure in recipe.figures
    ]


def _recipe_owner(recipe: Recipe) -> Markup:
    """`finetuned`, or `finetuned − base` where the start's differences are taken off."""
    less = f" − {code(recipe.start)}" if recipe.start else ""
    return Markup(f"{code(recipe.model)}{less}")


def _figure_name(figure: RecipeFigure) -> str:
    names = {POOLED: "pooled", "shared_text": "shared text"}
    place = names.get(figure.place) or dataset_name(figure.place)
    return f"{place}, {figure.measure}"


def _figure_cells(figure: RecipeFigure) -> dict:
    verdict = figure.verdict.kind if figure.verdict else "invalid" if figure.reason else MISSING
    word = Markup(f"**{verdict}**") if verdict in ("worse", "better") else verdict
    if figure.estimate is None:
        columns = ("all draws", "first draw alone", "lowest and highest draw", "between draws")
        return dict.fromkeys(columns, MISSING) | {"verdict": word}
    estimate, first = figure.estimate, figure.first
    show = lambda x: _shown_figure(figure, x)  # noqa: E731
    own = first.interval(figure.interval.confidence)
    whole = span(figure.interval, show) if not estimate.degenerate else "(no spread)"
    alone = span(own, show) if not first.degenerate else "(no spread)"
    lowest, highest = min(estimate.draw_means), max(estimate.draw_means)
    return {
        "all draws": Markup(f"{show(estimate.mean)} {whole}"),
        "first draw alone": Markup(f"{show(first.mean)} {alone}"),
        "lowest and highest draw": f"{show(lowest)}, {show(highest)}",
        "between draws": _figure_amount(figure, estimate.between_draws),
        "verdict": word,
    }


def _shown_figure(figure: RecipeFigure, value: float) -> str:
    """A difference in points or hundredths of a nat."""
    return signed(100 * value, 1 if figure.unit == "probability" else 2)


def _figure_amount(figure: RecipeFigure, value: float) -> str:
    """A spread in points or hundredths of a nat."""
    return f"{100 * value:.{1 if figure.unit == 'probability' else 2}f}"


def calibrations_block(results: Results) -> dict:
    """The block `calibrations` of summary.json; empty if no variant names a calibration."""
    rows = [
        {
            "model": effect.model,
            "variant": effect.variant,
            "reference": effect.reference,
            "draws": effect.draws,
            "kl": effect.kl,
            "low": effect.low,
            "high": effect.high,
            "place": effect.place,
        }
        for effect in results.calibration_effects
    ]
    return {"calibrations": rows} if rows else {}


def calibrations_chapter(results: Results) -> list[Markdown]:
    """How to read it, a sentence a model, every variant; empty without named calibrations."""
    if not results.calibration_effects:
        return []
    parts = [
        "## Calibration items",
        calibrations_paragraph(results),
        "\n".join(f"- {sentence}" for sentence in calibration_sentences(results)),
        markdown_table(calibrations_table(results)),
    ]
    return [Markdown("\n\n".join(parts) + "\n")]


def calibrations_paragraph(results: Results) -> str:
    """What is compared, and when a difference is more than that of draws."""
    return (
        "Variants of one recipe that differ in their calibration items alone, by the KL on the "
        "shared text. Other items of the study's own calibration give another checkpoint, and "
        "with it another KL: from the spread of the draws, one more draw lies in the interval with "
        f"{percent_plain(results.rules.confidence)} confidence. A KL outside of it shows that the "
        "number or the kind of items matters. The intervals are exploratory, each for itself."
    )


def calibration_sentences(results: Results) -> list[str]:
    """By model and reference, which calibrations give a KL beyond that of another draw."""
    sentences = []
    at = dict.fromkeys((e.model, e.reference) for e in results.calibration_effects)
    for model, reference in at:
        effects = [
            e for e in results.calibration_effects if (e.model, e.reference) == (model, reference)
        ]
        clauses = []
        for place, words in (
            ("above", "higher KL than another draw"),
            ("below", "lower KL than another draw"),
            ("within", "no difference beyond the draws"),
            ("unknown", "no conclusion (fewer than three draws, or a failed check)"),
        ):
            names = [_calibrated(results, e.variant) for e in effects if e.place == place]
            clauses += [f"{words}: {listed(names)}"] if names else []
        sentences.append(f"**Calibration** of `{model}`, `{reference}`: {'; '.join(clauses)}.")
    return sentences


def _calibrated(results: Results, variant: str) -> str:
    settings = results.study.calibration_called(results.study.calibration_of(variant))
    return f"`{variant}` ({count(settings.items, 'item')} of {dataset_name(settings.adapter)})"


def calibrations_table(results: Results) -> Rows:
    """KL of every variant of a named calibration, and where another draw's would lie."""
    hundredths = lambda x: signed(100 * x, 2).removeprefix("+")  # noqa: E731
    rows = []
    for effect in results.calibration_effects:
        name = results.study.calibration_of(effect.variant)
        settings = results.study.calibration_called(name)
        another = MISSING
        if effect.low is not None and effect.high is not None:
            another = f"[{hundredths(effect.low)}, {hundredths(effect.high)}]"
        rows.append(
            {
                "calibration of": code(effect.model),
                "variant": variant_label(results, effect.variant),
                "items": str(settings.items),
                "of": dataset_name(settings.adapter),
                "KL [0.01 nats]": MISSING if effect.kl is None else hundredths(effect.kl),
                "another draw of": code(effect.reference),
                "would have": another,
                "so it lies": effect.place,
            }
        )
    return rows


def decompositions_block(results: Results) -> dict:
    """The block `decompositions` of summary.json; empty if no variant has both rulers."""
    rows = [
        {
            "model": one.model,
            "variant": one.variant,
            "rulers": [one.weights, one.activations],
            "measure": one.measure,
            "unit": one.unit,
            "sets": list(one.sets),
            "reason": one.reason,
            "parts": {
                name: {"draws": list(part.draws), "low": part.low, "high": part.high}
                for name, part in one.parts.items()
            },
        }
        for one in results.decompositions
    ]
    return {"decompositions": rows} if rows else {}


def decompositions_chapter(results: Results) -> list[Markdown]:
    """How to read it, and what either part changes; empty without rulers beside a variant."""
    if not results.decompositions:
        return []
    parts = [
        "## Weights or activations",
        decompositions_paragraph(results),
        markdown_table(decompositions_table(results)),
    ]
    return [Markdown("\n\n".join(parts) + "\n")]


def decompositions_paragraph(results: Results) -> str:
    """What is compared, and what the remainder is."""
    return (
        "What rounding the weights alone (W8A16) and the activations alone (A8) changes, both "
        "simulated, on the items and the text of the evaluation: graded scores in points against "
        f"`{results.study.baseline}`, pooled over the informative sets, and KL. What both change "
        "together beyond the sum of the two is not additive. Intervals are over items "
        f"({percent_plain(results.rules.confidence)}), of the first draw; where all three variants "
        "are repeated, the last column has every draw's remainder."
    )


def _points(value: float) -> str:
    return signed(100 * value, 1)


PART_COLUMNS = {
    "both": "both",
    "weights": "weights alone",
    "activations": "activations alone",
    "not_additive": "not additive",
}


def decompositions_table(results: Results) -> Rows:
    """A row a measure of every variant that has both rulers."""
    rows = []
    for one in results.decompositions:
        graded = one.measure == "graded score"
        cells = dict.fromkeys(PART_COLUMNS.values(), MISSING) | {"remainder of every draw": MISSING}
        if one.parts:
            show = _points if graded else _hundredths
            for name, column in PART_COLUMNS.items():
                part = one.parts[name]
                limits = f"{show(part.low)}, {show(part.high)}"
                cells[column] = f"{show(part.draws[0])} [{limits}]"
            remainders = one.parts["not_additive"].draws
            if len(remainders) > 1:
                cells["remainder of every draw"] = ", ".join(map(show, remainders))
        rows.append(
            {"parts of": code(one.model), "variant": variant_label(results, one.variant)}
            | {"measure": "graded scores [points]" if graded else "KL [0.01 nats a token]"}
            | cells
        )
    return rows
