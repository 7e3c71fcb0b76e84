"""Loader and checks read the same tensors, those that transformers reads."""

import pytest
import torch
from transformers import AutoModelForCausalLM

import brought_models
from brought_models import HEAD, TABLE, WEIGHTS, copied
from helpers.core.errors import StudyError
from helpers.quantization.variants import load_int8, load_variant
from helpers.sources.model_files import TensorFiles
from helpers.sources.models import byte_tokenizer, load_head, load_model, random_model
from helpers.study.schema import Runtime
from helpers.verification.runtime_gates import loaded_gates
from quantized_run import QuantizedRun, lived_in

RUNTIME = Runtime(device="cpu", dtype="float32", threads=1, quantized="int8")
IDS = torch.tensor([[5, 9, 77, 130, 12]])
SOUND = ["equal_head", "head_without_table", "decoder_names", "old_buffers"]
SOUND += ["other_layout_beside", "sharded"]


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    folder = tmp_path_factory.mktemp("brought") / "sound"
    lived_in(random_model("llama", seed=3)).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def brought(sound, tmp_path):
    """make(*changes): a copy of a sound folder, changed."""
    return lambda *names: copied(
        sound, tmp_path / "model", *(getattr(brought_models, name) for name in names)
    )


@pytest.mark.parametrize("case", [*SOUND, "own_head"])
def test_the_tensors_are_those_that_transformers_loads(brought, case):
    folder = brought(case)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    expected, files = model.state_dict(), TensorFiles(folder, dtype=torch.float32)
    tied = expected[HEAD].data_ptr() == expected[TABLE].data_ptr()
    assert files.tied == tied == (case != "own_head")
    assert set(files) == set(expected) - ({HEAD} if tied else set())
    assert all(torch.equal(files[name], expected[name]) for name in files)
    together = files.load_all()
    assert set(together) == set(files)
    assert all(torch.equal(together[name], files[name]) for name in files)
    head, _ = load_head(folder, dtype=torch.float32, device="cpu")
    assert torch.equal(head, expected[HEAD])


def test_a_head_that_differs_in_one_bit_is_its_own(brought):
    folder = brought("equal_head")

    def flip(tensors):
        value = tensors[HEAD][17, 3]
        value.copy_(torch.nextafter(value, torch.tensor(9.0)))

    brought_models.edit_tensors(folder, flip)
    assert not TensorFiles(folder, dtype=None).tied


def quantized(tmp_path, settings, variant: str, *changes) -> QuantizedRun:
    """A run whose source was changed before anything was made from it."""
    run = QuantizedRun(tmp_path / "run", settings, variant)
    run.save_source("llama")
    for name in changes:
        getattr(brought_models, name)(run.root / "source")
    if variant != "noquant":
        run.calibrate()
        run.quantize()
        run.note_verified()
    return run


@pytest.mark.parametrize("case", [*SOUND, "own_head"])
def test_every_check_passes_on_what_transformers_loads(tmp_path, study_settings, case):
    run = quantized(tmp_path, study_settings, "smoothquant_w8a8", case)
    assert run.failed() == set()
    with run.outputs():
        model = load_variant(run.job)[0]
        assert all(gate.passed for gate in loaded_gates(run.job, model))


@pytest.mark.parametrize("variant", ["noquant", "smoothquant_w8a8", "smooth_only"])
def test_every_variant_answers_with_the_checkpoints_own_head(tmp_path, study_settings, variant):
    run = quantized(tmp_path, study_settings, variant, "own_head")
    expected = TensorFiles(run.root / "source", dtype=torch.float32)[HEAD]
    with run.outputs():
        model = load_variant(run.job)[0]
    head = model.get_output_embeddings().weight
    assert torch.equal(head, expected)
    assert not torch.equal(head, model.get_input_embeddings().weight)
    assert not model.config.tie_word_embeddings


