"""A run that verifies one model and asks another: each way of it is caught before it asks."""

import shutil

import pytest
import torch

from helpers.quantization.variants import load_int8, load_variant
from helpers.sources.models import load_model
from helpers.verification.runtime_gates import loaded_gates
from quantized_run import VARIANTS, QuantizedRun

ARITHMETIC, FILES = "quantized layers in memory", "weights match the files"
VERIFIED = "checkpoint is the verified one"


def failed(run, asked=None) -> set[str]:
    """Names of the gates that fail on the model asked in place of the variant."""
    with run.outputs():
        model = asked(run) if asked else load_variant(run.job)[0]
        return {gate.name for gate in loaded_gates(run.job, model) if not gate.passed}


def the_float_source(run):
    return load_model(run.root / "source", run.job.study.runtime)


def another_float_type(run):
    runtime = run.job.study.runtime.model_copy(update={"dtype": "bfloat16"})
    return load_model(run.root / "source", runtime)


def one_linear_left_float(run):
    model = load_variant(run.job)[0]
    place = model.model.layers[1].mlp
    place.up_proj = torch.nn.Linear(place.up_proj.in_features, place.up_proj.out_features, False)
    return model


def steps_a_little_larger(run):
    model = load_variant(run.job)[0]
    model.model.layers[0].mlp.up_proj.weight_scale.mul_(1.001)
    return model


def another_model(run):
    model = load_variant(run.job)[0]
    model.model.embed_tokens.weight.data[5, 0] += 1e-3
    return model


@pytest.mark.parametrize(
    "variant", ["noquant", "smoothquant_w8a8", "o3", "down_float", "smooth_only", "seed_recipe"]
)
def test_the_variant_itself_passes_but_for_the_broken_recipe(sound_run, family, variant):
    failing = failed(sound_run(family, variant))
    assert failing == ({ARITHMETIC} if variant == "seed_recipe" else set())


def test_the_simulated_runtime_passes_too(study_settings, tmp_path):
    study_settings["runtime"]["quantized"] = "reference"
    run = QuantizedRun(tmp_path / "run", study_settings, "o3")
    run.save_source("qwen3")
    run.calibrate()
    run.quantize()
    run.note_verified()
    assert failed(run) == set()
    assert failed(run, the_float_source) == {ARITHMETIC, FILES}


@pytest.mark.bank("model", "in the variant's place: {asked}", at="the loaded model")
@pytest.mark.parametrize(
    ("asked", "names"),
    [
        (the_float_source, {ARITHMETIC, FILES}),
        (one_linear_left_float, {ARITHMETIC, FILES}),
        (steps_a_little_larger, {FILES}),
        (another_model, {FILES}),
    ],
)
def test_another_model_in_its_place_is_caught(sound_run, family, asked, names):
    assert failed(sound_run(family, "smoothquant_w8a8"), asked) == names


@pytest.mark.bank("model", "the checkpoint of another variant is asked", at="the loaded model")
def test_the_checkpoint_of_another_variant_is_caught(sound_run, sound_runs, family):
    """Same layers, same granularity: only the tensors tell."""
    other = sound_runs(family, "rtn_w8a8").checkpoint
    place = {"dtype": torch.float32, "device": "cpu"}
    run = sound_run(family, "smoothquant_w8a8")
    assert failed(run, lambda _: load_int8(other, **place)) == {FILES}


@pytest.mark.bank(
    "model", "another checkpoint put in place of the verified one", at="the checkpoint's folder"
)
def test_a_checkpoint_put_in_place_of_the_verified_one_is_caught(sound_run, sound_runs, family):
    """Between verification and evaluation; all that is loaded agrees with what lies there."""
    run, other = sound_run(family, "smoothquant_w8a8"), sound_runs(family, "rtn_w8a8").checkpoint
    shutil.rmtree(run.checkpoint)
    shutil.copytree(other, run.checkpoint)
    assert failed(run) == {VERIFIED}


@pytest.mark.bank("model", "the verification of another variant", at="verification.json")
def test_the_verification_of_another_variant_is_caught(sound_run, sound_runs, family):
    run, other = sound_run(family, "smoothquant_w8a8"), sound_runs(family, "rtn_w8a8").checkpoint
    shutil.copy(other.parent / "verification.json", run.checkpoint.parent)
    assert failed(run) == {VERIFIED}


@pytest.mark.bank("model", "a float variant asked in another type", at="the loaded model")
def test_a_float_variant_in_another_type_is_caught(sound_run):
    assert failed(sound_run("llama", "noquant"), another_float_type) == {ARITHMETIC, FILES}


def test_the_noise_floor_is_held_to_its_own_float_type(sound_run, monkeypatch):
    monkeypatch.setitem(VARIANTS, "other_type", {"dtype": "bfloat16"})
    run = sound_run("llama", "noquant")
    run.variant = "other_type"
    assert failed(run) == set()
    assert failed(run, the_float_source) == {ARITHMETIC, FILES}
