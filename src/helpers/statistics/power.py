"""The smallest difference that a study of n items detects with a given power.

The report states it beside every null result, which would otherwise read as "no cost". Every
fraction is 0-1, alpha is two-sided. How many items a planned study needs is in
`tools.sample_size`.

Left out: power after the fact from the observed difference, which only restates p.
"""

import math

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq
from scipy.stats import binom, nct
from scipy.stats import t as student_t

from helpers.statistics.intervals import require_count, require_fraction

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
    require_rates(loss, gain_rate)
    flip_rate = min(loss + 2 * gain_rate, 1.0)
    if flip_rate == 0:
        return 0.0
    flips = likely_flips(n, flip_rate)
    fewest_losses = binom.isf(alpha / 2, flips, 0.5) + 1  # rejected: P(losses >= this) <= alpha / 2
    rejected = binom.sf(fewest_losses - 1, flips, (loss + gain_rate) / flip_rate)
    return float(binom.pmf(flips, n, flip_rate) @ rejected)


def detectable_loss(n: int, *, gain_rate: float, alpha: float, power: float) -> float | None:
    """Smallest loss of accuracy, a fraction, that exact McNemar detects with the given power.

    None where no loss reaches it: below 6 items at alpha 0.05 nothing can.

    Raises:
        ValueError: n < 1, gain_rate outside [0, 0.5), or not 0 < alpha < power < 1.
    """
    require_power(alpha, power)
    require_rates(0.0, gain_rate)
    largest = 1 - 2 * gain_rate

    def shortfall(loss: float) -> float:
        return mcnemar_power(n, loss=loss, gain_rate=gain_rate, alpha=alpha) - power

    if shortfall(largest) < 0:
        return None
    return float(brentq(shortfall, 0.0, largest, xtol=1e-9))


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
    require_power(alpha, power)
    if not 0 < standard_error < math.inf:
        remedy = "without observed spread the detectable difference is unknown, add items"
        raise ValueError(f"standard_error = {standard_error} is not a positive number: {remedy}")
    critical = student_t.isf(alpha / 2, clusters - 1)

    def shortfall(effect: float) -> float:  # effect: in standard errors
        return nct.sf(critical, clusters - 1, effect) - power

    # Bracketed: statsmodels' solver at times returns the negative root or an array.
    return float(brentq(shortfall, 0.0, 4 * critical)) * standard_error


def require_power(alpha: float, power: float) -> None:
    """Refuse a level or a power outside (0, 1), and a power not above the level."""
    require_fraction("alpha", alpha)
    require_fraction("power", power)
    if power <= alpha:
        raise ValueError(f"power = {power} is not above alpha = {alpha}: ask for more than chance")


def require_rates(loss: float, gain_rate: float) -> None:
    """Refuse rates of losses (loss + gain_rate) and gains that do not fit in 1."""
    if not (loss >= 0 and 0 <= gain_rate < 0.5 and loss + 2 * gain_rate <= 1 + NEGLIGIBLE):
        limit = "from 0 up, gain_rate below 0.5, loss + 2 gain_rate at most 1"
        raise ValueError(f"loss = {loss}, gain_rate = {gain_rate}: give fractions {limit}")


def likely_flips(n: int, flip_rate: float) -> NDArray[np.int64]:
    """The numbers of flips among n items that are not negligibly rare."""
    first, last = binom.interval(1 - NEGLIGIBLE, n, flip_rate) if flip_rate else (0, 0)
    return np.arange(int(first), int(last) + 1)
