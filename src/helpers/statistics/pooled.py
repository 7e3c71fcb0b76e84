"""One answer a model: the informative sets pooled, each with the same weight, and recovery.

Sets are strata: each set's mean has its own error, and the pooled mean is their plain average,
declared beforehand. Which sets are informative is decided before any comparison.

Scores in nats are pooled as probabilities a token (`graded.token_probability`), so that every
set counts in points and a collapsed answer counts at most as a lost one.

*Recovery*, the number the field quotes, is the pooled score above chance as a share of the
float model's. Its interval is Fieller's idea with this project's limits: the shares r for which
the mean of (variant - chance) - r (float - chance) may be 0 (Fieller, J. R. Stat. Soc. B 16
(1954) 175). Where the float model is not clearly above chance there is none.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq

from helpers.statistics.clustered import MeanEstimate, clustered_mean, combine
from helpers.statistics.graded import Scored, paired_differences, token_probability
from helpers.statistics.intervals import Interval

WIDEST = 100.0  # a share beyond this many times the float model's is no finite limit


@dataclass(frozen=True)
class Recovery:
    """Pooled score above chance, as a share of the float model's (1 is all of it).

    `above_chance` is the float model's pooled score above chance, 0-1.
    """

    value: float
    interval: Interval
    above_chance: float
    sets: tuple[str, ...]


def as_probabilities(found: Scored) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(scores, chance) of a set, both (n,) on the scale 0-1."""
    if found.unit == "probability":
        return found.scores, found.chance
    return token_probability(found.scores), token_probability(found.chance)


def pooled_difference(pairs: Mapping[str, tuple[Scored, Scored]]) -> MeanEstimate:
    """Mean over sets of the mean difference, variant minus baseline, in probability.

    Args:
        pairs: by informative set, the baseline's and the variant's scores.

    Raises:
        ValueError: there is no set.
    """
    return _pool(pairs, lambda name: _changes(*pairs[name]), {n: p[0] for n, p in pairs.items()})


def pooled_cost_difference(
    base: Mapping[str, tuple[Scored, Scored]], finetuned: Mapping[str, tuple[Scored, Scored]]
) -> MeanEstimate:
    """The difference of differences pooled over the sets that are informative for both models."""
    return _pool(
        base,
        lambda name: _changes(*finetuned[name]) - _changes(*base[name]),
        {name: pair[0] for name, pair in base.items()},
    )


def recovery(pairs: Mapping[str, tuple[Scored, Scored]], *, confidence: float) -> Recovery | None:
    """Pooled score of the variant above chance, as a share of the baseline's.

    Chance is the float model's: of options 1 / options, of written answers its own
    probability of the foil.

    Returns:
        None where the float model is not clearly above chance, or no limit is finite.
    """
    if not pairs:
        return None
    firsts = {name: pair[0] for name, pair in pairs.items()}
    floats, gaps = {}, {}
    for name, (baseline, variant) in pairs.items():
        before, chance = as_probabilities(baseline)
        floats[name] = before - chance
        gaps[name] = _changes(baseline, variant) + floats[name]
    above = _pool(pairs, floats.__getitem__, firsts)
    if above.interval(confidence).low <= 0:
        return None
    value = _pool(pairs, gaps.__getitem__, firsts).mean / above.mean

    def limits(share: float) -> Interval:
        found = _pool(pairs, lambda name: gaps[name] - share * floats[name], firsts)
        return found.interval(confidence)

    low = _crossing(lambda share: limits(share).low, value, -1)
    high = _crossing(lambda share: limits(share).high, value, 1)
    if low is None or high is None:
        return None
    return Recovery(value, Interval(low, high, confidence), above.mean, tuple(pairs))


def _changes(baseline: Scored, variant: Scored) -> NDArray[np.float64]:
    paired_differences(baseline, variant)  # refuses other items
    return as_probabilities(variant)[0] - as_probabilities(baseline)[0]


def _pool(
    names: Mapping[str, object],
    values: Callable[[str], NDArray[np.float64]],
    firsts: Mapping[str, Scored],
) -> MeanEstimate:
    estimates = [clustered_mean(values(name), firsts[name].clusters) for name in names]
    return combine(estimates, [1 / len(estimates)] * len(estimates))


def _crossing(limit: Callable[[float], float], start: float, sign: int) -> float | None:
    """The share beside `start`, on one side of it, at which a falling limit is 0."""
    step = 0.01
    if abs(limit(start)) <= 1e-15:
        return start
    while step < WIDEST:
        end = start + sign * step
        if limit(start) * limit(end) <= 0:
            return float(brentq(limit, *sorted((start, end)), xtol=1e-10))
        step *= 2
    return None
