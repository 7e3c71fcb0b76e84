"""Recomputes statistics and scores from the answers with scipy and statsmodels.

The second opinion on `helpers.statistics` and on the report's estimates, of whose code nothing is
used here. Where another way to a figure exists it is taken: Tango's interval from a likelihood
maximised numerically, a sign-flip test by its exact distribution, power summed over gains. A
bootstrap is drawn again with the study's seed, and its width held to a jackknife. Every figure of
summary.csv is (value, low, high, n); the limits are None where it has no interval. Every fraction
is 0-1.
"""

import heapq
import math
import statistics
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import optimize, stats
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.power import TTestPower

from helpers.statistics.checks.recomputed_graded import kl_quantiles

FEWEST_FLIPS = 5  # below, the normal approximation fails


@dataclass(frozen=True)
class BootstrapSettings:
    """A study's confidence, resamples and seed."""

    confidence: float
    resamples: int
    seed: int


@dataclass(frozen=True)
class ClusteredMean:
    """A mean over items in clusters; `low` and `high` are None if all clusters agree."""

    mean: float
    low: float | None
    high: float | None
    standard_error: float
    clusters: int


@dataclass(frozen=True)
class RecomputedComparison:
    """One comparison recomputed, under the names of summary.json.

    `p_tolerance` bounds the distance of a Monte Carlo p from this exact one; `jackknife` is the
    half-width of a normal interval by the jackknife's standard error.
    """

    n: int
    clusters: int
    losses: int
    gains: int
    delta: float
    low: float
    high: float
    equivalence_low: float
    equivalence_high: float
    p: float
    p_tolerance: float
    jackknife: float
    standard_error: float


def recompute_comparison(
    baseline: list[dict], variant: list[dict], settings: BootstrapSettings
) -> RecomputedComparison:
    """Counts, difference, intervals and test of two variants' rows, paired by item id.

    Raises:
        ValueError: the two have different items, or one has an item twice.
    """
    before, after = ({row["id"]: row for row in rows} for rows in (baseline, variant))
    counts = {len(before), len(after), len(baseline), len(variant)}
    if before.keys() != after.keys() or len(counts) > 1:
        raise ValueError("they have different items")
    ids = sorted(before)
    changes = [after[i]["score"] - before[i]["score"] for i in ids]
    clusters = [before[i]["cluster"] or i for i in ids]
    losses, gains, n = changes.count(-1), changes.count(1), len(ids)
    mean = clustered_mean(changes, clusters, settings)
    independent = len(set(clusters)) == n
    if independent:
        limits = [tango_limits(losses, gains, n, level) for level in _confidence_levels(settings)]
        p, tolerance = mcnemar_p(losses, gains), 0.0
    else:
        limits = [
            _clustered_limits(changes, clusters, settings, x) for x in _confidence_levels(settings)
        ]
        p, tolerance = sign_flip_p(changes, clusters, settings.resamples)
    z = stats.norm.ppf((1 + settings.confidence) / 2)
    return RecomputedComparison(
        n=n,
        clusters=len(set(clusters)),
        losses=losses,
        gains=gains,
        delta=sum(changes) / n,
        low=limits[0][0],
        high=limits[0][1],
        equivalence_low=limits[1][0],
        equivalence_high=limits[1][1],
        p=p,
        p_tolerance=tolerance,
        jackknife=z * mean.standard_error,
        standard_error=mean.standard_error,
    )


def _confidence_levels(settings: BootstrapSettings) -> tuple[float, float]:
    """The study's confidence, and that of the interval for the equivalence test."""
    return settings.confidence, 1 - 2 * round(1 - settings.confidence, 12)


def mcnemar_p(losses: int, gains: int) -> float:
    """Two-sided exact McNemar p by statsmodels."""
    return float(mcnemar([[0, losses], [gains, 0]], exact=True).pvalue)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm-adjusted p by statsmodels, in the same order."""
    return list(multipletests(p_values, method="holm")[1]) if p_values else []


def wilson_limits(successes: int, n: int, confidence: float) -> tuple[float, float]:
    """Wilson's interval by scipy."""
    limits = stats.binomtest(successes, n).proportion_ci(confidence, method="wilson")
    return float(limits.low), float(limits.high)


def tango_limits(losses: int, gains: int, n: int, confidence: float) -> tuple[float, float]:
    """Differences at which the score statistic is the normal quantile, by bisection."""
    delta, limit = (gains - losses) / n, stats.chi2.ppf(confidence, 1)

    def excess(difference: float) -> float:
        rate = _likeliest_loss_rate(difference, losses, gains, n)
        variance = n * (2 * rate + difference * (1 - difference))
        gap = (n * (delta - difference)) ** 2
        return gap - limit * variance

    ends = []
    for end in (-1.0, 1.0):
        if delta == end:
            ends.append(end)
        else:
            inside = delta + math.copysign(1e-12, end)  # without flips the variance here is 0
            ends.append(float(optimize.bisect(excess, inside, end, xtol=1e-13)))
    return ends[0], ends[1]


