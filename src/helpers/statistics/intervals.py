"""Intervals, tests and detectable differences for scores of 0 or 1, of one model or two.

Wilson, Tango, McNemar, Holm, equivalence by two one-sided tests; two models answer the same items.
Every fraction is 0-1; a difference is variant minus baseline, so a loss is negative. Means of
graded scores and items that share a passage are in `clustered`; what the numbers mean for a study
is in `verdicts`.

The smallest difference that a study of n items detects with a given power stands beside every null
result in the report, which would otherwise read as "no cost"; alpha is two-sided there. How many
items a planned study needs is in `tools.sample_size`.

Left out: Wald intervals, which have zero width at zero flips, where a quantized model often lands;
unpaired tests, which throw away that both models saw the same items; effect sizes without a unit;
power after the fact from the observed difference, which only restates p.
"""

import math
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import brentq
from scipy.stats import binom, binomtest, nct, norm
from scipy.stats import t as student_t
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.proportion import proportion_confint

Name = TypeVar("Name", bound=Hashable)  # of a comparison


@dataclass(frozen=True)
class Interval:
    """A confidence interval: `low` and `high` in the unit of the score, `confidence` in (0, 1)."""

    low: float
    high: float
    confidence: float


@dataclass(frozen=True)
class PairedBinary:
    """Two models on the same n items, each item right (1) or wrong (0).

    Attributes:
        n: items.
        losses: items the baseline has right and the variant wrong.
        gains: items the variant has right and the baseline wrong.
        delta: (gains - losses) / n, the difference of the two accuracies.
        interval: Tango score interval of delta.
        p: two-sided exact McNemar p.
        flip_rate: (gains + losses) / n; it can be large while delta is 0.
    """

    n: int
    losses: int
    gains: int
    delta: float
    interval: Interval
    p: float
    flip_rate: float


def require_fraction(name: str, value: float, *, below: float = 1) -> None:
    """Refuse anything outside the open interval (0, below), NaN included."""
    if not 0 < value < below:
        raise ValueError(f"{name} = {value} is outside (0, {below}): give a fraction, not percent")


def require_count(name: str, value: int, *, minimum: int) -> None:
    """Refuse anything but a whole number of at least `minimum`."""
    is_whole = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
    if not is_whole or value < minimum:
        raise ValueError(f"{name} = {value!r} is not a whole number from {minimum} up: count items")


def require_scores(name: str, values: ArrayLike) -> NDArray[np.float64]:
    """`values` as a float array (n,); refuse other shapes, no items, NaN and infinity."""
    try:
        scores = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} is not all numbers ({error}): score every item") from None
    if scores.ndim != 1 or scores.size == 0:
        raise ValueError(f"{name} has shape {scores.shape}: give one score per item")
    not_finite = np.flatnonzero(~np.isfinite(scores))
    if not_finite.size:
        raise ValueError(
            f"{name}[{not_finite[0]}] = {scores[not_finite[0]]} is not finite: score that item"
        )
    return scores


def require_binary(name: str, values: ArrayLike) -> NDArray[np.float64]:
    """`values` as a float array (n,) of zeros and ones."""
    scores = require_scores(name, values)
    not_binary = np.flatnonzero((scores != 0) & (scores != 1))
    if not_binary.size:
        remedy = "use bootstrap.bootstrap_difference for graded scores"
        raise ValueError(
            f"{name}[{not_binary[0]}] = {scores[not_binary[0]]} is not 0 or 1: {remedy}"
        )
    return scores


def wilson_interval(successes: int, n: int, *, confidence: float) -> Interval:
    """Score interval of one proportion, successes / n.

    Wilson, J. Am. Stat. Assoc. 22 (1927) 209. Assumes independent items.

    Raises:
        ValueError: a count is not whole, successes > n, n = 0, or confidence outside (0, 1).
    """
    require_count("n", n, minimum=1)
    require_count("successes", successes, minimum=0)
    require_fraction("confidence", confidence)
    if successes > n:
        raise ValueError(f"successes = {successes} exceeds n = {n}: count each item once")
    low, high = proportion_confint(successes, n, alpha=1 - confidence, method="wilson")
    # The limits are 0 and 1 at the ends up to rounding, which may fall outside.
    low = 0.0 if successes == 0 else float(low)
    high = 1.0 if successes == n else float(high)
    return Interval(low, high, confidence)


def mcnemar_exact(losses: int, gains: int) -> float:
    """Two-sided exact McNemar p: is a flip as likely to be a gain as a loss?

    The binomial test of `gains` out of `losses + gains` at 1/2 (McNemar,
    Psychometrika 12 (1947) 153); 1.0 without flips. Items must be independent:
    where they share a passage use `bootstrap.bootstrap_difference`.

    Raises:
        ValueError: a count is negative or not whole.
    """
    require_count("losses", losses, minimum=0)
    require_count("gains", gains, minimum=0)
    flips = int(losses) + int(gains)
    return float(binomtest(int(gains), flips, 0.5).pvalue) if flips else 1.0


