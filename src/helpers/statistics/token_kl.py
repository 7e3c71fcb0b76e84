"""KL between the float model and a variant, token by token, as the field reads it.

The mean hides where the divergence is. A variant that is the float model but for one token in
a thousand and one that differs a little everywhere may have one mean, and are two different
models to use. Quantiles are of tokens, over all passages together.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from helpers.core.errors import StudyError


@dataclass(frozen=True)
class TokenPlace:
    """One token of the shared text: its passage, its place there (0 is the first scored)."""

    passage: str
    token: int
    kl: float


@dataclass(frozen=True)
class TokenKl:
    """KL in nats over all tokens of the shared text.

    Attributes:
        percentile_99, percentile_99_9: inverse of the empirical distribution (no interpolation):
            the smallest value that at least this share of the tokens does not exceed.
        tail: the tokens with the largest KL, largest first.
        tail_share: part of the summed KL that the largest 1 % of the tokens hold, 0-1.
    """

    tokens: int
    mean: float
    median: float
    percentile_99: float
    percentile_99_9: float
    largest: float
    tail: tuple[TokenPlace, ...]
    tail_share: float


def token_kl(passages: Mapping[str, Sequence[float]], *, shown: int) -> TokenKl:
    """Mean, quantiles, largest value and tail of the KL of every token.

    Args:
        passages: by passage id, KL in nats of each scored token, in reading order.
        shown: how many tokens of the tail are named.

    Raises:
        StudyError: there are no tokens, or one is not finite.
    """
    names = [name for name, row in sorted(passages.items()) for _ in row]
    places = [i for _, row in sorted(passages.items()) for i in range(len(row))]
    values = np.array([x for _, row in sorted(passages.items()) for x in row], dtype=np.float64)
    if not values.size:
        raise StudyError("the shared text has no tokens; run 03_evaluation again")
    if not np.isfinite(values).all():
        raise StudyError("the KL of a token is not finite; the variant is invalid")
    order = np.argsort(-values, kind="stable")
    median, high, highest = np.quantile(values, (0.5, 0.99, 0.999), method="inverted_cdf")
    total, most = values.sum(), max(1, round(0.01 * values.size))
    return TokenKl(
        tokens=values.size,
        mean=float(values.mean()),
        median=float(median),
        percentile_99=float(high),
        percentile_99_9=float(highest),
        largest=float(values.max()),
        tail=tuple(TokenPlace(names[i], places[i], float(values[i])) for i in order[:shown]),
        tail_share=float(values[order[:most]].sum() / total) if total > 0 else 0.0,
    )