def test_the_saved_configuration_tells_the_truth(tmp_path, study_settings):
    """So that others load from it what was verified here."""
    for name, tied in (("own_head", False), ("equal_head", True)):
        run = quantized(tmp_path / name, study_settings, "rtn_w8a8", name)
        config = AutoModelForCausalLM.from_pretrained(run.checkpoint).config
        assert config.tie_word_embeddings == tied


@pytest.mark.bank("tied", "a checkpoint with a head of its own read as tied", at="the loaded model")
def test_a_model_asked_with_the_embeddings_as_its_head_is_caught(tmp_path, study_settings):
    run = quantized(tmp_path, study_settings, "rtn_w8a8", "own_head")
    with run.outputs():
        model = load_variant(run.job)[0]
        model.lm_head.weight = model.model.embed_tokens.weight
        failed = {gate.name for gate in loaded_gates(run.job, model) if not gate.passed}
    assert failed == {"weights match the files"}


@pytest.mark.bank(
    "tied",
    "a head of its own lost in the checkpoint",
    "all other tensors unchanged",
    at="model.safetensors",
)
def test_a_checkpoint_that_lost_its_head_is_caught(tmp_path, study_settings):
    run = quantized(tmp_path, study_settings, "rtn_w8a8", "own_head")
    with run.edited() as saved:
        del saved[HEAD]
    with run.edited_json(run.checkpoint / "config.json") as config:
        config["tie_word_embeddings"] = True
    assert "all other tensors unchanged" in run.failed()


def test_int8_ends_its_answers_where_the_float_model_does(tmp_path, study_settings):
    """The tokens that end a text are in a file of their own, beside the configuration."""
    run = quantized(tmp_path, study_settings, "rtn_w8a8")
    settings = {"eos_token_id": [2, 7], "pad_token_id": 0}
    brought_models.edit_json(run.root / "source" / "generation_config.json", **settings)
    run.calibrate()
    run.quantize()
    place = {"dtype": torch.float32, "device": "cpu"}
    for model in (load_model(run.root / "source", RUNTIME), load_int8(run.checkpoint, **place)):
        assert model.generation_config.eos_token_id == [2, 7]


@pytest.mark.parametrize("variant", ["rtn_w8a8", "smooth_only"])
def test_sampling_settings_without_sampling_do_not_stop_a_study(tmp_path, study_settings, variant):
    run = quantized(tmp_path, study_settings, variant)
    settings = {"eos_token_id": 2, "temperature": 0.9, "top_p": 0.6}
    brought_models.edit_json(run.root / "source" / "generation_config.json", **settings)
    run.calibrate()
    run.quantize()
    with run.outputs():
        assert load_variant(run.job)[0].generation_config.eos_token_id == 2


def test_settings_of_sampling_that_are_sound_are_kept(brought):
    folder = brought()
    settings = {"eos_token_id": 2, "do_sample": True, "temperature": 0.9}
    brought_models.edit_json(folder / "generation_config.json", **settings)
    assert load_model(folder, RUNTIME).generation_config.temperature == 0.9


def missing(tensors):
    del tensors["model.layers.1.mlp.up_proj.weight"]


def unexpected(tensors):
    tensors["model.layers.0.self_attn.q_proj.bias"] = torch.ones(64)


@pytest.mark.bank("brought", "a tensor {change} in a model's files", at="the model's folder")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (missing, "model.layers.1.mlp.up_proj.weight is not in its files"),
        (unexpected, "model.layers.0.self_attn.q_proj.bias is in its files (1 tensors in all)"),
    ],
)
def test_what_transformers_would_draw_at_random_or_leave_out_is_refused(brought, change, message):
    folder = brought()
    brought_models.edit_tensors(folder, change)
    with pytest.raises(StudyError) as caught:
        load_model(folder, RUNTIME)
    assert message in str(caught.value)


def test_files_without_weights_of_transformers_name_are_refused(brought):
    folder = brought("other_layout_beside")
    (folder / WEIGHTS).unlink()
    with pytest.raises(StudyError, match=r"holds neither model\.safetensors nor model\.s"):
        TensorFiles(folder, dtype=None)
