"""Eight families as they are discovered: census, smoothing, quantizing, saving, reloading."""

from typing import get_args

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from helpers.core.errors import StudyError
from helpers.quantization.calibration import linear_layers, run_calibration, smoothing_groups
from helpers.quantization.int8_linear import Int8Linear
from helpers.quantization.smoothing import fold_scales_, representable_scales, same_alpha, smooth_
from helpers.quantization.variants import load_int8, load_reference
from helpers.runtime.discovery import float_matrices, linear_names
from helpers.sources.models import FAMILIES, SIZES, load_model, random_model
from helpers.study.schema import RandomModel, Runtime
from helpers.verification.checkpoint_files import capture_inputs
from quantized_run import QuantizedRun, lived_in

ALL = sorted(FAMILIES)
OTHERS = sorted(set(ALL) - {"llama", "qwen3"})  # those two go through every variant elsewhere
TARGETS = ("attention_input", "mlp_input", "mlp_down")
RUNTIME = Runtime(device="cpu", dtype="float32", threads=1, quantized="int8")


@pytest.fixture(params=ALL)
def family(request) -> str:
    return request.param


def texts():
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, 259, (n,), generator=generator).tolist() for n in (9, 43, 14, 5)]


def smoothed_by(model, targets):
    """The model's logits before and after smoothing at the targets, and the groups."""
    ids = torch.tensor([texts()[1]])
    statistics = run_calibration(model, texts(), batch_tokens=64)
    absmax = {name: channel_statistics.absmax for name, channel_statistics in statistics.items()}
    with torch.inference_mode():
        before = model(ids).logits
        done = smooth_(model, absmax, targets, same_alpha(model.config, targets, 0.5))
        return before, model(ids).logits, done


def test_every_random_family_has_tiny_sizes():
    assert set(FAMILIES) == set(get_args(RandomModel.model_fields["random"].annotation))


