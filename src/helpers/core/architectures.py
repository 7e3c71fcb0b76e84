"""Supported model architectures, one entry a family: its Linears, norms and smoothing groups.

An entry says where the blocks lie, which Linears a block has, what feeds each of them,
how its norms multiply, and what a configuration must not ask for. Everything that
depends on a family (smoothing, census, checks, loading) is read off this table, so that
a ninth family is one entry here and one line of tiny sizes in `models`.

A place is a producer, whose output channels can be divided by s, and the Linears that
read it, whose input channels are then multiplied by s. Every Linear of a block is read
off the places: it is a consumer of exactly one. Where producer and Linear are fused, the
consumer reads the producer's last channels (v of qkv, up of gate_up). `{expert}` stands
for every expert of a block; imports no torch.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

from helpers.core.errors import StudyError

HEAD = "lm_head"  # of every family here; often tied to the embeddings


@dataclass(frozen=True)
class Requirement:
    """A condition on a configuration; `words` describe it and may quote `{config}`."""

    holds: Callable[..., bool]
    words: str


@dataclass(frozen=True)
class Place:
    """One place of a block into which scales can be folded, by names inside the block.

    Attributes:
        target: name of this kind of place in the study file.
        producer: the norm or Linear whose (last) output channels are divided by s.
        consumers: the Linears that read it.
        readers: float matrices that also read it (a router); they are multiplied as well.
        need: condition under which folding here preserves the model's function.
    """

    target: str
    producer: str
    consumers: tuple[str, ...]
    readers: tuple[str, ...] = ()
    need: Requirement | None = None


@dataclass(frozen=True)
class Architecture:
    """One model family, named by the `model_type` of its configuration.

    Attributes:
        places: in the order in which scales are folded: a Linear is a consumer before it
            is a producer.
        blocks: name of the list of decoder blocks.
        embeddings: names of the lookup tables, the token embeddings first.
        norm_offset: what a norm adds to its weight before it multiplies: 1 for (1 + w).
        experts: transformers' class that holds a block's experts as stacked tensors.
        needs: conditions under which this entry describes a configuration.
    """

    name: str
    places: tuple[Place, ...]
    blocks: str = "model.layers"
    embeddings: tuple[str, ...] = ("model.embed_tokens",)
    norm_offset: float = 0.0
    experts: str = ""
    needs: tuple[Requirement, ...] = ()


ONE_VALUE_A_HEAD = Requirement(
    lambda config: config.num_key_value_heads == config.num_attention_heads,
    "as many key/value heads as heads, since a shared value channel feeds several heads; here "
    "are {config.num_key_value_heads} and {config.num_attention_heads}",
)
ATTENTION = (
    Place(
        "attention_input",
        "input_layernorm",
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ),
    Place("attention_output", "self_attn.v_proj", ("self_attn.o_proj",), need=ONE_VALUE_A_HEAD),
)
LLAMA = (
    *ATTENTION,
    Place("mlp_input", "post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
    Place("mlp_down", "mlp.up_proj", ("mlp.down_proj",)),
)
QWEN3_MOE = (
    *ATTENTION,
    Place(
        "mlp_input",
        "post_attention_layernorm",
        ("mlp.experts.{expert}.gate_proj", "mlp.experts.{expert}.up_proj"),
        readers=("mlp.gate",),
    ),
    Place("mlp_down", "mlp.experts.{expert}.up_proj", ("mlp.experts.{expert}.down_proj",)),
)
GEMMA3 = (
    *ATTENTION,
    Place("mlp_input", "pre_feedforward_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
    Place("mlp_down", "mlp.up_proj", ("mlp.down_proj",)),
)
PHI3 = (
    Place("attention_input", "input_layernorm", ("self_attn.qkv_proj",)),
    Place("attention_output", "self_attn.qkv_proj", ("self_attn.o_proj",), need=ONE_VALUE_A_HEAD),
    Place("mlp_input", "post_attention_layernorm", ("mlp.gate_up_proj",)),
    Place("mlp_down", "mlp.gate_up_proj", ("mlp.down_proj",)),
)
OPT = (
    Place(
        "attention_input",
        "self_attn_layer_norm",
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ),
    Place("attention_output", "self_attn.v_proj", ("self_attn.out_proj",)),
    Place("mlp_input", "final_layer_norm", ("fc1",)),
    Place(
        "mlp_down",
        "fc1",
        ("fc2",),
        need=Requirement(
            lambda config: config.activation_function == "relu",
            "a relu between fc1 and fc2, the one activation that commutes with scales; here is "
            "{config.activation_function}",
        ),
    ),
)

ARCHITECTURES = {
    entry.name: entry
    for entry in (
        Architecture("llama", LLAMA),
        Architecture("mistral", LLAMA),
        Architecture("qwen2", LLAMA),
        Architecture("qwen3", LLAMA),
        Architecture(
            "qwen3_moe",
            QWEN3_MOE,
            experts="transformers.models.qwen3_moe.modeling_qwen3_moe.Qwen3MoeExperts",
            needs=(
                Requirement(
                    lambda c: not c.mlp_only_layers and c.decoder_sparse_step == 1,
                    "experts in every block; here mlp_only_layers = {config.mlp_only_layers} and "
                    "decoder_sparse_step = {config.decoder_sparse_step}",
                ),
            ),
        ),
        Architecture(
            "gemma3_text",
            GEMMA3,
            norm_offset=1.0,
            needs=(
                Requirement(
                    lambda c: c.final_logit_softcapping is None,
                    "final_logit_softcapping = null, since the head is read without a cap; here it "
                    "is {config.final_logit_softcapping}",
                ),
                Requirement(
                    lambda c: not c.use_bidirectional_attention,
                    "use_bidirectional_attention = false, since a token is scored by those before",
                ),
            ),
        ),
        Architecture("phi3", PHI3),
        Architecture(
            "opt",
            OPT,
            blocks="model.decoder.layers",
            embeddings=("model.decoder.embed_tokens", "model.decoder.embed_positions"),
            needs=(
                Requirement(
                    lambda c: c.do_layer_norm_before and c.layer_norm_elementwise_affine,
                    "do_layer_norm_before and layer_norm_elementwise_affine = true, since other "
                    "norms feed the residual too or have no weight",
                ),
                Requirement(
                    lambda c: c.word_embed_proj_dim == c.hidden_size,
                    "word_embed_proj_dim = hidden_size; here are {config.word_embed_proj_dim} and "
                    "{config.hidden_size}",
                ),
            ),
        ),
    )
}


def unknown_family_message(model_type: str) -> str | None:
    """The error message for a family without an entry; None if it has one."""
    if model_type in ARCHITECTURES:
        return None
    return (
        f"architecture {model_type!r} is not among {', '.join(sorted(ARCHITECTURES))}; add which "
        "norm feeds which of its Linears to helpers/core/architectures.py"
    )


def architecture(config) -> Architecture:
    """The entry of a model's configuration.

    Raises:
        StudyError: the family has no entry, or the configuration violates a condition of it.
    """
    if message := unknown_family_message(config.model_type):
        raise StudyError(message)
    entry = ARCHITECTURES[config.model_type]
    for need in entry.needs:
        if not need.holds(config):
            words = need.words.format(config=config)
            raise StudyError(f"architecture {entry.name!r} is known only with {words}")
    return entry


def places(config) -> list[Place]:
    """Every place of every block with full module names, experts expanded, in block order."""
    entry = architecture(config)
    return [
        expanded
        for block in range(config.num_hidden_layers)
        for place in entry.places
        for expanded in _one_place_per_producer(place, f"{entry.blocks}.{block}.", config)
    ]


def _one_place_per_producer(place: Place, block: str, config) -> list[Place]:
    """A place of one block, repeated for each expert if its producer belongs to an expert."""
    experts = range(config.num_experts) if architecture(config).experts else range(1)
    separate = "{expert}" in place.producer

    def names(patterns: tuple[str, ...], indices) -> tuple[str, ...]:
        expanded = (block + p.replace("{expert}", str(e)) for e in indices for p in patterns)
        return tuple(
            dict.fromkeys(expanded)
        )  # without a placeholder all experts give the same name

    return [
        replace(
            place,
            producer=names((place.producer,), indices)[0],
            consumers=names(place.consumers, indices),
            readers=names(place.readers, indices),
        )
        for indices in ([(e,) for e in experts] if separate else [experts])
    ]


def linear_names(config) -> list[str]:
    """Names of every Linear the architecture has, block by block, and the head last."""
    return [name for place in places(config) for name in place.consumers] + [HEAD]


def float_matrices(config) -> list[str]:
    """Names of the modules whose matrices are not Linears: lookup tables and routers."""
    readers = [name for place in places(config) for name in place.readers]
    return [*architecture(config).embeddings, *readers]
