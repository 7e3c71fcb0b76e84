"""Means over items in clusters: limits and tests by Student's t, and by the bootstrap.

Items about one passage rise and fall together: passages are the clusters. Differences of graded
scores are skewed where a model is near its ceiling and heavy-tailed where a few items collapse.
Every limit of `clustered_mean` is the outer one of two, for few, skewed and uneven clusters:

- Student's t with the bias-reduced standard error CR2 and its Satterthwaite degrees of freedom
  (Bell and McCaffrey, Survey Methodology 28 (2002) 169);
- the same after Hall's monotone cubic correction for skewness (J. R. Stat. Soc. B 54 (1992) 221).

A test rejects if both do. The first alone fails for skewed scores, the second alone for symmetric
ones with heavy tails, where BCa and studentized bootstraps fail too; together they cover 93 to 97
% of simulated studies of 20 to 200 items (`benchmarks.coverage`). Nothing is drawn by lot, so that
the same answers give the same figures everywhere. Left out: any repair where fewer than one
cluster in twenty collapses and fewer than 60 were drawn. A sample without a collapse cannot show
that there are any.

The bootstrap resamples passages, not items; give item ids as clusters where items are independent.
The mean is a ratio of sums: a passage counts by its items (or their weights), and passages may
differ in size. BCa is scipy's, on the per-passage sums. A 95 % BCa interval of simulated normal or
skewed passages of 1 to 5 items covered the truth 93 % of the time with 40 to 100 passages, 91 %
with 20, 88 % with 10 and 80 % with 5. The result carries the number of clusters so that a report
can warn.
"""

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats
from scipy.optimize import brentq
from scipy.special import stdtr, stdtrit
from scipy.stats import nct

from helpers.statistics.intervals import Interval, require_count, require_fraction, require_scores

ROUNDING = 1e-12  # relative; a smaller spread is floating-point noise
FLAT = 1e-9  # a smaller skewness changes no printed digit


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
