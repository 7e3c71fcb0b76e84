"""Log-likelihood of each option as the continuation of an item's prompt.

An item's context is computed once: context and options are one row in which an option
sees the context and itself, under a tree-shaped attention mask, at the positions it
would have alone. The head runs only where a scored token is predicted.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from helpers.sources.batching import pad, token_budget_batches

PADDING = -1


@dataclass(frozen=True)
class OptionTokens:
    """One item as token ids: a context and at least one non-empty continuation of it."""

    context: list[int]
    options: list[list[int]]

    def __post_init__(self):
        if not self.context or not self.options or not all(self.options):
            raise ValueError("an item needs a context and options of at least one token each")


@dataclass(frozen=True)
class Row:
    """The packed row: what is read, where, and which logits are wanted for which token.

    `segments` is 0 for the context and k for the k-th option.
    """

    tokens: list[int]
    positions: list[int]
    segments: list[int]
    sources: list[int]
    targets: list[int]
    owners: list[int]


def pack(item: OptionTokens) -> Row:
    """Lay an item out as one row; an option's last token is predicted but never read."""
    length = len(item.context)
    row = Row(list(item.context), list(range(length)), [0] * length, [], [], [])
    for k, option in enumerate(item.options):
        start = len(row.tokens)
        row.tokens.extend(option[:-1])
        row.positions.extend(range(length, length + len(option) - 1))
        row.segments.extend([k + 1] * (len(option) - 1))
        row.sources.extend([length - 1, *range(start, start + len(option) - 1)])
        row.targets.extend(option)
        row.owners.extend([k] * len(option))
    return row


def tree_mask(segments: Tensor) -> Tensor:
    """(rows, 1, width, width) bool: who may look at whom.

    Args:
        segments: (rows, width) 0 for context, k for option k, -1 for padding.
    """
    width = segments.shape[1]
    causal = torch.ones(width, width, dtype=torch.bool, device=segments.device).tril()
    same = segments[:, :, None] == segments[:, None, :]
    context = (segments == 0)[:, None, :]
    allowed = causal & (same | (context & (segments != PADDING)[:, :, None]))
    return allowed[:, None]  # padding sees padding only, so that no row is empty


def _additive(allowed: Tensor, dtype) -> Tensor:
    """The mask as a number added to attention scores: eager attention adds even a bool one."""
    return torch.zeros_like(allowed, dtype=dtype).masked_fill(~allowed, torch.finfo(dtype).min)


@torch.inference_mode()
def option_loglikelihoods(
    model, items: list[OptionTokens], *, batch_tokens: int
) -> Iterator[tuple[int, list[float]]]:
    """Yield (item index, summed log-probability of each option) as batches finish.

    Args:
        model: a causal language model of transformers, in evaluation mode.
        items: contexts and options as token ids.
        batch_tokens: rows × width of one forward pass at most.
    """
    rows = [pack(item) for item in items]
    for batch in token_budget_batches([len(r.tokens) for r in rows], batch_tokens=batch_tokens):
        chosen = [rows[i] for i in batch]
        scores = _score_batch(model, chosen)
        for index, row, logprobs in zip(batch, chosen, scores, strict=True):
            owners = torch.tensor(row.owners)
            sums = [logprobs[owners == k].sum().item() for k in range(len(items[index].options))]
            yield index, sums


def _score_batch(model, rows: list[Row]) -> list[Tensor]:
    """For each row, (targets,) float64 log-probability of every scored token."""
    device = model.device
    tokens = pad([r.tokens for r in rows], value=0, side="right", device=device)
    positions = pad([r.positions for r in rows], value=0, side="right", device=device)
    segments = pad([r.segments for r in rows], value=PADDING, side="right", device=device)
    hidden = model.base_model(
        input_ids=tokens,
        attention_mask=_additive(tree_mask(segments), model.dtype),
        position_ids=positions,
        use_cache=False,
    ).last_hidden_state  # (rows, width, hidden)
    scores = []
    for i, row in enumerate(rows):
        wanted, inverse = torch.unique(torch.tensor(row.sources), return_inverse=True)
        logits = model.get_output_embeddings()(hidden[i, wanted.to(device)])
        logprobs = logits.float().log_softmax(-1).cpu()  # (wanted, vocabulary)
        scores.append(logprobs[inverse, torch.tensor(row.targets)].double())
    return scores
