"""Graded scores: how probable the right answer was; over draws, over sets, and KL by token.

A quantized model moves probabilities on every item and flips few answers, so that the same items
show losses three to five times smaller by their graded scores.

- Option sets: the probability of the right option, 0-1, renormalised over the options. Where the
  choice is made by log-likelihood per byte, each log-likelihood is brought to the mean length of
  the item's options. The order of the options is then that of the choice, and with options of one
  length it is the plain softmax. (Softmax of log-likelihoods per byte as such is nearly uniform,
  whatever the model knows.)
- Written answers: the gold answer's probability less its foil's, the gold of another item after the
  same prompt. Each is the geometric mean over its tokens; of several golds the best counts. The
  gold alone also moves with the model's taste for the form of answers: bfloat16 alone moved it by
  0.06 nats a token on one set, and the foil as much. A choice between the two, gold / (gold +
  foil), would say nothing about a strong model, which never takes the foil.

Whether a model has any ability to lose on a set is decided before any comparison.

A checkpoint is one draw of its recipe: another calibration sample or another rounding gives
another one. Every draw answers the same items, so that items and draws are crossed. The mean over
both varies with the items drawn and with the checkpoints made, and a claim about the recipe needs
both. The half-widths that items and draws would have alone are added in quadrature (Zou and
Donner, Stat. Med. 27 (2008) 1693): each keeps its own degrees of freedom, of which the draws have
few. Adding variances with Satterthwaite's degrees instead covered 83 % of simulated studies of two
draws. With four draws or more the interval covers 95 to 97 %; with two or three up to 99 %, since
two checkpoints hardly show a spread. One draw says nothing about the spread between draws, and the
result says so.

Sets are strata: each set's mean has its own error, and the pooled mean is their plain average,
declared beforehand. Which sets are informative is decided before any comparison. Every score is in
probabilities, so that a collapsed answer counts at most as a lost one.

*Recovery*, the number the field quotes, is the pooled score above chance as a share of the float
model's. Its interval is Fieller's idea with this project's limits: the shares r for which the mean
of (variant - chance) - r (float - chance) may be 0 (Fieller, J. R. Stat. Soc. B 16 (1954) 175).
Where the float model is not clearly above chance there is none.

Whether fine-tuning raises the cost of quantization is a difference of differences. Both models
answer the same items, so each item gives one number: what the fine-tuned model lost to
quantization minus what the base model lost. Its mean is tested as any other paired difference is.
Two costs whose intervals overlap may still differ, and two verdicts that read differently ("worse"
and "inconclusive") need not. Nothing is said where either model has no ability on the set. Whether
a rotation lowers the cost is the same question of a rotated model and its start.

The mean KL hides where the divergence is. A variant that is the float model but for one token in a
thousand and one that differs a little everywhere may have one mean, and are two different models
to use. Quantiles are of tokens, over all passages together, and interpolate linearly between two
neighbours in the sorted values (numpy's default; type 7 of Hyndman and Fan, Am. Stat. 50 (1996)
361). If the KL of one token is not finite there is no quantile, and the token is named.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import brentq
from scipy.special import stdtrit
from scipy.stats import norm

from helpers.core.errors import StudyError
from helpers.evaluation.scoring import foil_score, gold_score
from helpers.statistics.intervals import (
    ROUNDING,
    Interval,
    MeanEstimate,
    clustered_mean,
    combine,
    require_fraction,
    tost_from_interval,
)

SMALLEST_P = 1e-6
# Of alpha, at which each of the two tests for equivalence stands: at alpha itself a skewed loss as
# large as the margin was called equivalent in up to 5.8 % of simulated studies.
EQUIVALENCE_LEVEL = 0.9


@dataclass(frozen=True)
class RecipeEstimate:
    """The mean difference of a recipe over draws and items.

    Attributes:
        items: the mean over draws with the spread between items; all of it, of one draw.
        draws: how many there are; with one, the limits hold for that checkpoint alone.
        draw_means: (draws,) mean difference of each.
        between_draws: standard deviation between draws, less what the items' noise adds; None
            with one draw.
        draws_error: standard error of the mean from the observed spread of the draws' means.
        items_error: standard error from the items, less what `draws_error` holds already.
    """

    items: MeanEstimate
    draws: int
    draw_means: tuple[float, ...]
    between_draws: float | None
    draws_error: float
    items_error: float

    @property
    def mean(self) -> float:
        """Over draws and items, in the unit of the scores."""
        return self.items.mean

    @property
    def n(self) -> int:
        """Items of each draw."""
        return self.items.n

    @property
    def clusters(self) -> int:
        """Independent units of items."""
        return self.items.clusters

    @property
    def standard_error(self) -> float:
        """From items and draws."""
        return math.hypot(self.items_error, self.draws_error)

    @property
    def degenerate(self) -> bool:
        """Nothing varies, between items or draws."""
        return self.standard_error == 0

    def interval(self, confidence: float) -> Interval:
        """Two-sided interval for draws and items not yet seen."""
        require_fraction("confidence", confidence)
        if self.draws == 1:
            return self.items.interval(confidence)
        own = replace(self.items, standard_error=self.items_error).interval(confidence)
        by_draws = self.draws_error * float(stdtrit(self.draws - 1, (1 + confidence) / 2))
        low = self.mean - math.hypot(self.mean - own.low, by_draws)
        return Interval(low, self.mean + math.hypot(own.high - self.mean, by_draws), confidence)

    def p_value(self, null: float = 0.0) -> float:
        """Two-sided p that the recipe's mean is `null`: where the interval begins to hold it."""
        if self.draws == 1 or self.degenerate:
            return self.items.p_value(null)
        if self.mean == null:
            return 1.0

        def excess(p: float) -> float:  # above 0 where the interval leaves `null` out
            interval = self.interval(1 - p)
            return interval.low - null if self.mean > null else null - interval.high

        if excess(SMALLEST_P) >= 0:
            return SMALLEST_P
        if excess(1 - SMALLEST_P) <= 0:
            return 1.0
        return float(brentq(excess, SMALLEST_P, 1 - SMALLEST_P, xtol=1e-9))

    def detectable(self, *, alpha: float, power: float) -> float | None:
        """Smallest true difference of the recipe found with about this power."""
        if self.draws == 1 or self.degenerate:
            return self.items.detectable(alpha=alpha, power=power)
        interval = self.interval(1 - alpha)
        return (interval.high - interval.low) / 2 + float(norm.ppf(power)) * self.standard_error


