"""Grouped-query attention: the same function as torch's, with keys read in place."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from helpers.evaluation.attention import GROUPED_QUERIES, grouped_attention


@pytest.mark.parametrize(("heads", "key_heads"), [(9, 3), (4, 4), (8, 1)])
@pytest.mark.parametrize(("queries", "keys"), [(1, 12), (7, 7), (3, 12)])
def test_equals_torchs_attention(heads, key_heads, queries, keys):
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, heads, queries, 16, generator=generator)
    k, v = (torch.randn(2, key_heads, keys, 16, generator=generator) for _ in range(2))
    allowed = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)
    mask = torch.zeros(queries, keys).masked_fill(~allowed, torch.finfo(torch.float32).min)
    mask = mask.expand(2, 1, -1, -1)
    expected = scaled_dot_product_attention(
        q, k, v, attn_mask=allowed, scale=0.25, enable_gqa=True
    ).transpose(1, 2)
    found, _ = grouped_attention(None, q, k, v, mask, scaling=0.25)
    torch.testing.assert_close(found, expected)


def test_a_model_computes_the_same_with_it(exact_model):
    ids = torch.randint(3, 259, (3, 11), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, 7:] = 0
    expected = exact_model(ids, attention_mask=mask).logits
    exact_model.set_attn_implementation(GROUPED_QUERIES)
    found = exact_model(ids, attention_mask=mask).logits
    torch.testing.assert_close(found[mask.bool()], expected[mask.bool()], rtol=1e-6, atol=1e-6)


def test_what_it_does_not_do_is_refused():
    x = torch.zeros(1, 2, 3, 4)
    with pytest.raises(NotImplementedError, match="soft-capped"):
        grouped_attention(None, x, x, x, None, scaling=1.0, softcap=50.0)
