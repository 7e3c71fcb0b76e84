"""What a model computed while it was asked, held to the tensors on disk: each lapse is seen."""

from types import MethodType

import pytest
import torch
import yaml

from conftest import STUDY
from evaluated_run import (
    asked,
    dequantized,
    each_int8,
    failed,
    in_bfloat16,
    multiplied,
    scale_of_each_token,
)
from helpers.core.architectures import HEAD
from helpers.evaluation.checks.recorded_calls import (
    FLOAT,
    QUANTIZED,
    WHOLE,
    CallRecorder,
    LinearFile,
    linear_files,
)
from helpers.inference import packed_attention, perplexity, protocols
from helpers.quantization.int8_linear import Int8Linear
from helpers.runtime.devices import current_sequence_ids
from helpers.sources.models import random_model
from quantized_run import QuantizedRun
from test_plain_beginning import tokenizer_with


def readers(patch, read) -> None:
    """Put another `read` of packed rows in the place of the engine's."""
    for module in (protocols, perplexity, protocols):
        patch.setattr(module, "read", read)


LOADED = "the loaded model"
FORWARD = "quantization.int8_linear.Int8Linear.forward"
SOUND = [("llama", "noquant"), ("qwen3", "rtn_w8a8"), ("llama", "o2"), ("qwen3", "o3")]
SOUND += [("llama", "down_float"), ("qwen3", "smooth_only")]


@pytest.mark.parametrize(("family", "variant"), SOUND)
def test_a_sound_evaluation_passes(sound_runs, family, variant):
    gates = asked(sound_runs(family, variant))
    assert failed(gates) == set()
    names = {WHOLE, FLOAT} | ({QUANTIZED} if variant not in ("noquant", "smooth_only") else set())
    assert {gate.name for gate in gates} == names


@pytest.mark.parametrize("variant", ["noquant", "rtn_w8a8", "o2"])
def test_a_sound_evaluation_in_bfloat16_passes(variant, tmp_path):
    settings = yaml.safe_load(STUDY)
    settings["runtime"]["dtype"] = "bfloat16"
    run = QuantizedRun(tmp_path, settings, variant)
    run.save_source("qwen3")
    if variant != "noquant":
        run.calibrate()
        run.quantize()
    assert failed(asked(run)) == set()


@pytest.mark.parametrize(("family", "variant"), [("opt", "o2"), ("gemma3_text", "rtn_w8a8"),
                                                 ("qwen3_moe", "o2")])  # fmt: skip
def test_other_families_pass(sound_runs, family, variant):
    assert failed(asked(sound_runs(family, variant))) == set()


@pytest.mark.parametrize("variant", ["noquant", "rtn_w8a8"])
def test_texts_that_begin_with_two_tokens_pass(tmp_path, variant):
    """One more token a passage is read than is predicted."""
    run = QuantizedRun(tmp_path, yaml.safe_load(STUDY), variant)
    run.save_source("llama")
    tokenizer_with("two first tokens").save_pretrained(tmp_path / "source")
    if variant != "noquant":
        run.calibrate()
        run.quantize()
    assert failed(asked(run)) == set()


@pytest.mark.bank("int8", "packed rows run every Linear in float")
def test_packed_rows_multiplied_in_float(sound_runs, monkeypatch):
    """Decoding stays int8, and the checkpoint's own gates see nothing."""
    read = packed_attention.read

    def float_read(model, segments):
        each_int8(model, dequantized)
        try:
            return read(model, segments)
        finally:
            for module in model.modules():
                if isinstance(module, Int8Linear):
                    del module.forward

    readers(monkeypatch, float_read)
    gates = asked(sound_runs("llama", "rtn_w8a8"))
    assert failed(gates) == {QUANTIZED}
    [gate] = [gate for gate in gates if not gate.passed]
    assert "0 int8" not in gate.measured
    assert ", 0 float" not in gate.measured


@pytest.mark.bank("int8", "packed rows read by a float copy of the model", WHOLE)
def test_packed_rows_read_by_a_float_copy(sound_runs, monkeypatch):
    """No call of an int8 Linear is wrong; there are too few of them."""
    import copy

    read = packed_attention.read

    def float_read(model, segments):
        twin = copy.deepcopy(model)
        each_int8(twin, dequantized)
        twin.set_attn_implementation("packed")
        for module in twin.modules():
            module._forward_hooks.clear()
            module._forward_pre_hooks.clear()
        return read(twin, segments)

    readers(monkeypatch, float_read)
    assert WHOLE in failed(asked(sound_runs("llama", "rtn_w8a8")))


def one_scale_a_text(module, x):
    owners = current_sequence_ids()
    rows = x.reshape(-1, x.shape[-1])
    tops = rows.abs().amax(1)
    whole = torch.stack([tops[owners == owner].amax() for owner in owners])
    return multiplied(module, x, (whole / 127.5)[:, None])


def truncated(module, x):
    return multiplied(module, x, scale_of_each_token(x), rounding=torch.trunc)


def sevens(module, x):
    return multiplied(module, x, x.float().abs().amax(-1, keepdim=True) / 127)


ARITHMETICS = {
    one_scale_a_text: "one scale a text instead of a token in packed rows",
    truncated: "activations truncated in the evaluation alone",
    sevens: "scales of 1/127 instead of 1/127.5 of the largest value",
    dequantized: "every Linear with float activations",
}


@pytest.mark.parametrize(
    "forward",
    [
        pytest.param(f, marks=pytest.mark.bank("int8", w, at=FORWARD))
        for f, w in ARITHMETICS.items()
    ],
)
def test_another_arithmetic(sound_runs, forward):
    gates = asked(sound_runs("llama", "rtn_w8a8"), lambda model: each_int8(model, forward))
    assert failed(gates) == {QUANTIZED}


