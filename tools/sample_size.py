"""How many items a planned study needs, and what it could claim with n.

For whoever plans a study: the documentation and the tests of the parameter files use it,
no stage does. Every fraction is 0-1, alpha is two-sided for differences and one-sided for
equivalence (the level of each of the two tests).
"""

import math
from bisect import bisect_left

import numpy as np
from scipy.stats import binom, norm

from helpers.statistics.intervals import (
    likely_flips,
    mcnemar_power,
    require_count,
    require_fraction,
    require_power,
    require_rates,
    tango_interval,
    tost_from_interval,
)

MOST_ITEMS = 1_000_000  # a benchmark nobody has; beyond it the answer is "not reachable"


def items_for_loss(loss: float, *, gain_rate: float, alpha: float, power: float) -> int | None:
    """Fewest items with which exact McNemar detects `loss` with the given power.

    None where a million items do not suffice.

    Raises:
        ValueError: loss is not above 0, rates that do not fit in 1, or not 0 < alpha < power < 1.
    """
    require_power(alpha, power)
    require_rates(loss, gain_rate)
    if loss == 0:
        raise ValueError("loss = 0 is not above 0: to show no loss use items_for_equivalence")

    def enough(n: int) -> bool:
        return mcnemar_power(n, loss=loss, gain_rate=gain_rate, alpha=alpha) >= power

    high = 1  # the power rises with n: one more item more often brings a loss than a gain
    while not enough(high):
        high *= 2
        if high > MOST_ITEMS:
            return None
    low = high // 2  # not enough, or 0
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high


def smallest_claimable_margin(n: int, *, alpha: float) -> float:
    """The margin that n items without a single flip only just fail to prove: z^2 / (n + z^2).

    The half-width of `intervals.tango_interval` at 0 flips and confidence
    1 - 2 alpha. No smaller margin, nor this one, can be claimed with n items.

    Raises:
        ValueError: n < 1 or alpha outside (0, 0.5).
    """
    require_count("n", n, minimum=1)
    require_fraction("alpha", alpha, below=0.5)
    z = float(norm.isf(alpha))
    return z * z / (n + z * z)


def equivalence_power(n: int, *, margin: float, flip_rate: float, alpha: float) -> float:
    """Probability that models of equal accuracy are found equivalent within +-margin.

    Exact for `intervals.tango_interval` and `tost_from_interval`: the number of
    flips is binomial, and given the flips each is a loss or a gain at 1/2.

    Args:
        n: independent items.
        margin: largest harmless difference of accuracy.
        flip_rate: true share of items that change, losses and gains together.
        alpha: level of each of the two tests.

    Raises:
        ValueError: n < 1, margin outside (0, 1), flip_rate outside [0, 1], alpha not in (0, 0.5).
    """
    require_count("n", n, minimum=1)
    _require_equivalence(margin, flip_rate, alpha)

    def fewest_gains(flips: int) -> int:
        """The claim holds from this many gains to the same number of losses, if at all."""

        def claimed(gains: int) -> bool:
            interval = tango_interval(flips - gains, gains, n, confidence=1 - 2 * alpha)
            return tost_from_interval(interval, margin=margin, alpha=alpha)

        return bisect_left(range(flips // 2 + 1), True, key=claimed)

    flips = likely_flips(n, flip_rate)
    least = np.array([fewest_gains(int(count)) for count in flips])
    balanced = binom.cdf(flips - least, flips, 0.5) - binom.cdf(least - 1, flips, 0.5)
    return float(binom.pmf(flips, n, flip_rate) @ balanced.clip(min=0))


def items_for_equivalence(margin: float, *, flip_rate: float, alpha: float, power: float) -> int:
    """About how many items show equivalence within +-margin if the accuracies are equal.

    n = (z_{1-alpha} + z_{(1+power)/2})^2 flip_rate / margin^2, the normal
    approximation to two one-sided tests; never below what zero flips need. It
    takes the variance at no difference, so it is optimistic: 476 items for a 3
    point margin and 5 % flips have 74 % power, and 80 % takes 520. Check a planned n
    with `equivalence_power`, which is exact.

    Args:
        margin, flip_rate, alpha: as in `equivalence_power`.
        power: probability of the claim, in (0, 1).

    Raises:
        ValueError: margin or power outside (0, 1), flip_rate outside [0, 1], alpha not in (0, 0.5).
    """
    _require_equivalence(margin, flip_rate, alpha)
    require_fraction("power", power)
    z = float(norm.isf(alpha))
    without_flips = math.floor(z * z * (1 - margin) / margin) + 1
    with_flips = (z + norm.ppf((1 + power) / 2)) ** 2 * flip_rate / margin**2
    return max(without_flips, math.ceil(with_flips))


def _require_equivalence(margin: float, flip_rate: float, alpha: float) -> None:
    require_fraction("margin", margin)
    require_fraction("alpha", alpha, below=0.5)
    if not 0 <= flip_rate <= 1:
        raise ValueError(f"flip_rate = {flip_rate} is outside [0, 1]: give a fraction, not percent")
