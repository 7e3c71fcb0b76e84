"""Attention for evaluation: grouped queries read their shared keys in place.

transformers repeats every key and value head for each of the query heads that share it,
at every decoding step; here the queries of a group are one matrix against one key. The
result is that of plain softmax attention.
"""

import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, eager_mask

GROUPED_QUERIES = "grouped_queries"


def grouped_attention(
    module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    **options,
) -> tuple[Tensor, None]:
    """softmax(q kᵀ · scaling + mask) v, head groups as one matrix.

    Args:
        query: (rows, heads, queries, head_dim).
        key: (rows, key_heads, keys, head_dim); heads is a multiple of key_heads.
        value: as key.
        attention_mask: (rows, 1, queries, keys) additive, or None for no restriction.

    Returns:
        (rows, queries, heads, head_dim), and None for the weights.

    Raises:
        NotImplementedError: the model caps its scores or has attention sinks.
    """
    if options.get("softcap") or options.get("s_aux") is not None:
        raise NotImplementedError("soft-capped scores and attention sinks; use sdpa for this model")
    rows, heads, queries, width = query.shape
    key_heads, keys = key.shape[1], key.shape[2]
    grouped = (query * scaling).reshape(rows, key_heads, -1, width)  # groups · queries
    scores = (grouped @ key.transpose(-1, -2)).view(rows, key_heads, -1, queries, keys)
    if attention_mask is not None:
        scores += attention_mask[:, :, None, :, :keys]
    precision = torch.promote_types(query.dtype, torch.float32)
    weights = scores.softmax(-1, dtype=precision).to(query.dtype)
    mixed = weights.view(rows, key_heads, -1, keys) @ value
    return mixed.view(rows, heads, queries, width).transpose(1, 2).contiguous(), None


AttentionInterface.register(GROUPED_QUERIES, grouped_attention)
AttentionMaskInterface.register(GROUPED_QUERIES, eager_mask)
