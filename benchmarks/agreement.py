"""Whether two ways gave the same answers: choices, log-probabilities, written answers.

Two correct INT8 implementations, or two precisions, do not answer every item alike
(NOTES.md, 2026-11-23); there the share is told and nothing is claimed.
"""

from dataclasses import dataclass

LOGPROB_TOLERANCE = 1e-3  # nats, of a whole option's sum, between two float32 ways


@dataclass(frozen=True)
class Agreement:
    """The measured agreement, and whether it suffices; None if it cannot be expected."""

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
    text = f"{same} of {len(pairs)} choices, log-probabilities within {gap:.1g}"
    if not exact:
        return Agreement(f"{text}; another precision")
    holds = same == len(pairs) and gap <= LOGPROB_TOLERANCE
    return Agreement(f"{text} (tolerance {LOGPROB_TOLERANCE:g})", holds)


def texts(ours: list[list[str]], peer: list[list[str]], *, exact: bool) -> Agreement:
    """Written answers of all items, character by character, over all rounds."""
    pairs = _pairs(ours, peer)
    same = sum(a == b for a, b in pairs)
    rounds = f" in {len(ours)} rounds" if len(ours) > 1 else ""
    text = f"{same} of {len(pairs)} answers{rounds}"
    if not exact:
        return Agreement(f"{text}; another rounding")
    return Agreement(text, same == len(pairs))


def _pairs(ours: list[list], peer: list[list]) -> list[tuple]:
    """Item by item, over all rounds."""
    return [
        pair
        for a_round, b_round in zip(ours, peer, strict=True)
        for pair in zip(a_round, b_round, strict=True)
    ]