def test_the_census_is_what_transformers_builds(family):
    """Counted on transformers' own model: its Linears, and its experts' stacked matrices."""
    with torch.device("meta"):
        config = AutoConfig.for_model(family, **{**SIZES, **FAMILIES[family]})
        model = AutoModelForCausalLM.from_config(config)
    linears = {n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    matrices = {n for n, p in model.named_parameters() if p.ndim == 2}
    for name, parameter in model.named_parameters():
        if parameter.ndim == 3:
            kinds = ("gate_proj", "up_proj") if "gate_up" in name else ("down_proj",)
            block = name.rpartition(".")[0]
            linears |= {f"{block}.{e}.{k}" for e in range(len(parameter)) for k in kinds}
    assert len(linear_names(config)) == len(set(linear_names(config)))
    assert set(linear_names(config)) == linears
    others = {n.removesuffix(".weight") for n in matrices} - linears
    assert others == set(float_matrices(config))


def test_smoothing_keeps_the_models_function(family):
    """In float64 but for the norms, which compute in float32 whatever the model's dtype."""
    model = lived_in(random_model(family, seed=3)).double()
    before, after, done = smoothed_by(model, TARGETS)
    each = 6 if family == "qwen3_moe" else 3  # its four experts are smoothed apart
    assert len(done) == each * model.config.num_hidden_layers
    assert not any((s.scales == 1).all() for s in done)
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", sorted(set(ALL) - {"opt"}))
def test_value_smoothing_where_every_head_has_its_own(family):
    model = random_model(family, seed=3)
    with pytest.raises(StudyError, match=r"attention_output.* here are 2 and 4"):
        smoothing_groups(model.config, ("attention_output",))
    model = lived_in(random_model(family, seed=3, num_key_value_heads=4)).double()
    before, after, _ = smoothed_by(model, ("attention_input", "attention_output"))
    torch.testing.assert_close(after, before, rtol=1e-6, atol=1e-6)


def test_opt_smooths_its_values_and_through_its_relu_only():
    model = lived_in(random_model("opt", seed=3)).double()
    before, after, _ = smoothed_by(model, (*TARGETS, "attention_output"))
    torch.testing.assert_close(after, before, rtol=1e-6, atol=1e-6)
    model = random_model("opt", seed=3, activation_function="gelu")
    with pytest.raises(StudyError, match=r"mlp_down.* here is gelu"):
        smoothing_groups(model.config, ("mlp_down",))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_norm_of_one_plus_w_is_folded_by_what_it_can_hold(dtype):
    """Near w = -1 a rounding of w is no longer one of 1 + w; the product must not notice."""
    torch.manual_seed(0)
    norm, linear = torch.nn.RMSNorm(64).to(dtype), torch.nn.Linear(64, 3, bias=False)
    with torch.no_grad():
        norm.weight.copy_(torch.randn(64))
        norm.weight[0] = -1.0  # a dead channel
    factor, weight = norm.weight.double() + 1, linear.weight.detach().double().clone()
    scales = representable_scales(norm.weight, torch.logspace(-3, 6, 64), norm_offset=1)
    fold_scales_(norm, [linear], scales, norm_offset=1)
    product = (norm.weight.double() + 1) * linear.weight.detach().double()
    torch.testing.assert_close(product, factor * weight, rtol=1e-6, atol=0)
    assert bool(((norm.weight.double() == -1) == (factor == 0)).all())


@pytest.mark.parametrize("family", OTHERS)
def test_a_sound_run_passes_every_gate(sound_run, family):
    assert [g for g in sound_run(family, "w8a8_down").verify() if not g.passed] == []


@pytest.mark.long
@pytest.mark.parametrize("variant", ["o1", "o2", "o3_down", "smooth_only_down"])
@pytest.mark.parametrize("family", OTHERS)
def test_so_does_every_scheme(sound_run, family, variant):
    assert [g for g in sound_run(family, variant).verify() if not g.passed] == []


@pytest.mark.parametrize("family", OTHERS)
def test_int8_layers_equal_the_simulation(sound_run, family):
    """Every Linear but the head, on the input it has in the simulated model."""
    run = sound_run(family, "w8a8_down")
    place = {"dtype": torch.float32, "device": "cpu"}
    fast, simulated = load_int8(run.checkpoint, **place), load_reference(run.checkpoint, **place)
    names = {n for n, m in fast.named_modules() if isinstance(m, Int8Linear)}
    assert names | {"lm_head"} == set(linear_names(fast.config))
    with torch.inference_mode():
        for name, x in capture_inputs(simulated, names, texts()[1]).items():
            expected = simulated.get_submodule(name)(x)
            size = expected.abs().max().item()
            output = fast.get_submodule(name)(x)
            torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5 * size)


@pytest.mark.parametrize("family", ["opt", "qwen3_moe", "gemma3_text"])
def test_the_simulation_passes_every_gate_too(study_settings, tmp_path, family):
    study_settings["runtime"]["quantized"] = "reference"
    run = made(family, study_settings, tmp_path)
    assert [g for g in run.verify() if not g.passed] == []


@pytest.mark.parametrize("family", ["opt", "qwen3_moe"])
def test_flattened_inputs_simulated_per_tensor_are_caught(
    study_settings, tmp_path, family, monkeypatch
):
    """What compressed-tensors does by itself to an input of no batch dimension."""
    from helpers.quantization import variants

    study_settings["runtime"]["quantized"] = "reference"
    monkeypatch.setattr(variants, "_forward_rows", lambda module, x: module.simulated(x))
    failed = made(family, study_settings, tmp_path).failed()
    assert "int8 activations at run time" in failed


def made(family, settings, folder) -> QuantizedRun:
    run = QuantizedRun(folder / "run", settings, "w8a8_down")
    run.save_source(family)
    run.calibrate()
    run.quantize()
    return run


def test_bfloat16_norms_of_one_plus_w_pass_every_gate(study_settings, tmp_path):
    study_settings["runtime"]["dtype"] = "bfloat16"
    run = made("gemma3_text", study_settings, tmp_path)
    assert [g for g in run.verify() if not g.passed] == []