@pytest.mark.bank("int8", "one scale a packed row instead of a text", at=FORWARD)
def test_one_scale_a_row_instead_of_a_text(sound_runs):
    """Texts packed into one row share a scale that each ought to have by itself."""
    whole = lambda module, x: multiplied(module, x, x.abs().amax() / 127.5)  # noqa: E731
    gates = asked(sound_runs("llama", "o2"), lambda model: each_int8(model, whole))
    assert failed(gates) == {QUANTIZED}


@pytest.mark.bank("int8", "a static scale made anew for each token", at=FORWARD)
def test_a_static_scale_made_anew(sound_runs):
    own = lambda module, x: multiplied(module, x, scale_of_each_token(x))  # noqa: E731
    gates = asked(sound_runs("llama", "o3"), lambda model: each_int8(model, own))
    assert failed(gates) == {QUANTIZED}


@torch.no_grad()
def weight_scales_doubled_at_load_in_the_evaluation_alone(model):
    for module in model.modules():
        if isinstance(module, Int8Linear):
            module.weight_scale *= 2


def one_linear_float(model):
    model.model.layers[1].mlp.up_proj.forward = MethodType(
        dequantized, model.model.layers[1].mlp.up_proj
    )


@pytest.mark.bank("int8", "{change}", at=LOADED)
@pytest.mark.parametrize(
    "change", [weight_scales_doubled_at_load_in_the_evaluation_alone, one_linear_float]
)
def test_weights_other_than_on_disk(sound_runs, change):
    assert failed(asked(sound_runs("llama", "rtn_w8a8"), change)) == {QUANTIZED}


@pytest.mark.bank("int8", "one call in float after some in int8", at=FORWARD)
def test_float_from_the_second_half_on(sound_runs):
    """Early calls are sound; every call is looked at."""

    def change(model):
        module, calls = model.model.layers[0].mlp.down_proj, []

        def forward(self, x):
            calls.append(1)
            if len(calls) == 5:
                return dequantized(self, x)
            return multiplied(self, x, scale_of_each_token(x))

        module.forward = MethodType(forward, module)

    gates = asked(sound_runs("llama", "rtn_w8a8"), change)
    assert failed(gates) == {QUANTIZED}
    assert any("1 float" in gate.measured for gate in gates)


def head_in_bfloat16(model):
    head = model.get_submodule(HEAD)
    head.forward = MethodType(in_bfloat16, head)


def products_in_bfloat16(model):
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            module.forward = MethodType(in_bfloat16, module)


def norm_in_bfloat16(model):
    norm = model.model.norm
    forward = norm.forward
    norm.forward = lambda x: forward(x.bfloat16()).to(x.dtype)


def another_epsilon(model):
    model.model.layers[0].input_layernorm.variance_epsilon = 1e-3


@pytest.mark.bank("float", "{change} for quantized variants alone", at=LOADED)
@pytest.mark.parametrize("change", [head_in_bfloat16, norm_in_bfloat16, another_epsilon])
def test_float_parts_of_a_quantized_variant(sound_runs, change):
    assert failed(asked(sound_runs("llama", "rtn_w8a8"), change)) == {FLOAT}


@pytest.mark.bank("float", "the baseline's {change}", at=LOADED)
@pytest.mark.parametrize("change", [products_in_bfloat16, head_in_bfloat16, norm_in_bfloat16])
def test_float_parts_of_the_baseline(sound_runs, change):
    assert failed(asked(sound_runs("llama", "noquant"), change)) == {FLOAT}


@pytest.mark.bank("float", "logits by a function of their own, the head never called", FLOAT)
def test_a_head_that_is_not_the_models(sound_runs, monkeypatch):
    """Logits made by a function of their own: the head is never called."""

    def logits_at(model, hidden):
        weight = model.get_output_embeddings().weight
        return torch.nn.functional.linear(hidden.bfloat16(), weight.bfloat16()).float()

    for module in (protocols, perplexity, protocols):
        monkeypatch.setattr(module, "logits_at", logits_at)
    assert FLOAT in failed(asked(sound_runs("llama", "rtn_w8a8")))


def test_items_answered_before_a_crash_need_no_calls(sound_runs):
    run = sound_runs("llama", "rtn_w8a8")
    everything = {"arc": {f"none-{i}" for i in range(3)}}
    assert failed(asked(run, resumed=everything)) == set()


def test_what_cannot_be_looked_at_fails_and_stops_nothing(sound_run):
    run = sound_run("llama", "rtn_w8a8")
    with run.edited() as tensors:
        del tensors["model.layers.0.mlp.up_proj.weight_scale"]
    with run.outputs():
        files = linear_files(run.job)
    recorder = CallRecorder(random_model("llama", seed=1), files, ["model.layers.0.mlp.up_proj"])
    assert "weight_scale" in recorder.errors[0]


@pytest.mark.parametrize("lanes", [8, 16])
def test_float_sums_with_an_outlier_are_rounding(lanes):
    """One channel makes every partial sum large; a processor adds in as many lanes as it has."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(64, 1536, generator=generator)
    x[:, 5] = 3000.0
    weight = torch.randn(48, 1536, generator=generator)
    file = LinearFile(weight, None, None, None, None, 2.0**-23)
    products = file.products(x)
    terms = (x[:, None] * weight).reshape(64, 48, -1, lanes)
    sums = torch.zeros(64, 48, lanes)
    for step in terms.unbind(2):
        sums = sums + step
    y = sums.sum(-1).double()
    ratio = ((y - products.exact).abs() / products.allowed).max().item()
    assert ratio < 1
    in_bfloat16 = (x.bfloat16() @ weight.bfloat16().T).double()
    assert bool(((in_bfloat16 - products.exact).abs() > products.allowed).any())
