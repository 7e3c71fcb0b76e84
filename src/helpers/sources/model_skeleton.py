"""The tensors that a configuration's model has, without any weights: names and shapes.

transformers builds the model on the meta device, so that names are those it loads by, and
what it leaves unread in a folder (buffers that older versions saved) is known as well.
"""

import copy
import re
from dataclasses import dataclass
from functools import lru_cache

import torch
from transformers import AutoModelForCausalLM
from transformers.initialization import no_init_weights

from helpers.core.architectures import HEAD, architecture
from helpers.runtime.moe_experts import linear_experts


@dataclass(frozen=True)
class Skeleton:
    """Names and shapes of the tensors of one configuration's model.

    Attributes:
        shapes: of every saved tensor by name, a tied head included.
        unread: pattern of the tensor names that transformers ignores; None if there are none.
        prefix: prefix of the decoder's tensor names in the causal model.
        head: name of the head's weight.
        table: name of the token embeddings' weight.
    """

    shapes: dict[str, tuple[int, ...]]
    unread: re.Pattern | None
    prefix: str
    head: str
    table: str

    def is_ignored(self, name: str) -> bool:
        """Whether transformers silently ignores a tensor of this name."""
        return self.unread is not None and bool(self.unread.search(name))

    def name_of(self, stored: str) -> str:
        """The model's name of a stored tensor; adds the prefix for a decoder saved without head."""
        longer = f"{self.prefix}.{stored}"
        return longer if stored not in self.shapes and longer in self.shapes else stored


def skeleton(config) -> Skeleton:
    """The skeleton of a configuration's model.

    Raises:
        StudyError: the family is not known.
    """
    return _skeleton(_Same(config))


class _Same:
    """A configuration as a cache key: equal if all its settings are equal."""

    def __init__(self, config):
        self.config, self.text = config, config.to_json_string(use_diff=False)

    def __eq__(self, other) -> bool:
        return self.text == other.text

    def __hash__(self) -> int:
        return hash(self.text)


@lru_cache(maxsize=8)
def _skeleton(same: _Same) -> Skeleton:
    config = copy.deepcopy(same.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"), no_init_weights(), linear_experts(config):
        model = AutoModelForCausalLM.from_config(config)
    patterns = set(model._keys_to_ignore_on_load_unexpected or ())
    buffers = [name for name, _ in model.named_buffers()]
    if any(name.endswith("rotary_emb.inv_freq") for name in buffers):
        patterns.add(r"rotary_emb\.inv_freq")
    if any(name.endswith("position_ids") for name in buffers):
        patterns.add(r"(^|\.)position_ids$")
    return Skeleton(
        shapes={name: tuple(tensor.shape) for name, tensor in model.state_dict().items()},
        unread=re.compile("|".join(f"({p})" for p in sorted(patterns))) if patterns else None,
        prefix=model.base_model_prefix,
        head=f"{HEAD}.weight",
        table=f"{architecture(config).embeddings[0]}.weight",
    )
