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
def states(model, tokens: list[int]) -> Tensor:
    """(tokens, hidden) of one text after the last layer, before the head."""
    reset_dynamic_rope_(model)
    ids = torch.tensor([tokens], device=model.device)
    return model.base_model(input_ids=ids, use_cache=False).last_hidden_state[0]


class Continued:
    """One text that grows by a token at a time.

    Keys and values are kept as long as they are at the positions they would have in the
    longer text, and computed anew where they are not.
    """

    def __init__(self, model):
        self.model, self._memory = model, None

    @torch.inference_mode()
    def last_state(self, tokens: list[int]) -> Tensor:
        """(1, hidden) at the text's last token."""
        if self._memory is None or changes_at(self.model.config, len(tokens)):
            self._memory = DynamicCache(config=self.model.config)
        known = self._memory.get_seq_length()
        reset_dynamic_rope_(self.model)
        device = self.model.device
        read = self.model.base_model(
            input_ids=torch.tensor([tokens[known:]], device=device),
            position_ids=torch.arange(known, len(tokens), device=device)[None],
            past_key_values=self._memory,
            use_cache=True,
        )
        return read.last_hidden_state[0, -1:]