def _likeliest_loss_rate(difference: float, losses: int, gains: int, n: int) -> float:
    """P(loss) that maximises the likelihood of the counts if P(gain) = P(loss) + `difference`."""
    low, high = max(0.0, -difference), (1 - difference) / 2
    if high - low < 1e-15:
        return low

    def slope(rate: float) -> float:  # of the log-likelihood times all denominators
        unchanged = 1 - 2 * rate - difference
        gain_rate = rate + difference
        flip_terms = losses * gain_rate * unchanged + gains * rate * unchanged
        return flip_terms - 2 * (n - losses - gains) * rate * gain_rate

    inner = (high - low) * 1e-13
    if slope(low + inner) <= 0:
        return low
    if slope(high - inner) >= 0:
        return high
    return float(optimize.bisect(slope, low + inner, high - inner, xtol=1e-16))


def _cluster_sums(
    values: Sequence[float], clusters: Sequence[str], weights: Sequence[float] | None
) -> tuple[np.ndarray, np.ndarray]:
    """Sums of weighted values and of weights by cluster, in the order of the clusters' names."""
    totals: dict[str, list[float]] = {name: [0.0, 0.0] for name in sorted(map(str, set(clusters)))}
    for place, (value, name) in enumerate(zip(values, clusters, strict=True)):
        weight = 1.0 if weights is None else weights[place]
        totals[str(name)][0] += weight * value
        totals[str(name)][1] += weight
    columns = np.array(list(totals.values()))
    return columns[:, 0], columns[:, 1]


def clustered_mean(
    values: Sequence[float],
    clusters: Sequence[str],
    settings: BootstrapSettings,
    *,
    weights: Sequence[float] | None = None,
    confidence: float | None = None,
    interval: bool = False,
) -> ClusteredMean:
    """A mean with the jackknife's standard error and, if asked for, its BCa interval."""
    sums, sizes = _cluster_sums(values, clusters, weights)
    mean, count = sums.sum() / sizes.sum(), len(sums)
    cluster_means = sums / sizes
    left_out = [
        (sums.sum() - s) / (sizes.sum() - k) if count > 1 else mean
        for s, k in zip(sums, sizes, strict=True)
    ]
    error = math.sqrt((count - 1) / count * sum((x - np.mean(left_out)) ** 2 for x in left_out))
    low = high = None
    if (
        interval
        and count > 1
        and cluster_means.max() - cluster_means.min() > 1e-12 * abs(cluster_means).max()
    ):
        low, high = _bca_limits(sums, sizes, settings, confidence or settings.confidence)
    return ClusteredMean(float(mean), low, high, error, count)


