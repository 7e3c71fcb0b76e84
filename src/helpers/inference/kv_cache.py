"""The keys and values of answers being written: a slot for each, of one fixed width.

What all prompts begin with is held once and read by every slot. A slot's tokens begin at
its left edge and what is beyond its length weighs nothing, so that neither the width nor
the other slots change what a row computes.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

from helpers.inference.packed_rows import Segment
from helpers.runtime.linears import grouped_product, widened

WIDTH_STEP = 16  # matrix products round equally at multiples of the vector width
SUMMED = 256  # keys per product on a CPU; BLAS libraries split sums of more than 384


class KVCache:
    """Keys and values of a batch of answers, in memory of fixed size.

    Args:
        count: how many answers are written at once.
        width: the most tokens of one, its own part of the prompt included.
        shared: segments that all answers continue, oldest first.
    """

    def __init__(self, count: int, width: int, shared: tuple[Segment, ...]):
        self.count, self.shared = count, shared
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
