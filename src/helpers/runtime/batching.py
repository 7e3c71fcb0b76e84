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


FEWEST_ROWS = 16  # of a matrix product; with fewer, libraries use kernels that sum in another order

# The tensor by device, its original device first; a model on several devices copies it.
_SEQUENCE_IDS: ContextVar[dict[torch.device, Tensor] | None] = ContextVar("owners", default=None)


@contextmanager
def use_sequence_ids(sequence_ids: Tensor | None) -> Iterator[None]:
    """Inside the context, the tokens of a forward pass belong to different texts.

    Args:
        owners: (tokens,) int64, the number of each token's text; None if there is one text.
    """
    token = _SEQUENCE_IDS.set(None if sequence_ids is None else {sequence_ids.device: sequence_ids})
    try:
        yield
    finally:
        _SEQUENCE_IDS.reset(token)


def current_sequence_ids(device: torch.device | None = None) -> Tensor | None:
    """(tokens,) number of each token's text in this forward pass; None if there is one text.

    Args:
        device: the device of the result, to which it is copied once; None for the original.
    """
    copies = _SEQUENCE_IDS.get()
    if copies is None:
        return None
    source_ids = next(iter(copies.values()))
    if device is None:
        return source_ids
    if device not in copies:
        copies[device] = source_ids.to(device)
    return copies[device]
