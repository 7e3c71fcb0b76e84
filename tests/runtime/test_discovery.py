"""Discovery finds the groups that the table of eight families listed, and more of other kinds."""

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM

from helpers.core.architectures import Place
from helpers.core.errors import StudyError
from helpers.runtime.discovery import Search, architecture, discover, linear_names, places
from helpers.runtime.twins import Twin, _is_plain, build_twin, twin_config
from helpers.sources.models import FAMILIES, SIZES

QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
LLAMA = [
    ("attention_input", "input_layernorm", QKV, ()),
    ("attention_output", "self_attn.v_proj", ("self_attn.o_proj",), ()),
    ("mlp_input", "post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj"), ()),
    ("mlp_down", "mlp.up_proj", ("mlp.down_proj",), ()),
]
EXPERTS = [f"mlp.experts.{e}" for e in range(4)]
TABLE = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3"), LLAMA),
    "qwen3_moe": [
        *LLAMA[:2],
        (
            "mlp_input",
            "post_attention_layernorm",
            tuple(f"{e}.{part}_proj" for e in EXPERTS for part in ("gate", "up")),
            ("mlp.gate",),
        ),
        *[("mlp_down", f"{e}.up_proj", (f"{e}.down_proj",), ()) for e in EXPERTS],
    ],
    "gemma3_text": [
        *LLAMA[:2],
        ("mlp_input", "pre_feedforward_layernorm", ("mlp.gate_proj", "mlp.up_proj"), ()),
        LLAMA[3],
    ],
    "phi3": [
        ("attention_input", "input_layernorm", ("self_attn.qkv_proj",), ()),
        ("attention_output", "self_attn.qkv_proj", ("self_attn.o_proj",), ()),
        ("mlp_input", "post_attention_layernorm", ("mlp.gate_up_proj",), ()),
        ("mlp_down", "mlp.gate_up_proj", ("mlp.down_proj",), ()),
    ],
    "opt": [
        ("attention_input", "self_attn_layer_norm", QKV, ()),
        ("attention_output", "self_attn.v_proj", ("self_attn.out_proj",), ()),
        ("mlp_input", "final_layer_norm", ("fc1",), ()),
        ("mlp_down", "fc1", ("fc2",), ()),
    ],
}


def tiny(family: str, **changes):
    return AutoConfig.for_model(family, **{**SIZES, **FAMILIES[family], **changes})


def default(family: str, **changes):
    """A family's default configuration, shrunk to a few layers."""
    return twin_config(CONFIG_MAPPING[family](**changes), layers=4)


OWN_HEADS = [(family, False) for family in sorted(TABLE)]
SHARED_HEADS = [(family, True) for family in sorted(TABLE) if family != "opt"]  # OPT has none


@pytest.mark.parametrize(("family", "shared_heads"), OWN_HEADS + SHARED_HEADS)
def test_the_eight_families_have_the_groups_of_the_table(family, shared_heads):
    config = (
        tiny(family) if shared_heads or family == "opt" else tiny(family, num_key_value_heads=4)
    )
    blocks = "model.decoder.layers" if family == "opt" else "model.layers"
    expected = []
    for block in range(config.num_hidden_layers):
        full = lambda names, b=block: tuple(f"{blocks}.{b}.{name}" for name in names)  # noqa: E731
        for target, producer, consumers, readers in TABLE[family]:
            [producer] = full([producer])
            if shared_heads and target == "attention_output":
                producer = ""  # a value channel feeds several heads
            offset = 1.0 if family == "gemma3_text" and target.endswith("input") else 0.0
            row = (target, producer, full(consumers), full(readers), offset)
            expected.append(row)
    found = [(p.target, p.producer, p.consumers, p.readers, p.norm_offset) for p in places(config)]
    assert found == expected
    assert architecture(config).blocks == blocks
    refused = {p.target for p in places(config) if p.refusal}
    assert refused == ({"attention_output"} if shared_heads else set())


def kinds(config) -> dict[tuple[str, str], int]:
    """Number of places that fold, by target and second target."""
    count: dict[tuple[str, str], int] = {}
    for place in discover(config).places:
        if place.producer:
            count[place.target, place.also] = count.get((place.target, place.also), 0) + 1
    return count


