"""The chapter on recipes of which several checkpoints were made, and its numbers for programs.

A study without repeated variants has no such chapter, and no block `draws` in summary.json. There,
differences are fractions 0-1 or nats a token, as `unit` says.
"""

from IPython.display import Markdown

from helpers.report.executive import variant_label
from helpers.report.graded_chapter import verdict_row
from helpers.report.markdown import (
    MISSING,
    Markup,
    Rows,
    code,
    dataset_name,
    listed,
    markdown_table,
    percent_plain,
    signed,
    span,
)
from helpers.report.results import Results
from helpers.statistics.draws import POOLED, Recipe, RecipeFigure


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


def chapter(results: Results) -> list[Markdown]:
    """How to read it, a sentence a recipe, every figure; empty if every variant was made once."""
    if not results.recipes:
        return []
    parts = [
        "## Draws of a recipe",
        reading_paragraph(results),
        "\n".join(f"- {recipe_sentence(recipe)}" for recipe in results.recipes),
        made_once_sentence(results),
        markdown_table(draws_table(results)),
    ]
    return [Markdown("\n\n".join(filter(None, parts)) + "\n")]


def summary_bullets(results: Results) -> list[str]:
    """The recipes of the studied variants, and which variants stand for one checkpoint only."""
    if not results.recipes or not results.declared_verdicts():
        return []
    studied = [r for r in results.recipes if r.variant in results.studied_variants]
    return [*map(recipe_sentence, studied), *filter(None, [made_once_sentence(results)])]


def reading_paragraph(results: Results) -> str:
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
        f"{words} {_show(figure, figure.estimate.mean)} "
        f"{span(figure.interval, lambda x, f=figure: _show(f, x))} {UNITS[figure.unit]}, "
        f"{_amount(figure, figure.estimate.between_draws)} between draws"
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
            "recipe of": _owner(recipe),
            "variant": variant_label(results, recipe.variant),
            "figure": _name(figure),
            "unit": "points" if figure.unit == "probability" else "0.01 nats",
            **_cells(figure),
        }
        for recipe in results.recipes
        for figure in recipe.figures
    ]


def _owner(recipe: Recipe) -> Markup:
    """`finetuned`, or `finetuned − base` where the start's differences are taken off."""
    less = f" − {code(recipe.start)}" if recipe.start else ""
    return Markup(f"{code(recipe.model)}{less}")


def _name(figure: RecipeFigure) -> str:
    names = {POOLED: "pooled", "shared_text": "shared text"}
    place = names.get(figure.place) or dataset_name(figure.place)
    return f"{place}, {figure.measure}"


def _cells(figure: RecipeFigure) -> dict:
    verdict = figure.verdict.kind if figure.verdict else "invalid" if figure.reason else MISSING
    word = Markup(f"**{verdict}**") if verdict in ("worse", "better") else verdict
    if figure.estimate is None:
        columns = ("all draws", "first draw alone", "lowest and highest draw", "between draws")
        return dict.fromkeys(columns, MISSING) | {"verdict": word}
    estimate, first = figure.estimate, figure.first
    show = lambda x: _show(figure, x)  # noqa: E731
    own = first.interval(figure.interval.confidence)
    whole = span(figure.interval, show) if not estimate.degenerate else "(no spread)"
    alone = span(own, show) if not first.degenerate else "(no spread)"
    lowest, highest = min(estimate.draw_means), max(estimate.draw_means)
    return {
        "all draws": Markup(f"{show(estimate.mean)} {whole}"),
        "first draw alone": Markup(f"{show(first.mean)} {alone}"),
        "lowest and highest draw": f"{show(lowest)}, {show(highest)}",
        "between draws": _amount(figure, estimate.between_draws),
        "verdict": word,
    }


def _show(figure: RecipeFigure, value: float) -> str:
    """A difference in points or hundredths of a nat."""
    return signed(100 * value, 1 if figure.unit == "probability" else 2)


def _amount(figure: RecipeFigure, value: float) -> str:
    """A spread in points or hundredths of a nat."""
    return f"{100 * value:.{1 if figure.unit == 'probability' else 2}f}"
