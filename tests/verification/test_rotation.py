"""A rotated model against independent formulas, and rotations that lack a side."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers.quantization.variants import (
    has_hadamard_matrix,
    quantize_,
    quiet_llmcompressor,
    rotate_,
    save_checkpoint,
)
from helpers.sources.models import byte_tokenizer, random_model, save_model
from helpers.study.schema import ROTATED, Runtime, Variant
from helpers.verification import checkpoint_gates, runtime_gates
from helpers.verification.checkpoint_files import RotatedFiles
from quantized_run import lived_in

TEXTS = ["The quick brown fox jumps over the lazy dog.", "2 + 3 = 5, and 3 + 4 = 7."]
GATES = (
    checkpoint_gates.orthogonal_gate,
    checkpoint_gates.rotated_gate,
    checkpoint_gates.untied_gate,
    checkpoint_gates.rotated_tokenizer_gate,
    runtime_gates.same_function_gate,
)
TENSORS, FUNCTION = "rotated tensors as declared", "rotation keeps the function"
LAYER = "model.layers.1"


def save_pair(folder, family: str, rotations, *, dtype="float32", **changes):
    """A random model with a tied head and uneven norms, and the same rotated."""
    quiet_llmcompressor()
    tokenizer, model = byte_tokenizer(), lived_in(random_model(family, seed=3, **changes))
    save_model(model, tokenizer, folder / "start")
    rotate_(model, rotations)
    save_model(model.to(getattr(torch, dtype)), tokenizer, folder / "rotated")


def failed(folder, rotations=("r1", "r2"), *, dtype="float32") -> set[str]:
    """Names of the gates that do not hold."""
    runtime = Runtime(device="cpu", dtype=dtype, threads=1, quantized="int8")
    tokens = [byte_tokenizer()(text).input_ids for text in TEXTS]
    evidence = RotatedFiles(
        folder / "start",
        folder / "rotated",
        rotations,
        runtime=runtime,
        tokens=tokens,
        texts=TEXTS,
    )
    gates = [check(evidence) for check in GATES]
    return {gate.name for gate in gates if not gate.passed}


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """With biases of q, k and v, and two keys for four queries."""
    folder = tmp_path_factory.mktemp("pair")
    save_pair(folder, "qwen2", ["r1", "r2"])
    return folder


@pytest.fixture
def copied(pair, tmp_path):
    return shutil.copytree(pair, tmp_path / "pair")


@pytest.mark.parametrize(
    ("family", "rotations", "dtype", "changes"),
    [
        ("qwen2", ["r1", "r2"], "float32", {}),
        ("llama", ["r1", "r2"], "bfloat16", {"attention_bias": True, "mlp_bias": True}),
        ("mistral", ["r1"], "float32", {"hidden_size": 48}),  # 12 · 4: no power of two
        ("qwen3", ["r2"], "float32", {"tie_word_embeddings": False}),
    ],
)
def test_a_rotated_model_is_what_the_formulas_say(tmp_path, family, rotations, dtype, changes):
    assert family in ROTATED
    save_pair(tmp_path, family, rotations, dtype=dtype, **changes)
    assert failed(tmp_path, rotations, dtype=dtype) == set()


def test_what_was_not_declared_is_no_rotation(pair):
    assert failed(pair, ["r1"]) == {TENSORS}  # its function is right all the same


def turned(start, tensors):
    """R1, by least squares between the two tables of embeddings."""
    table = "model.embed_tokens.weight"
    return torch.linalg.lstsq(start[table].double(), tensors[table].double()).solution


def r1_left_out_of_one_o_proj(start, tensors):
    name = f"{LAYER}.self_attn.o_proj.weight"
    tensors[name] = (turned(start, tensors) @ tensors[name].double()).float()


def r1_left_out_of_one_down_proj(start, tensors):
    tensors[f"{LAYER}.mlp.down_proj.weight"] = start[f"{LAYER}.mlp.down_proj.weight"]


def r1_left_out_of_one_up_proj(start, tensors):
    norm, name = f"{LAYER}.post_attention_layernorm.weight", f"{LAYER}.mlp.up_proj.weight"
    tensors[name] = start[name] * start[norm]


def r1_left_out_of_the_head(start, tensors):
    tensors["lm_head.weight"] = start["model.embed_tokens.weight"] * start["model.norm.weight"]


def r2_on_v_proj_only(start, tensors):
    name = f"{LAYER}.self_attn.o_proj.weight"
    tensors[name] = (turned(start, tensors).T @ start[name].double()).float()


def r2_left_out_of_the_bias_of_v_proj(start, tensors):
    tensors[f"{LAYER}.self_attn.v_proj.bias"] = start[f"{LAYER}.self_attn.v_proj.bias"]


def a_norm_that_was_not_folded(start, tensors):
    tensors[f"{LAYER}.input_layernorm.weight"] = start[f"{LAYER}.input_layernorm.weight"]


def the_last_norm_not_in_the_head(start, tensors):
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()


def embeddings_less_their_mean(start, tensors):
    """What llmcompressor's own SpinQuant does to every model."""
    table = "model.embed_tokens.weight"
    less = start[table] - start[table].mean(-1, keepdim=True)
    tensors[table] = (less.double() @ turned(start, tensors)).float()


