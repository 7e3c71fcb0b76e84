"""Batches by token budget over length-sorted sequences, padding, and whose a token is."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor


def token_budget_batches(lengths: list[int], *, batch_tokens: int) -> list[list[int]]:
    """Indices of sequences, longest first, so that rows × longest row ≤ `batch_tokens`.

    A sequence longer than the budget is a batch of its own. Ties keep their order.
    """
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    batches: list[list[int]] = []
    for index in order:
        longest = lengths[batches[-1][0]] if batches else 0
        if batches and (len(batches[-1]) + 1) * longest <= batch_tokens:
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches


def pad(rows: list[list[int]], *, value: int, side: str, device) -> Tensor:
    """(rows, longest) int64, short rows filled with `value` on the given side."""
    width = max(len(row) for row in rows)
    filled = torch.full((len(rows), width), value, dtype=torch.long)
    for i, row in enumerate(rows):
        if side == "right":
            filled[i, : len(row)] = torch.tensor(row, dtype=torch.long)
        else:
            filled[i, width - len(row) :] = torch.tensor(row, dtype=torch.long)
    return filled.to(device)


FEWEST_ROWS = 16  # of a matrix product; below, libraries switch to kernels that sum otherwise

# The tensor by device, the device it was given on first; a spread model reads it on several.
_OWNERS: ContextVar[dict[torch.device, Tensor] | None] = ContextVar("owners", default=None)


@contextmanager
def use_sequence_ids(owners: Tensor | None) -> Iterator[None]:
    """Inside, the tokens of a forward pass belong to different texts.

    Args:
        owners: (tokens,) int64, a number for every text; None if all are one text's.
    """
    before = _OWNERS.set(None if owners is None else {owners.device: owners})
    try:
        yield
    finally:
        _OWNERS.reset(before)


def current_sequence_ids(device: torch.device | None = None) -> Tensor | None:
    """(tokens,) whose each token of the running forward pass is; None if all are one text's.

    Args:
        device: where it is needed, copied there once for all; None for where it was given.
    """
    copies = _OWNERS.get()
    if copies is None:
        return None
    given = next(iter(copies.values()))
    if device is None:
        return given
    if device not in copies:
        copies[device] = given.to(device)
    return copies[device]