def _bca_limits(sums, sizes, settings: BootstrapSettings, confidence: float) -> tuple[float, float]:
    scale = abs(sums).sum() / sizes.sum()

    def mean(s, k, axis=-1):
        """Means that differ by less than rounding are one and the same."""
        means = s.sum(axis=axis) / k.sum(axis=axis)
        return np.round(means / scale, 12) * scale

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        limits = stats.bootstrap(
            (sums, sizes),
            mean,
            paired=True,
            n_resamples=settings.resamples,
            confidence_level=confidence,
            method="BCa",
            batch=max(1, 250_000 // len(sums)),
            rng=np.random.default_rng(settings.seed),
        ).confidence_interval
    return float(limits.low), float(limits.high)


def _clustered_limits(changes, clusters, settings: BootstrapSettings, confidence: float):
    """BCa over clusters; if all agree, Tango's interval with clusters as items."""
    mean = clustered_mean(changes, clusters, settings, confidence=confidence, interval=True)
    if mean.low is not None and mean.high is not None:
        return mean.low, mean.high
    flips = round(abs(mean.mean) * mean.clusters)
    counts = (flips, 0) if mean.mean < 0 else (0, flips)
    return tango_limits(*counts, mean.clusters, confidence)


def sign_flip_p(
    changes: Sequence[float], clusters: Sequence[str], resamples: int
) -> tuple[float, float]:
    """(exact two-sided p, tolerance for a Monte Carlo p) of whole-numbered changes.

    The distribution of the sum under random signs of the clusters is a convolution.
    """
    sums = [round(s) for s in _cluster_sums(changes, clusters, None)[0] if round(s)]
    if len(sums) < 2:
        return 1.0, 0.0
    reach = sum(map(abs, sums))
    chances = np.zeros(2 * reach + 1)
    chances[reach] = 1.0
    for size in sums:
        chances = (np.roll(chances, abs(size)) + np.roll(chances, -abs(size))) / 2
    at_least = chances[abs(np.arange(-reach, reach + 1)) >= abs(sum(sums))].sum()
    p = min(1.0, float(at_least))
    if 2 ** min(len(sums), 64) <= resamples:
        return p, 1e-9
    return p, 6 * math.sqrt(p * (1 - p) / resamples) + 3 / (resamples + 1)


def detectable_loss(n: int, gain_rate: float, alpha: float, power: float) -> float | None:
    """Smallest loss that exact McNemar detects with the given power; None if there is none."""
    if gain_rate >= 0.5:
        return None
    gains = np.arange(n + 1)
    chance = stats.binom.pmf(gains, n, gain_rate)
    gains, chance = gains[chance > 1e-13], chance[chance > 1e-13]
    fewest = np.array([_fewest_losses(int(g), alpha) for g in gains])

    def shortfall(loss: float) -> float:
        rate = min(1.0, (gain_rate + loss) / (1 - gain_rate))
        return float(chance @ stats.binom.sf(fewest - 1, n - gains, rate)) - power

    largest = 1 - 2 * gain_rate
    if shortfall(largest) < 0:
        return None
    return float(optimize.bisect(shortfall, 0.0, largest, xtol=1e-10))


def _fewest_losses(gains: int, alpha: float) -> int:
    """The fewest losses with which the test rejects, given the number of gains."""
    low, high = gains, 2 * gains + 64
    while low < high:
        middle = (low + high) // 2
        if 2 * stats.binom.cdf(gains, middle + gains, 0.5) <= alpha:
            high = middle
        else:
            low = middle + 1
    return low


def detectable_mean_loss(error: float, clusters: int, alpha: float, power: float) -> float | None:
    """Smallest mean difference that a t-test over clusters detects, by statsmodels' power."""
    if 2.0 ** (1 - clusters) > alpha:
        return None
    test = TTestPower()

    def shortfall(effect: float) -> float:  # in standard errors
        size = effect / math.sqrt(clusters)
        return float(test.power(size, clusters, alpha / 2, alternative="larger")) - power

    loss = optimize.bisect(shortfall, 0.0, 12.0, xtol=1e-10) * error
    return loss if loss <= 1 else None


Figure = tuple[float | None, float | None, float | None, int]
QUANTILES = ("median", "percentile_99", "percentile_99_9", "largest")
LARGEST_LOSS = 700.0  # nats per token; exp of more overflows


def shared_text_figures(rows: list[dict], settings: BootstrapSettings) -> dict[str, Figure]:
    """Perplexity, KL and top-1 agreement over the tokens of the shared text."""
    loss, low, high, tokens = token_figure(rows, "nll", settings)
    perplexity: Figure = (None, None, None, tokens)
    if loss is not None and loss <= LARGEST_LOSS:
        lowest, highest = (None if x is None else math.exp(x) for x in (low, high))
        perplexity = (math.exp(loss), lowest, highest, tokens)
    return {
        "perplexity": perplexity,
        "kl": token_figure(rows, "kl", settings),
        **_kl_figures([row.get("token_kl") for row in rows]),
        "top1_agreement": token_figure(rows, "top1_agreements", settings),
    }


def _kl_figures(passages: Sequence[list[float | None] | None]) -> dict[str, Figure]:
    """Quantiles, largest KL and what the largest hundredth holds; empty without KL by token."""
    if None in passages:
        return {}
    tokens = [kl for passage in passages for kl in passage or ()]
    values, n = [kl for kl in tokens if kl is not None], len(tokens)
    figures: dict[str, float | None] = dict.fromkeys((*QUANTILES, "tail_share"))
    if len(values) == n:
        summed, top = math.fsum(values), math.fsum(heapq.nlargest(math.ceil(n / 100), values))
        figures |= kl_quantiles(values) | {"tail_share": top / summed if summed > 0 else 0.0}
    return {f"kl_{name}": (value, None, None, n) for name, value in figures.items()}


def token_figure(rows: list[dict], key: str, settings: BootstrapSettings) -> Figure:
    """A mean per token over passages, weighted by their tokens."""
    tokens = [row["tokens"] for row in rows]
    if any(row[key] is None for row in rows):
        return None, None, None, sum(tokens)
    means = [row[key] / row["tokens"] for row in rows]
    names = [row["id"] for row in rows]
    mean = clustered_mean(means, names, settings, weights=tokens, interval=True)
    return mean.mean, mean.low, mean.high, sum(tokens)


def loss_change(baseline: list[dict], variant: list[dict], settings: BootstrapSettings) -> Figure:
    """Change of the loss per token, paired by passage."""
    before = {row["id"]: row for row in baseline}
    lengths = [{row["id"]: row["tokens"] for row in rows} for rows in (baseline, variant)]
    if lengths[0] != lengths[1]:
        return None, None, None, 0
    pairs = sorted(((row["id"], row, before[row["id"]]) for row in variant), key=lambda x: x[0])
    tokens = [row["tokens"] for _, row, _ in pairs]
    if any(None in (a["nll"], b["nll"]) for _, a, b in pairs):
        return None, None, None, sum(tokens)
    changes = [(a["nll"] - b["nll"]) / a["tokens"] for _, a, b in pairs]
    names = [name for name, _, _ in pairs]
    mean = clustered_mean(changes, names, settings, weights=tokens, interval=True)
    return mean.mean, mean.low, mean.high, sum(tokens)


def dataset_figures(
    adapter: str, rows: list[dict], settings: BootstrapSettings
) -> dict[str, Figure]:
    """The figures of one evaluation set by name, the main one first."""
    n, readable = len(rows), sum(row["status"] != "unparsed" for row in rows)
    figures: dict[str, Figure] = {}
    if adapter == "squad_v2":
        figures["exact_match"], figures["f1"] = (
            score_figure(rows, settings),
            _f1_figure(rows, settings),
        )
        for name, answerable in (("has_answer", True), ("no_answer", False)):
            if part := [row for row in rows if bool(row["golds"]) == answerable]:
                figures[f"{name}_exact_match"] = score_figure(part, settings)
                figures[f"{name}_f1"] = _f1_figure(part, settings)
    else:
        figures["accuracy"] = score_figure(rows, settings)
    if adapter == "openmath":
        gaps = [r["absolute_difference"] for r in rows if r["absolute_difference"] is not None]
        median = statistics.median(gaps) if gaps else None
        figures["median_absolute_difference"] = (median, None, None, len(gaps))
        figures["median_absolute_difference_coverage"] = _share_figure(len(gaps), n, settings)
    elif adapter not in ("squad_v2", "task"):
        figures["macro_f1"] = (_macro_f1(rows), None, None, n)
    return figures | {"format_success": _share_figure(readable, n, settings)}


def score_figure(rows: list[dict], settings: BootstrapSettings) -> Figure:
    """Share of right answers: Wilson's interval, or a bootstrap if items share passages."""
    n, right = len(rows), sum(row["score"] for row in rows)
    names = [row["cluster"] or row["id"] for row in rows]
    if len(set(names)) == 1:
        return right / n, None, None, n
    if len(set(names)) == n:
        return right / n, *wilson_limits(int(right), n, settings.confidence), n
    mean = clustered_mean([r["score"] for r in rows], names, settings, interval=True)
    limits = (mean.low, mean.high)
    if mean.low is None:  # no spread: the passages are the items
        limits = wilson_limits(round(mean.mean * mean.clusters), mean.clusters, settings.confidence)
    return mean.mean, *limits, n


def _f1_figure(rows: list[dict], settings: BootstrapSettings) -> Figure:
    names = [row["cluster"] or row["id"] for row in rows]
    mean = clustered_mean([row["f1"] for row in rows], names, settings, interval=True)
    return mean.mean, mean.low, mean.high, len(rows)


def _share_figure(part: int, n: int, settings: BootstrapSettings) -> Figure:
    return part / n, *wilson_limits(part, n, settings.confidence), n


def _macro_f1(rows: list[dict]) -> float:
    """Mean over the gold classes of 2 hits / (answers + golds of the class)."""
    gold_counts = Counter(row["golds"][0] for row in rows)
    answer_counts = Counter(row["parsed"] for row in rows)
    hits = Counter(row["parsed"] for row in rows if row["parsed"] == row["golds"][0])
    return math.fsum(2 * hits[c] / (answer_counts[c] + gold_counts[c]) for c in gold_counts) / len(
        gold_counts
    )


def best_fixed_score(adapter: str, rows: list[dict]) -> float:
    """The score of the best constant answer: one label, one text, or always abstaining.

    For word problems, golds count as equal only if their text is equal.
    """
    golds = [[_normalized_gold(gold, adapter) for gold in row["golds"]] for row in rows]
    gold_counts = Counter(text for texts in golds for text in set(texts))
    best = max(gold_counts.values(), default=0)
    if adapter == "squad_v2":
        best = max(best, sum(not texts for texts in golds))
    return best / len(rows)


def _normalized_gold(gold: str, adapter: str) -> str:
    if adapter == "arc" and gold.isdigit():
        return chr(ord("A") + int(gold) - 1)
    if adapter == "squad_v2":
        words = "".join(c for c in gold.lower() if c.isalnum() or c.isspace()).split()
        return " ".join(word for word in words if word not in ("a", "an", "the"))
    return gold.strip().removeprefix("$").replace(",", "").removesuffix(".0")
