"""Where the loss lies: what leaving Linears float would save, and KL against α.

Measured inside the quantization, on the calibration items that judge, and so apart from
every number that a verdict rests on.
"""

from IPython.display import Markdown
from matplotlib.figure import Figure

from helpers.report import figures
from helpers.report.formats import MISSING, Rows, code, listed, markdown_table, number
from helpers.report.results import Evaluated, Results

AS_QUANTIZED = "nothing"


def loss_chapter(results: Results) -> list[Markdown | Figure]:
    """For every model: a sentence and a table, and a curve for each variant with a grid of α."""
    shown: list[Markdown | Figure] = []
    for model in results.models:
        rows = left_float(results, model)
        if not rows:
            continue
        told = f"### Where the loss of `{model}` lies\n\n{' '.join(carriers(results, model))}"
        shown.append(Markdown(f"{told}\n\n{markdown_table(rows)}\n"))
        if curves := alpha_curves(results, model):
            shown.append(figures.kl_by_alpha(curves, title=alpha_claim(curves, model)))
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


def _in_words(label: str) -> str:
    return label.replace("model.layers.", "").replace("model.decoder.layers.", "")


def carriers(results: Results, model: str) -> list[str]:
    """One sentence a variant: which kind of Linear carries most of its loss."""
    said = []
    for variant, rows in _probed(results, model).items():
        whole = rows[AS_QUANTIZED]["kl"]
        kinds = {label: row for label, row in rows.items() if label != AS_QUANTIZED}
        best = min(kinds, key=lambda label: kinds[label]["kl"])
        if not whole > 0 or kinds[best]["kl"] >= whole:
            said.append(f"No single kind of Linear carries the loss of `{variant}`.")
            continue
        share = 100 * (1 - kinds[best]["kl"] / whole)
        said.append(
            f"Leaving {_in_words(best)} float would take `{variant}` from a KL of "
            f"{number(whole)} to {number(kinds[best]['kl'])} nats a token ({share:.0f} % of it)."
        )
    return said


def alpha_curves(results: Results, model: str) -> dict[str, list[dict]]:
    """Variant to its KL at every α of its grid."""
    found = {
        e.variant: _losses(e).get("alpha", {}).get("curve") for e in results.compared_in(model)
    }
    return {variant: curve for variant, curve in found.items() if curve}


def alpha_claim(curves: dict[str, list[dict]], model: str) -> str:
    """Which α each grid chose."""
    best = {v: min(curve, key=lambda row: row["kl"])["alpha"] for v, curve in curves.items()}
    return f"{model}: least KL at " + listed([f"α = {a:g} ({v})" for v, a in best.items()])