@dataclass(frozen=True)
class DrawsOfSet:
    """What every checkpoint of a recipe does to every item of one set.

    Attributes:
        differences: (draws, n) variant minus baseline, one row a checkpoint, items in one order.
        clusters: (n,) the passage of each item.
        weights: (n,) such as its tokens; None weighs items alike.
    """

    differences: NDArray[np.float64]
    clusters: Sequence[str | int]
    weights: ArrayLike | None = None

    @property
    def means(self) -> NDArray[np.float64]:
        """(draws,) mean difference of each checkpoint."""
        sizes = np.ones(self.differences.shape[1]) if self.weights is None else self.weights
        weights = np.asarray(sizes, dtype=np.float64)
        return np.sum(self.differences * weights, axis=1) / weights.sum()

    @property
    def items(self) -> MeanEstimate:
        """The mean over draws, with the spread between items."""
        return clustered_mean(self.differences.mean(axis=0), self.clusters, self.weights)

    @property
    def noise(self) -> float:
        """Variance that the items' own reactions to each draw add to a draw's mean."""
        apart = self.differences - self.differences.mean(axis=0)
        errors = [clustered_mean(row, self.clusters, self.weights).standard_error for row in apart]
        return float(np.mean(np.square(errors))) * len(apart) / (len(apart) - 1)


def recipe_estimate(
    differences: ArrayLike, clusters: Sequence[str | int], weights: ArrayLike | None = None
) -> RecipeEstimate:
    """The recipe's mean difference with limits that hold for draws not yet made.

    Args:
        differences: (draws, n) variant minus baseline, one row a checkpoint, items in one order.
        clusters: (n,) the passage of each item.
        weights: (n,) positive weight of each item, such as its tokens; None weighs alike.

    Raises:
        ValueError: it is not a table with a row a draw, or as `intervals.cluster_sums`.
    """
    table = np.asarray(differences, dtype=np.float64)
    if table.ndim != 2 or table.shape[0] < 1:
        raise ValueError(f"differences have shape {table.shape}: give one row a draw")
    return pooled_recipe([DrawsOfSet(table, clusters, weights)])


