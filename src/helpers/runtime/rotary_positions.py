"""Rotary positions that depend on the length of a text (longrope, dynamic NTK scaling).

transformers computes them for the longest text of a forward pass. Beyond a length, a text
beside a longer one is then read otherwise than alone; such texts are read one at a time.
"""

from helpers.core.errors import StudyError


def check_context_length(label: str, lengths: list[int], config) -> None:
    """Check that no text is longer than the model's context, whose positions were trained.

    Raises:
        StudyError: a text is longer.
    """
    longest, limit = max(lengths, default=0), config.max_position_embeddings
    if longest > limit:
        raise StudyError(
            f"{label}: a text has {longest} tokens but the model reads {limit}; lower max_tokens, "
            "or leave the text out"
        )


def length_independent_up_to(config) -> int | None:
    """The length up to which positions do not depend on the length; None if they never do."""
    limits = []
    for parameters in _rope_parameters(config):
        kind = parameters.get("rope_type", "default")
        if kind == "longrope":
            limits.append(parameters["original_max_position_embeddings"])
        elif "dynamic" in kind:
            limits.append(config.max_position_embeddings)
    return min(limits, default=None)


def _rope_parameters(config) -> list[dict]:
    """The rotary settings: one mapping, or one for each type of layer."""
    parameters = getattr(config, "rope_parameters", None) or {}
    nested = [value for value in parameters.values() if isinstance(value, dict)]
    return nested or [parameters]


def reads_alone(config, length: int) -> bool:
    """Whether a text of this length must be read alone."""
    limit = length_independent_up_to(config)
    return limit is not None and length > limit


def changes_at(config, length: int) -> bool:
    """Whether the last token of a text changes the positions of the earlier ones."""
    limit = length_independent_up_to(config)
    if limit is None or length <= limit:
        return False
    changing = any("dynamic" in p.get("rope_type", "") for p in _rope_parameters(config))
    return changing or length == limit + 1


def batch_tokens_for(config, lengths: list[int], *, batch_tokens: int) -> int:
    """The token budget of a batch of padded texts: 1, which means one text, if needed."""
    return 1 if reads_alone(config, max(lengths, default=0)) else batch_tokens


def reset_dynamic_rope_(model) -> None:
    """Reset dynamic scaling, which otherwise keeps the frequencies of a longer text."""
    for module in model.modules():
        if "dynamic" in str(getattr(module, "rope_type", "")):
            module.max_seq_len_cached = module.original_max_seq_len
            module.inv_freq = module.original_inv_freq.to(module.inv_freq.device)
