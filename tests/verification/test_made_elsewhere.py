"""Checkpoints made elsewhere: told from their files what they are, and caught if they are not."""

import copy
import shutil
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM

from helpers.core.errors import StudyError
from helpers.evaluation.preflight import problems
from helpers.quantization.calibration import load_absmax
from helpers.quantization.simulation import linear_scales, scales_in_files, sqnr_as_stored
from helpers.quantization.smoothing import same_alpha
from helpers.quantization.variants import describe_recipe
from helpers.report.narrative import elsewhere_finding
from helpers.report.summary import origin_sentence
from helpers.sources.model_files import TensorFiles
from helpers.sources.models import load_model, load_tokenizer, random_model
from helpers.study.schema import FolderModel, Variant
from helpers.verification import variant_gates
from helpers.verification.checkpoint_files import CheckpointFiles
from quantized_run import VARIANTS, QuantizedRun, lived_in

ORIGIN = "weights follow from the source"
SCALES = "smoothing scales found in the files"
CONFIG = "configuration matches the source"
KEPT = "all other tensors unchanged"
CENSUS = "quantized layers as declared"
Q0 = "model.layers.0.self_attn.q_proj"
MAPPINGS = [
    [["re:.*q_proj", "re:.*k_proj", "re:.*v_proj"], "re:.*input_layernorm"],
    [["re:.*gate_proj", "re:.*up_proj"], "re:.*post_attention_layernorm"],
]


