"""Whether two ways gave the same answers: choices, log-probabilities, written answers.

Two correct INT8 implementations, or two precisions, do not answer every item alike
(NOTES.md, 2026-11-23); there the share is told and nothing is claimed.
"""

from dataclasses import dataclass

LOGPROB_TOLERANCE = 1e-3  # nats, of a whole option's sum, between two float32 ways


@dataclass(frozen=True)
class Agreement:
    """What was found, and whether that is agreement; None where none can be asked for."""

    text: str
    holds: bool | None = None


def choices(ours: list[list[dict]], peer: list[list[dict]], *, exact: bool) -> Agreement:
    """Chosen options and log-probabilities of all items, over all rounds.

    Args:
        ours: predictions with `parsed` and `logprobs`, a list of them a round.
        peer: the same items in the same order.
        exact: whether both are float32 and have to agree.
    """
    pairs = _pairs(ours, peer)
    same = sum(a["parsed"] == b["parsed"] for a, b in pairs)
    gap = max(
        abs(x - y) for a, b in pairs for x, y in zip(a["logprobs"], b["logprobs"], strict=True)
    )
    text = f"{_share(same, pairs, ours)} choices, log-probabilities within {gap:.1g}"
    if not exact:
        return Agreement(f"{text}; another precision")
    holds = same == len(pairs) and gap <= LOGPROB_TOLERANCE
    return Agreement(f"{text} (tolerance {LOGPROB_TOLERANCE:g})", holds)


def texts(ours: list[list[str]], peer: list[list[str]], *, exact: bool) -> Agreement:
    """Written answers of all items, character by character, over all rounds."""
    pairs = _pairs(ours, peer)
    same = sum(a == b for a, b in pairs)
    text = f"{_share(same, pairs, ours)} answers"
    if not exact:
        return Agreement(f"{text}; another rounding")
    return Agreement(text, same == len(pairs))


def _pairs(ours: list[list], peer: list[list]) -> list[tuple]:
    return [
        pair
        for a_round, b_round in zip(ours, peer, strict=True)
        for pair in zip(a_round, b_round, strict=True)
    ]


def _share(same: int, pairs: list, rounds: list) -> str:
    """The same number of items in every round, or the total over the rounds."""
    if same % len(rounds) == 0:
        return f"{same // len(rounds)} of {len(pairs) // len(rounds)}"
    return f"{same} of {len(pairs)} (over {len(rounds)} rounds)"
