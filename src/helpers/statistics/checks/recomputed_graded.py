"""Recomputes graded scores from the rows of answers, with other algorithms.

The second opinion on `graded` and on the means of `intervals`, of whose
code nothing is used here. The bias-reduced error and its degrees of freedom come from each
cluster's block of the hat matrix, by eigenvectors (Pustejovsky and Tipton, J. Bus. Econ. Stat.
36 (2018) 672), Hall's correction from the roots of its cubic, the detectable difference from
statsmodels' power; statsmodels' own cluster-robust error stands beside. Probabilities are 0-1,
log-probabilities nats.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

import numpy as np
import statsmodels.api as sm
from numpy.typing import ArrayLike
from scipy import linalg, optimize, special, stats
from statsmodels.stats.power import TTestPower

Rows = Sequence[Mapping]
Pair = tuple[Rows, Rows]  # of the baseline and the variant


@dataclass(frozen=True)
class Mean:
    """An estimated mean: standard error, degrees of freedom and skewness of the estimate.

    `plain_error` is statsmodels' own cluster-robust one, which is a little smaller.
    """

    value: float
    error: float
    degrees: float
    skewness: float
    n: int
    clusters: int
    plain_error: float

    def limits(self, confidence: float) -> tuple[float, float]:
        """The outer ones of Student's and Hall's limits."""
        top = stats.t(self.degrees).ppf(1 - (1 - confidence) / 2)
        ends = [(q, _root(self.skewness, q)) for q in (top, -top)]
        return self.value - self.error * max(ends[0]), self.value - self.error * min(ends[1])

    def p(self) -> float:
        """Two-sided, that the mean is 0: the larger of the two."""
        if self.error == 0:
            return 1.0 if self.value == 0 else 0.5 ** (self.clusters - 1)
        t = self.value / self.error
        bent = np.polyval(_cubic(self.skewness), t)
        law = stats.t(self.degrees)
        tails = [law.sf(x) if t > 0 else law.cdf(x) for x in (t, bent)]
        return float(min(1.0, 2 * max(tails)))

    def detectable(self, alpha: float, power: float) -> float | None:
        """Smallest true difference found with this power, by statsmodels."""
        if self.error == 0:
            return None
        test = TTestPower()

        def shortfall(effect: float) -> float:  # in standard errors; one observation each
            return float(test.power(effect, 1, alpha / 2, df=self.degrees, alternative="larger"))

        high = 4.0
        while shortfall(high) < power:
            high *= 2
        errors = optimize.bisect(lambda x: shortfall(x) - power, 0.0, high, xtol=1e-10)
        return float(errors) * self.error


def _cubic(skewness: float) -> list[float]:
    return [skewness**2 / 27, skewness / 3, 1.0, skewness / 6]


def _root(skewness: float, quantile: float) -> float:
    """Where Hall's cubic takes a quantile; it rises throughout, so there is one."""
    if abs(skewness) < 1e-7:
        return quantile - skewness / 6 - skewness * quantile**2 / 3
    coefficients = _cubic(skewness)
    coefficients[-1] -= quantile
    roots = np.roots(coefficients)
    return float(roots[np.argmin(np.abs(roots.imag))].real)


def mean_of(
    values: ArrayLike,
    clusters: Sequence[str],
    weights: ArrayLike | None = None,
    *,
    plain: bool = True,
) -> Mean:
    """The mean of clustered values; `plain` fits statsmodels' least squares beside it."""
    y = np.asarray(values, dtype=float)
    w = np.ones(len(y)) if weights is None else np.asarray(weights, dtype=float)
    places: dict[str, list[int]] = {name: [] for name in sorted({str(c) for c in clusters})}
    for i, name in enumerate(clusters):
        places[str(name)].append(i)
    value, bread, root = float(np.average(y, weights=w)), 1 / w.sum(), np.sqrt(w)
    turned = _turned([root[at] for at in places.values()], bread)
    means = [float(np.average(y[at], weights=w[at])) for at in places.values()]
    if max(means) - min(means) <= 1e-12 * max(map(abs, means)):
        return Mean(value, 0.0, _degrees(turned, bread), 0.0, len(y), len(places), 0.0)
    moved = root * (y - value)
    parts, raw = [], []
    for at, (vector, own) in zip(places.values(), turned, strict=True):
        parts.append(bread * vector @ moved[at])
        raw.append(bread * own @ moved[at])
    error = math.sqrt(math.fsum(x * x for x in parts))
    skewness = math.fsum(x**3 for x in raw) / error**3
    robust = _plain_error(y, w, places) if plain else math.nan
    return Mean(value, error, _degrees(turned, bread), skewness, len(y), len(places), robust)


