"""Intervals and tests: of scores of 0 or 1, and of means over items in clusters.

Scores of 0 or 1: Wilson, Tango, McNemar, Holm, equivalence by two one-sided tests; two models
answer the same items. Every fraction is 0-1; a difference is variant minus baseline, so a loss is
negative. What the numbers mean for a study is in `verdicts`. The smallest difference that a study
of n items detects with a given power stands beside every null result in the report, which would
otherwise read as "no cost"; alpha is two-sided there. How many items a planned study needs is in
`tools.sample_size`. Left out: Wald intervals, which have zero width at zero flips, where a
quantized model often lands; unpaired tests, which throw away that both models saw the same items;
effect sizes without a unit; power after the fact, which only restates p.

Means over clusters: items about one passage rise and fall together. Differences of graded scores
are skewed where a model is near its ceiling and heavy-tailed where a few items collapse. Every
limit of `clustered_mean` is the outer one of two, for few, skewed and uneven clusters: Student's t
with the bias-reduced standard error CR2 and its Satterthwaite degrees of freedom (Bell and
McCaffrey, Survey Methodology 28 (2002) 169), and the same after Hall's monotone cubic correction
for skewness (J. R. Stat. Soc. B 54 (1992) 221). A test rejects if both do. The first alone fails
for skewed scores, the second alone for symmetric ones with heavy tails, where BCa and studentized
bootstraps fail too; together they cover 93 to 97 % of simulated studies of 20 to 200 items
(`benchmarks.coverage`). Nothing is drawn by lot, so that the same answers give the same figures
everywhere. Left out: any repair where fewer than one cluster in twenty collapses and fewer than 60
were drawn. A sample without a collapse cannot show that there are any.

The bootstrap resamples passages, not items; give item ids as clusters where items are independent.
The mean is a ratio of sums: a passage counts by its items (or their weights), and passages may
differ in size. BCa is scipy's, on the per-passage sums. A 95 % BCa interval of simulated normal or
skewed passages of 1 to 5 items covered the truth 93 % of the time with 40 to 100 passages, 91 %
with 20, 88 % with 10 and 80 % with 5. The result carries the number of clusters so that a report
can warn.
"""

import math
import warnings
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats
from scipy.optimize import brentq
from scipy.special import stdtr, stdtrit
from scipy.stats import binom, binomtest, nct, norm
from scipy.stats import t as student_t
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.proportion import proportion_confint

Name = TypeVar("Name", bound=Hashable)  # of a comparison
ROUNDING = 1e-12  # relative; a smaller spread is floating-point noise
FLAT = 1e-9  # a smaller skewness changes no printed digit


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


@dataclass(frozen=True)
class MeanEstimate:
    """A mean, or a sum of means, with what its limits follow from.

    Attributes:
        mean: in the unit of the scores.
        standard_error: CR2, of the mean.
        degrees: of freedom of the standard error.
        skewness: third central moment of the mean, over standard_error ** 3.
        n: items.
        clusters: independent units.
    """

    mean: float
    standard_error: float
    degrees: float
    skewness: float
    n: int
    clusters: int

    @property
    def degenerate(self) -> bool:
        """All clusters have one mean: the interval is a point and shows no uncertainty."""
        return self.standard_error == 0

    def interval(self, confidence: float) -> Interval:
        """Two-sided interval; the outer limits of the two methods.

        Raises:
            ValueError: confidence outside (0, 1).
        """
        require_fraction("confidence", confidence)
        t = float(stdtrit(self.degrees, (1 + confidence) / 2))
        below = max(t, _uncorrected(t, self.skewness))
        above = min(-t, _uncorrected(-t, self.skewness))
        low = self.mean - self.standard_error * below
        return Interval(low, self.mean - self.standard_error * above, confidence)

    def lower_limit(self, confidence: float) -> float:
        """One-sided: the mean lies above it in this share of studies."""
        return self.interval(2 * confidence - 1).low

    def p_value(self, null: float = 0.0) -> float:
        """Two-sided p that the mean is `null`; the larger of the two methods' p.

        It is at most 1 - confidence if and only if `interval` leaves `null` out. Without any
        spread it is the sign test's over the clusters, or 1 where the mean is `null`.
        """
        gap = self.mean - null
        if self.degenerate:
            return 1.0 if gap == 0 else 2.0 ** (1 - self.clusters)
        t = gap / self.standard_error
        both = (t, _corrected(t, self.skewness))
        nearest = max(0.0, min(x * math.copysign(1, t) for x in both))
        return float(2 * stdtr(self.degrees, -nearest))

    def detectable(self, *, alpha: float, power: float) -> float | None:
        """Smallest true difference found with this power, in the unit of the scores.

        From the noncentral t of the standard error at hand. None without any spread.

        Args:
            alpha: two-sided level; divide by the comparisons to allow for Holm.

        Raises:
            ValueError: not 0 < alpha < power < 1.
        """
        require_fraction("alpha", alpha)
        require_fraction("power", power)
        if power <= alpha:
            raise ValueError(f"power = {power} is not above alpha = {alpha}: ask for more")
        if self.degenerate:
            return None
        critical = float(stdtrit(self.degrees, 1 - alpha / 2))

        def shortfall(effect: float) -> float:  # effect: in standard errors
            return float(nct.sf(critical, self.degrees, effect)) - power

        return brentq(shortfall, 0.0, 6 * critical + 6) * self.standard_error


