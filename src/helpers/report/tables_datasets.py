"""One evaluation set, as tables: scores, how answers came about, and answers side by side."""

from helpers.report.estimates import Estimate
from helpers.report.executive_controls import EQUALITY_ROLES
from helpers.report.markdown import Markup, Rows, code, number, percent, percent_span, quoted
from helpers.report.results import Results
from helpers.report.results_data import VariantResults

LONGEST_TEXT = 110  # characters of a question or an answer
METRIC_NAMES = {
    "accuracy": "accuracy",
    "macro_f1": "macro-F1",
    "exact_match": "exact match",
    "f1": "F1",
    "has_answer_exact_match": "HasAns EM",
    "has_answer_f1": "HasAns F1",
    "no_answer_exact_match": "NoAns EM",
    "no_answer_f1": "NoAns F1",
    "median_absolute_difference": "median absolute difference",
    "median_absolute_difference_coverage": "items with a number",
    "format_success": "readable",
}
NOT_FRACTIONS = {"median_absolute_difference"}
NOT_IN_TABLE = {"no_answer_f1"}  # equals the exact match by definition


def score_table(results: Results, dataset: str) -> Rows:
    """The metrics of every variant of every model."""
    rows = []
    for variant in _all_variants(results):
        row = {"model": code(variant.model), "variant": code(variant.variant)}
        for name, estimate in results.dataset_estimates[*variant.key, dataset].items():
            if name not in NOT_IN_TABLE and name != "format_success":
                row[METRIC_NAMES[name]] = _metric_cell(name, estimate)
        rows.append(row)
    return rows


def _metric_cell(name: str, estimate: Estimate) -> str:
    if name in NOT_FRACTIONS:
        return number(estimate.value)
    return percent_span(estimate.value, estimate.interval)


def behavior_table(results: Results, dataset: str) -> Rows:
    """Counts of answered, abstained and unparsed, finish reasons, and output tokens."""
    rows = []
    for variant in _all_variants(results):
        m = variant.metrics[dataset]
        row = {"model": code(variant.model), "variant": code(variant.variant)}
        row |= {status: str(m[status]) for status in ("answered", "abstained", "unparsed")}
        row["readable"] = percent(m["format_success"])
        ends = ", ".join(f"{reason} {n}" for reason, n in m["finish_reasons"].items())
        row["finish reasons"] = ends
        row["output tokens"] = f"{m['output_tokens']:,}"
        rows.append(row)
    return rows


def sample_answer_table(results: Results, dataset: str, model: str, *, rows: int) -> Rows:
    """Answers of the variants to the same items, differing answers first."""
    by_variant = {e.variant: _by_id(e, dataset) for e in _side_by_side(results, model)}
    item_ids = [p["id"] for p in results.baseline_of(model).predictions[dataset]]
    order = sorted(item_ids, key=lambda key: _agreement([p[key] for p in by_variant.values()]))
    table = []
    for key in order[:rows]:
        golds = by_variant[results.study.baseline][key]["golds"]
        question = results.questions[dataset].get(key)
        row = {"item": quoted(question, limit=LONGEST_TEXT) if question else code(key)}
        row["gold answer"] = quoted("; ".join(golds), limit=60) if golds else "(none)"
        row |= {
            code(name): answer_cell(predictions[key]) for name, predictions in by_variant.items()
        }
        table.append(row)
    return table


def _by_id(variant: VariantResults, dataset: str) -> dict[str, dict]:
    return {p["id"]: p for p in variant.predictions[dataset]}


def _side_by_side(results: Results, model: str) -> list[VariantResults]:
    """The variants whose answers the table shows: all but those that only measure rounding."""
    skipped = (*EQUALITY_ROLES, "noise floor")
    return [e for e in results.variants_of(model) if results.role(e.variant) not in skipped]


def _agreement(predictions: list[dict]) -> int:
    """0 if scores differ, 1 if only answers differ, 2 if all are the same."""
    if len({p["score"] for p in predictions}) > 1:
        return 0
    return 1 if len({(p["status"], p["parsed"]) for p in predictions}) > 1 else 2


def answer_cell(prediction: dict) -> Markup:
    """The parsed answer with its mark; the raw text if it could not be parsed."""
    mark = "✓" if prediction["score"] else "✗"
    match prediction["status"]:
        case "abstained":
            return Markup(f"{mark} abstained")
        case "unparsed":
            return Markup(f"{mark} unparsed: {quoted(prediction['output'], limit=LONGEST_TEXT)}")
    return Markup(f"{mark} {quoted(prediction['parsed'], limit=LONGEST_TEXT)}")


def count_differing_items(results: Results, dataset: str, model: str) -> int:
    """The number of items with differing answers among these variants."""
    by_variant = [_by_id(e, dataset) for e in _side_by_side(results, model)]
    return sum(_agreement([p[key] for p in by_variant]) < 2 for key in by_variant[0])


def _all_variants(results: Results) -> list[VariantResults]:
    return [variant for model in results.models for variant in results.variants_of(model)]