def pooled_recipe(sets: Sequence[DrawsOfSet]) -> RecipeEstimate:
    """The recipe's mean difference averaged over sets, which the same checkpoints answered.

    The sets' items are independent; a checkpoint may be good or bad on all sets at once, so that
    its pooled means are what varies between draws.
    """
    share = 1 / len(sets)
    means = np.mean([of_set.means for of_set in sets], axis=0)  # (draws,)
    items = sets[0].items
    if len(sets) > 1:
        items = combine([of_set.items for of_set in sets], [share] * len(sets))
    estimate = RecipeEstimate(
        items, len(means), tuple(map(float, means)), None, 0.0, items.standard_error
    )  # fmt: skip
    if len(means) == 1:
        return estimate
    noise = sum(share**2 * of_set.noise for of_set in sets)
    apart = np.ptp(means) > ROUNDING * np.abs(means).max()
    spread = float(np.var(means, ddof=1)) if apart else 0.0
    rest = max(0.0, items.standard_error**2 - noise / len(means))
    return replace(
        estimate,
        between_draws=math.sqrt(max(0.0, spread - noise)),
        draws_error=math.sqrt(spread / len(means)),
        items_error=math.sqrt(rest),
    )


Estimate = MeanEstimate | RecipeEstimate
Unit = Literal["probability", "nats a token"]  # of graded scores; of KL
GradedKind = Literal["worse", "better", "equivalent", "inconclusive", "uninformative"]
LETTERS, DIGITS = "ABCDE", "12345"


@dataclass(frozen=True)
class Scored:
    """Graded scores of one variant's answers to one set, in the order of the items' ids.

    Attributes:
        ids, clusters: (n,) of the items; a written answer without a foil has no score.
        scores: (n,) probabilities, 0-1; of written answers differences of two, -1 to 1.
        chance: (n,) what a model without the ability scores: 1 / options, or 0 against a foil.
        lead: (n,) how far the score exceeds that of an answer which ignores the question: of
            options the model's own mean option probabilities, given to every item; of written
            answers 0.
    """

    ids: tuple[str, ...]
    clusters: tuple[str, ...]
    scores: NDArray[np.float64]
    chance: NDArray[np.float64]
    lead: NDArray[np.float64]


@dataclass(frozen=True)
class Ability:
    """Whether a model's scores depend on the question, so that it has something to lose.

    Attributes:
        mean: of the scores; `chance` is what it has to exceed where there are options.
        mean_low: one-sided limit of the mean.
        lead: over an answer that ignores the question; `lead_low` its one-sided limit.
    """

    able: bool
    mean: float
    mean_low: float
    chance: float
    lead: float
    lead_low: float


@dataclass(frozen=True)
class GradedComparison:
    """A difference of graded scores, variant minus baseline, with everything said about it.

    Attributes:
        interval: at the study's confidence.
        equivalence: the interval of two one-sided tests at `EQUIVALENCE_LEVEL` alpha.
        p: two-sided, unadjusted; it enters Holm's family.
        detectable: smallest true difference found with the wanted power; None without spread.
    """

    unit: Unit
    n: int
    clusters: int
    delta: float
    interval: Interval
    equivalence: Interval
    p: float
    detectable: float | None
    identical: bool
    estimate: Estimate

    def is_inside(self, margin: float) -> bool:
        """Whether two one-sided tests place the difference inside ±margin."""
        alpha = (1 - self.equivalence.confidence) / 2
        return tost_from_interval(self.equivalence, margin=margin, alpha=alpha)


def option_probabilities(
    loglikelihoods: ArrayLike, lengths: ArrayLike | None = None
) -> NDArray[np.float64]:
    """Probability of each option, renormalised over the options as the choice is made.

    Args:
        loglikelihoods: (options,) summed log-probability of each, in nats.
        lengths: (options,) UTF-8 bytes of each where the choice is made per byte; else None.

    Returns:
        (options,) probabilities that sum to 1.
    """
    sums = np.asarray(loglikelihoods, dtype=np.float64)
    if lengths is not None:
        count = np.asarray(lengths, dtype=np.float64)
        if count.shape != sums.shape or count.min() <= 0:
            raise ValueError(f"{count.size} lengths for {sums.size} options: give one above 0 each")
        sums = sums / count * count.mean()
    if not np.isfinite(sums).all():
        raise ValueError("an option's log-likelihood is not finite: such an answer is invalid")
    shares = np.exp(sums - sums.max())
    return shares / shares.sum()


def right_options(row: dict) -> list[int]:
    """Positions of the right options of an option row, by its labels where it has them."""
    golds = row["golds"]
    labels = row.get("labels")
    if labels is None:  # rows from before labels were kept
        count = len(row["logprobs"])
        known = (["yes", "no"], list(LETTERS[:count]), list(DIGITS[:count]))
        labels = next((x for x in known if set(golds) <= set(x)), [])
    places = [i for i, label in enumerate(labels) if label in golds]
    if not places:
        raise StudyError(
            f"item {row['id']}: no option is labelled {golds}; run 03_evaluation again"
        )
    return places


