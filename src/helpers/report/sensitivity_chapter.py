"""Where the loss lies: what leaving Linears float would save, and KL against α.

Measured inside the quantization, on the calibration items that judge, and so apart from
every number that a verdict rests on. Every row is one draw of rounding (NOTES.md, 2026-11-23);
what a draw moves is read off the rows themselves, and nothing smaller is called a cause.
"""

from IPython.display import Markdown
from matplotlib.figure import Figure

from helpers.report import figures_comparison
from helpers.report.markdown import MISSING, Rows, code, listed, markdown_table, number
from helpers.report.results import Evaluated, Results

AS_QUANTIZED = "nothing"


def loss_chapter(results: Results) -> list[Markdown | Figure]:
    """For every model: a sentence and a table, and a curve for each variant with a grid of α."""
    shown: list[Markdown | Figure] = []
    if chance := by_chance(results):
        shown.append(Markdown(how_to_read(chance)))
    for model in results.models:
        rows = left_float(results, model)
        if not rows:
            continue
        told = f"### Where the loss of `{model}` lies\n\n{' '.join(carriers(results, model))}"
        shown.append(Markdown(f"{told}\n\n{markdown_table(rows)}\n"))
        if curves := alpha_curves(results, model):
            title = alpha_claim(curves, model)
            shown.append(
                figures_comparison.kl_by_alpha(curves, variants=results.compared, title=title)
            )
    return shown


def _losses(found: Evaluated) -> dict:
    return (found.quantization or {}).get("results", {}).get("losses") or {}


def _probed(results: Results, model: str) -> dict[str, dict[str, dict]]:
    """Variant to what was left float to its divergence."""
    found = {e.variant: _losses(e).get("left_float") for e in results.compared_in(model)}
    return {v: {row["float"]: row for row in rows} for v, rows in found.items() if rows}


def left_float(results: Results, model: str) -> Rows:
    """KL from the float model by what is left float, a column a variant."""
    probed = _probed(results, model)
    labels = dict.fromkeys(label for rows in probed.values() for label in rows)
    return [
        {
            "left float": _in_words(label),
            **{
                code(v): number(r[label]["kl"]) if label in r else MISSING
                for v, r in probed.items()
            },
        }
        for label in labels
    ]


def by_chance(results: Results) -> float | None:
    """By how much a KL rises at most, of itself, when Linears are left float; None if not probed.

    A float Linear adds no error, so that a rise is chance: every change draws rounding anew.
    """
    rises = [
        row["kl"] / rows[AS_QUANTIZED]["kl"] - 1
        for model in results.models
        for rows in _probed(results, model).values()
        if (rows[AS_QUANTIZED]["kl"] or 0) > 0
        for row in rows.values()
        if row["kl"] is not None
    ]
    return max(rises, default=None)


def how_to_read(chance: float) -> str:
    """What the rows below can show, given what chance moves."""
    return (
        "A Linear left float adds no error, but every change draws the rounding of all others "
        "anew: where a row is above the first, that is chance, and it comes to as much as "
        f"{100 * chance:.0f} % here. What lowers the KL by no more than that is not told from "
        "chance.\n"
    )


def _in_words(label: str) -> str:
    return label.replace("model.layers.", "").replace("model.decoder.layers.", "")


def carriers(results: Results, model: str) -> list[str]:
    """One sentence a variant: which kind of Linear carries most of its loss, beyond chance."""
    said, chance = [], by_chance(results) or 0.0
    for variant, rows in _probed(results, model).items():
        whole = rows[AS_QUANTIZED]["kl"]
        if whole is None:
            said.append(f"As quantized, `{variant}` gives probabilities that are not finite.")
            continue
        finite = {label: row["kl"] for label, row in rows.items() if row["kl"] is not None}
        best = min(finite, key=finite.__getitem__)  # "nothing" where nothing is saved
        share = 100 * (1 - finite[best] / whole) if whole > 0 else 0.0
        if share <= 100 * chance:
            said.append(f"No kind of Linear is seen to carry the loss of `{variant}` by itself.")
            continue
        said.append(
            f"Leaving {_in_words(best)} float would take `{variant}` from a KL of "
            f"{number(whole)} to {number(finite[best])} nats a token ({share:.0f} % of it)."
        )
    return said


def alpha_curves(results: Results, model: str) -> dict[str, list[dict]]:
    """Variant to its KL at every α of its grid that has a finite one."""
    found = {
        e.variant: [
            row for row in _losses(e).get("alpha", {}).get("curve") or [] if row["kl"] is not None
        ]
        for e in results.compared_in(model)
    }
    return {variant: curve for variant, curve in found.items() if curve}


def alpha_claim(curves: dict[str, list[dict]], model: str) -> str:
    """Which α each grid chose."""
    best = {v: min(curve, key=lambda row: row["kl"])["alpha"] for v, curve in curves.items()}
    return f"{model}: least KL at " + listed([f"α = {a:g} ({v})" for v, a in best.items()])