def made_by_oneshot(source, folder, *, gptq: bool, dtype=torch.float32) -> None:
    """What llmcompressor's `oneshot` makes of a model, on random tokens of its own."""
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier

    rounding = GPTQModifier if gptq else QuantizationModifier
    generator = torch.Generator().manual_seed(3)
    items = torch.randint(3, 250, (8, 40), generator=generator).tolist()
    rows = [{"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in items]
    oneshot(
        model=AutoModelForCausalLM.from_pretrained(source, dtype=dtype),
        processor=load_tokenizer(source, enable_thinking=None),
        dataset=Dataset.from_list(rows),
        recipe=[
            SmoothQuantModifier(smoothing_strength=0.8, mappings=MAPPINGS),
            rounding(targets="Linear", scheme="W8A8", ignore=["lm_head"]),
        ],
        max_seq_length=40,
        num_calibration_samples=len(items),
        output_dir=str(folder),
    )


def as_given(run: QuantizedRun) -> QuantizedRun:
    """The run with the checkpoint in its folder `given` as its variant."""
    folder = run.root / "given"
    run.variant = "theirs"
    run.variants = VARIANTS | {"theirs": {"checkpoint": {"folder": str(folder)}}}
    return run


@pytest.fixture
def given_run(sound_run, tmp_path):
    """A run to which a checkpoint is given that another one has made of the same source."""

    def given(family: str, variant: str) -> QuantizedRun:
        run = sound_run(family, variant).copy(tmp_path / "given_run")
        shutil.copytree(run.checkpoint, run.root / "given")
        as_given(run).settings = copy.deepcopy(run.settings)
        run.quantize()
        return run

    return given


def failed(run: QuantizedRun) -> set[str]:
    """Names of the gates on files that do not hold; those on loaded models are left out."""
    with run.outputs():
        evidence = CheckpointFiles(run.job, source_hash=run.source_hash)
        checks = [c for c in variant_gates.ELSEWHERE_CHECKS if c.__module__.endswith("point_gates")]
        gates = [check(evidence) for check in checks]
    assert len(gates) == 8
    return {gate.name for gate in gates if not gate.passed}


def found(run: QuantizedRun) -> set[str]:
    """The roundings that the files show."""
    with run.outputs():
        return set(CheckpointFiles(run.job, source_hash="").found_roundings.values())


@pytest.mark.parametrize(("gptq", "dtype"), [(True, torch.float32), (False, torch.bfloat16)])
def test_what_llmcompressor_made_is_told_from_its_files(gptq, dtype, study_settings, tmp_path):
    run = as_given(QuantizedRun(tmp_path / "run", study_settings, "theirs"))
    run.save_source("llama")
    made_by_oneshot(run.root / "source", run.root / "given", gptq=gptq, dtype=dtype)
    run.calibrate()
    run.quantize()
    gates = {gate.name: gate for gate in run.verify()}
    assert [gate for gate in gates.values() if not gate.passed] == []
    assert "no calibration leakage" not in gates  # nothing is known of it
    assert found(run) == {"gptq" if gptq else "nearest"}
    name = "GPTQModifier" if gptq else "QuantizationModifier"
    assert f"names SmoothQuantModifier, {name}, unchecked" in gates[ORIGIN].measured
    assert gates[SCALES].measured.startswith("4 norms and the rows of 0 Linears")
    assert_sqnr_is_recomputed(run)
    recipe = run.job.recipe
    assert (recipe.scheme, recipe.ignore) == (("channel", "token_dynamic"), ("lm_head",))
    for words in (gates[ORIGIN].measured, describe_recipe(recipe, {})):
        assert "leakage from evaluation items cannot be excluded" in words


def assert_sqnr_is_recomputed(run) -> None:
    """What the simulation finds with the scales of the files, and numpy with those of the gates."""
    with run.outputs():
        evidence = CheckpointFiles(run.job, source_hash=run.source_hash, record={})
        curves = sqnr_as_stored(
            lambda: evidence.source_model,
            evidence.tokens[: variant_gates.SQNR_TEXTS],
            run.job.recipe,
            evidence.absmax,
            {},
            run.checkpoint,
        )
        evidence.record = {"sqnr_db": curves}
        gate = variant_gates.sqnr_gate(evidence)
    assert gate.passed, gate.measured


@pytest.mark.parametrize(
    ("variant", "rounding"),
    [("o1", "nearest"), ("o3", "nearest"), ("mse_w8a8", "mse"), ("gptq_w8a8", "gptq")],
)
def test_every_scheme_and_rounding_is_told_from_its_files(given_run, variant, rounding):
    run = given_run("qwen3", variant)
    assert failed(run) == set()
    assert found(run) == {rounding}
    with run.outputs():
        study = run.job.study
    assert study.variants["theirs"].scheme == study.variants[variant].scheme


# Each is a checkpoint that is not what it is given as


def of_another_model(run):
    """Another model's weights, on the same architecture."""
    source = run.root / "source"
    lived_in(random_model("llama", seed=4)).save_pretrained(source)
    run.calibrate()
    run.quantize()


def of_a_model_whose_weights_moved_a_little(run):
    with run.edited(run.root / "source") as tensors:
        generator = torch.Generator().manual_seed(1)
        for name in [name for name in tensors if name.endswith("proj.weight")]:
            noise = torch.randn(tensors[name].shape, generator=generator)
            tensors[name] *= 1 + 1e-3 * noise


def rows_of_one_linear_in_another_order(run):
    with run.edited() as tensors:
        tensors[f"{Q0}.weight"] = tensors[f"{Q0}.weight"].roll(1, 0)


def three_weights_of_one_linear_altered(run):
    with run.edited() as tensors:
        weight = tensors[f"{Q0}.weight"]
        weight[[1, 5, 9], 3] = torch.where(weight[[1, 5, 9], 3] > 0, -60, 60).to(torch.int8)


def the_scale_of_one_row_given_to_another(run):
    with run.edited() as tensors:
        scale = tensors[f"{Q0}.weight_scale"]
        scale[[3, 4]] = scale[[4, 3]]


def embeddings_altered(run):
    with run.edited() as tensors:
        tensors["model.embed_tokens.weight"][7] *= 1.01


def a_norm_that_turns_a_channel_around(run):
    with run.edited() as tensors:
        tensors["model.layers.0.input_layernorm.weight"][3] *= -1


def other_positions_in_its_configuration(run):
    with run.edited_json(run.checkpoint / "config.json") as config:
        config["rope_parameters"]["rope_theta"] *= 4


def another_end_of_text_in_its_generation_settings(run):
    with run.edited_json(run.checkpoint / "generation_config.json") as settings:
        settings["eos_token_id"] = 1


def one_linear_in_float_that_its_config_calls_int8(run):
    with run.edited() as tensors:
        step = tensors.pop(f"{Q0}.weight_scale")
        tensors[f"{Q0}.weight"] = tensors[f"{Q0}.weight"].float() * step


BROKEN = {
    of_another_model: {ORIGIN, KEPT},
    of_a_model_whose_weights_moved_a_little: {ORIGIN},
    rows_of_one_linear_in_another_order: {ORIGIN},
    three_weights_of_one_linear_altered: {ORIGIN},
    the_scale_of_one_row_given_to_another: {ORIGIN},
    embeddings_altered: {KEPT},
    a_norm_that_turns_a_channel_around: {SCALES},
    other_positions_in_its_configuration: {CONFIG},
    another_end_of_text_in_its_generation_settings: {CONFIG},
    one_linear_in_float_that_its_config_calls_int8: {CENSUS, ORIGIN},
}


@pytest.mark.bank("checkpoint", "given from elsewhere: {break_}", at="the given checkpoint")
@pytest.mark.parametrize("break_", BROKEN, ids=lambda function: function.__name__)
def test_a_checkpoint_that_is_not_the_source_s_fails_a_gate(break_, given_run):
    run = given_run("llama", "smoothquant_w8a8")
    break_(run)
    assert BROKEN[break_] <= failed(run)


def test_scales_in_rows_are_found_where_steps_are_per_channel(given_run):
    run = given_run("llama", "w8a8_down")
    gates = {gate.name: gate for gate in run.verify()}
    assert [gate for gate in gates.values() if not gate.passed] == []
    assert gates[SCALES].measured.startswith("4 norms and the rows of 2 Linears")
    with run.outputs():
        job = run.job
        model = load_model(run.root / "source", job.study.runtime)
        smooth = job.study.variants["w8a8_down"].smooth
        alphas = same_alpha(model.config, smooth.targets, smooth.alpha)
        absmax = load_absmax(run.calibration / "activations.safetensors")
    found_scales = scales_in_files(model, TensorFiles(run.checkpoint, dtype=None))
    expected = linear_scales(model, job.study.variants["w8a8_down"], absmax, alphas)
    assert {n for n, s in found_scales.items() if s.outputs is not None} == {
        f"model.layers.{i}.mlp.up_proj" for i in (0, 1)
    }
    for name, scales in found_scales.items():
        torch.testing.assert_close(scales.inputs, expected[name].inputs)
        if scales.outputs is not None:
            torch.testing.assert_close(scales.outputs, expected[name].outputs)


@pytest.mark.bank(
    "checkpoint", "given from elsewhere: a scale of another row beside GPTQ's weights",
    ORIGIN, at="model.safetensors",
)  # fmt: skip
def test_gptq_excuses_no_scale_of_another_row(given_run):
    run = given_run("llama", "gptq_w8a8")
    the_scale_of_one_row_given_to_another(run)
    assert ORIGIN in failed(run)


def test_a_checkpoint_of_another_architecture_is_refused_beforehand(given_run, sound_run):
    run = given_run("llama", "smoothquant_w8a8")
    with run.outputs():
        assert list(problems(run.job.study, run.job.paths, dry=False)) == []
        shutil.rmtree(run.root / "given")
        shutil.copytree(sound_run("qwen3", "smoothquant_w8a8").checkpoint, run.root / "given")
        [line] = problems(run.job.study, run.job.paths, dry=False)
    assert line.startswith("variants.theirs.checkpoint.base.folder = ")
    assert "is a qwen3 model, and models.base a llama model; give a checkpoint of" in line


def test_a_checkpoint_of_another_vocabulary_is_refused_beforehand(given_run):
    run = given_run("llama", "smoothquant_w8a8")
    with run.edited(run.root / "given") as tensors:
        table = tensors["model.embed_tokens.weight"]
        tensors["model.embed_tokens.weight"] = torch.cat([table, table[:8]])
    with run.outputs():
        [line] = problems(run.job.study, run.job.paths, dry=False)
    assert "has model.embed_tokens.weight [267, 64] where models.base has [259, 64]" in line


def test_the_report_and_the_card_say_what_is_not_known():
    theirs = Variant(checkpoint={"base": {"folder": "theirs"}})
    models = {"base": FolderModel(folder="source")}
    study = SimpleNamespace(variants={"noquant": Variant(), "theirs": theirs}, models=models)
    sentence = elsewhere_finding(SimpleNamespace(variants=["noquant", "theirs"], study=study))
    job = SimpleNamespace(study=study, model="base", recipe=theirs)
    card = origin_sentence(job, {"inputs": {"model": "0123"}, "results": {"items": ["a"]}})
    assert sentence.startswith("`theirs`: made elsewhere")
    for text in (sentence, card):
        assert "leakage from evaluation items cannot be excluded" in text
    assert "calibrated on" not in card


def test_a_given_checkpoint_is_copied_and_left_as_it_is(given_run):
    run = given_run("llama", "smoothquant_w8a8")
    before = {p.name: p.read_bytes() for p in (run.root / "given").iterdir()}
    for name, content in before.items():
        assert (run.checkpoint / name).read_bytes() == content
        assert (run.checkpoint / name).stat().st_ino != (run.root / "given" / name).stat().st_ino
    (run.root / "given" / "config.json").write_text('{"auto_map": {"AutoModel": "code.Model"}}')
    with pytest.raises(StudyError):
        run.quantize()