@dataclass(frozen=True)
class ClusterSums:
    """Items summed by cluster, the clusters in the order of their names.

    Attributes:
        totals: (clusters,) weighted sum of the scores.
        sizes: (clusters,) sum of the weights: items, or tokens.
        n: items.
    """

    totals: NDArray[np.float64]
    sizes: NDArray[np.float64]
    n: int


def cluster_sums(
    values: ArrayLike, clusters: Sequence[str | int], weights: ArrayLike | None = None
) -> ClusterSums:
    """Sums by cluster.

    Args:
        values: (n,) one score per item.
        clusters: (n,) the passage of each item; item ids where items are independent.
        weights: (n,) positive weight of each item, such as its tokens; None weighs alike.

    Raises:
        ValueError: lengths differ, no items, NaN, a weight not above 0, one cluster only.
    """
    scores = require_scores("values", values)
    weight = np.ones(scores.size) if weights is None else require_scores("weights", weights)
    for name, length in (("clusters", len(clusters)), ("weights", weight.size)):
        if length != scores.size:
            raise ValueError(f"{name} has {length} entries for {scores.size} items: give one each")
    if weight.min() <= 0:
        raise ValueError(f"the smallest weight is {weight.min()}, not above 0: drop such items")
    names, place = np.unique(np.asarray(clusters), return_inverse=True)  # in their sorted order
    if names.size < 2:
        raise ValueError(f"all {scores.size} items are in one cluster: sample from more passages")
    totals, sizes = np.bincount(place, weight * scores), np.bincount(place, weight)
    return ClusterSums(totals.astype(np.float64), sizes.astype(np.float64), scores.size)


def clustered_mean(
    values: ArrayLike, clusters: Sequence[str | int], weights: ArrayLike | None = None
) -> MeanEstimate:
    """Mean over items, or over tokens, with its CR2 error; arguments as in `cluster_sums`."""
    return mean_of_sums(cluster_sums(values, clusters, weights))


def mean_of_sums(sums: ClusterSums) -> MeanEstimate:
    """The ratio of the two sums; a cluster counts by its size."""
    whole = sums.sizes.sum()
    mean = float(sums.totals.sum() / whole)
    means = sums.totals / sums.sizes  # (clusters,)
    influence = (sums.totals - mean * sums.sizes) / whole
    if np.ptp(means) <= ROUNDING * np.abs(means).max():
        influence = np.zeros_like(influence)
    error = float(np.sqrt(np.sum(influence**2 / (1 - sums.sizes / whole))))
    skewness = float(np.sum(influence**3)) / error**3 if error else 0.0
    degrees = satterthwaite_degrees(sums.sizes)
    return MeanEstimate(mean, error, degrees, skewness, sums.n, len(sums.sizes))


def satterthwaite_degrees(sizes: NDArray) -> float:
    """Degrees of freedom of the CR2 variance of a mean; clusters - 1 where all are of one size.

    2 E² / Var of the estimated variance if items were independent (Bell and McCaffrey 2002).
    """
    whole = sizes.sum()
    factors = 1 / (1 - sizes / whole)  # (clusters,)
    own = factors * (sizes - sizes**2 / whole)
    # Squared covariances of two clusters' residual sums, n_g n_h / n, over all pairs.
    shared = (np.sum(factors * sizes**2) ** 2 - np.sum(factors**2 * sizes**4)) / whole**2
    return float(np.sum(own) ** 2 / (np.sum(own**2) + shared))


def combine(estimates: Sequence[MeanEstimate], weights: Sequence[float]) -> MeanEstimate:
    """Weighted sum of independent estimates; degrees of freedom by Welch and Satterthwaite.

    Raises:
        ValueError: there are none, or not one weight each.
    """
    if not estimates or len(estimates) != len(weights):
        raise ValueError(f"{len(estimates)} estimates with {len(weights)} weights: give one each")
    pairs = list(zip(weights, estimates, strict=True))
    parts = np.array([(w * e.standard_error) ** 2 for w, e in pairs])
    variance = float(parts.sum())
    error = math.sqrt(variance)
    degrees = float(sum(e.degrees for e in estimates))
    skewness = 0.0
    if variance:
        degrees = variance**2 / float(np.sum(parts**2 / [e.degrees for e in estimates]))
        third = sum((w * e.standard_error) ** 3 * e.skewness for w, e in pairs)
        skewness = third / error**3
    return MeanEstimate(
        mean=float(sum(w * e.mean for w, e in pairs)),
        standard_error=error,
        degrees=degrees,
        skewness=skewness,
        n=sum(e.n for e in estimates),
        clusters=sum(e.clusters for e in estimates),
    )


