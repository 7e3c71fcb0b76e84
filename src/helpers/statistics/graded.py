"""Graded scores: how probable the right answer was, beside whether it was given.

A quantized model moves probabilities on every item and flips few answers, so that the same
items show losses three to five times smaller by their graded scores.

- Option sets: the probability of the right option, 0-1, renormalised over the options. Where
  the choice is made by log-likelihood per byte, each log-likelihood is brought to the mean
  length of the item's options. The order of the options is then that of the choice, and with
  options of one length it is the plain softmax. (Softmax of log-likelihoods per byte as such
  is nearly uniform, whatever the model knows.)
- Written answers: the gold answer's log-probability in nats a token, the best of several golds.

Whether a model has any ability to lose on a set is decided before any comparison.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from helpers.core.errors import StudyError
from helpers.statistics.clustered import MeanEstimate, clustered_mean
from helpers.statistics.draws import RecipeEstimate, recipe_estimate
from helpers.statistics.intervals import Interval, tost_from_interval

Estimate = MeanEstimate | RecipeEstimate
Unit = Literal["probability", "nats a token"]
GradedKind = Literal["worse", "better", "equivalent", "inconclusive", "uninformative"]
LETTERS, DIGITS = "ABCDE", "12345"


@dataclass(frozen=True)
class Scored:
    """Graded scores of one variant's answers to one set, in the order of the items' ids.

    Attributes:
        ids, clusters: (n,) of the items.
        scores: (n,) in `unit`.
        chance: (n,) what a model without the ability scores: 1 / options, or the score of
            another item's gold under the same prompt.
        lead: (n,) how far the score exceeds that of an answer which ignores the question: of
            options the model's own mean option probabilities, given to every item; of written
            answers the foil, NaN where an item has none.
    """

    ids: tuple[str, ...]
    clusters: tuple[str, ...]
    scores: NDArray[np.float64]
    chance: NDArray[np.float64]
    lead: NDArray[np.float64]
    unit: Unit


@dataclass(frozen=True)
class Ability:
    """Whether a model's scores depend on the question, so that it has something to lose.

    Attributes:
        mean: of the scores; `chance` is what it has to exceed where there are options.
        mean_low: one-sided limit of the mean.
        lead: over an answer that ignores the question, in `unit`; `lead_low` its one-sided limit.
    """

    able: bool
    mean: float
    mean_low: float
    chance: float
    lead: float
    lead_low: float
    unit: Unit


@dataclass(frozen=True)
class GradedComparison:
    """A difference of graded scores, variant minus baseline, with everything said about it.

    Attributes:
        interval: at the study's confidence.
        equivalence: at 1 - 2 alpha; equivalence is read from it.
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


def written_score(gold_loglikelihoods: Sequence[float], gold_tokens: Sequence[int]) -> float:
    """Log-probability of the best of several gold answers, in nats a token.

    Args:
        gold_loglikelihoods: summed log-probability of each gold, in nats.
        gold_tokens: tokens of each.
    """
    return max(s / t for s, t in zip(gold_loglikelihoods, gold_tokens, strict=True))


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
    score_rows = _options if "logprobs" in ordered[0] else _written
    ids = tuple(row["id"] for row in ordered)
    clusters = tuple(row["cluster"] or row["id"] for row in ordered)
    return Scored(ids, clusters, *score_rows(ordered, normalize))


def _options(rows: list[dict], normalize: str):
    """(scores, chance, lead, unit) of rows with options."""
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
    return (shares * right).sum(axis=1), chance, lead.sum(axis=1), "probability"


def _written(rows: list[dict], normalize: str):
    """(scores, chance, lead, unit) of rows with written answers, which are scored by the token."""
    del normalize
    scores = [written_score(r["gold_loglikelihoods"], r["gold_tokens"]) for r in rows]
    foils = np.array(
        [r["foil_loglikelihood"] / r["foil_tokens"] if r["foil_tokens"] else np.nan for r in rows]
    )
    chance = np.where(np.isnan(foils), np.nanmean(foils), foils)
    return np.array(scores), chance, np.array(scores) - foils, "nats a token"


def ability(found: Scored, *, confidence: float) -> Ability:
    """Whether a model's graded scores show an ability that could be lost.

    Options: the right option's mean probability lies above 1 / options, and above what the
    model's own mean option probabilities would score if every item were given them. The second
    is 0 for any constant answer, however biased the model and the set are. Written answers: the
    gold is more probable than another item's gold under the same prompt. One-sided limits,
    clustered.
    """
    average = clustered_mean(found.scores, found.clusters)
    kept = np.flatnonzero(~np.isnan(found.lead))
    lead = clustered_mean(found.lead[kept], [found.clusters[i] for i in kept])
    chance, mean_low = float(found.chance.mean()), average.lower_limit(confidence)
    lead_low = lead.lower_limit(confidence)
    above_chance = found.unit != "probability" or mean_low > chance
    return Ability(
        able=lead_low > 0 and above_chance,
        mean=average.mean,
        mean_low=mean_low,
        chance=chance,
        lead=lead.mean,
        lead_low=lead_low,
        unit=found.unit,
    )


def paired_differences(baseline: Scored, variant: Scored) -> NDArray[np.float64]:
    """(n,) score of the variant minus that of the baseline, item by item.

    Raises:
        StudyError: the items or the units differ.
    """
    if baseline.ids != variant.ids or baseline.unit != variant.unit:
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
        estimate, unit=baseline.unit, confidence=confidence, alpha=alpha, power=power,
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
        recipe_estimate(changes, baseline.clusters), unit=baseline.unit, confidence=confidence,
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
        equivalence=estimate.interval(1 - 2 * round(1 - confidence, 12)),
        p=estimate.p_value(),
        detectable=estimate.detectable(alpha=alpha, power=power),
        identical=identical,
        estimate=estimate,
    )


def judge_graded(
    found: GradedComparison,
    *,
    able: bool,
    adjusted_p: float,
    margin: float,
    higher_is_better: bool = True,
) -> GradedKind:
    """The verdict word of one comparison of graded scores, KL, or a difference of differences.

    Args:
        able: the models compared have the ability; else nothing could be lost.
        adjusted_p: after Holm over the declared comparisons; `found.p` where there is one.
        margin: largest harmless difference, in the unit of the scores.
        higher_is_better: False for KL and losses.
    """
    alpha = round(1 - found.interval.confidence, 12)
    if not able:
        return "uninformative"
    if adjusted_p <= alpha and found.delta != 0:
        return "better" if (found.delta > 0) == higher_is_better else "worse"
    inside = tost_from_interval(found.equivalence, margin=margin, alpha=alpha)
    return "equivalent" if inside else "inconclusive"


def token_probability(nats: ArrayLike) -> NDArray[np.float64]:
    """Geometric mean probability a token, 0-1: what written answers are pooled with options by."""
    return np.exp(np.asarray(nats, dtype=np.float64))