def missing_scores(rows: Sequence[dict]) -> str | None:
    """Why these rows have no graded scores, in words; None if every row has one."""
    for row in rows:
        if "logprobs" in row:
            continue
        golds = row.get("gold_loglikelihoods")
        if not golds:
            return f"item {row['id']} has no log-probabilities"
        if None in golds or (row.get("foil_tokens") and row["foil_loglikelihood"] is None):
            return f"item {row['id']} has a log-probability that is not finite"
    if rows and not any("logprobs" in row or row.get("foil_tokens") for row in rows):
        return "no item has another item's gold to be held against"
    return None


def scored(rows: Sequence[dict], *, normalize: str = "none") -> Scored:
    """The graded scores of one variant's rows of one set, of either protocol.

    Args:
        rows: predictions; option rows hold `logprobs` and, if `normalize` is bytes,
            `option_bytes`; rows of written answers `gold_loglikelihoods`, `gold_tokens`,
            `foil_loglikelihood` and `foil_tokens`, both None without a foil.

    Raises:
        StudyError: a row lacks what its score is made from.
    """
    if not rows:
        raise StudyError("there are no predictions to score; run 03_evaluation")
    if problem := missing_scores(rows):
        raise StudyError(f"{problem}; run 03_evaluation again")
    ordered = sorted(rows, key=lambda row: row["id"])
    if "logprobs" in ordered[0]:
        figures = _options(ordered, normalize)
    else:
        ordered = [row for row in ordered if row["foil_tokens"]]
        figures = _written(ordered)
    ids = tuple(row["id"] for row in ordered)
    clusters = tuple(row["cluster"] or row["id"] for row in ordered)
    return Scored(ids, clusters, *figures)


def _options(rows: list[dict], normalize: str):
    """(scores, chance, lead) of rows with options."""
    most = max(len(row["logprobs"]) for row in rows)
    shares, right = np.zeros((len(rows), most)), np.zeros((len(rows), most))
    for i, row in enumerate(rows):
        if normalize == "bytes" and "option_bytes" not in row:
            raise StudyError(f"item {row['id']} has no option_bytes; run 03_evaluation again")
        lengths = row["option_bytes"] if normalize == "bytes" else None
        shares[i, : len(row["logprobs"])] = option_probabilities(row["logprobs"], lengths)
        right[i, right_options(row)] = 1
    chance = right.sum(axis=1) / [len(row["logprobs"]) for row in rows]
    lead = (shares - shares.mean(axis=0)) * (right - right.mean(axis=0))  # (items, options)
    return (shares * right).sum(axis=1), chance, lead.sum(axis=1)


CONTRASTED = (gold_score, foil_score)  # each in nats a token


def _written(rows: list[dict]):
    """(scores, chance, lead) of rows with written answers, each with a foil."""
    golds, foils = (np.array([score(row) for row in rows], dtype=float) for score in CONTRASTED)
    scores = np.exp(golds) - np.exp(foils)
    return scores, np.zeros(len(rows)), scores


def ability(scored_answers: Scored, *, confidence: float) -> Ability:
    """Whether a model's graded scores show an ability that could be lost.

    Options: the right option's mean probability lies above 1 / options, and above what the
    model's own mean option probabilities would score if every item were given them. The second
    is 0 for any constant answer, however biased the model and the set are. Written answers: the
    gold is on average more probable than its foil. One-sided limits, clustered.
    """
    average = clustered_mean(scored_answers.scores, scored_answers.clusters)
    lead = clustered_mean(scored_answers.lead, scored_answers.clusters)
    chance, mean_low = float(scored_answers.chance.mean()), average.lower_limit(confidence)
    lead_low = lead.lower_limit(confidence)
    return Ability(
        able=lead_low > 0 and mean_low > chance,
        mean=average.mean,
        mean_low=mean_low,
        chance=chance,
        lead=lead.mean,
        lead_low=lead_low,
    )


def paired_differences(baseline: Scored, variant: Scored) -> NDArray[np.float64]:
    """(n,) score of the variant minus that of the baseline, item by item.

    Raises:
        StudyError: the items differ.
    """
    if baseline.ids != variant.ids:
        raise StudyError("two variants answered different items; run 03_evaluation again")
    return variant.scores - baseline.scores


