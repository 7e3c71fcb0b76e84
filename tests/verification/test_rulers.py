"""Rulers, simulated by compressed-tensors: sound ones pass every gate, broken ones fail theirs."""

import pytest
import torch
from compressed_tensors.compressors import pack_to_int32, unpack_from_int32
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import fake_quantize

from evaluated_run import asked, failed, looked_at
from helpers.core.errors import StudyError
from helpers.quantization import simulation
from helpers.quantization.variants import load_variant
from helpers.study.loading import load_study
from helpers.study.schema import RULERS as SCHEMES
from helpers.study.schema import Variant
from helpers.verification import rulers
from helpers.verification.checkpoint_files import CheckpointFiles
from quantized_run import NORMS, SMOOTH, VARIANTS, QuantizedRun

RULERS = {
    "w8a16": {"preset": "w8a16"},
    "w4a16": {"preset": "w4a16", "smooth": SMOOTH},
    "a8": {"preset": "a8", "smooth": SMOOTH},
    "fp8": {"preset": "fp8", "smooth": {"alpha": 0.5, "targets": [*NORMS, "mlp_down"]}},
}
Q_PROJ = "model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def made_runs():
    return {}


@pytest.fixture
def run_of(study_settings, tmp_path, tmp_path_factory, made_runs, monkeypatch):
    """A run of a ruler on a tiny model, for the test to break."""
    for name, recipe in RULERS.items():
        monkeypatch.setitem(VARIANTS, name, recipe)

    def run(variant: str) -> QuantizedRun:
        if variant not in made_runs:
            made = QuantizedRun(tmp_path_factory.mktemp(variant), study_settings, variant)
            made.save_source("qwen2")
            made.calibrate()
            made.quantize()
            made.note_verified()
            made_runs[variant] = made
        return made_runs[variant].copy(tmp_path / "copy")

    return run


@pytest.mark.parametrize("variant", RULERS)
def test_a_sound_ruler_passes_every_gate(run_of, variant):
    run = run_of(variant)
    assert [g for g in run.verify() if not g.passed] == []
    assert [g for g in asked(run) if not g.passed] == []
    assert [g for _, g in looked_at(run) if not g.passed] == []


def edit_level(tensors):
    packed = tensors[f"{Q_PROJ}.weight_packed"]
    packed[0, 0] ^= 1 << 8  # one weight, by one level


def exchange_steps(tensors):
    steps = tensors[f"{Q_PROJ}.weight_scale"]
    steps[[0, 1]] = steps[[1, 0]]


def double_a_step(tensors):
    tensors[f"{Q_PROJ}.weight_scale"][0] *= 2


def keep_float(tensors):
    for part in ("weight_shape", "weight_scale", "weight_packed"):
        packed = tensors.pop(f"{Q_PROJ}.{part}")
    tensors[f"{Q_PROJ}.weight"] = torch.zeros(len(packed), 64)


def edit_float_weight(tensors):
    tensors[f"{Q_PROJ}.weight"][0, 0] += 1e-3


def one_number_off(tensors):
    numbers = tensors[f"{Q_PROJ}.weight"].view(torch.uint8)
    tensors[f"{Q_PROJ}.weight"] = (numbers ^ (torch.arange(64) == 3)).view(torch.float8_e4m3fn)


GRID, LAYERS = "ruler's weights on the declared grid", "ruler's layers as declared"
EDITS = [
    ("w8a16", edit_level, GRID),
    ("w4a16", exchange_steps, GRID),
    ("w4a16", double_a_step, GRID),
    ("w8a16", keep_float, LAYERS),
    ("fp8", one_number_off, GRID),
    ("fp8", exchange_steps, GRID),
    ("a8", edit_float_weight, "smoothed float weights"),
]


@pytest.mark.bank("ruler", "a ruler's tensor edited", at="checkpoint/model.safetensors")
@pytest.mark.parametrize(("variant", "edit", "gate"), EDITS)
def test_an_edited_tensor_fails(run_of, variant, edit, gate):
    run = run_of(variant)
    with run.edited() as tensors:
        edit(tensors)
    assert gate in run.failed()


CONFIGS = [
    ("w8a16", lambda g: g["weights"].update(num_bits=4)),
    ("w4a16", lambda g: g["weights"].update(group_size=16)),
    ("a8", lambda g: g["input_activations"].update(num_bits=4)),
    ("fp8", lambda g: g.update(input_activations=None)),
]


@pytest.mark.bank("ruler", "a ruler's config edited", at="checkpoint/config.json")
@pytest.mark.parametrize(("variant", "edit"), CONFIGS)
def test_an_edited_config_fails(run_of, variant, edit):
    run = run_of(variant)
    with run.edited_json(run.checkpoint / "config.json") as config:
        edit(config["quantization_config"]["config_groups"]["group_0"])
    assert "ruler's metadata match the tensors" in run.failed()


