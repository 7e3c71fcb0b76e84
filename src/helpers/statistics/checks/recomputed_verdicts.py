"""Every comparison of a study a second time: the rows of summary.json from the answers.

Figures come from `recomputed_statistics`. Whether a comparison is a measurement at all is
asked of `validity`; whether its baseline beats a fixed answer is computed again too.
"""

from collections.abc import Mapping

from helpers.evaluation.trivial_answers import best_fixed_answer, ends_in_loop, status_and_answer
from helpers.statistics.checks.recomputed_comparisons import drawing_of
from helpers.statistics.checks.recomputed_scores import score_figure
from helpers.statistics.checks.recomputed_statistics import (
    Drawing,
    Recount,
    detectable_loss,
    detectable_mean,
    holm,
    recount,
)
from helpers.statistics.comparison import Answers, rules_of
from helpers.statistics.validity import (
    FEWEST_READABLE,
    MOST_BROKEN,
    invalid_reason,
    uninformative_reason,
)
from helpers.study.schema import Comparison, Study

EXACT = "exact McNemar, Tango interval"
BY_PASSAGE = "sign-flip test and bootstrap by passage"


def comparison_rows(
    study: Study, answers: Mapping, published_p: Mapping[Comparison, float | None]
) -> dict[Comparison, dict]:
    """By comparison, the row of summary.json, and `p_drawn`: the p that has to be shown.

    Args:
        answers: by (model, dataset, variant), as `Answers`.
        published_p: what was published; a p drawn by lot enters Holm's family as it was drawn.
    """
    drawing, declared = drawing_of(study), list(dict.fromkeys(study.statistics.primary))
    rows = {}
    for c in dict.fromkeys([*declared, *_against_baseline(study)]):
        baseline, variant = (answers.get((c.model, c.dataset, v)) for v in (c.baseline, c.variant))
        if baseline is not None and variant is not None:
            rows[c] = _row(study, c, baseline, variant, drawing, declared=c in declared)
    for c, row in rows.items():
        row["p_drawn"] = _drawn(row, published_p.get(c))
    p_values = [1.0 if c not in rows else rows[c]["p_drawn"] for c in declared]
    corrected = dict(zip(declared, holm([1.0 if p is None else p for p in p_values]), strict=True))
    for c, row in rows.items():
        if c in corrected and row["verdict"] != "invalid":
            row["holm_p"] = corrected[c]
        row["verdict"] = _kind(study, row)
        row["reason"] = _remark(study, row)
    return rows


def _against_baseline(study: Study) -> list[Comparison]:
    others = [v for v in study.variants if v != study.baseline]
    return [
        Comparison(model=m, dataset=d, baseline=study.baseline, variant=v)
        for m in study.models
        for d in study.evaluation.datasets
        for v in others
    ]


def _row(
    study: Study,
    c: Comparison,
    baseline: Answers,
    variant: Answers,
    drawing: Drawing,
    *,
    declared: bool,
) -> dict:
    adapter, rules = study.evaluation.datasets[c.dataset].adapter, rules_of(study)
    again = recount(baseline.predictions, variant.predictions, drawing)
    invalid = invalid_reason(adapter, baseline, variant, rules)
    blind = None if invalid else uninformative_reason(adapter, baseline, rules)
    if not invalid and bool(blind) == informative(adapter, baseline.predictions, drawing):
        blind = "whether the baseline beats a fixed answer has two answers"
    kind = "invalid" if invalid else "uninformative" if blind else ""
    after = {row["id"]: status_and_answer(row) for row in variant.predictions}
    return {
        **c.model_dump(),
        "metric": "exact_match" if adapter == "squad_v2" else "accuracy",
        "primary": declared,
        "verdict": kind,
        "reason": invalid or blind or "",
        "n": again.n,
        "clusters": again.clusters,
        "losses": again.losses,
        "gains": again.gains,
        "delta": again.delta,
        "low": again.low,
        "high": again.high,
        "equivalence_low": again.equivalence_low,
        "equivalence_high": again.equivalence_high,
        "p": None if invalid else again.p,
        "p_room": again.p_room,
        "holm_p": None,
        "smallest_detectable_loss": _detectable(study, again, declared=declared),
        "identical_answers": all(
            status_and_answer(r) == after[r["id"]] for r in baseline.predictions
        ),
        "method": EXACT if again.clusters == again.n else BY_PASSAGE,
    }


def informative(adapter: str, rows: list[dict], drawing: Drawing) -> bool:
    """Whether a baseline's answers beat the best fixed one by more than chance."""
    readable = sum(row["status"] != "unparsed" for row in rows) / len(rows)
    several = (
        len({status_and_answer(r) for r in rows}) > 1 or len({tuple(r["golds"]) for r in rows}) == 1
    )
    low = score_figure(rows, drawing)[1]
    beaten = low is not None and low > best_fixed_answer(adapter, rows).score
    cut = sum(row["finish_reason"] == "length" for row in rows) / len(rows)
    looped = sum(ends_in_loop(row.get("output", "")) for row in rows) / len(rows)
    whole = max(cut, looped) <= MOST_BROKEN
    return readable >= FEWEST_READABLE and several and beaten and whole


def _detectable(study: Study, again: Recount, *, declared: bool) -> float | None:
    alpha = round(1 - study.statistics.confidence, 12)
    level = alpha / len(study.statistics.primary) if declared else alpha
    power = study.statistics.power
    if again.clusters == again.n:
        return detectable_loss(again.n, again.gains / again.n, level, power)
    if again.standard_error <= 1e-12:
        return detectable_loss(again.clusters, 0.0, level, power)
    return detectable_mean(again.standard_error, again.clusters, level, power)


def _drawn(row: dict, published: float | None) -> float | None:
    """The published p where it is as near as one drawn by lot has to be, else the exact one."""
    if row["p"] is None:
        return None
    near = published is not None and abs(published - row["p"]) <= row["p_room"]
    return published if near else row["p"]


def _inside(study: Study, row: dict) -> bool:
    margin = study.statistics.margin
    return -margin < row["equivalence_low"] and row["equivalence_high"] < margin


def _kind(study: Study, row: dict) -> str:
    if row["verdict"] or not row["primary"]:
        return row["verdict"] or "exploratory"
    if row["holm_p"] <= round(1 - study.statistics.confidence, 12) and row["delta"]:
        return "worse" if row["delta"] < 0 else "better"
    return "equivalent" if _inside(study, row) else "inconclusive"


def _remark(study: Study, row: dict) -> str:
    """The reason of an invalid or uninformative row, or what goes with another verdict."""
    if row["reason"]:
        return row["reason"]
    if row["verdict"] in ("worse", "better"):
        inside = "the difference lies inside the margin all the same"
        return inside if _inside(study, row) else ""
    return f"identical answers on all {row['n']} items" if row["identical_answers"] else ""