def _plain_error(y: np.ndarray, w: np.ndarray, places: Mapping[str, list[int]]) -> float:
    """statsmodels' cluster-robust standard error of the mean."""
    code = np.empty(len(y), dtype=int)
    for number, at in enumerate(places.values()):
        code[at] = number
    model = sm.WLS(y, np.ones((len(y), 1)), weights=w)
    return float(model.fit(cov_type="cluster", cov_kwds={"groups": code}).bse[0])


def _turned(roots: list[np.ndarray], bread: float) -> list[tuple[np.ndarray, np.ndarray]]:
    """By cluster, (I - H) ** -1/2 times the roots of its weights, and these roots.

    H is the cluster's block of the hat matrix. Clusters with the same weights share the work.
    """
    known: dict[bytes, np.ndarray] = {}
    for own in roots:
        if own.tobytes() not in known:
            values, vectors = linalg.eigh(np.eye(own.size) - bread * np.outer(own, own))
            known[own.tobytes()] = (vectors / np.sqrt(values)) @ vectors.T @ own
    return [(known[own.tobytes()], own) for own in roots]


def _degrees(turned: list[tuple[np.ndarray, np.ndarray]], bread: float) -> float:
    """Satterthwaite's degrees: squared trace over squared norm of the variance's matrix.

    Its entries are products of the columns (I - H)' A sqrt(w) of two clusters, of which only
    the length of A sqrt(w) and its projection on sqrt(w) are needed.
    """
    lengths = np.array([vector @ vector for vector, _ in turned])
    shadows = np.array([vector @ own for vector, own in turned]) ** 2  # (clusters,)
    diagonal = lengths - bread * shadows
    rest = bread**2 * (shadows.sum() ** 2 - np.sum(shadows**2))
    return float(diagonal.sum() ** 2 / (np.sum(diagonal**2) + rest))


def _sum_of(means: Sequence[Mean], weights: Sequence[float]) -> Mean:
    """Independent means weighted and added, with Welch's degrees."""
    variances = [(w * m.error) ** 2 for w, m in zip(weights, means, strict=True)]
    whole = math.fsum(variances)
    value = math.fsum(w * m.value for w, m in zip(weights, means, strict=True))
    n, clusters = sum(m.n for m in means), sum(m.clusters for m in means)
    if whole == 0:
        return Mean(value, 0.0, sum(m.degrees for m in means), 0.0, n, clusters, 0.0)
    below = math.fsum(v * v / m.degrees for v, m in zip(variances, means, strict=True))
    third = math.fsum((w * m.error) ** 3 * m.skewness for w, m in zip(weights, means, strict=True))
    plain = math.sqrt(
        math.fsum((w * m.plain_error) ** 2 for w, m in zip(weights, means, strict=True))
    )
    return Mean(value, whole**0.5, whole**2 / below, third / whole**1.5, n, clusters, plain)


def item_scores(rows: Rows, normalize: str) -> dict[str, float]:
    """Graded score of every item that has one; a text without a foil has none."""
    return {
        row["id"]: _score(row, normalize) for row in rows if "logprobs" in row or row["foil_tokens"]
    }


def _score(row: Mapping, normalize: str) -> float:
    if "logprobs" not in row:
        pairs = zip(row["gold_loglikelihoods"], row["gold_tokens"], strict=True)
        gold = max(total / count for total, count in pairs)
        foil = row["foil_loglikelihood"] / row["foil_tokens"]
        return math.exp(foil) * math.expm1(gold - foil)
    shares = _shares(row, normalize)
    return float(sum(shares[i] for i in _right(row)))


def _shares(row: Mapping, normalize: str) -> np.ndarray:
    sums = np.array(row["logprobs"], dtype=float)
    if normalize == "bytes":
        sizes = np.array(row["option_bytes"], dtype=float)
        sums = sums * (sizes.sum() / sizes.size) / sizes
    return np.exp(special.log_softmax(sums))


def _right(row: Mapping) -> list[int]:
    if "labels" in row:
        return [i for i, label in enumerate(row["labels"]) if label in row["golds"]]
    return [{"yes": 0, "no": 1}.get(g, "ABCDE12345".find(g) % 5) for g in row["golds"]]


def _clusters(rows: Rows) -> dict[str, str]:
    return {row["id"]: row["cluster"] or row["id"] for row in rows}


def _changes(pair: Pair, normalize: str) -> dict[str, float]:
    before, after = (item_scores(rows, normalize) for rows in pair)
    if before.keys() != after.keys():
        raise ValueError("they have different items")
    return {name: after[name] - before[name] for name in sorted(before)}


def difference(pair: Pair, normalize: str) -> Mean:
    """Mean difference of graded scores, variant minus baseline."""
    changes, clusters = _changes(pair, normalize), _clusters(pair[0])
    return mean_of(list(changes.values()), [clusters[name] for name in changes])


