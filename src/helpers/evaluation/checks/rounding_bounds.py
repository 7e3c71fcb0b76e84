"""How far two computations of one thing are apart, in parts of what rounding allows."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from helpers.core.gates import Gate

ROUNDINGS = 6.0  # multiple of the rounding error measured in transformers
FEWEST_EPS = 8.0  # the least limit on states, in eps of the declared type
SOFTMAX_EPS = 16.0  # allowed bias of a float32 softmax over a large vocabulary, in eps
STORED = 2e-6  # rounding of log-probabilities stored with six decimals


@dataclass
class Comparison:
    """Differences of one kind, as multiples of their limits.

    Attributes:
        number: of compared values.
        worst: the largest difference, as a multiple of its limit.
        where: the name of that value.
        words: that difference and its limit, in words.
        errors: reasons why values could not be compared.
    """

    number: int = 0
    worst: float = 0.0
    where: str = ""
    words: str = ""
    errors: list[str] = field(default_factory=list)

    def add(self, difference: float, limit: float, where: str) -> None:
        self.number += 1
        part = difference / limit if math.isfinite(difference) else math.inf
        if not part <= self.worst:
            self.worst, self.where = part, where
            self.words = f"{difference:.2g}, at most {limit:.2g}"

    def cannot(self, where: str, error: Exception) -> None:
        """Note that a value could not be compared."""
        reason = " ".join(str(error).split())[:160]
        self.errors.append(f"{where}: {type(error).__name__}: {reason}")

    def gate(self, name: str, compared: str, unit: str) -> Gate:
        """The gate that all differences lie within rounding."""
        measured = f"{self.number:,} {compared} compared"
        if self.words:
            measured += f"; the furthest from transformers' ({self.where}) {self.words} {unit}"
        if self.errors:
            measured += f"; {len(self.errors)} could not be: {self.errors[0]}"
        passed = self.number > 0 and self.worst <= 1 and not self.errors
        return Gate(name, passed, measured, "all of them within rounding")


def each_logprob(logits: Tensor, targets: Sequence[int]) -> Tensor:
    """(rows,) float64 log-probability of each target."""
    return logits.double().log_softmax(-1).gather(1, torch.tensor(targets)[:, None])[:, 0]


def rms(values: Tensor) -> float:
    """Root mean square."""
    return float(values.double().square().mean().sqrt())


def furthest_row(values: Tensor, reference: Tensor) -> float:
    """The largest relative difference of a row, by norms; infinite for NaN."""
    size = reference.double().norm(dim=1).clamp(min=1e-30)
    parts = (values.double() - reference.double()).norm(dim=1) / size
    return float(parts.nan_to_num(torch.inf).max())


def sum_limit(change: float, logits: Tensor, count: int, dtype: torch.dtype) -> float:
    """The rounding error allowed in a summed log-probability.

    Roundings of logits have random signs; those of a float32 softmax may be biased.

    Args:
        change: root mean square change of a logit by rounding.
        logits: (tokens, vocabulary), for their size.
        count: of tokens.
        dtype: the announced float type.
    """
    size = float(logits.abs().max())
    one_sided = SOFTMAX_EPS * torch.finfo(torch.float32).eps * size
    each = ROUNDINGS * change + torch.finfo(dtype).eps * size
    return count**0.5 * each + count * one_sided + STORED


def tie_margin(change: float, logits: Tensor, dtype: torch.dtype) -> float:
    """The logit difference within which rounding may swap the two likeliest tokens.

    Args:
        change: the largest change of a logit by rounding.
    """
    return 3 * change + torch.finfo(dtype).eps * float(logits.abs().max())