def tango_interval(losses: int, gains: int, n: int, *, confidence: float) -> Interval:
    """Score interval of the paired difference (gains - losses) / n.

    Tango, Stat. Med. 17 (1998) 891: the differences delta at which the score
    statistic stays within +-z. Without flips it is +-z^2 / (n + z^2). It is
    asymptotic: at a handful of flips it can exclude 0 while `mcnemar_exact`
    does not reject; a verdict follows the test.

    Args:
        losses: pairs right under the baseline only.
        gains: pairs right under the variant only.
        n: all pairs, those without a flip included.

    Raises:
        ValueError: a count is not whole, losses + gains > n, n = 0, or confidence outside (0, 1).
    """
    require_count("n", n, minimum=1)
    require_count("losses", losses, minimum=0)
    require_count("gains", gains, minimum=0)
    require_fraction("confidence", confidence)
    losses, gains, n = int(losses), int(gains), int(n)
    if losses + gains > n:
        raise ValueError(f"losses + gains = {losses + gains} exceeds n = {n}: count each pair once")
    angle = math.atan(norm.isf((1 - confidence) / 2))
    delta = (gains - losses) / n

    def at_limit(limit: float, target: float) -> float:
        return _tango_angle(limit, losses, gains, n) - target

    low = -1.0 if losses == n else float(brentq(at_limit, -1, delta, args=(angle,), xtol=1e-14))
    high = 1.0 if gains == n else float(brentq(at_limit, delta, 1, args=(-angle,), xtol=1e-14))
    return Interval(low, high, confidence)


def _tango_angle(delta: float, losses: int, gains: int, n: int) -> float:
    """Arc tangent of Tango's score statistic, falling in delta, finite where the variance is 0."""
    q = _tango_loss_rate(delta, losses, gains, n)
    variance = max(n * (2 * q + delta * (1 - delta)), 0.0)
    return math.atan2(gains - losses - n * delta, math.sqrt(variance))


def _tango_loss_rate(delta: float, losses: int, gains: int, n: int) -> float:
    """Maximum-likelihood probability of a loss when P(gain) - P(loss) = delta (Tango 1998)."""
    a = 2 * n
    b = (2 * n - gains + losses) * delta - losses - gains
    c = -losses * delta * (1 - delta)
    root = math.sqrt(max(b * b - 4 * a * c, 0.0))
    if b > 0:  # the same root, written without cancellation
        return -2 * c / (b + root)
    return (root - b) / (2 * a)


def paired_binary(baseline: ArrayLike, variant: ArrayLike, *, confidence: float) -> PairedBinary:
    """Compare two models item by item on scores of 0 or 1.

    Args:
        baseline: (n,) scores of the reference, 0 or 1.
        variant: (n,) scores of the compared variant, in the same item order.

    Raises:
        ValueError: lengths differ, no items, a score is not 0 or 1, or confidence outside (0, 1).
    """
    before, after = require_binary("baseline", baseline), require_binary("variant", variant)
    n = before.size
    if after.size != n:
        raise ValueError(f"baseline has {n} items, variant {after.size}: pair them by item id")
    losses = int(np.sum(before > after))
    gains = int(np.sum(after > before))
    return PairedBinary(
        n=n,
        losses=losses,
        gains=gains,
        delta=(gains - losses) / n,
        interval=tango_interval(losses, gains, n, confidence=confidence),
        p=mcnemar_exact(losses, gains),
        flip_rate=(gains + losses) / n,
    )


def holm(p_values: Mapping[Name, float]) -> dict[Name, float]:
    """Holm-adjusted p by comparison name, in the same order; an empty family gives {}.

    Holm, Scand. J. Stat. 6 (1979) 65: rejecting where the adjusted p is at most
    alpha keeps the chance of any false rejection at alpha, under any dependence.

    Raises:
        ValueError: a p is NaN or outside [0, 1].
    """
    for name, p in p_values.items():
        if not 0 <= p <= 1:
            raise ValueError(f"p of {name} = {p} is outside [0, 1]: leave invalid comparisons out")
    if not p_values:
        return {}
    adjusted = multipletests(list(p_values.values()), method="holm")[1]
    return dict(zip(p_values, map(float, adjusted), strict=True))


def tost_from_interval(interval: Interval, *, margin: float, alpha: float) -> bool:
    """Equivalence by two one-sided tests: is the interval strictly inside (-margin, +margin)?

    Schuirmann, J. Pharmacokin. Biopharm. 15 (1987) 657. Two tests at level alpha
    are one interval at confidence 1 - 2 alpha: 90 % for 5 %.

    Raises:
        ValueError: margin is not above 0, alpha is outside (0, 0.5), the interval has a NaN
            limit, or its confidence is not 1 - 2 alpha.
    """
    require_fraction("alpha", alpha, below=0.5)
    if not 0 < margin < math.inf:
        raise ValueError(
            f"margin = {margin} is not above 0: declare the largest harmless difference"
        )
    if math.isnan(interval.low) or math.isnan(interval.high):
        raise ValueError(f"{interval} has a NaN limit: compute it from finite scores")
    if not math.isclose(interval.confidence, 1 - 2 * alpha):
        remedy = f"alpha = {alpha} needs an interval at {1 - 2 * alpha:.4g}"
        raise ValueError(f"interval.confidence = {interval.confidence} is not it: {remedy}")
    return -margin < interval.low and interval.high < margin


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