def compare_graded(
    baseline: Scored, variant: Scored, *, confidence: float, alpha: float, power: float
) -> GradedComparison:
    """Two variants' graded scores on the same items, clustered as the baseline's items are.

    Args:
        alpha: two-sided level the detectable difference is computed for.
    """
    changes = paired_differences(baseline, variant)
    estimate = clustered_mean(changes, baseline.clusters)
    return comparison_of(
        estimate, unit="probability", confidence=confidence, alpha=alpha, power=power,
        identical=not changes.any(),
    )  # fmt: skip


def compare_draws(
    baseline: Scored, draws: Sequence[Scored], *, confidence: float, alpha: float, power: float
) -> GradedComparison:
    """A recipe's checkpoints on the same items; its limits hold for draws not yet made.

    Of one draw they hold for that checkpoint alone: `estimate.draws` is 1.
    """
    changes = np.array([paired_differences(baseline, draw) for draw in draws])
    return comparison_of(
        recipe_estimate(changes, baseline.clusters), unit="probability", confidence=confidence,
        alpha=alpha, power=power, identical=not changes.any(),
    )  # fmt: skip


def comparison_of(
    estimate: Estimate,
    *,
    unit: Unit,
    confidence: float,
    alpha: float,
    power: float,
    identical: bool = False,
) -> GradedComparison:
    """Everything that is said about one estimated difference."""
    return GradedComparison(
        unit=unit,
        n=estimate.n,
        clusters=estimate.clusters,
        delta=estimate.mean,
        interval=estimate.interval(confidence),
        equivalence=estimate.interval(1 - 2 * EQUIVALENCE_LEVEL * round(1 - confidence, 12)),
        p=estimate.p_value(),
        detectable=estimate.detectable(alpha=alpha, power=power),
        identical=identical,
        estimate=estimate,
    )


def judge_graded(
    comparison: GradedComparison,
    *,
    able: bool,
    adjusted_p: float,
    margin: float,
    higher_is_better: bool = True,
) -> GradedKind:
    """The verdict word of one comparison of graded scores, KL, or a difference of differences.

    Args:
        able: the models compared have the ability; else nothing could be lost.
        adjusted_p: after Holm over the declared comparisons; `comparison.p` where there is one.
        margin: largest harmless difference, in the unit of the scores.
        higher_is_better: False for KL and losses.
    """
    alpha = round(1 - comparison.interval.confidence, 12)
    if not able:
        return "uninformative"
    if adjusted_p <= alpha and comparison.delta != 0:
        return "better" if (comparison.delta > 0) == higher_is_better else "worse"
    return "equivalent" if comparison.is_inside(margin) else "inconclusive"


def cost_difference(base: tuple[Scored, Scored], finetuned: tuple[Scored, Scored]) -> MeanEstimate:
    """(finetuned variant - finetuned baseline) - (base variant - base baseline), by item.

    Negative: quantization costs the fine-tuned model more.

    Args:
        base, finetuned: the baseline's and the variant's scores of one set.

    Raises:
        StudyError: the four answered different items.
    """
    if base[0].ids != finetuned[0].ids:
        raise StudyError("the two models answered different items; run 03_evaluation again")
    changes = paired_differences(*finetuned) - paired_differences(*base)
    return clustered_mean(changes, base[0].clusters)


def kl_difference(
    base: Sequence[Mapping], finetuned: Sequence[Mapping], *, key: str = "kl"
) -> MeanEstimate:
    """KL a token of the fine-tuned variant minus that of the base variant, by passage.

    Each is held against its own float model. Positive: quantization costs the fine-tuned
    model more.

    Args:
        base, finetuned: rows of the shared text: `id`, `tokens`, and the sum over the
            passage under `key`, in nats.

    Raises:
        StudyError: the two read different passages or tokens, or a sum is not finite.
    """
    before, after = ({row["id"]: row for row in rows} for rows in (base, finetuned))
    tokens = {name: row["tokens"] for name, row in before.items()}
    if tokens != {name: row["tokens"] for name, row in after.items()}:
        raise StudyError("the two models read other tokens of the shared text; nothing to compare")
    names = sorted(tokens)
    sums = [[side[name][key] for name in names] for side in (before, after)]
    if any(value is None for side in sums for value in side):
        raise StudyError(f"a passage has no finite {key}; the variant is invalid")
    counts = np.array([tokens[name] for name in names], dtype=float)
    changes = (np.array(sums[1]) - np.array(sums[0])) / counts  # (passages,) nats a token
    return clustered_mean(changes, names, counts)


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