def float_activations(model):
    for module in model.modules():
        if getattr(module, "quantization_scheme", None):
            module.quantization_scheme.input_activations = None


def one_scale_for_all(model):
    for module in model.modules():
        if getattr(module, "quantization_scheme", None):
            module.quantization_scheme.input_activations.strategy = "tensor"


def doubled_weights(model):
    with torch.no_grad():
        model.get_submodule(Q_PROJ).weight.mul_(1.01)


CHANGES = [
    ("a8", float_activations),
    ("fp8", float_activations),
    ("a8", one_scale_for_all),
    ("w4a16", doubled_weights),
]


@pytest.mark.bank("ruler", "a ruler that computes otherwise than declared", at="running model")
@pytest.mark.parametrize(("variant", "change"), CHANGES)
def test_other_arithmetic_fails(run_of, monkeypatch, variant, change):
    run = run_of(variant)
    assert "quantized Linears in the evaluation" in failed(asked(run, change))

    def load_changed(job):
        model, tokenizer = load_variant(job)
        change(model)
        return model, tokenizer

    monkeypatch.setattr("helpers.verification.checkpoint_files.load_variant", load_changed)
    assert "ruler's arithmetic at run time" in run.failed()


@pytest.mark.parametrize("bits", [4, 8])
def test_packed_weights_are_read_as_compressed_tensors_writes_them(bits):
    levels = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (3, 13), dtype=torch.int8)
    packed = pack_to_int32(levels, bits)
    assert torch.equal(unpack_from_int32(packed, bits, levels.shape), levels)
    tensors = {"a.weight_packed": packed, "a.weight_shape": torch.tensor(levels.shape)}
    tensors["a.weight_scale"] = torch.ones(3, 1)
    stored = rulers.stored_weight(tensors, "a", SCHEMES[f"w{bits}a16"].weights)
    assert torch.equal(stored.levels, levels.double())


def test_numbers_are_rounded_as_torch_and_compressed_tensors_round_them():
    x = torch.randn(64, 128) * torch.logspace(-4, 4, 128)
    fp8 = SCHEMES["fp8"].activations
    steps = x / rulers.activation_steps(x, fp8)
    expected = steps.to(torch.float8_e4m3fn).float()
    assert torch.equal(rulers.nearest(steps, fp8), expected)
    for name, numbers in {"int8": SCHEMES["a8"].activations, "fp8": fp8}.items():
        scale = rulers.activation_steps(x, numbers)
        args = QuantizationArgs(num_bits=8, type=numbers.kind, strategy="token", dynamic=True)
        other = fake_quantize(x, scale, torch.zeros_like(scale), args)
        assert torch.equal(rulers.nearest(x / scale, numbers) * scale, other), name
        assert torch.equal(simulation.fake_round(x, numbers), other), name


@pytest.mark.parametrize("variant", RULERS)
def test_the_simulation_of_a_linear_is_that_of_the_checkpoint(run_of, variant):
    run = run_of(variant)
    with run.outputs():
        job = run.job
        weight = CheckpointFiles(job, source_hash="").smoothed_weight(Q_PROJ).float()
        linear = load_variant(job)[0].get_submodule(Q_PROJ)
    x = torch.randn(5, linear.in_features)
    one = simulation.SmoothedLinear(x, weight, None, group=32)  # the widths are 64 and 96
    expected = linear(x[None])[0] - linear.bias
    # The largest weight of a part lies on a tie, which the last bit of a scale decides.
    agrees = torch.isclose(one.rounded(job.recipe), expected, atol=1e-5, rtol=1e-5)
    assert agrees.float().mean() > 0.95


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        ({"preset": "w4a16", "rounding": "gptq"}, "rounding = 'gptq'"),
        ({"preset": "fp8", "ignore": []}, "keeps the head float"),
        ({"preset": "a8", "smooth": {"alpha": "auto", "targets": NORMS}}, "is a ruler beside it"),
    ],
)
def test_what_a_ruler_has_not_is_refused(recipe, words):
    with pytest.raises(ValueError, match=words):
        Variant(**recipe)


def test_a_ruler_in_bfloat16_is_refused(study_settings, write_study):
    study_settings["runtime"]["dtype"] = "bfloat16"
    study_settings["variants"]["ruler"] = {"preset": "w8a16"}
    with pytest.raises(StudyError, match=r"variants\.ruler\.preset = 'w8a16' is simulated"):
        load_study(write_study(study_settings))