@pytest.mark.parametrize(
    ("family", "tensor", "gate"),
    [
        ("qwen3_moe", "model.layers.1.mlp.gate.weight", "smoothing scales as declared"),
        ("opt", "model.decoder.layers.0.final_layer_norm.bias", "smoothing scales as declared"),
        ("opt", "model.decoder.layers.1.fc1.bias", "smoothing scales as declared"),
        ("opt", "model.decoder.layers.1.fc2.bias", "all other tensors unchanged"),
        (
            "gemma3_text",
            "model.layers.0.pre_feedforward_layernorm.weight",
            "smoothing scales as declared",
        ),
        (
            "gemma3_text",
            "model.layers.0.post_feedforward_layernorm.weight",
            "all other tensors unchanged",
        ),
        ("phi3", "model.layers.0.mlp.gate_up_proj.weight_scale", "weights on the declared grid"),
    ],
)
def test_what_a_family_adds_is_guarded(sound_run, family, tensor, gate):
    """A router, a bias, an extra norm, a fused Linear: off by one percent, and caught."""
    run = sound_run(family, "w8a8_down")
    with run.edited() as saved:
        saved[tensor] = saved[tensor] * 1.01
    assert gate in run.failed()


def test_a_matrix_no_entry_knows_is_caught(sound_run):
    run = sound_run("mistral", "w8a8_down")
    for folder in (run.checkpoint, run.root / "source"):
        with run.edited(folder) as tensors:
            tensors["model.layers.0.extra.weight"] = torch.ones(3, 3)
    failed_gates = {g.name: g for g in run.verify() if not g.passed}
    assert (
        "1 matrices of the source are no known part"
        in failed_gates["quantized layers as declared"].measured
    )


@pytest.mark.parametrize(
    ("family", "sizes", "words"),
    [
        ("gpt2", {"n_layer": 1, "n_head": 2, "n_embd": 16}, "'gpt2' cannot be studied: .*Conv1D"),
        ("bert", SIZES, "'bert' cannot be studied: its head is 'cls.predictions.decoder'"),
        ("gemma3_text", {"use_bidirectional_attention": True}, "it is no causal model"),
    ],
)
def test_a_model_that_cannot_be_studied_is_refused_by_reason(family, sizes, words, tmp_path):
    tiny = {**SIZES, **FAMILIES[family]} if family in FAMILIES else {}
    config = AutoConfig.for_model(family, **{**tiny, **sizes})
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(StudyError, match=words):
        load_model(tmp_path, RUNTIME)


def test_an_opt_that_normalizes_after_its_blocks_has_no_norm_to_fold():
    config = AutoConfig.for_model("opt", **{**SIZES, **FAMILIES["opt"]}, do_layer_norm_before=False)
    with pytest.raises(StudyError, match="'attention_input' needs a norm that only its Linears"):
        smoothing_groups(config, ("attention_input",))
    assert len(smoothing_groups(config, ("mlp_down",))) == config.num_hidden_layers


def test_weights_missing_from_the_files_are_refused(sound_run):
    """transformers would draw them at random and go on."""
    run = sound_run("mistral", "w8a8_down")
    with run.edited(run.root / "source") as tensors:
        del tensors["model.layers.1.mlp.up_proj.weight"]
    with pytest.raises(StudyError, match=r"layers\.1\.mlp\.up_proj\.weight is not in its files"):
        load_model(run.root / "source", RUNTIME)


def test_a_model_comes_back_from_its_folder(family, tmp_path):
    model = random_model(family, seed=4)
    model.save_pretrained(tmp_path)
    again, ids = load_model(tmp_path, RUNTIME), torch.tensor([texts()[1]])
    assert set(linear_layers(again)) == set(linear_names(again.config))
    state, loaded_state = model.state_dict(), again.state_dict()
    assert state.keys() == loaded_state.keys()
    assert all(torch.equal(state[name], loaded_state[name]) for name in state)
    with torch.inference_mode():  # its Linears are multiplied by another library
        torch.testing.assert_close(again(ids).logits, model(ids).logits, rtol=1e-5, atol=1e-5)
