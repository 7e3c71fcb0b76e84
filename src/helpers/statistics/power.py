"""What a study of n items can see, and how many items a question needs.

A null result without the smallest difference it could have shown reads as "no
cost". These figures stand beside every one. Every fraction is 0-1, alpha is
two-sided for differences and one-sided for equivalence (the level of each of
the two tests).

Left out: power after the fact from the observed difference, which only restates p.
"""

import math
from bisect import bisect_left

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq
from scipy.stats import binom, nct, norm
from scipy.stats import t as student_t

from helpers.statistics.intervals import (
    require_count,
    require_fraction,
    tango_interval,
    tost_from_interval,
)

MOST_ITEMS = 1_000_000  # a benchmark nobody has; beyond it the answer is "not reachable"
NEGLIGIBLE = 1e-12  # probability left out of the sum over the number of flips


def mcnemar_power(n: int, *, loss: float, gain_rate: float, alpha: float) -> float:
    """Probability that exact McNemar reports a loss of accuracy of `loss`.

    Items are lost with probability gain_rate + loss and gained with gain_rate.
    The power is exact: the number of flips is binomial, and given the flips so is
    the number of losses. Rejections in the wrong direction do not count.

    Args:
        n: independent items.
        loss: true accuracy of the baseline minus that of the variant.
        gain_rate: background rate of gains; quantization flips answers both ways.
        alpha: two-sided level; divide by the comparisons to allow for Holm.

    Raises:
        ValueError: n < 1, alpha outside (0, 1), or rates that do not fit in 1.
    """
    require_count("n", n, minimum=1)
    require_fraction("alpha", alpha)
    _require_rates(loss, gain_rate)
    flip_rate = min(loss + 2 * gain_rate, 1.0)
    if flip_rate == 0:
        return 0.0
    flips = _likely_flips(n, flip_rate)
    fewest_losses = binom.isf(alpha / 2, flips, 0.5) + 1  # rejected: P(losses >= this) <= alpha / 2
    rejected = binom.sf(fewest_losses - 1, flips, (loss + gain_rate) / flip_rate)
    return float(binom.pmf(flips, n, flip_rate) @ rejected)


def detectable_loss(n: int, *, gain_rate: float, alpha: float, power: float) -> float | None:
    """Smallest loss of accuracy, a fraction, that exact McNemar detects with the given power.

    None where no loss reaches it: below 6 items at alpha 0.05 nothing can.

    Raises:
        ValueError: n < 1, gain_rate outside [0, 0.5), or not 0 < alpha < power < 1.
    """
    _require_power(alpha, power)
    _require_rates(0.0, gain_rate)
    largest = 1 - 2 * gain_rate

    def shortfall(loss: float) -> float:
        return mcnemar_power(n, loss=loss, gain_rate=gain_rate, alpha=alpha) - power

    if shortfall(largest) < 0:
        return None
    return float(brentq(shortfall, 0.0, largest, xtol=1e-9))


def items_for_loss(loss: float, *, gain_rate: float, alpha: float, power: float) -> int | None:
    """Fewest items with which exact McNemar detects `loss` with the given power.

    None where a million items do not suffice.

    Raises:
        ValueError: loss is not above 0, rates that do not fit in 1, or not 0 < alpha < power < 1.
    """
    _require_power(alpha, power)
    _require_rates(loss, gain_rate)
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

    flips = _likely_flips(n, flip_rate)
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


def detectable_mean_difference(
    standard_error: float, *, clusters: int, alpha: float, power: float
) -> float:
    """Smallest mean difference, in the unit of the scores, detected with the given power.

    From the noncentral t of a one-sample test on clusters - 1 degrees of freedom,
    as an approximation to the sign-flip test; for many clusters it is
    (z_{1-alpha/2} + z_power) standard_error.

    Args:
        standard_error: of the mean difference, such as `BootstrapMean.standard_error`,
            which carries the clustering; sd / sqrt(n) for independent items.
        clusters: independent units behind it, at least 2.

    Raises:
        ValueError: standard_error is not above 0 (a degenerate bootstrap knows
            no detectable one), clusters < 2, or not 0 < alpha < power < 1.
    """
    require_count("clusters", clusters, minimum=2)
    _require_power(alpha, power)
    if not 0 < standard_error < math.inf:
        remedy = "without observed spread the detectable difference is unknown, add items"
        raise ValueError(f"standard_error = {standard_error} is not a positive number: {remedy}")
    critical = student_t.isf(alpha / 2, clusters - 1)

    def shortfall(effect: float) -> float:  # effect: in standard errors
        return nct.sf(critical, clusters - 1, effect) - power

    # Bracketed: statsmodels' solver at times returns the negative root or an array.
    return float(brentq(shortfall, 0.0, 4 * critical)) * standard_error


def _require_power(alpha: float, power: float) -> None:
    require_fraction("alpha", alpha)
    require_fraction("power", power)
    if power <= alpha:
        raise ValueError(f"power = {power} is not above alpha = {alpha}: ask for more than chance")


def _require_rates(loss: float, gain_rate: float) -> None:
    if not (loss >= 0 and 0 <= gain_rate < 0.5 and loss + 2 * gain_rate <= 1 + NEGLIGIBLE):
        limit = "from 0 up, gain_rate below 0.5, loss + 2 gain_rate at most 1"
        raise ValueError(f"loss = {loss}, gain_rate = {gain_rate}: give fractions {limit}")


def _require_equivalence(margin: float, flip_rate: float, alpha: float) -> None:
    require_fraction("margin", margin)
    require_fraction("alpha", alpha, below=0.5)
    if not 0 <= flip_rate <= 1:
        raise ValueError(f"flip_rate = {flip_rate} is outside [0, 1]: give a fraction, not percent")


def _likely_flips(n: int, flip_rate: float) -> NDArray[np.int64]:
    """The numbers of flips among n items that are not negligibly rare."""
    first, last = binom.interval(1 - NEGLIGIBLE, n, flip_rate) if flip_rate else (0, 0)
    return np.arange(int(first), int(last) + 1)
