"""Texts read one at a time, by the model's own forward pass and its own attention.

For models of which a packed row cannot compute what they compute alone
(`helpers.runtime.rotary_positions`). Slower, and the same operations as `loglikelihood`,
`generation` and `perplexity` offer.
"""

import torch
from torch import Tensor
from transformers import DynamicCache

from helpers.runtime.rotary_positions import changes_at, reset_dynamic_rope_


@torch.inference_mode()
def hidden_states(model, tokens: list[int]) -> Tensor:
    """(tokens, hidden) of one text after the last layer, before the head."""
    reset_dynamic_rope_(model)
    ids = torch.tensor([tokens], device=model.device)
    return model.base_model(input_ids=ids, use_cache=False).last_hidden_state[0]


class CachedSequence:
    """One text that grows token by token, with its KV cache.

    Cached keys and values are used while their positions are those of the longer text, and
    computed again when the model changes the positions.
    """

    def __init__(self, model):
        self.model, self._memory = model, None

    @torch.inference_mode()
    def last_state(self, tokens: list[int]) -> Tensor:
        """(1, hidden) state of the text's last token."""
        if self._memory is None or changes_at(self.model.config, len(tokens)):
            self._memory = DynamicCache(config=self.model.config)
        cached_tokens = self._memory.get_seq_length()
        reset_dynamic_rope_(self.model)
        device = self.model.device
        output = self.model.base_model(
            input_ids=torch.tensor([tokens[cached_tokens:]], device=device),
            position_ids=torch.arange(cached_tokens, len(tokens), device=device)[None],
            past_key_values=self._memory,
            use_cache=True,
        )
        return output.last_hidden_state[0, -1:]
