"""Packed rows and the KV cache: texts of different lengths read and continued without padding.

Texts are read as one row of tokens. What is read in one go is a segment; it may continue earlier
segments, which are read once for all that share them. Every segment attends by itself, at the
shape it would have alone, and all other arithmetic of a decoder is done token by token: what a
text is answered does not depend on what else is in the row.

While answers are written, each has a slot of keys and values of one fixed width. What all prompts
begin with is held once and read by every slot. A slot's tokens begin at its left edge and what is
beyond its length weighs nothing, so that neither the width nor the other slots change what a row
computes.

Attention is registered with transformers under one name. What is read says how it attends: the
`packed` object handed to the model reaches every layer's attention.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from helpers.runtime.devices import FEWEST_ROWS, grouped_product, use_sequence_ids, widened
from helpers.runtime.discovery import head_logits

PACKED = "packed"


def packed_attention(
    module, query: Tensor, key: Tensor, value: Tensor, attention_mask, scaling=None, **options
) -> tuple[Tensor, None]:
    """softmax(q kᵀ · scaling) v over the keys that each token may see.

    Args:
        module: the attention layer; its `layer_idx` is the key of its cached keys and values.
        query: (1, heads, tokens, head_dim).
        key: (1, key_heads, tokens, head_dim); heads is a multiple of key_heads.
        value: as key.
        options: `packed` computes the attention; `sliding_window` limits how far back it looks.

    Returns:
        (1, tokens, heads, head_dim), and None for the weights.

    Raises:
        NotImplementedError: the model caps its scores or has attention sinks.
        TypeError: the model is called without `packed`.
    """
    if "packed" not in options:
        raise TypeError(
            "a model that attends by packed rows is called through `packed_attention.read`"
        )
    if options.get("softcap") or options.get("s_aux") is not None:
        raise NotImplementedError("soft-capped scores and attention sinks cannot be evaluated")
    packed = options["packed"]
    if packed.kv == "int8":
        key, value = int8_rounded(key), int8_rounded(value)
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    mixed = packed.attend(
        module.layer_idx, query, key, value, scaling=scaling, window=options.get("sliding_window")
    )
    return mixed.transpose(1, 2).contiguous(), None


KV_STEPS = 127


def int8_rounded(states: Tensor) -> Tensor:
    """(…, tokens, head_dim) keys or values as an int8 cache gives them back.

    One scale for a token and a head, its largest magnitude / 127, as vLLM's cache
    `int8_per_token_head` has it (vllm-project/vllm pull request 38378).
    """
    wide = states.to(torch.promote_types(states.dtype, torch.float32))
    scale = wide.abs().amax(-1, keepdim=True) / KV_STEPS
    scale = scale.masked_fill(scale == 0, 1.0)
    return ((wide / scale).round() * scale).to(states.dtype)


def kv_of(model) -> str | None:
    """The integers that the model's keys and values are kept in; None for its float type."""
    return getattr(model, "kv_cache", None)


@contextmanager
def use_packed_attention(model) -> Iterator[None]:
    """Inside, the model uses the attention of packed rows."""
    before = model.config._attn_implementation
    model.set_attn_implementation(PACKED)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def _no_mask(*_args, **_options) -> None:
    """No mask over the whole row: each segment builds its own."""


AttentionInterface.register(PACKED, packed_attention)
AttentionMaskInterface.register(PACKED, _no_mask)


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
    """The segments of one forward pass, one after the other.

    Args:
        kv: `int8` if keys and values are kept in int8.
    """

    def __init__(self, segments: Sequence[Segment], *, kv: str | None = None):
        self.segments, self.kv, end = list(segments), kv, 0
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
    row, device = PackedBatch(segments, kv=kv_of(model)), model.device
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
    return head_logits(model, hidden)[:packed_batches].float()


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


WIDTH_STEP = 16  # matrix products round equally at multiples of the vector width
SUMMED = 256  # keys per product on a CPU; BLAS libraries split sums of more than 384


