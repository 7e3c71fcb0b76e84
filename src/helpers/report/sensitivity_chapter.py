"""Where the loss lies: what leaving Linears float would save, and KL against α.

Measured inside the quantization, on the calibration items that judge, and so apart from
every number that a verdict rests on. Every row is one draw of rounding (NOTES.md, 2026-11-23);
what a draw moves is read off the rows themselves, and nothing smaller is called a cause.
"""

from IPython.display import Markdown
from matplotlib.figure import Figure

from helpers.report import figures_comparison
from helpers.report.markdown import MISSING, Rows, code, listed, markdown_table, number
from helpers.report.results import Results, VariantResults

AS_QUANTIZED = "nothing"


def loss_chapter(results: Results) -> list[Markdown | Figure]:
    """For every model: a sentence and a table, and a curve for each variant with a grid of α."""
    parts: list[Markdown | Figure] = []
    if chance_rise := largest_chance_rise(results):
        parts.append(Markdown(chance_note(chance_rise)))
    for model in results.models:
        rows = left_float_rows(results, model)
        if not rows:
            continue
        sentences = " ".join(loss_carrier_sentences(results, model))
        text = f"### Where the loss of `{model}` lies\n\n{sentences}"
        parts.append(Markdown(f"{text}\n\n{markdown_table(rows)}\n"))
        if curves := alpha_curves(results, model):
            title = alpha_figure_title(curves, model)
            parts.append(
                figures_comparison.kl_by_alpha(curves, variants=results.compared, title=title)
            )
    return parts


def _recorded_sensitivity(variant: VariantResults) -> dict:
    return (variant.quantization or {}).get("results", {}).get("losses") or {}


def _rows_by_left_float(results: Results, model: str) -> dict[str, dict[str, dict]]:
    """Variant → label of the Linears left in float → its row."""
    measured = {
        e.variant: _recorded_sensitivity(e).get("left_float")
        for e in results.compared_variants_of(model)
    }
    return {v: {row["float"]: row for row in rows} for v, rows in measured.items() if rows}


def left_float_rows(results: Results, model: str) -> Rows:
    """KL from the float model by the Linears left in float, one column per variant."""
    rows_by_variant = _rows_by_left_float(results, model)
    labels = dict.fromkeys(label for rows in rows_by_variant.values() for label in rows)
    return [
        {
            "left in float": _short_label(label),
            **{
                code(v): number(r[label]["kl"]) if label in r else MISSING
                for v, r in rows_by_variant.items()
            },
        }
        for label in labels
    ]


def largest_chance_rise(results: Results) -> float | None:
    """Largest relative rise of the KL with Linears left in float; None if not measured.

    A float Linear adds no error, so a rise is chance: every change redraws the rounding.
    """
    rises = [
        row["kl"] / rows[AS_QUANTIZED]["kl"] - 1
        for model in results.models
        for rows in _rows_by_left_float(results, model).values()
        if (rows[AS_QUANTIZED]["kl"] or 0) > 0
        for row in rows.values()
        if row["kl"] is not None
    ]
    return max(rises, default=None)


def chance_note(chance: float) -> str:
    """How to read the rows below, given the size of chance."""
    return (
        "A Linear left in float adds no error, but every change redraws the rounding of all other "
        "Linears. A row above the first is therefore chance; here it is up to "
        f"{100 * chance:.0f} % above. A decrease of at most that size cannot be distinguished from "
        "chance.\n"
    )


def _short_label(label: str) -> str:
    return label.replace("model.layers.", "").replace("model.decoder.layers.", "")


def loss_carrier_sentences(results: Results, model: str) -> list[str]:
    """One sentence per variant: the kind of Linear that carries most of its loss."""
    sentences, chance_rise = [], largest_chance_rise(results) or 0.0
    for variant, rows in _rows_by_left_float(results, model).items():
        quantized_kl = rows[AS_QUANTIZED]["kl"]
        if quantized_kl is None:
            sentences.append(f"As quantized, `{variant}` gives non-finite probabilities.")
            continue
        finite = {label: row["kl"] for label, row in rows.items() if row["kl"] is not None}
        best = min(finite, key=finite.__getitem__)  # "nothing" where nothing is saved
        share = 100 * (1 - finite[best] / quantized_kl) if quantized_kl > 0 else 0.0
        if share <= 100 * chance_rise:
            sentences.append(
                f"No single kind of Linear carries the loss of `{variant}` beyond chance."
            )
            continue
        sentences.append(
            f"Leaving {_short_label(best)} in float would reduce the KL of `{variant}` "
            f"from {number(quantized_kl)} to {number(finite[best])} nats per token "
            f"(by {share:.0f} %)."
        )
    return sentences


def alpha_curves(results: Results, model: str) -> dict[str, list[dict]]:
    """Variant → the rows of its α grid with a finite KL."""
    curves = {
        e.variant: [
            row
            for row in _recorded_sensitivity(e).get("alpha", {}).get("curve") or []
            if row["kl"] is not None
        ]
        for e in results.compared_variants_of(model)
    }
    return {variant: curve for variant, curve in curves.items() if curve}


def alpha_figure_title(curves: dict[str, list[dict]], model: str) -> str:
    """Title of the α figure: the α with the lowest KL of each grid."""
    best = {v: min(curve, key=lambda row: row["kl"])["alpha"] for v, curve in curves.items()}
    return f"{model}: lowest KL at " + listed([f"α = {a:g} ({v})" for v, a in best.items()])
