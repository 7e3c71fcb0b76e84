"""Texts of different lengths read as one row of tokens, without any padding.

What is read in one go is a segment; it may continue earlier segments, which are read
once for all that share them. Every segment attends by itself, at the shape it would have
alone, and all other arithmetic of a decoder is done token by token: what a text is
answered does not depend on what else is in the row.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from helpers.runtime.batching import FEWEST_ROWS, use_sequence_ids
from helpers.runtime.linears import widened

TRUNK = 0


@dataclass(eq=False)
class Segment:
    """Consecutive tokens of one text, read in one pass after the segments they continue.

    Attributes:
        tokens: ids, at least one.
        before: the segments they continue, oldest first.
        branches: TRUNK, or k for the k-th of several continuations that do not see each
            other; None if all is trunk.
        positions: of each token; None if they follow one another.
        kept: whether later segments may continue this one, so that its memory stays.
        memory: layer to its keys and values, (1, key_heads, tokens, head_dim) each, if kept.
    """

    tokens: list[int]
    before: tuple["Segment", ...] = ()
    branches: list[int] | None = None
    positions: list[int] | None = None
    kept: bool = False
    memory: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    _masks: dict[tuple, Tensor | None] = field(default_factory=dict)

    def __post_init__(self):
        self.start = sum(len(segment.tokens) for segment in self.before)
        if self.positions is None:
            self.positions = list(range(self.start, self.start + len(self.tokens)))

    def allowed(self, window: int | None, device="cpu") -> Tensor | None:
        """(tokens, before + tokens) bool: which keys each token sees; None if plainly causal.

        Args:
            window: how many positions back a layer looks at most; None for all.
            device: of the mask, copied there once for all layers.
        """
        if window is not None and max(self.positions) < window:
            window = None
        if window is None and self.branches is None and not self.before:
            return None
        if (window, device) not in self._masks:
            self._masks[window, device] = self._mask(window).to(device)
        return self._masks[window, device]

    def _mask(self, window: int | None) -> Tensor:
        size = len(self.tokens)
        branch = torch.tensor(self.branches or [TRUNK] * size)
        own = torch.ones(size, size, dtype=torch.bool).tril()
        own &= (branch[:, None] == branch) | (branch == TRUNK)
        allowed = torch.cat([torch.ones(size, self.start, dtype=torch.bool), own], dim=1)
        if window is not None:
            at = torch.tensor(self.positions)
            seen = torch.cat([torch.arange(self.start), at])
            allowed &= at[:, None] - seen < window
        return allowed


class PackedBatch:
    """The segments of one forward pass, one after the other."""

    def __init__(self, segments: Sequence[Segment]):
        self.segments, end = list(segments), 0
        self.spans: dict[Segment, slice] = {}
        for segment in self.segments:
            self.spans[segment] = slice(end, end + len(segment.tokens))
            end += len(segment.tokens)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, **how) -> Tensor:
        """(1, heads, tokens, head_dim) attention of every segment to itself and its predecessors.

        Args:
            layer: index of the decoder's layer.
            query: (1, heads, tokens, head_dim); key and value: (1, key_heads, tokens, head_dim).
            how: `scaling`, and `window` (see `Segment.allowed`).
        """
        mixed = torch.empty_like(query)
        for segment, span in self.spans.items():
            own = key[:, :, span], value[:, :, span]
            if segment.kept:
                segment.memory[layer] = own
            earlier = [self._memory(layer, s, key, value) for s in segment.before]
            keys, values = (
                torch.cat(parts, dim=2) if earlier else parts[0]
                for parts in zip(*earlier, own, strict=True)
            )
            mask = segment.allowed(how["window"], query.device)
            mixed[:, :, span] = scaled_dot_product_attention(
                *widened(query[:, :, span], keys, values),
                attn_mask=mask,
                is_causal=mask is None,
                scale=how["scaling"],
                enable_gqa=query.shape[1] != key.shape[1],
            )
        return mixed

    def _memory(self, layer: int, segment: Segment, key: Tensor, value: Tensor):
        if segment in self.spans:
            span = self.spans[segment]
            return key[:, :, span], value[:, :, span]
        return segment.memory[layer]


@torch.inference_mode()
def read(model, segments: Sequence[Segment]) -> Tensor:
    """(tokens, hidden) of all segments after the last layer, before the head.

    Args:
        model: a causal language model of transformers, inside `attention.packed`.
        segments: their predecessors are among them, or were read before and kept.
    """
    row, device = PackedBatch(segments), model.device
    lengths = torch.tensor([len(s.tokens) for s in segments], device=device)
    owners = torch.arange(len(segments), device=device).repeat_interleave(lengths)
    tokens = torch.tensor([[t for s in segments for t in s.tokens]], device=device)
    positions = torch.tensor([[p for s in segments for p in s.positions]], device=device)
    with use_sequence_ids(owners):
        output = model.base_model(
            input_ids=tokens, position_ids=positions, use_cache=False, packed=row
        )
    return output.last_hidden_state[0]


@torch.inference_mode()
def logits_at(model, hidden: Tensor) -> Tensor:
    """(rows, vocabulary) float32 logits of (rows, hidden), the same for any number of rows."""
    packed_batches = len(hidden)
    if packed_batches < FEWEST_ROWS:
        hidden = torch.cat([hidden, hidden[-1:].expand(FEWEST_ROWS - packed_batches, -1)])
    return model.get_output_embeddings()(hidden)[:packed_batches].float()


@dataclass(frozen=True)
class SplitText:
    """The token ids of a text in pieces: shareable prefixes, oldest first, and the rest."""

    shared: tuple[tuple[int, ...], ...]
    rest: tuple[int, ...]

    def __len__(self) -> int:
        return sum(map(len, self.shared)) + len(self.rest)


def split_at(tokens: list[int], cuts: Sequence[int]) -> SplitText:
    """The text split at token counts; the rest has at least one token, no piece is empty."""
    bounds = [0, *sorted({c for c in cuts if 0 < c < len(tokens)}), len(tokens)]
    pieces = [tuple(tokens[a:b]) for a, b in pairwise(bounds)]
    return SplitText(tuple(pieces[:-1]), pieces[-1])


class PrefixCache:
    """Shared prefixes as segments, each read once while something references it."""

    def __init__(self):
        self._known: WeakValueDictionary = WeakValueDictionary()

    def before(self, text: SplitText) -> tuple[tuple[Segment, ...], list[Segment]]:
        """(all segments of a text's shared prefix, those of them that are new)."""
        prefix: tuple[Segment, ...] = ()
        new_segments = []
        for end in range(1, len(text.shared) + 1):
            key = text.shared[:end]
            segment = self._known.get(key)
            if segment is None:
                segment = Segment(list(text.shared[end - 1]), before=prefix, kept=True)
                self._known[key] = segment
                new_segments.append(segment)
            prefix = (*prefix, segment)
        return prefix, new_segments


def packed_batches(
    texts: Sequence[SplitText], make_suffix, *, row_tokens: int
) -> Iterator[tuple[list[int], list[Segment], list[Segment]]]:
    """Yield (indices of texts, segments to read, the suffix of each text), batch after batch.

    Texts that share a prefix are neighbours. A batch holds at least one text, and more
    while their new tokens fit.

    Args:
        make_suffix: (index, prefix segments) → the segment of the text's rest.
        row_tokens: the most tokens of one row.
    """
    prefixes = PrefixCache()
    order = sorted(range(len(texts)), key=lambda i: (texts[i].shared, -len(texts[i]), i))
    indices: list[int] = []
    segments: list[Segment] = []
    suffixes: list[Segment] = []
    for index in order:
        prefix, new_segments = prefixes.before(texts[index])
        new_segments = [*new_segments, make_suffix(index, prefix)]
        size = sum(len(s.tokens) for s in [*segments, *new_segments])
        if indices and size > row_tokens:
            yield indices, segments, suffixes
            indices, segments, suffixes = [], [], []
        indices.append(index)
        segments += new_segments
        suffixes.append(new_segments[-1])
    if indices:
        yield indices, segments, suffixes
