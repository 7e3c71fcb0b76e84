"""Log-likelihood of each option as the continuation of an item's prompt.

An item's context is computed once: its options follow it as branches that do not see
each other, at the positions they would have alone. What several contexts begin with is
computed once for all of them. The head runs only where a scored token is predicted.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from helpers.inference import single_sequence
from helpers.inference.packed_attention import use_packed_attention
from helpers.inference.packed_rows import TRUNK, Segment, logits_at, packed_batches, read, split_at
from helpers.runtime.rotary_positions import reads_alone

HEAD_ROWS = 128  # positions whose logits are in memory at once


@dataclass(frozen=True)
class OptionTokens:
    """One item as token ids: a context and at least one non-empty continuation of it.

    Attributes:
        cuts: token counts at which the context may be shared with other items.
    """

    context: list[int]
    options: list[list[int]]
    cuts: tuple[int, ...] = ()

    def __len__(self) -> int:
        """Tokens of the context and the longest option."""
        return len(self.context) + max(map(len, self.options))

    def __post_init__(self):
        if not self.context or not self.options or not all(self.options):
            raise ValueError("an item needs a context and options of at least one token each")


def option_segment(item: OptionTokens, before: tuple[Segment, ...]) -> Segment:
    """The segment of an item: the rest of its context, then its options as branches.

    The last token of an option is predicted but never read.
    """
    length = len(item.context)
    tokens = item.context[sum(len(s.tokens) for s in before) :]
    positions = list(range(length - len(tokens), length))
    branches = [TRUNK] * len(tokens)
    for k, option in enumerate(item.options, start=TRUNK + 1):
        tokens = tokens + option[:-1]
        positions += range(length, length + len(option) - 1)
        branches += [k] * (len(option) - 1)
    return Segment(tokens, before, branches, positions)


def scored_tokens(item: OptionTokens, branches: list[int]) -> list[tuple[int, int, int]]:
    """(predicting place in the segment, token, option index) of every scored token."""
    trunk = branches.count(TRUNK)
    scored, branch_start = [], trunk
    for k, option in enumerate(item.options):
        predicting = [trunk - 1, *range(branch_start, branch_start + len(option) - 1)]
        scored += [(place, token, k) for place, token in zip(predicting, option, strict=True)]
        branch_start += len(option) - 1
    return scored


@torch.inference_mode()
def option_loglikelihoods(
    model, items: list[OptionTokens], *, batch_tokens: int
) -> Iterator[tuple[int, list[float]]]:
    """Yield (item index, summed log-probability of each option) as rows finish.

    Args:
        model: a causal language model of transformers, in evaluation mode.
        items: contexts and options as token ids.
        batch_tokens: the most tokens of one forward pass.
    """
    alone = [i for i, item in enumerate(items) if reads_alone(model.config, len(item))]
    for index in alone:
        context, options = items[index].context, items[index].options
        yield index, [loglikelihood_alone(model, context, option) for option in options]
    batched = [i for i in range(len(items)) if i not in set(alone)]
    packed_items = [items[i] for i in batched]
    for index, sums in _packed_logprobs(model, packed_items, batch_tokens):
        yield batched[index], sums


def loglikelihood_alone(model, context: list[int], option: list[int]) -> float:
    """The option's summed log-probability, from one pass over context and option."""
    hidden, first = single_sequence.hidden_states(model, context + option), len(context) - 1
    places = list(range(first, first + len(option)))
    return sum(target_logprobs(model, hidden, places, option).tolist())


def _packed_logprobs(
    model, items: list[OptionTokens], batch_tokens: int
) -> Iterator[tuple[int, list[float]]]:
    texts = [split_at(item.context, item.cuts) for item in items]
    make_segment = lambda index, before: option_segment(items[index], before)  # noqa: E731
    for indices, segments, suffixes in packed_batches(texts, make_segment, row_tokens=batch_tokens):
        with use_packed_attention(model):
            hidden = read(model, segments)
        starts = segment_starts(segments)
        placed = [
            (starts[suffix], items[index], suffix.branches)
            for index, suffix in zip(indices, suffixes, strict=True)
        ]
        yield from zip(indices, packed_option_sums(model, hidden, placed), strict=True)


def packed_option_sums(
    model, hidden: Tensor, placed: Sequence[tuple[int, OptionTokens, list[int]]]
) -> list[list[float]]:
    """Summed log-probability of each option of several items read in one row.

    Args:
        hidden: (rows, hidden) states of the row.
        placed: (start of its segment in the row, item, branches of the segment) of each item.
            A segment without context tokens follows the end of its context.
    """
    scored = [
        (start + at, token, (number, k))
        for number, (start, item, branches) in enumerate(placed)
        for at, token, k in scored_tokens(item, branches)
    ]
    sums = [[0.0] * len(item.options) for _, item, _ in placed]
    logprobs = target_logprobs(model, hidden, [s[0] for s in scored], [s[1] for s in scored])
    for (_, _, (number, k)), value in zip(scored, logprobs.tolist(), strict=True):
        sums[number][k] += value
    return sums


def segment_starts(segments: list[Segment]) -> dict[Segment, int]:
    """Index of each segment's first token in the row of all segments."""
    starts, end = {}, 0
    for segment in segments:
        starts[segment] = end
        end += len(segment.tokens)
    return starts


def target_logprobs(model, hidden: Tensor, places: list[int], tokens: list[int]) -> Tensor:
    """(targets,) float64 log-probability of each token, as predicted at its place.

    Args:
        hidden: (rows, hidden) states of one forward pass.
        places: a row of `hidden` for every target; several may share one.
        tokens: the target tokens.
    """
    distinct_places, inverse = torch.unique(torch.tensor(places), return_inverse=True)
    order = torch.argsort(inverse, stable=True)
    token_ids = torch.tensor(tokens)
    logprobs = torch.empty(len(places), dtype=torch.float64)
    for start in range(0, len(distinct_places), HEAD_ROWS):
        chunk = distinct_places[start : start + HEAD_ROWS].to(hidden.device)
        chunk_logprobs = logits_at(model, hidden[chunk]).log_softmax(-1)
        in_chunk = order[(inverse[order] >= start) & (inverse[order] < start + HEAD_ROWS)]
        packed_batches, columns = (
            x.to(chunk_logprobs.device) for x in (inverse[in_chunk] - start, token_ids[in_chunk])
        )
        logprobs[in_chunk] = chunk_logprobs[packed_batches, columns].cpu().double()
    return logprobs
