"""Attention as evaluation needs it: by segments of a packed row, or by slots of a decoder.

Registered with transformers under one name. What is read says how it attends: the
`packed` object handed to the model reaches every layer's attention.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

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
        raise TypeError("a model that attends by packed rows is called through `packed_rows.read`")
    if options.get("softcap") or options.get("s_aux") is not None:
        raise NotImplementedError("soft-capped scores and attention sinks cannot be evaluated")
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    mixed = options["packed"].attend(
        module.layer_idx, query, key, value, scaling=scaling, window=options.get("sliding_window")
    )
    return mixed.transpose(1, 2).contiguous(), None


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
