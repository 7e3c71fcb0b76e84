"""Which Linears a family quantizes, and which module's output each group of them shares.

A smoothing group is a producer, whose output channels can be divided by s, and the
consumers, whose input channels are multiplied by s. This is the one place that knows
architectures; a family it does not know is refused by name.
"""

from dataclasses import dataclass

from torch import nn

from helpers.study.errors import StudyError

# Decoder layers with RMSNorm weights that scale directly, gated MLPs and separate q, k, v.
LLAMA_LIKE = {"llama", "mistral", "qwen2", "qwen3"}


@dataclass(frozen=True)
class SmoothingGroup:
    """One place to fold s into, by module names.

    Attributes:
        target: the study file's word for this kind of place.
        producer: the norm or Linear whose output channels are divided by s.
        consumers: the Linears that read it and whose input channels are multiplied by s.
    """

    target: str
    producer: str
    consumers: tuple[str, ...]


def family(model) -> str:
    """The architecture's name, if it is one this module knows.

    Raises:
        StudyError: the architecture is not known; says what to add.
    """
    name = model.config.model_type
    if name not in LLAMA_LIKE:
        raise StudyError(
            f"architecture {name!r} is not among {', '.join(sorted(LLAMA_LIKE))}; add how its "
            "norms feed its Linears to helpers/quantization/layer_groups.py"
        )
    return name


def smoothing_groups(model, targets: tuple[str, ...]) -> list[SmoothingGroup]:
    """The groups of the named targets, in layer order.

    Raises:
        StudyError: unknown architecture; a module is missing; or `attention_output` under
            grouped-query attention, where one value channel feeds several heads.
    """
    family(model)
    config, groups = model.config, []
    if "attention_output" in targets and config.num_key_value_heads != config.num_attention_heads:
        raise StudyError(
            f"smooth.targets: 'attention_output' needs as many key/value heads as heads, but this "
            f"model has {config.num_key_value_heads} and {config.num_attention_heads}; leave it out"
        )
    for layer in range(config.num_hidden_layers):
        for target, producer, consumers in _LLAMA_GROUPS:
            if target in targets:
                at = f"model.layers.{layer}."
                groups.append(
                    SmoothingGroup(target, at + producer, tuple(at + c for c in consumers))
                )
    names = dict(model.named_modules())
    for group in groups:
        for name in (group.producer, *group.consumers):
            if name not in names:
                raise StudyError(f"{name} is expected in a {family(model)} model but is not there")
    return groups


_LLAMA_GROUPS = (
    (
        "attention_input",
        "input_layernorm",
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ),
    ("attention_output", "self_attn.v_proj", ("self_attn.o_proj",)),
    ("mlp_input", "post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
    ("mlp_down", "mlp.up_proj", ("mlp.down_proj",)),
)


def linear_layers(model) -> dict[str, nn.Linear]:
    """Every Linear of the model by name, the head included."""
    return {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}


def quantized_linears(model, ignore: tuple[str, ...]) -> dict[str, nn.Linear]:
    """The Linears a variant quantizes: all but those it ignores.

    Args:
        ignore: module names, whole or their last part (`lm_head`, `down_proj`).

    Raises:
        StudyError: an ignored name matches nothing.
    """
    linears = linear_layers(model)
    ignored = {name for name in linears for i in ignore if name == i or name.endswith("." + i)}
    for i in ignore:
        if not any(name == i or name.endswith("." + i) for name in linears):
            raise StudyError(f"ignore: {i!r} matches no Linear of this model; correct the name")
    return {name: m for name, m in linears.items() if name not in ignored}