def one_weight_a_thousandth_off(start, tensors):
    tensors[f"{LAYER}.mlp.gate_proj.weight"][3, 4] *= 1.001


REJECTED = "rotations are orthogonal"
FAILURES = [
    (r1_left_out_of_one_o_proj, {TENSORS, FUNCTION}),
    (r1_left_out_of_one_down_proj, {TENSORS, FUNCTION}),
    (r1_left_out_of_one_up_proj, {TENSORS, FUNCTION}),
    (r1_left_out_of_the_head, {TENSORS, FUNCTION}),
    (r2_on_v_proj_only, {TENSORS, FUNCTION}),
    (r2_left_out_of_the_bias_of_v_proj, {TENSORS, FUNCTION}),
    (a_norm_that_was_not_folded, {TENSORS, FUNCTION}),
    (the_last_norm_not_in_the_head, {TENSORS, FUNCTION}),
    (embeddings_less_their_mean, {TENSORS, FUNCTION, REJECTED}),  # no matrix gives them
    (one_weight_a_thousandth_off, {TENSORS}),
]


@pytest.mark.bank("rotation", "{change}", at="files of the rotated model")
@pytest.mark.parametrize(("change", "expected"), FAILURES, ids=lambda v: getattr(v, "__name__", ""))
def test_a_rotation_that_lacks_a_part_is_caught(copied, change, expected):
    path = copied / "rotated" / "model.safetensors"
    start, tensors = load_file(copied / "start" / "model.safetensors"), load_file(path)
    change(start, tensors)
    save_file({n: t.contiguous() for n, t in tensors.items()}, path, metadata={"format": "pt"})
    assert failed(copied) == expected


@pytest.mark.bank("rotation", "a matrix that is not orthogonal", REJECTED)
def test_a_matrix_that_is_not_orthogonal_is_caught(tmp_path, monkeypatch):
    """llmcompressor's `random-matrix` has an inverse, which no norm between the two forgives."""
    from llmcompressor.modifiers.transform import SpinQuantModifier

    monkeypatch.setattr("helpers.quantization.variants.TRANSFORM", "random-matrix")
    save_pair(tmp_path, "llama", ["r1", "r2"])
    assert SpinQuantModifier.model_fields["transform_type"].default == "hadamard"
    assert failed(tmp_path) == {REJECTED, TENSORS, FUNCTION}


HEAD_GATE = "rotated model has a head of its own"


@pytest.mark.bank("rotation", "a head left tied", HEAD_GATE, TENSORS, at="config.json")
def test_a_head_left_tied_is_caught(copied):
    path, weights = copied / "rotated" / "config.json", copied / "rotated" / "model.safetensors"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tie_word_embeddings": True}))
    tensors = load_file(weights)
    del tensors["lm_head.weight"]
    save_file(tensors, weights, metadata={"format": "pt"})
    assert failed(copied) >= {HEAD_GATE, TENSORS}


TOKENIZER = "rotated model's tokenizer matches its start's"


@pytest.mark.bank(
    "rotation", "another tokenizer saved with a rotated model", TOKENIZER, at="the tokenizer"
)
def test_another_tokenizer_is_caught(copied):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = tokenizer.chat_template.replace("assistant", "Assistant")
    tokenizer.save_pretrained(copied / "rotated")
    assert failed(copied) == {TOKENIZER}


def test_a_checkpoint_keeps_a_head_of_its_own_that_equals_the_embeddings(tmp_path):
    """After norms of ones, as untrained models have them, both are rotated to the same values."""
    model = random_model("llama", seed=3)
    rotate_(model, ["r1"])
    assert torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)
    quantize_(model, Variant(preset="w8a8"), {})
    save_checkpoint(model, byte_tokenizer(), tmp_path)
    assert "lm_head.weight" in load_file(tmp_path / "model.safetensors")


def test_the_sizes_that_are_refused_are_those_without_a_matrix():
    from compressed_tensors.transform.utils.hadamard import random_hadamard_matrix

    def exists(size: int) -> bool:
        try:
            random_hadamard_matrix(size)
        except ValueError:
            return False
        return True

    sizes = [1, 2, 3, 4, 6, 8, 12, 20, 92, 96, 250, 252, 260, 576, 896, 1000, 1160]
    assert [n for n in sizes if has_hadamard_matrix(n) != exists(n)] == []
    assert {exists(n) for n in sizes} == {True, False}
