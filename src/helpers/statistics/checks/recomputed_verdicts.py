"""Recomputes comparisons and verdicts from the answers.

A comparison whose counts, test, correction or intervals are not those of `recomputed_statistics`
is named, with what differs, and is invalid in the report. What cannot be computed again differs;
nothing is raised. The rows of summary.json are made again too. Whether a comparison is a
measurement at all is asked of `helpers.statistics.verdicts`; the best constant answer, repeated
ends and whether the baseline beats the constant are computed again.
"""

import math
from collections.abc import Mapping

from helpers.evaluation.checks.recomputed_answers import words_of
from helpers.sources.items import gold_number
from helpers.statistics.checks.recomputed_statistics import (
    FEWEST_FLIPS,
    BootstrapSettings,
    RecomputedComparison,
    detectable_loss,
    detectable_mean_loss,
    holm,
    recompute_comparison,
    score_figure,
)
from helpers.statistics.verdicts import (
    LARGEST_BROKEN_SHARE,
    SMALLEST_READABLE_SHARE,
    VariantPredictions,
    Verdict,
    decision_rules,
    invalid_reason,
    study_verdicts,
    uninformative_reason,
)
from helpers.study.schema import Comparison, Study

TOLERANCE = 1e-6  # absolute, of fractions computed by two methods
NARROWEST, WIDEST = 0.6, 1.7  # ratio of an interval's half-width to the jackknife's


def disagreements(study: Study, answers: Mapping, verdicts: Mapping) -> dict[Comparison, str]:
    """The differing figures in words, by comparison; empty if all agree.

    Args:
        answers: by (model, dataset, variant): `predictions` of each.
        verdicts: by comparison: `kind`, `holm_p`, `primary` and `paired` of each.
    """
    settings = bootstrap_settings(study)
    reasons = {}
    for c, verdict in verdicts.items():
        if reason := _comparison_differences(c, verdict.paired, answers, settings):
            reasons[c] = reason
    for c, reason in _holm_differences(study, verdicts).items():
        reasons.setdefault(c, reason)
    return {
        c: f"its figures do not follow from the answers: {reason}" for c, reason in reasons.items()
    }


def checked_verdicts(study: Study, answers: Mapping) -> dict[Comparison, Verdict]:
    """The study's verdicts; invalid if the figures do not follow from the answers."""
    verdicts = study_verdicts(study, answers)
    if wrong := disagreements(study, answers, verdicts):
        verdicts = study_verdicts(study, answers, wrong)
        # A correction over a wrong family invalidates all its comparisons.
        if wrong := disagreements(study, answers, verdicts) | wrong:
            verdicts = study_verdicts(study, answers, wrong)
    return verdicts


def bootstrap_settings(study: Study) -> BootstrapSettings:
    """The study's confidence, resamples and seed."""
    return BootstrapSettings(study.statistics.confidence, study.statistics.resamples, study.seed)


def _comparison_differences(
    c: Comparison, paired, answers: Mapping, settings: BootstrapSettings
) -> str:
    try:
        baseline, variant = (
            answers[c.model, c.dataset, v].predictions for v in (c.baseline, c.variant)
        )
        return "; ".join(
            figure_differences(paired, recompute_comparison(baseline, variant, settings))
        )
    except Exception as error:  # rows of any shape must not stop the report
        return f"they cannot be computed again ({type(error).__name__}: {error})"


def figure_differences(paired, recomputed: RecomputedComparison) -> list[str]:
    """Figures of a comparison that differ from the recomputed ones."""
    lines = [
        f"{name} {getattr(paired, name)}, recomputed {getattr(recomputed, name)}"
        for name in ("n", "clusters", "losses", "gains")
        if getattr(paired, name) != getattr(recomputed, name)
    ]
    pairs = {
        "delta": (paired.delta, recomputed.delta, TOLERANCE),
        "p": (paired.p, recomputed.p, max(recomputed.p_tolerance, TOLERANCE)),
        "low": (paired.interval.low, recomputed.low, TOLERANCE),
        "high": (paired.interval.high, recomputed.high, TOLERANCE),
        "equivalence low": (paired.equivalence.low, recomputed.equivalence_low, TOLERANCE),
        "equivalence high": (paired.equivalence.high, recomputed.equivalence_high, TOLERANCE),
    }
    lines += [
        f"{name} {value:.6g}, recomputed {recomputed_value:.6g}"
        for name, (value, recomputed_value, tolerance) in pairs.items()
        if not abs(value - recomputed_value) <= tolerance
    ]
    half = (paired.interval.high - paired.interval.low) / 2
    flips = recomputed.losses + recomputed.gains
    # If nearly all items flip, a score interval is far from a normal one.
    comparable = FEWEST_FLIPS <= flips <= recomputed.n / 2 and recomputed.jackknife > 0
    if comparable and not NARROWEST <= half / recomputed.jackknife <= WIDEST:
        lines.append(f"half-width {half:.4g}, {recomputed.jackknife:.4g} by a jackknife")
    return lines


