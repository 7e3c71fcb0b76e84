"""Whether every comparison's figures follow from the answers, by statistics of its own.

A comparison whose counts, test, correction or intervals are not those of
`recomputed_statistics` is named, with what differs, and is invalid in the report. What cannot
be computed again differs; nothing is raised.
"""

import math
from collections.abc import Mapping

from helpers.statistics.checks.recomputed_statistics import (
    FEWEST_FLIPS,
    Drawing,
    Recount,
    holm,
    recount,
)
from helpers.statistics.verdicts import Verdict, study_verdicts
from helpers.study.schema import Comparison, Study

CLOSE = 1e-6  # absolute, of fractions; two ways to one figure
NARROWEST, WIDEST = 0.6, 1.7  # of an interval's half-width to the jackknife's


def disagreements(study: Study, answers: Mapping, verdicts: Mapping) -> dict[Comparison, str]:
    """What differs, in words, by comparison; empty where all figures follow.

    Args:
        answers: by (model, dataset, variant): `predictions` of each.
        verdicts: by comparison: `kind`, `holm_p`, `primary` and `paired` of each.
    """
    drawing = drawing_of(study)
    found = {}
    for c, verdict in verdicts.items():
        if told := _of_one(c, verdict.paired, answers, drawing):
            found[c] = told
    for c, told in _of_holm(study, verdicts).items():
        found.setdefault(c, told)
    return {c: f"its figures do not follow from the answers: {told}" for c, told in found.items()}


def checked_verdicts(study: Study, answers: Mapping) -> dict[Comparison, Verdict]:
    """The study's verdicts; invalid where the figures do not follow from the answers."""
    verdicts = study_verdicts(study, answers)
    if odd := disagreements(study, answers, verdicts):
        verdicts = study_verdicts(study, answers, odd)
        # A correction over other comparisons than the declared ones is wrong for all of them.
        if odd := disagreements(study, answers, verdicts) | odd:
            verdicts = study_verdicts(study, answers, odd)
    return verdicts


def drawing_of(study: Study) -> Drawing:
    """How the study draws its bootstraps."""
    return Drawing(study.statistics.confidence, study.statistics.resamples, study.seed)


def _of_one(c: Comparison, paired, answers: Mapping, drawing: Drawing) -> str:
    try:
        baseline, variant = (
            answers[c.model, c.dataset, v].predictions for v in (c.baseline, c.variant)
        )
        return "; ".join(differences(paired, recount(baseline, variant, drawing)))
    except Exception as error:  # rows of any shape: the report goes on and says so
        return f"they cannot be computed again ({type(error).__name__}: {error})"


def differences(paired, again: Recount) -> list[str]:
    """Figures of a comparison that are not those counted again."""
    told = [
        f"{name} {getattr(paired, name)}, counted again {getattr(again, name)}"
        for name in ("n", "clusters", "losses", "gains")
        if getattr(paired, name) != getattr(again, name)
    ]
    pairs = {
        "delta": (paired.delta, again.delta, CLOSE),
        "p": (paired.p, again.p, max(again.p_room, CLOSE)),
        "low": (paired.interval.low, again.low, CLOSE),
        "high": (paired.interval.high, again.high, CLOSE),
        "equivalence low": (paired.equivalence.low, again.equivalence_low, CLOSE),
        "equivalence high": (paired.equivalence.high, again.equivalence_high, CLOSE),
    }
    told += [
        f"{name} {value:.6g}, again {other:.6g}"
        for name, (value, other, room) in pairs.items()
        if not abs(value - other) <= room
    ]
    half = (paired.interval.high - paired.interval.low) / 2
    flips = again.losses + again.gains
    # Where nearly all items flip, a score interval is far from a normal one.
    comparable = FEWEST_FLIPS <= flips <= again.n / 2 and again.jackknife > 0
    if comparable and not NARROWEST <= half / again.jackknife <= WIDEST:
        told.append(f"half-width {half:.4g}, {again.jackknife:.4g} by a jackknife")
    return told


def _of_holm(study: Study, verdicts: Mapping) -> dict[Comparison, str]:
    """Declared comparisons whose corrected p is not Holm's over all that were declared."""
    declared = list(dict.fromkeys(study.statistics.primary))
    due = dict(zip(declared, holm([_p(verdicts.get(c)) for c in declared]), strict=True))
    odd = {}
    for c, verdict in verdicts.items():
        if verdict.kind == "invalid":
            continue
        value, again = verdict.holm_p, due.get(c)
        if (value is None) != (again is None):
            odd[c] = "it was corrected and not declared, or declared and not corrected"
        elif again is not None and not math.isclose(value, again, rel_tol=CLOSE, abs_tol=1e-12):
            told = f"Holm p {value:.6g}, over all {len(declared)} declared {again:.6g}"
            odd[c] = told
    return odd


def _p(verdict) -> float:
    """The p that enters Holm's family: 1 where there is no valid test."""
    return 1.0 if verdict is None or verdict.kind == "invalid" else verdict.paired.p