def cost_difference(base: Pair, finetuned: Pair, normalize: str) -> Mean:
    """What quantization changes for the fine-tuned model less what it changes for the base."""
    changes = [_changes(pair, normalize) for pair in (base, finetuned)]
    if changes[0].keys() != changes[1].keys():
        raise ValueError("they have different items")
    clusters = _clusters(base[0])
    values = [changes[1][name] - changes[0][name] for name in changes[0]]
    return mean_of(values, [clusters[name] for name in changes[0]])


def kl_difference(base: Rows, finetuned: Rows, key: str = "kl") -> Mean:
    """KL a token, fine-tuned minus base; one value a passage, weighed by its tokens."""
    before, after = ({row["id"]: row for row in rows} for rows in (base, finetuned))
    if before.keys() != after.keys():
        raise ValueError("they have different passages")
    names = sorted(before)
    values = [(after[k][key] - before[k][key]) / before[k]["tokens"] for k in names]
    return mean_of(values, names, [before[k]["tokens"] for k in names])


def pooled(pairs: Mapping[str, Pair], normalize: Mapping[str, str]) -> Mean:
    """Plain average over sets of the mean change of probability."""
    means = []
    for name, pair in pairs.items():
        changes, clusters = _changes(pair, normalize[name]), _clusters(pair[0])
        means.append(mean_of(list(changes.values()), [clusters[i] for i in changes]))
    return _sum_of(means, [1 / len(means)] * len(means))


def pooled_cost_difference(
    base: Mapping[str, Pair], finetuned: Mapping[str, Pair], normalize: Mapping[str, str]
) -> Mean:
    """Plain average over sets of the difference of differences in probability."""
    means = []
    for name, pair in base.items():
        first = _changes(pair, normalize[name])
        second = _changes(finetuned[name], normalize[name])
        clusters = _clusters(pair[0])
        values = [second[i] - first[i] for i in first]
        means.append(mean_of(values, [clusters[i] for i in first]))
    return _sum_of(means, [1 / len(means)] * len(means))


@dataclass(frozen=True)
class RecipeMean:
    """A mean over the draws of a recipe and over items, which every draw answers.

    Attributes:
        deltas: mean of each draw.
        items: the mean over draws, with the items' whole error.
        noise: variance that the items add to the mean of one draw.
    """

    deltas: tuple[float, ...]
    items: Mean
    noise: float

    @property
    def between(self) -> float:
        """Standard deviation between draws without the items' noise."""
        return math.sqrt(max(0.0, statistics.variance(self.deltas) - self.noise))

    @property
    def draws_error(self) -> float:
        return statistics.stdev(self.deltas) / math.sqrt(len(self.deltas))

    @property
    def items_error(self) -> float:
        return math.sqrt(max(0.0, self.items.error**2 - self.noise / len(self.deltas)))

    def limits(self, confidence: float) -> tuple[float, float]:
        """The reach by items and the reach by draws, as two sides of a right angle."""
        low, high = replace(self.items, error=self.items_error).limits(confidence)
        law = stats.t(len(self.deltas) - 1)
        reach = law.isf((1 - confidence) / 2) * self.draws_error
        value = self.items.value
        return value - math.dist((value, reach), (low, 0)), value + math.dist(
            (high, reach), (value, 0)
        )

    def p(self) -> float:
        """Two-sided, that the mean is 0: where the interval begins to hold it."""
        if self.items_error == 0 and self.draws_error == 0:
            return self.items.p()
        value = self.items.value

        def is_outside(p: float) -> bool:
            low, high = self.limits(1 - p)
            return low > 0 or high < 0

        least, most = 1e-6, 1 - 1e-6
        if value == 0 or not is_outside(most):
            return 1.0
        if is_outside(least):
            return least
        while most - least > 1e-11:
            middle = (least + most) / 2
            least, most = (least, middle) if is_outside(middle) else (middle, most)
        return (least + most) / 2

    def detectable(self, alpha: float, power: float) -> float | None:
        error = math.hypot(self.items_error, self.draws_error)
        if error == 0:
            return self.items.detectable(alpha, power)
        low, high = self.limits(1 - alpha)
        return (high - low) / 2 + stats.norm.isf(1 - power) * error


Changes = Mapping[str, float]  # by item


def recipe_mean(
    sets: Sequence[tuple[Sequence[Changes], Mapping[str, str], Mapping[str, float] | None]],
) -> RecipeMean:
    """Plain average over sets of what a recipe changes.

    Args:
        sets: the changes of every draw by item, the items' clusters, and their weights.
    """
    items, noises, deltas = [], [], []
    for draws, clusters, weights in sets:
        names = sorted(draws[0])
        groups = [clusters[name] for name in names]
        sizes = None if weights is None else [weights[name] for name in names]
        average = {name: statistics.fmean(draw[name] for draw in draws) for name in names}
        items.append(mean_of(list(average.values()), groups, sizes, plain=False))
        residuals = [[draw[name] - average[name] for name in names] for draw in draws]
        squares = [mean_of(row, groups, sizes, plain=False).error ** 2 for row in residuals]
        noises.append(math.fsum(squares) / (len(draws) - 1) if len(draws) > 1 else 0.0)
        deltas.append([statistics.fmean([d[name] for name in names], sizes) for d in draws])
    share = 1 / len(sets)
    whole = items[0] if len(items) == 1 else _sum_of(items, [share] * len(items))
    means = tuple(statistics.fmean(of_draw) for of_draw in zip(*deltas, strict=True))
    return RecipeMean(means, whole, share**2 * math.fsum(noises))


