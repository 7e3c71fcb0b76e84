"""Every comparison of a study a second time: the rows of summary.json from the answers.

Figures come from `recomputed_statistics`. Whether a comparison is a measurement at all is
asked of `validity`; whether its baseline beats a fixed answer is computed again too.
"""

from collections.abc import Mapping

from helpers.evaluation.trivial_answers import best_fixed_answer, ends_in_loop, status_and_answer
from helpers.statistics.checks.recomputed_comparisons import bootstrap_settings
from helpers.statistics.checks.recomputed_scores import score_figure
from helpers.statistics.checks.recomputed_statistics import (
    BootstrapSettings,
    RecomputedComparison,
    detectable_loss,
    detectable_mean_loss,
    holm,
    recompute_comparison,
)
from helpers.statistics.comparison import VariantPredictions, decision_rules
from helpers.statistics.validity import (
    LARGEST_BROKEN_SHARE,
    SMALLEST_READABLE_SHARE,
    invalid_reason,
    uninformative_reason,
)
from helpers.study.schema import Comparison, Study

EXACT_METHOD = "exact McNemar, Tango interval"
PASSAGE_METHOD = "sign-flip test and bootstrap by passage"


def comparison_rows(
    study: Study, answers: Mapping, published_p: Mapping[Comparison, float | None]
) -> dict[Comparison, dict]:
    """By comparison, the expected row of summary.json with `family_p`: the p that the report shows.

    Args:
        answers: `VariantPredictions` by (model, dataset, variant).
        published_p: the published p; a Monte Carlo p enters Holm's family as published.
    """
    settings, declared = bootstrap_settings(study), list(dict.fromkeys(study.statistics.primary))
    rows = {}
    for c in dict.fromkeys([*declared, *_baseline_comparisons(study)]):
        baseline, variant = (answers.get((c.model, c.dataset, v)) for v in (c.baseline, c.variant))
        if baseline is not None and variant is not None:
            rows[c] = _comparison_row(study, c, baseline, variant, settings, declared=c in declared)
    for c, row in rows.items():
        row["family_p"] = _published_or_exact_p(row, published_p.get(c))
    p_values = [1.0 if c not in rows else rows[c]["family_p"] for c in declared]
    holm_p_values = dict(
        zip(declared, holm([1.0 if p is None else p for p in p_values]), strict=True)
    )
    for c, row in rows.items():
        if c in holm_p_values and row["verdict"] != "invalid":
            row["holm_p"] = holm_p_values[c]
        row["verdict"] = _verdict_kind(study, row)
        row["reason"] = _verdict_reason(study, row)
    return rows


def _baseline_comparisons(study: Study) -> list[Comparison]:
    others = [v for v in study.variants if v != study.baseline]
    return [
        Comparison(model=m, dataset=d, baseline=study.baseline, variant=v)
        for m in study.models
        for d in study.evaluation.datasets
        for v in others
    ]


def _comparison_row(
    study: Study,
    c: Comparison,
    baseline: VariantPredictions,
    variant: VariantPredictions,
    settings: BootstrapSettings,
    *,
    declared: bool,
) -> dict:
    adapter, rules = study.evaluation.datasets[c.dataset].adapter, decision_rules(study)
    recomputed = recompute_comparison(baseline.predictions, variant.predictions, settings)
    invalid = invalid_reason(adapter, baseline, variant, rules)
    uninformative = None if invalid else uninformative_reason(adapter, baseline, rules)
    if not invalid and bool(uninformative) == is_informative(
        adapter, baseline.predictions, settings
    ):
        uninformative = "two computations disagree on whether the baseline beats a constant answer"
    kind = "invalid" if invalid else "uninformative" if uninformative else ""
    after = {row["id"]: status_and_answer(row) for row in variant.predictions}
    return {
        **c.model_dump(),
        "metric": "exact_match" if adapter == "squad_v2" else "accuracy",
        "primary": declared,
        "verdict": kind,
        "reason": invalid or uninformative or "",
        "n": recomputed.n,
        "clusters": recomputed.clusters,
        "losses": recomputed.losses,
        "gains": recomputed.gains,
        "delta": recomputed.delta,
        "low": recomputed.low,
        "high": recomputed.high,
        "equivalence_low": recomputed.equivalence_low,
        "equivalence_high": recomputed.equivalence_high,
        "p": None if invalid else recomputed.p,
        "p_tolerance": recomputed.p_tolerance,
        "holm_p": None,
        "smallest_detectable_loss": _detectable_loss(study, recomputed, declared=declared),
        "identical_answers": all(
            status_and_answer(r) == after[r["id"]] for r in baseline.predictions
        ),
        "method": EXACT_METHOD if recomputed.clusters == recomputed.n else PASSAGE_METHOD,
    }


def is_informative(adapter: str, rows: list[dict], settings: BootstrapSettings) -> bool:
    """Whether a baseline significantly beats the best constant answer."""
    readable = sum(row["status"] != "unparsed" for row in rows) / len(rows)
    varied_answers = (
        len({status_and_answer(r) for r in rows}) > 1 or len({tuple(r["golds"]) for r in rows}) == 1
    )
    low = score_figure(rows, settings)[1]
    beats_fixed_answer = low is not None and low > best_fixed_answer(adapter, rows).score
    cut = sum(row["finish_reason"] == "length" for row in rows) / len(rows)
    looped = sum(ends_in_loop(row.get("output", "")) for row in rows) / len(rows)
    mostly_complete = max(cut, looped) <= LARGEST_BROKEN_SHARE
    return (
        readable >= SMALLEST_READABLE_SHARE
        and varied_answers
        and beats_fixed_answer
        and mostly_complete
    )


def _detectable_loss(
    study: Study, recomputed: RecomputedComparison, *, declared: bool
) -> float | None:
    alpha = round(1 - study.statistics.confidence, 12)
    level = alpha / len(study.statistics.primary) if declared else alpha
    power = study.statistics.power
    if recomputed.clusters == recomputed.n:
        return detectable_loss(recomputed.n, recomputed.gains / recomputed.n, level, power)
    if recomputed.standard_error <= 1e-12:
        return detectable_loss(recomputed.clusters, 0.0, level, power)
    return detectable_mean_loss(recomputed.standard_error, recomputed.clusters, level, power)


def _published_or_exact_p(row: dict, published: float | None) -> float | None:
    """The published p if it is within the tolerance of the exact one, else the exact one."""
    if row["p"] is None:
        return None
    within_tolerance = published is not None and abs(published - row["p"]) <= row["p_tolerance"]
    return published if within_tolerance else row["p"]


def _within_margin(study: Study, row: dict) -> bool:
    margin = study.statistics.margin
    return -margin < row["equivalence_low"] and row["equivalence_high"] < margin


def _verdict_kind(study: Study, row: dict) -> str:
    if row["verdict"] or not row["primary"]:
        return row["verdict"] or "exploratory"
    if row["holm_p"] <= round(1 - study.statistics.confidence, 12) and row["delta"]:
        return "worse" if row["delta"] < 0 else "better"
    return "equivalent" if _within_margin(study, row) else "inconclusive"


def _verdict_reason(study: Study, row: dict) -> str:
    """The reason of an invalid or uninformative row, or the remark of another verdict."""
    if row["reason"]:
        return row["reason"]
    if row["verdict"] in ("worse", "better"):
        inside = "the difference is nevertheless inside the margin"
        return inside if _within_margin(study, row) else ""
    return f"identical answers on all {row['n']} items" if row["identical_answers"] else ""
