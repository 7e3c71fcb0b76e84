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
from helpers.inference.packed_attention import packed
from helpers.inference.packed_rows import TRUNK, Segment, cut, logits_at, read, rows
from helpers.runtime.rotary_positions import reads_alone

HEAD_ROWS = 128  # positions whose logits over the vocabulary are held at once


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


def branched(item: OptionTokens, before: tuple[Segment, ...]) -> Segment:
    """What is left of the context, and the options as its branches.

    An option's last token is predicted but never read.
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


def targets(item: OptionTokens, branches: list[int]) -> list[tuple[int, int, int]]:
    """(place in the segment that predicts it, token, option) of every scored token."""
    trunk = branches.count(TRUNK)
    found, place = [], trunk
    for k, option in enumerate(item.options):
        places = [trunk - 1, *range(place, place + len(option) - 1)]
        found += [(at, token, k) for at, token in zip(places, option, strict=True)]
        place += len(option) - 1
    return found


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
    apart = [i for i, item in enumerate(items) if reads_alone(model.config, len(item))]
    for index in apart:
        yield (
            index,
            [alone_loglikelihood(model, items[index].context, o) for o in items[index].options],
        )
    together = [i for i in range(len(items)) if i not in set(apart)]
    packed_items = [items[i] for i in together]
    for index, sums in _packed(model, packed_items, batch_tokens):
        yield together[index], sums


def alone_loglikelihood(model, context: list[int], option: list[int]) -> float:
    """The option's summed log-probability by one pass over context and option."""
    hidden, first = single_sequence.states(model, context + option), len(context) - 1
    places = list(range(first, first + len(option)))
    return sum(target_logprobs(model, hidden, places, option).tolist())


def _packed(
    model, items: list[OptionTokens], batch_tokens: int
) -> Iterator[tuple[int, list[float]]]:
    texts = [cut(item.context, item.cuts) for item in items]
    make = lambda index, before: branched(items[index], before)  # noqa: E731
    for indices, segments, leaves in rows(texts, make, row_tokens=batch_tokens):
        with packed(model):
            hidden = read(model, segments)
        begins = starts(segments)
        pieces = [
            (begins[leaf], items[i], leaf.branches) for i, leaf in zip(indices, leaves, strict=True)
        ]
        yield from zip(indices, option_sums(model, hidden, pieces), strict=True)


def option_sums(
    model, hidden: Tensor, pieces: Sequence[tuple[int, OptionTokens, list[int]]]
) -> list[list[float]]:
    """Summed log-probability of each option of several items read in one row.

    Args:
        hidden: (rows, hidden) states of the row.
        pieces: (where its segment starts in the row, item, the segment's branches) of each item;
            what comes before a segment without a context is the context's end.
    """
    wanted = [
        (start + at, token, (number, k))
        for number, (start, item, branches) in enumerate(pieces)
        for at, token, k in targets(item, branches)
    ]
    sums = [[0.0] * len(item.options) for _, item, _ in pieces]
    logprobs = target_logprobs(model, hidden, [w[0] for w in wanted], [w[1] for w in wanted])
    for (_, _, (number, k)), value in zip(wanted, logprobs.tolist(), strict=True):
        sums[number][k] += value
    return sums


def starts(segments: list[Segment]) -> dict[Segment, int]:
    """Where each segment begins in the row of all of them."""
    found, end = {}, 0
    for segment in segments:
        found[segment] = end
        end += len(segment.tokens)
    return found


def target_logprobs(model, hidden: Tensor, places: list[int], tokens: list[int]) -> Tensor:
    """(targets,) float64 log-probability of each token, as predicted at its place.

    Args:
        hidden: (rows, hidden) states of one forward pass.
        places: a row of `hidden` for every target; several may share one.
        tokens: the target tokens.
    """
    used, inverse = torch.unique(torch.tensor(places), return_inverse=True)
    order = torch.argsort(inverse, stable=True)
    targets = torch.tensor(tokens)
    found = torch.empty(len(places), dtype=torch.float64)
    for start in range(0, len(used), HEAD_ROWS):
        chunk = used[start : start + HEAD_ROWS].to(hidden.device)
        logprobs = logits_at(model, hidden[chunk]).log_softmax(-1)
        here = order[(inverse[order] >= start) & (inverse[order] < start + HEAD_ROWS)]
        rows, columns = (x.to(logprobs.device) for x in (inverse[here] - start, targets[here]))
        found[here] = logprobs[rows, columns].cpu().double()
    return found