def score_changes(pair: Pair, normalize: str) -> tuple[Changes, Mapping[str, str]]:
    """What a variant changes of every item's graded score, and the items' clusters."""
    return _changes(pair, normalize), _clusters(pair[0])


def able(rows: Rows, normalize: str, confidence: float) -> bool:
    """Whether the scores depend on the question, by one-sided limits."""
    two_sided = 2 * confidence - 1
    clusters = _clusters(rows)
    ordered = sorted(rows, key=lambda row: row["id"])
    scores = item_scores(ordered, normalize)
    if "logprobs" not in ordered[0]:
        groups = [clusters[name] for name in scores]
        return bool(mean_of(list(scores.values()), groups).limits(two_sided)[0] > 0)
    groups = [clusters[row["id"]] for row in ordered]
    chance = np.mean([len(_right(row)) / len(row["logprobs"]) for row in ordered])
    most = max(len(row["logprobs"]) for row in ordered)
    leads = np.zeros(len(ordered))
    for option in range(most):
        given = np.array([dict(enumerate(_shares(r, normalize))).get(option, 0.0) for r in ordered])
        right = np.array([float(option in _right(row)) for row in ordered])
        leads += (given - np.mean(given)) * (right - np.mean(right))
    low = mean_of([scores[row["id"]] for row in ordered], groups).limits(two_sided)[0]
    return bool(low > chance and mean_of(leads, groups).limits(two_sided)[0] > 0)


def recovered(
    pairs: Mapping[str, Pair], normalize: Mapping[str, str], confidence: float
) -> tuple[float, float, float] | None:
    """(share, low, high) of the float model's pooled score above chance that is left."""
    sets = [_above_chance(pair, normalize[name]) for name, pair in pairs.items()]

    def mean(share: float) -> Mean:
        """Of what is left less that share of what there was."""
        parts = [
            mean_of(after - share * before, groups, plain=False) for before, after, groups in sets
        ]
        return _sum_of(parts, [1 / len(parts)] * len(parts))

    there = _sum_of([mean_of(b, g) for b, _, g in sets], [1 / len(sets)] * len(sets))
    if there.limits(confidence)[0] <= 0:
        return None
    value = mean(0.0).value / there.value
    ends = []
    for side, sign in ((0, -1), (1, 1)):
        far, step = value, 0.003
        while sign * mean(far).limits(confidence)[side] > 0:
            far, step = far + sign * step, 2 * step
            if step > 100:
                return None
        near, outside = sorted((value, far))
        if near == outside:
            ends.append(value)
            continue
        solved = optimize.toms748(lambda x, s=side: mean(x).limits(confidence)[s], near, outside)
        ends.append(float(solved))
    return value, ends[0], ends[1]


def _above_chance(pair: Pair, normalize: str) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Per item: the float model's and the variant's probability above chance, and the cluster."""
    before, after = (item_scores(rows, normalize) for rows in pair)
    rows = {row["id"]: row for row in pair[0]}
    if "logprobs" in pair[0][0]:
        chance = {k: len(_right(r)) / len(r["logprobs"]) for k, r in rows.items()}
    else:
        chance = dict.fromkeys(rows, 0.0)
    names, clusters = sorted(before), _clusters(pair[0])
    gaps = [np.array([side[k] - chance[k] for k in names]) for side in (before, after)]
    return gaps[0], gaps[1], [clusters[k] for k in names]


def kl_quantiles(values: Sequence[float]) -> dict[str, float]:
    """Median, 99th and 99.9th percentile and largest KL of a token, by sorting.

    The quantile q of n values is at place q (n - 1) of the sorted ones, counted from 0, on the
    straight line between its neighbours.
    """
    ordered = sorted(values)

    def at(share: Fraction) -> float:
        place = share * (len(ordered) - 1)
        below = math.floor(place)
        part = float(place - below)
        above = min(below + 1, len(ordered) - 1)
        return (1 - part) * ordered[below] + part * ordered[above]

    shares = {"median": Fraction(1, 2), "percentile_99": Fraction(99, 100)}
    shares["percentile_99_9"] = Fraction(999, 1000)
    return {name: at(share) for name, share in shares.items()} | {"largest": ordered[-1]}