def pooled_difference(pairs: Mapping[str, tuple[Scored, Scored]]) -> MeanEstimate:
    """Mean over sets of the mean difference, variant minus baseline, in probability.

    Args:
        pairs: by informative set, the baseline's and the variant's scores.

    Raises:
        ValueError: there is no set.
    """
    firsts = {name: pair[0] for name, pair in pairs.items()}
    return _pool(pairs, lambda name: paired_differences(*pairs[name]), firsts)


def pooled_cost_difference(
    base: Mapping[str, tuple[Scored, Scored]], finetuned: Mapping[str, tuple[Scored, Scored]]
) -> MeanEstimate:
    """The difference of differences pooled over the sets that are informative for both models."""
    return _pool(
        base,
        lambda name: paired_differences(*finetuned[name]) - paired_differences(*base[name]),
        {name: pair[0] for name, pair in base.items()},
    )


def recovery(pairs: Mapping[str, tuple[Scored, Scored]], *, confidence: float) -> Recovery | None:
    """Pooled score of the variant above chance, as a share of the baseline's.

    Chance is 1 / options, and 0 of an answer written out, from which the foil is taken off.

    Returns:
        None where the float model is not clearly above chance, or no limit is finite.
    """
    if not pairs:
        return None
    firsts = {name: pair[0] for name, pair in pairs.items()}
    floats, gaps = {}, {}
    for name, (baseline, variant) in pairs.items():
        floats[name] = baseline.scores - baseline.chance
        gaps[name] = paired_differences(baseline, variant) + floats[name]
    above = _pool(pairs, floats.__getitem__, firsts)
    if above.interval(confidence).low <= 0:
        return None
    value = _pool(pairs, gaps.__getitem__, firsts).mean / above.mean

    def limits(share: float) -> Interval:
        gap = _pool(pairs, lambda name: gaps[name] - share * floats[name], firsts)
        return gap.interval(confidence)

    low = _crossing(lambda share: limits(share).low, value, -1)
    high = _crossing(lambda share: limits(share).high, value, 1)
    if low is None or high is None:
        return None
    return Recovery(value, Interval(low, high, confidence), above.mean, tuple(pairs))


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


@dataclass(frozen=True)
class TokenPlace:
    """One token of the shared text: its passage, its place there (0 is the first scored).

    `kl` is in nats, and None if it is not finite.
    """

    passage: str
    token: int
    kl: float | None


@dataclass(frozen=True)
class TokenKl:
    """KL in nats over all tokens of the shared text; the figures are None if one is not finite.

    Attributes:
        nonfinite: the number of tokens whose KL is not finite.
        tail: the tokens with the largest KL, largest first; before them those that are not finite.
        tail_share: part of the summed KL that the largest 1 % of the tokens (rounded up) hold, 0-1.
    """

    tokens: int
    nonfinite: int
    median: float | None
    percentile_99: float | None
    percentile_99_9: float | None
    largest: float | None
    tail_share: float | None
    tail: tuple[TokenPlace, ...]


def token_kl(passages: Mapping[str, Sequence[float | None]], *, shown: int) -> TokenKl:
    """Quantiles, largest value and tail of the KL of every token.

    Args:
        passages: by passage id, KL in nats of each scored token, in reading order; None or NaN
            where it is not finite.
        shown: how many tokens of the tail are named.

    Raises:
        StudyError: there are no tokens.
    """
    places = [
        TokenPlace(name, i, None if kl is None or not np.isfinite(kl) else float(kl))
        for name, row in sorted(passages.items())
        for i, kl in enumerate(row)
    ]
    if not places:
        raise StudyError("the shared text has no tokens; run 03_evaluation again")
    tail = sorted(places, key=lambda at: -np.inf if at.kl is None else -at.kl)  # stable
    nonfinite = sum(at.kl is None for at in places)
    if nonfinite:
        return TokenKl(len(places), nonfinite, None, None, None, None, None, tuple(tail[:shown]))
    values = np.array([at.kl for at in tail])  # largest first
    median, high, highest, largest = map(float, np.quantile(values, (0.5, 0.99, 0.999, 1)))
    total, most = float(values.sum()), -(-values.size // 100)
    share = float(values[:most].sum()) / total if total > 0 else 0.0
    return TokenKl(len(places), 0, median, high, highest, largest, share, tuple(tail[:shown]))
