"""Means of graded scores (F1, log-probability) with bootstrap intervals, clustered by passage.

Items about one passage rise and fall together, so passages are resampled, not
items; give item ids as clusters where items are independent. The mean is a ratio
of sums: a passage counts by its items (or their weights), and passages may
differ in size. BCa is scipy's, on the per-passage sums.

Left out: studentized and percentile intervals, and any repair for few clusters.
A 95 % BCa interval of simulated normal or skewed passages of 1 to 5 items covered
the truth 93 % of the time with 40 to 100 passages, 91 % with 20, 88 % with 10 and
80 % with 5. The result carries the number of clusters so that a report can warn.
"""

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from helpers.statistics.intervals import Interval, require_count, require_fraction, require_scores

BATCH_ELEMENTS = 500_000  # resampled values held at once: 4 MB an array
ROUNDING = 1e-12  # relative; a smaller spread is floating-point noise
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