def _holm_differences(study: Study, verdicts: Mapping) -> dict[Comparison, str]:
    """Declared comparisons whose corrected p differs from Holm's over all declared ones."""
    declared = declared_for(study, "accuracy")
    p_values = holm([_p_in_family(verdicts.get(c)) for c in declared])
    expected = {
        c: min(1.0, level_share(study) * p) for c, p in zip(declared, p_values, strict=True)
    }
    reasons = {}
    for c, verdict in verdicts.items():
        if verdict.kind == "invalid":
            continue
        value, recomputed = verdict.holm_p, expected.get(c)
        if (value is None) != (recomputed is None):
            reasons[c] = "it was corrected and not declared, or declared and not corrected"
        elif recomputed is not None and not math.isclose(
            value, recomputed, rel_tol=TOLERANCE, abs_tol=1e-12
        ):
            reason = f"Holm p {value:.6g}, over all {len(declared)} declared {recomputed:.6g}"
            reasons[c] = reason
    return reasons


def declared_for(study: Study, score: str) -> list[Comparison]:
    """The comparisons whose declaration names this score, or none."""
    judged: dict[Comparison, None] = {}
    for d in study.statistics.primary:
        if d.score is None or d.score == score:
            c = Comparison(model=d.model, dataset=d.dataset, baseline=d.baseline, variant=d.variant)
            judged[c] = None
    return list(judged)


def level_share(study: Study) -> int:
    """What an adjusted p is multiplied by: 2 where two scores judge declared comparisons."""
    return 2 if all(declared_for(study, score) for score in ("accuracy", "graded")) else 1


def _p_in_family(verdict) -> float:
    """The p that enters Holm's family: 1 without a valid test."""
    return 1.0 if verdict is None or verdict.kind == "invalid" else verdict.paired.p


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
    settings, declared = bootstrap_settings(study), declared_for(study, "accuracy")
    rows = {}
    by_score = [*declared, *declared_for(study, "graded")]
    for c in dict.fromkeys([*by_score, *_baseline_comparisons(study)]):
        baseline, variant = (answers.get((c.model, c.dataset, v)) for v in (c.baseline, c.variant))
        if baseline is not None and variant is not None:
            rows[c] = _comparison_row(study, c, baseline, variant, settings, declared=c in declared)
    for c, row in rows.items():
        row["family_p"] = _published_or_exact_p(row, published_p.get(c))
    p_values = [1.0 if c not in rows else rows[c]["family_p"] for c in declared]
    adjusted = holm([1.0 if p is None else p for p in p_values])
    holm_p_values = {
        c: min(1.0, level_share(study) * p) for c, p in zip(declared, adjusted, strict=True)
    }
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
    after = {row["id"]: answer_of(row) for row in variant.predictions}
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
        "identical_answers": all(answer_of(r) == after[r["id"]] for r in baseline.predictions),
        "method": EXACT_METHOD if recomputed.clusters == recomputed.n else PASSAGE_METHOD,
    }


def is_informative(adapter: str, rows: list[dict], settings: BootstrapSettings) -> bool:
    """Whether a baseline significantly beats the best constant answer."""
    readable = sum(row["status"] != "unparsed" for row in rows) / len(rows)
    varied_answers = (
        len({answer_of(r) for r in rows}) > 1 or len({tuple(r["golds"]) for r in rows}) == 1
    )
    low = score_figure(rows, settings)[1]
    beats_fixed_answer = low is not None and low > best_constant(adapter, rows)[1]
    cut = sum(row["finish_reason"] == "length" for row in rows) / len(rows)
    looped = sum(repeats_at_its_end(row.get("output", "")) for row in rows) / len(rows)
    mostly_complete = max(cut, looped) <= LARGEST_BROKEN_SHARE
    return (
        readable >= SMALLEST_READABLE_SHARE
        and varied_answers
        and beats_fixed_answer
        and mostly_complete
    )


def answer_of(row: Mapping) -> tuple[str, str | None]:
    """(status, parsed answer) of a prediction."""
    return row["status"], row["parsed"]


def best_constant(adapter: str, rows: list[dict]) -> tuple[str, float]:
    """(the constant answer with the best score, its score), each constant tried on every item.

    Of equal constants the first in the alphabet counts, and abstaining before any text.
    """
    readings = [{_reading(adapter, gold) for gold in row["golds"]} for row in rows]
    constants = sorted({reading for own in readings for reading in own})
    tried = [
        (f"answering “{constant}”", sum(constant in own for own in readings) / len(rows))
        for constant in constants
    ]
    abstaining = ("abstaining", sum(not own for own in readings) / len(rows))
    if adapter == "squad_v2" or not tried:
        tried.insert(0, abstaining)
    return max(tried, key=lambda one: one[1])


def _reading(adapter: str, gold: str) -> str:
    """A gold as it is compared: words, a number, the letter of a place, or the text itself."""
    if adapter == "squad_v2":
        return " ".join(words_of(gold))
    if adapter == "arc":
        return gold.translate(str.maketrans("12345", "ABCDE")) if len(gold) == 1 else gold
    number = gold_number(gold) if adapter == "openmath" else None
    return gold if number is None else str(number)


def repeats_at_its_end(text: str) -> bool:
    """Whether the text ends in four or more repetitions of one piece, over 24 characters or more.

    The piece has at most 60 characters; its last repetition may be incomplete.
    """
    for size in range(1, 61):
        length = max(24, 4 * size)
        end = text[len(text) - length :] if len(text) >= length else ""
        if end and end == (end[:size] * length)[:length]:
            return True
    return False


def _detectable_loss(
    study: Study, recomputed: RecomputedComparison, *, declared: bool
) -> float | None:
    alpha = round(1 - study.statistics.confidence, 12)
    tests = len(declared_for(study, "accuracy")) * level_share(study)
    level = alpha / tests if declared else alpha
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
