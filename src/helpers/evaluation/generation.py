"""Greedy generation in length-sorted batches whose finished rows leave at once.

What all prompts of a batch begin with (the system turn, the worked examples) is computed
once and its cache repeated for every row.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache

from helpers.sources.batching import pad, token_budget_batches


@dataclass(frozen=True)
class Generated:
    """What one prompt was answered.

    Attributes:
        tokens: the new tokens, without the one that ended the turn.
        finish_reason: `stop` (end of turn), `length` (the cap), `nonfinite` (broken logits).
    """

    tokens: list[int]
    finish_reason: str


@torch.inference_mode()
def generate_greedy(
    model,
    prompts: list[list[int]],
    *,
    max_new_tokens: int,
    stop_tokens: set[int],
    batch_tokens: int,
) -> Iterator[tuple[int, Generated]]:
    """Yield (prompt index, answer) as rows finish.

    Args:
        model: a causal language model of transformers, in evaluation mode.
        prompts: token ids, each at least one.
        max_new_tokens: the cap on new tokens of one answer.
        stop_tokens: ids that end an answer.
        batch_tokens: rows × (longest prompt + cap) of one batch at most.
    """
    lengths = [len(prompt) + max_new_tokens for prompt in prompts]
    for batch in token_budget_batches(lengths, batch_tokens=batch_tokens):
        rows = [prompts[i] for i in batch]
        for row, answer in _generate_batch(model, rows, max_new_tokens, stop_tokens):
            yield batch[row], answer


def _generate_batch(model, rows: list[list[int]], max_new_tokens: int, stop_tokens: set[int]):
    """Yield (row, answer) for one left-padded batch."""
    cache, shared = _shared_prefix(model, rows)
    rests, device = [row[shared:] for row in rows], model.device
    tokens = pad(rests, value=0, side="left", device=device)
    mask = pad([[1] * len(rest) for rest in rests], value=0, side="left", device=device)
    mask = torch.cat([mask.new_ones(len(rows), shared), mask], dim=1)
    alive = list(range(len(rows)))
    answers: list[list[int]] = [[] for _ in rows]
    while alive:
        logits = _next_logits(model, tokens, mask, cache)  # (alive, vocabulary)
        chosen, finite = logits.argmax(-1).tolist(), torch.isfinite(logits).all(-1).tolist()
        kept = []
        for place, row in enumerate(alive):
            reason = _advance(answers[row], chosen[place], finite[place], stop_tokens)
            if reason is None and len(answers[row]) == max_new_tokens:
                reason = "length"
            if reason:
                yield row, Generated(answers[row], reason)
            else:
                kept.append(place)
        if len(kept) < len(alive):
            places = torch.tensor(kept, dtype=torch.long, device=device)
            alive = [alive[place] for place in kept]
            mask = mask[places]
            if kept:
                cache.batch_select_indices(places)
        tokens = torch.tensor([[answers[row][-1]] for row in alive], device=device)
        mask = torch.cat([mask, mask.new_ones(len(alive), 1)], dim=1)


def _shared_prefix(model, rows: list[list[int]]) -> tuple[DynamicCache, int]:
    """(cache repeated for every row, length of what all rows begin with).

    At least one token of every row is left to be read.
    """
    length = min(len(row) for row in rows) - 1
    first, last = min(rows), max(rows)
    shared = next((i for i in range(length) if first[i] != last[i]), length)
    cache = DynamicCache(config=model.config)
    if len(rows) == 1 or shared == 0:
        return cache, 0
    prefix = torch.tensor([rows[0][:shared]], device=model.device)
    model.base_model(input_ids=prefix, past_key_values=cache, use_cache=True)
    cache.batch_repeat_interleave(len(rows))
    return cache, shared


def _advance(answer: list[int], token: int, finite: bool, stop_tokens: set[int]) -> str | None:
    """Append the token to the answer, or say why the answer ends before it."""
    if not finite:
        return "nonfinite"
    if token in stop_tokens:
        return "stop"
    answer.append(token)
    return None


def _next_logits(model, tokens: Tensor, mask: Tensor, cache: DynamicCache) -> Tensor:
    """(rows, vocabulary) float32 logits after the last token of each row."""
    positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -tokens.shape[1] :]
    hidden = model.base_model(
        input_ids=tokens,
        attention_mask=mask,
        position_ids=positions,
        past_key_values=cache,
        use_cache=True,
    ).last_hidden_state
    return model.get_output_embeddings()(hidden[:, -1]).float()