class KVCache:
    """Keys and values of a batch of answers, in memory of fixed size.

    Args:
        count: how many answers are written at once.
        width: the most tokens of one, its own part of the prompt included.
        shared: segments that all answers continue, oldest first.
        kv: `int8` if keys and values are kept in int8; they are simulated in the float type.
    """

    def __init__(
        self, count: int, width: int, shared: tuple[Segment, ...], *, kv: str | None = None
    ):
        self.count, self.shared, self.kv = count, shared, kv
        self.width = -(-width // WIDTH_STEP) * WIDTH_STEP
        self.offset = sum(len(s.tokens) for s in shared)
        self.lengths = torch.zeros(count, dtype=torch.long)  # tokens in each slot
        self._own: dict[int, tuple[Tensor, Tensor]] = {}  # each (count, key_heads, width, dim)
        self._shared: dict[int, tuple[Tensor, Tensor]] = {}  # as `_shared_memory` returns them
        self._mask_cache: dict[int | None, tuple[Tensor | None, Tensor | None]] = {}

    def fill(self, slot: int, segments: list[Segment]) -> None:
        """Copy the keys and values of segments into a slot; they follow the shared segments."""
        for layer in segments[-1].memory:
            keys, values = (
                torch.cat([s.memory[layer][part] for s in segments], dim=2)[0] for part in (0, 1)
            )
            own = self._slot_memory(layer, keys)
            own[0][slot, :, : keys.shape[1]] = keys
            own[1][slot, :, : keys.shape[1]] = values
        self.lengths[slot] = sum(len(s.tokens) for s in segments)

    def _slot_memory(self, layer: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """(count, key_heads, width, head_dim) keys and values, made when first used."""
        if layer not in self._own:
            shape = (self.count, like.shape[-3], self.width, like.shape[-1])
            self._own[layer] = like.new_zeros(shape), like.new_zeros(shape)
        return self._own[layer]

    def move(self, source: int, target: int) -> None:
        """Copy one slot onto another."""
        for keys, values in self._own.values():
            keys[target], values[target] = keys[source], values[source]
        self.lengths[target] = self.lengths[source]

    def step(self, alive: int, padding: int, device) -> Tensor:
        """(1, alive + padding) positions of the next tokens; each of these slots grows by one.

        Args:
            alive: how many slots, from the first, hold an answer.
            padding: how many slots after them are read only to fill the batch.
        """
        rows = alive + padding
        self.lengths[alive:rows] = 0
        positions = self.lengths[:rows].clone()
        self._at = positions.to(device)
        longest = int(positions.max()) + 1
        self._width = min(self.width, -(-longest // WIDTH_STEP) * WIDTH_STEP)
        self._mask_cache = {}
        self.lengths[:rows] += 1
        return (self._at + self.offset)[None]

    def _masks(self, window: int | None) -> tuple[Tensor | None, Tensor]:
        """((rows, 1, 1, shared), (rows, 1, 1, width)) bool: keys that are masked for a row."""
        if window not in self._mask_cache:
            places = torch.arange(self._width, device=self._at.device)
            own = places > self._at[:, None]
            common = None
            if window is not None:
                own |= self._at[:, None] - places >= window
                back = self._at[:, None] + self.offset - torch.arange(self.offset).to(own.device)
                common = (back >= window)[:, None, None] if (back >= window).any() else None
            self._mask_cache[window] = common, own[:, None, None]
        return self._mask_cache[window]

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, **options) -> Tensor:
        """(1, heads, rows, head_dim) attention of each row's newest token to all before it.

        Args:
            layer: index of the decoder's layer.
            query: (1, heads, rows, head_dim); key and value: (1, key_heads, rows, head_dim).
            options: `scaling` and `window`.
        """
        heads, rows, dim = query.shape[1:]
        groups, shared, width = key.shape[1], self.offset, self._width
        keys, values = self._slot_memory(layer, key)
        slots = torch.arange(rows, device=key.device)
        positions = self._at.to(key.device)
        keys[slots, :, positions], values[slots, :, positions] = (
            key[0].transpose(0, 1),
            value[0].transpose(0, 1),
        )
        hidden_common, hidden_own = self._masks(options["window"])
        q = (query[0] * options["scaling"]).transpose(0, 1).reshape(rows, groups, -1, dim)
        q, own_keys, own_values = widened(q, keys[:rows, :, :width], values[:rows, :, :width])
        scores = q @ own_keys.transpose(-1, -2)  # (rows, groups, queries, width)
        scores.masked_fill_(hidden_own.to(scores.device), float("-inf"))
        padded = 0
        if shared:
            common_keys, common_values = self._shared_memory(layer)
            padded = common_keys.shape[1]
            flat = q.transpose(0, 1).reshape(groups, -1, dim)  # (groups, rows · queries, dim)
            common = grouped_product(flat, common_keys).view(groups, rows, -1, padded)
            common[..., shared:] = float("-inf")
            common = common.transpose(0, 1)
            if hidden_common is not None:
                common[..., :shared].masked_fill_(hidden_common.to(common.device), float("-inf"))
            scores = torch.cat([common, scores], dim=-1)
        precision = torch.promote_types(scores.dtype, torch.float32)
        weights = scores.softmax(-1, dtype=precision).to(own_values.dtype)
        mixed = chunked_product(weights[..., padded:], own_values)
        if shared:
            flat = weights[..., :padded].transpose(0, 1).reshape(groups, -1, padded)
            shared_output = grouped_product(flat, common_values).view(groups, rows, -1, dim)
            mixed = mixed + shared_output.transpose(0, 1)
        return mixed.to(value.dtype).reshape(rows, heads, dim).transpose(0, 1)[None]

    def _shared_memory(self, layer: int) -> tuple[Tensor, Tensor]:
        """(key_heads, padded, dim) keys and (key_heads, dim, padded) values of shared segments.

        Zeros pad them to a multiple of WIDTH_STEP, as they pad a slot.
        """
        if layer not in self._shared:
            memories = [s.memory[layer] for s in self.shared]
            keys, values = (
                torch.cat([pair[part] for pair in memories], dim=2)[0] for part in (0, 1)
            )
            padding = (0, 0, 0, -keys.shape[1] % WIDTH_STEP)
            keys, values = widened(pad(keys, padding), pad(values, padding))
            self._shared[layer] = keys.contiguous(), values.transpose(1, 2).contiguous()
        return self._shared[layer]


def chunked_product(weights: Tensor, values: Tensor) -> Tensor:
    """weights @ values, (…, queries, width) and (…, width, head_dim), summed in fixed chunks.

    A BLAS library splits a long sum by its length, so keys of weight zero would change the
    rounding of the others' sum. On other devices no product is batch-invariant: one chunk.
    """
    width = weights.shape[-1]
    size = SUMMED if weights.device.type == "cpu" else width
    mixed = weights[..., :size] @ values[..., :size, :]
    for start in range(size, width, size):
        piece = slice(start, start + size)
        mixed = mixed + weights[..., piece] @ values[..., piece, :]
    return mixed
