"""Whether every comparison's figures follow from the answers, by statistics of its own.

A comparison whose counts, test, correction or intervals are not those of
`recomputed_statistics` is named, with what differs, and is invalid in the report. What cannot
be computed again differs; nothing is raised.
"""

import math
from collections.abc import Mapping

from helpers.statistics.checks.recomputed_statistics import (
    FEWEST_FLIPS,
    BootstrapSettings,
    RecomputedComparison,
    holm,
    recompute_comparison,
)
from helpers.statistics.verdicts import Verdict, study_verdicts
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
    declared = list(dict.fromkeys(study.statistics.primary))
    expected = dict(
        zip(declared, holm([_p_in_family(verdicts.get(c)) for c in declared]), strict=True)
    )
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


def _p_in_family(verdict) -> float:
    """The p that enters Holm's family: 1 without a valid test."""
    return 1.0 if verdict is None or verdict.kind == "invalid" else verdict.paired.p
