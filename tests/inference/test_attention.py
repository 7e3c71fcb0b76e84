"""Attention by segments and by slots: torch's own, and none that is called by mistake."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from helpers.inference.packed_attention import (
    PACKED,
    KVCache,
    PackedBatch,
    Segment,
    packed_attention,
    use_packed_attention,
)


def random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("heads", "key_heads"), [(9, 3), (4, 4), (8, 1)])
@pytest.mark.parametrize("window", [None, 3])
def test_a_row_attends_as_each_of_its_texts_alone(heads, key_heads, window):
    sizes = [5, 1, 8]
    row = PackedBatch([Segment([7] * size) for size in sizes])
    q = random(1, heads, sum(sizes), 16, seed=0)
    k, v = (random(1, key_heads, sum(sizes), 16, seed=s) for s in (1, 2))
    attended = row.attend(0, q, k, v, scaling=0.25, window=window)
    for span, size in zip(row.spans.values(), sizes, strict=True):
        at = torch.arange(size)
        allowed = (at[:, None] >= at) & (at[:, None] - at < (window or size))
        expected = scaled_dot_product_attention(
            q[:, :, span], k[:, :, span], v[:, :, span], allowed, scale=0.25, enable_gqa=True
        )
        torch.testing.assert_close(attended[:, :, span], expected)


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("offset", [0, 7])
def test_a_slot_attends_to_all_before_it(offset, window):
    """Three answers of different lengths after a common beginning, and a moved slot."""
    heads, key_heads, dim, lengths = 6, 3, 16, [3, 9, 1]
    common = Segment([7] * offset or [7], kept=True)
    common.memory[0] = (
        random(1, key_heads, offset, dim, seed=1),
        random(1, key_heads, offset, dim, seed=2),
    )
    slots = KVCache(16, 20, (common,) if offset else ())
    own = []
    for slot, length in enumerate(lengths):
        leaf = Segment([7] * length, kept=True)
        leaf.memory[0] = tuple(random(1, key_heads, length, dim, seed=9 + slot + s) for s in (0, 5))
        slots.fill(slot, [leaf])
        own.append(leaf.memory[0])
    slots.move(2, 0)
    own[0] = own[2]
    rows = 3
    q = random(1, heads, rows, dim, seed=30)
    k, v = (random(1, key_heads, rows, dim, seed=s) for s in (31, 32))
    positions = slots.step(rows, 0, "cpu")[0].tolist()
    assert positions == [offset + n for n in (1, 9, 1)]
    attended = slots.attend(0, q, k, v, scaling=0.3, window=window)
    for row in range(rows):
        parts = [(common.memory[0] if offset else (k[:, :, :0], v[:, :, :0])), own[row]]
        parts.append((k[:, :, row : row + 1], v[:, :, row : row + 1]))
        keys, values = (torch.cat(x, dim=2) for x in zip(*parts, strict=True))
        seen = torch.arange(keys.shape[2]) > keys.shape[2] - 1 - (window or keys.shape[2])
        expected = scaled_dot_product_attention(
            q[:, :, row : row + 1], keys, values, seen[None], scale=0.3, enable_gqa=True
        )
        torch.testing.assert_close(attended[:, :, row : row + 1], expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_slots_and_the_width_change_no_bit(dtype):
    """Or a quantized model would answer otherwise in other company (NOTES.md)."""
    heads, key_heads, dim, most = 9, 3, 64, 64
    common = Segment([7] * 37, kept=True)
    common.memory[0] = tuple(random(1, key_heads, 37, dim, seed=s).to(dtype) for s in (1, 2))
    leaves = []
    for slot in range(most):
        leaf = Segment([7] * (1 + slot * 3 % 41), kept=True)
        size = len(leaf.tokens)
        leaf.memory[0] = tuple(
            random(1, key_heads, size, dim, seed=100 * slot + s).to(dtype) for s in (3, 4)
        )
        leaves.append(leaf)
    q, k, v = (random(1, h, most, dim, seed=s).to(dtype) for s, h in ((5, heads), (6, 3), (7, 3)))

    def attended(chosen: list[int]) -> torch.Tensor:
        slots = KVCache(most, 90, (common,))
        for slot, i in enumerate(chosen):
            slots.fill(slot, [leaves[i]])
        blank = max(0, 16 - len(chosen))
        slots.step(len(chosen), blank, "cpu")
        each = [*chosen, *[0] * blank]
        parts = (q[:, :, each], k[:, :, each], v[:, :, each])
        return slots.attend(0, *parts, scaling=0.1, window=None)[:, :, : len(chosen)]

    together = attended(list(range(most)))
    for chosen in ([0], [5, 6, 7], list(range(40, 60)), list(range(63))):
        assert torch.equal(attended(chosen), together[:, :, chosen])


def test_what_it_does_not_do_is_refused():
    x = torch.zeros(1, 2, 3, 4)
    with pytest.raises(NotImplementedError, match="soft-capped"):
        packed_attention(None, x, x, x, None, scaling=1.0, softcap=50.0, packed=None)


def test_a_model_goes_back_to_its_own_attention(exact_model):
    ids = torch.arange(3, 20)[None]
    expected = exact_model(ids).logits
    with use_packed_attention(exact_model):
        assert exact_model.config._attn_implementation == PACKED
        with pytest.raises(TypeError, match="packed rows"):
            exact_model(ids)
    assert torch.equal(exact_model(ids).logits, expected)