def _corrected(t: float, skewness: float) -> float:
    """Hall's cubic: a t statistic of a skewed mean, mapped to one that is nearly symmetric."""
    return t + skewness * t**2 / 3 + skewness**2 * t**3 / 27 + skewness / 6


def _uncorrected(quantile: float, skewness: float) -> float:
    """The t statistic that `_corrected` maps to a quantile."""
    if abs(skewness) < FLAT:
        return quantile
    return 3 / skewness * (float(np.cbrt(1 + skewness * (quantile - skewness / 6))) - 1)


BATCH_ELEMENTS = 500_000  # resampled values held at once: 4 MB an array
KEPT_BITS = 2.0**40


@dataclass(frozen=True)
class BootstrapMean:
    """A mean over items with its BCa interval.

    Attributes:
        mean: in the unit of the scores.
        interval: BCa interval of the mean, clusters resampled.
        standard_error: delete-one-cluster jackknife, for `power.detectable_mean_difference`.
        n: items.
        clusters: resampled units.
        degenerate: every cluster has the same mean, so resampling shows no
            spread; the interval is a point and does not measure uncertainty.
    """

    mean: float
    interval: Interval
    standard_error: float
    n: int
    clusters: int
    degenerate: bool


@dataclass(frozen=True)
class BootstrapDifference(BootstrapMean):
    """A mean of paired differences, with a test that it is zero.

    Attributes:
        p: two-sided p of the cluster sign-flip test.
        p_method: "exact" (every sign pattern) or "monte carlo" (seeded, +1 correction).
    """

    p: float
    p_method: str


def bootstrap_mean(
    values: ArrayLike,
    clusters: Sequence[str | int],
    *,
    weights: ArrayLike | None = None,
    confidence: float,
    resamples: int,
    seed: int,
) -> BootstrapMean:
    """Mean of one model's scores with a BCa interval, clusters resampled.

    Efron, J. Am. Stat. Assoc. 82 (1987) 171; acceleration from the
    delete-one-cluster jackknife.

    Args:
        values: (n,) one score per item.
        clusters: (n,) the passage of each item; item ids where items are independent.
        weights: (n,) positive weight of each item, such as its tokens when
            values are mean negative log-likelihoods; None weighs items alike.
        resamples: bootstrap samples, at least 100; 10,000 for a report.

    Raises:
        ValueError: lengths differ, no items, NaN, a weight not above 0, one
            cluster only, or a setting out of range.
    """
    _require_settings(confidence, resamples, seed)
    scores = require_scores("values", values)
    sums, sizes = _cluster_sums(scores, clusters, weights)
    return _estimate(sums, sizes, scores.size, confidence, resamples, np.random.default_rng(seed))


def bootstrap_difference(
    differences: ArrayLike,
    clusters: Sequence[str | int],
    *,
    weights: ArrayLike | None = None,
    confidence: float,
    resamples: int,
    seed: int,
) -> BootstrapDifference:
    """Mean of paired differences, variant minus baseline, with a BCa interval and a p.

    The interval is that of `bootstrap_mean`. The p is a sign-flip permutation
    test (Fisher, The Design of Experiments, 1935): if the two models are
    exchangeable within a passage, each passage's summed difference is as likely
    with either sign. Every sign pattern is enumerated when there are no more than
    `resamples` of them, else `resamples` are drawn (p >= 2 / (resamples + 1);
    Phipson and Smyth, Stat. Appl. Genet. Mol. Biol. 9 (2010) 39). The interval
    and the p are computed separately and can disagree near the threshold; a
    verdict follows the test.

    Args:
        differences: (n,) score of the variant minus score of the baseline, per item.
        clusters: (n,) the passage of each item; item ids where items are independent.
        weights: (n,) as in `bootstrap_mean`.

    Raises:
        ValueError: as `bootstrap_mean`.
    """
    _require_settings(confidence, resamples, seed)
    scores = require_scores("differences", differences)
    sums, sizes = _cluster_sums(scores, clusters, weights)
    rng = np.random.default_rng(seed)
    estimate = _estimate(sums, sizes, scores.size, confidence, resamples, rng)
    p, p_method = _sign_flip_p(sums, resamples, rng)
    return BootstrapDifference(**vars(estimate), p=p, p_method=p_method)


