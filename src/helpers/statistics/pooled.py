"""Graded figures beyond one set: sets pooled, base against fine-tuned model, and KL by token.

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
and "inconclusive") need not. Nothing is said where either model has no ability on the set.

The mean KL hides where the divergence is. A variant that is the float model but for one token in a
thousand and one that differs a little everywhere may have one mean, and are two different models
to use. Quantiles are of tokens, over all passages together, and interpolate linearly between two
neighbours in the sorted values (numpy's default; type 7 of Hyndman and Fan, Am. Stat. 50 (1996)
361). If the KL of one token is not finite there is no quantile, and the token is named.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq

from helpers.core.errors import StudyError
from helpers.statistics.clustered import MeanEstimate, clustered_mean, combine
from helpers.statistics.graded import Scored, paired_differences
from helpers.statistics.intervals import Interval


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