def test_a_norm_before_parallel_attention_belongs_to_two_targets():
    found = kinds(default("phi"))
    assert found["attention_input", "mlp_input"] == 4
    shared = next(p for p in discover(default("phi")).places if p.also)
    served = [shared.serves((t,)) for t in ("attention_input", "mlp_input", "mlp_down")]
    assert served == [True, True, False]


def test_a_model_that_normalizes_after_its_blocks_has_no_norm_to_fold():
    found = kinds(default("olmo2"))
    assert not {target for target, _ in found} & {"attention_input", "mlp_input"}
    assert found["mlp_down", ""] == 4


def test_both_forms_of_norms_are_told_apart_by_the_proof():
    """gemma multiplies by 1 + w; helium computes in float32 and multiplies by w."""
    offsets = {f: {p.norm_offset for p in discover(default(f)).places if "norm" in p.producer}
               for f in ("gemma", "helium")}  # fmt: skip
    assert offsets == {"gemma": {1.0}, "helium": {0.0}}


def test_a_mixture_with_shared_experts_and_dense_layers_is_read_whole():
    config = twin_config(CONFIG_MAPPING["qwen2_moe"](mlp_only_layers=[1]), layers=2)
    down = [p.consumers[0] for p in places(config) if p.target == "mlp_down" and p.producer]
    assert [name for name in down if ".layers.1." in name] == ["model.layers.1.mlp.down_proj"]
    assert "model.layers.0.mlp.experts.3.down_proj" in down
    assert "model.layers.0.mlp.shared_expert.down_proj" in down


@pytest.mark.parametrize("family", ["phi", "olmo2", "gemma", "qwen2_moe", "bloom"])
def test_every_linear_has_one_place(family):
    config = default(family)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    linears = {n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    names = [n for n in linear_names(config) if ".experts." not in n]
    assert sorted(names) == sorted(linears)


def test_a_wrong_group_is_refused_by_the_proof():
    """Keys cannot be divided for the output, nor one of two readers left out."""
    twin = Twin(twin_config(tiny("llama", num_key_value_heads=4)))
    search = Search(twin, twin.flow())
    keys = Place("attention_output", "model.layers.0.self_attn.k_proj",
                 ("model.layers.0.self_attn.o_proj",))  # fmt: skip
    partial = Place("mlp_input", "model.layers.0.post_attention_layernorm",
                    ("model.layers.0.mlp.up_proj",))  # fmt: skip
    assert search._proof(keys, (0.0,))[0] is None
    assert search._proof(partial, (0.0, 1.0))[0] is None


def test_a_twin_keeps_how_modules_are_connected():
    config = AutoConfig.for_model("qwen3", num_hidden_layers=5, num_attention_heads=32,
                                  num_key_value_heads=8, tie_word_embeddings=True)  # fmt: skip
    small = twin_config(config)
    assert (small.num_hidden_layers, small.tie_word_embeddings) == (5, True)
    assert small.num_attention_heads == 2 * small.num_key_value_heads
    assert sum(p.numel() for p in build_twin(small).parameters()) < 10**6


def test_a_model_made_of_several_models_is_refused():
    with pytest.raises(StudyError, match="give its language model alone"):
        architecture(CONFIG_MAPPING["gemma3"]())


class WithProduct(torch.nn.Linear):
    def forward(self, x):
        y = x @ self.weight.T
        return y if self.bias is None else y + self.bias


class OfUnitInputs(torch.nn.Linear):
    def forward(self, x):
        return super().forward(torch.nn.functional.normalize(x, dim=-1))


class Scored(torch.nn.Linear):
    def forward(self, x):
        return super().forward(x).relu()


class Routed(torch.nn.Linear):
    def forward(self, x):
        return super().forward(x), x.argmax(-1)


@pytest.mark.parametrize(
    ("kind", "plain"),
    [(WithProduct, True), (OfUnitInputs, False), (Scored, False), (Routed, False)],
)
def test_only_what_computes_as_a_linear_is_replaced_by_one(kind, plain):
    torch.manual_seed(0)
    for bias in (True, False):
        assert _is_plain(kind(16, 8, bias=bias).double()) == plain
