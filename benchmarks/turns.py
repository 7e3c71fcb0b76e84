"""Several ways of doing one thing, timed in turns, and the comparisons drawn from that.

What the machine does beside it then falls on all of them; a round gives one ratio, and
the rounds give its spread.
"""

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

from benchmarks.agreement import Agreement


@dataclass(frozen=True)
class Turns:
    """Seconds and answers of each candidate, round by round."""

    seconds: dict[Any, list[float]]
    answers: dict[Any, list[Any]]


@dataclass(frozen=True)
class Comparison:
    """One row of the table.

    Attributes:
        what: what is done.
        ours: our way of it; peer: the other.
        ours_spent: what ours took in each round, in `unit`; peer_spent likewise, empty
            where the peer cannot run here.
        goal: the ratio peer / ours that is wanted at least; None if none was set.
        agreement: whether the answers are the same.
    """

    what: str
    ours: str
    peer: str
    ours_spent: list[float]
    peer_spent: list[float]
    goal: float | None
    agreement: Agreement
    unit: str = "s"

    @property
    def ratios(self) -> list[float]:
        """The peer's time divided by ours, in each round."""
        return [p / o for o, p in zip(self.ours_spent, self.peer_spent, strict=False)]

    @property
    def ratio(self) -> float | None:
        """The median ratio of the rounds."""
        return median(self.ratios) if self.ratios else None

    @property
    def reached(self) -> bool | None:
        """Whether the goal is reached; None without a goal or a peer."""
        return None if self.goal is None or self.ratio is None else self.ratio >= self.goal


def take_turns(ways: dict[Any, Callable[[int], Any]], *, rounds: int) -> Turns:
    """Run every candidate once per round, in opposite order every other round.

    Args:
        ways: by name; each is told the number of the round, from 0.
        rounds: how many.
    """
    seconds: dict[Any, list[float]] = {name: [] for name in ways}
    answers: dict[Any, list[Any]] = {name: [] for name in ways}
    for turn in range(rounds):
        for name in list(ways) if turn % 2 == 0 else reversed(ways):
            gc.collect()
            started = time.perf_counter()
            answers[name].append(ways[name](turn))
            seconds[name].append(time.perf_counter() - started)
            print(f"  {name}: {seconds[name][-1]:.2f} s", flush=True)
    return Turns(seconds, answers)