def _require_settings(confidence: float, resamples: int, seed: int) -> None:
    require_fraction("confidence", confidence)
    require_count("resamples", resamples, minimum=100)
    require_count("seed", seed, minimum=0)


def _cluster_sums(
    scores: NDArray, clusters: Sequence[str | int], weights: ArrayLike | None
) -> tuple[NDArray, NDArray]:
    """Weighted sum of scores and sum of weights per cluster, both (clusters,)."""
    labels = list(clusters)
    weight = np.ones(scores.size) if weights is None else require_scores("weights", weights)
    for name, length in (("clusters", len(labels)), ("weights", weight.size)):
        if length != scores.size:
            raise ValueError(f"{name} has {length} entries for {scores.size} items: give one each")
    for i, label in enumerate(labels):
        if not isinstance(label, (str, int, np.integer)):
            remedy = "give each item a passage id or its own id"
            raise ValueError(f"clusters[{i}] = {label!r} is not a string or integer: {remedy}")
    if weight.min() <= 0:
        remedy = "drop the items that carry no weight"
        raise ValueError(f"the smallest weight is {weight.min()}, not above 0: {remedy}")
    # Sorted labels: the same items in another order give the same numbers.
    _, cluster = np.unique(np.array(labels, dtype=str), return_inverse=True)
    sizes = np.bincount(cluster, weight)
    if sizes.size < 2:
        remedy = "the least is 2, sample items from more passages"
        raise ValueError(f"all {scores.size} items are in cluster {labels[0]!r}: {remedy}")
    return np.bincount(cluster, weight * scores), sizes


def _estimate(
    sums: NDArray,
    sizes: NDArray,
    n: int,
    confidence: float,
    resamples: int,
    rng: np.random.Generator,
) -> BootstrapMean:
    """BCa interval, jackknife standard error and the degenerate case of no spread."""
    mean, count = float(_ratio_of_sums(sums, sizes)), sums.size
    cluster_means = sums / sizes
    degenerate = bool(np.ptp(cluster_means) <= ROUNDING * np.abs(cluster_means).max())
    if degenerate:
        low, high, standard_error = mean, mean, 0.0
    else:
        low, high = _bca_limits(sums, sizes, confidence, resamples, rng)
        left_out = (sums.sum() - sums) / (sizes.sum() - sizes)  # (clusters,)
        standard_error = math.sqrt((count - 1) * float(np.var(left_out)))
    return BootstrapMean(
        mean=mean,
        interval=Interval(low, high, confidence),
        standard_error=standard_error,
        n=n,
        clusters=count,
        degenerate=degenerate,
    )


def _ratio_of_sums(sums: NDArray, sizes: NDArray, axis: int = -1) -> NDArray:
    """The mean over items, to 40 bits.

    BCa counts how many resamples lie below the sample. With few clusters, many resamples
    permute the sample and differ from it in the last bits only; they must tie.
    """
    mantissa, exponent = np.frexp(sums.sum(axis=axis) / sizes.sum(axis=axis))
    return np.ldexp(np.round(mantissa * KEPT_BITS) / KEPT_BITS, exponent)


def _bca_limits(
    sums: NDArray, sizes: NDArray, confidence: float, resamples: int, rng: np.random.Generator
) -> tuple[float, float]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", stats.DegenerateDataWarning)  # the NaN is refused below
        interval = stats.bootstrap(
            (sums, sizes),
            _ratio_of_sums,
            paired=True,
            vectorized=True,
            n_resamples=resamples,
            batch=max(1, BATCH_ELEMENTS // sums.size),
            confidence_level=confidence,
            method="BCa",
            rng=rng,
        ).confidence_interval
    low, high = float(interval.low), float(interval.high)
    if math.isnan(low) or math.isnan(high):
        cause = f"BCa is undefined for the spread of these {sums.size} clusters"
        raise ValueError(f"{cause} at resamples = {resamples}: raise it or add passages")
    return low, high


def _sign_flip_p(sums: NDArray, resamples: int, rng: np.random.Generator) -> tuple[float, str]:
    """Two-sided p and its method; a cluster that sums to 0 is the same with either sign."""
    flipped = sums[np.abs(sums) > ROUNDING * np.abs(sums).sum()]
    if flipped.size < 2:  # both signs of one cluster are as far from zero
        return 1.0, "exact"
    test = stats.permutation_test(
        (flipped,),
        np.sum,
        permutation_type="samples",
        vectorized=True,
        n_resamples=resamples,
        batch=max(1, BATCH_ELEMENTS // flipped.size),
        alternative="two-sided",
        rng=rng,
    )
    exact = flipped.size < 64 and 2**flipped.size <= resamples
    return float(test.pvalue), "exact" if exact else "monte carlo"
