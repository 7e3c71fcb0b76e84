"""Sound runs pass every gate, on every scheme and runtime; the known broken recipe does not."""

import json
from types import SimpleNamespace

import pytest
import torch

from helpers.core.records import Gate, checkpoint_gates_record, gate, sha256_folder, write_json
from helpers.quantization.variants import load_variant
from helpers.sources.models import load_model, model_folder
from helpers.sources.sampling import calibration_items
from helpers.study.loading import open_job
from helpers.study.stages import Run
from helpers.verification import variant_gates
from quantized_run import VARIANTS, QuantizedRun

SOUND = [name for name, recipe in VARIANTS.items() if recipe and "recipe" not in recipe]
APPLY_TO_FLOAT = {
    "tokenizer matches the source",
    "smoothing preserves the logits",
    "smoothing scales as declared",
    "all other tensors unchanged",
    "reloaded logits identical",
    "source model unchanged",
    "calibration items as declared",
    "no calibration leakage",
    "calibration maxima recomputed",
    "smoothed float weights",
}


@pytest.mark.parametrize("variant", SOUND)
def test_a_sound_run_passes_every_gate(sound_run, family, variant):
    gates = sound_run(family, variant).verify()
    assert [g for g in gates if not g.passed] == []
    assert len({g.name for g in gates}) == len(gates)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("runtime", ["int8", "reference"])
@pytest.mark.parametrize("variant", ["w8a8_down", "o2", "o3"])
def test_sound_in_every_dtype_on_every_runtime(study_settings, tmp_path, dtype, runtime, variant):
    study_settings["runtime"].update(dtype=dtype, quantized=runtime)
    run = QuantizedRun(tmp_path / "run", study_settings, variant)
    run.save_source("qwen3")
    run.calibrate()
    run.quantize()
    assert [g for g in run.verify() if not g.passed] == []


def test_smoothed_linears_that_stay_float_are_sound_in_bfloat16(study_settings, tmp_path):
    """Their weights times the scales are rounded as coarsely as the checkpoint stores them."""
    study_settings["runtime"]["dtype"] = "bfloat16"
    run = QuantizedRun(tmp_path / "run", study_settings, "protected")
    run.save_source("llama")
    run.calibrate()
    run.quantize()
    assert [g for g in run.verify() if not g.passed] == []
    with run.outputs():
        smoothed = {n for n in run.job.claim.ignore if n.endswith(("q_proj", "k_proj", "v_proj"))}
    assert smoothed


def test_a_base_model_without_a_chat_template_is_sound(study_settings, tmp_path):
    run = QuantizedRun(tmp_path / "run", study_settings, "o2")
    run.save_source("gemma3_text")
    for name in ("chat_template.jinja", "tokenizer_config.json"):
        path = run.root / "source" / name
        if name.endswith("json"):
            settings = json.loads(path.read_text("utf-8"))
            settings.pop("chat_template", None)
            path.write_text(json.dumps(settings), "utf-8")
        else:
            path.unlink(missing_ok=True)
    run.calibrate()
    run.quantize()
    assert [g for g in run.verify() if not g.passed] == []
    with run.outputs():
        assert load_variant(run.job)[1].chat_template is None
    (run.checkpoint / "chat_template.jinja").write_text("{{ messages }}", "utf-8")
    [failed] = [g for g in run.verify() if not g.passed]
    assert failed.name == "tokenizer matches the source"
    assert "chat format" in failed.measured


@pytest.mark.bank(
    "calibration", "a draw calibrated on an item of an earlier draw", at="calibration~2/record.json"
)
def test_a_draw_that_reads_an_item_of_an_earlier_draw_fails_its_gate(study_settings, write_study):
    study_settings["variants"]["smoothquant_w8a8"]["repeats"] = 2
    job = open_job(write_study(study_settings), model="base", variant="smoothquant_w8a8", draw=2)
    first, second = ([i.id for i in calibration_items(job.study, draw=d)] for d in (1, 2))
    write_json(Run("calibration", "base").record(job.paths), {"results": {"items": first}})
    for ids, passes in ((second, True), ([*second[1:], first[0]], False)):
        evidence = SimpleNamespace(job=job, calibration_record={"results": {"items": ids}})
        gate = variant_gates.leakage_gate(evidence)
        assert gate.passed == passes, gate.measured
    assert f"{first[0]} in draw 1" in gate.measured


@pytest.mark.parametrize("targets", ["smooth_only", "smooth_only_down"])
def test_smoothing_alone_computes_what_the_source_does(sound_run, family, targets):
    run = sound_run(family, targets)
    with run.outputs():
        job = run.job
        assert {c.gate_name for c in variant_gates.checks_of(job.recipe)} == APPLY_TO_FLOAT
        smoothed = load_variant(job)[0]
        source = load_model(model_folder(job.study, job.model, job.paths), job.study.runtime)
        assert sha256_folder(run.checkpoint) != run.source_hash
    weights = dict(source.named_parameters())
    assert any(not torch.equal(p, weights[n]) for n, p in smoothed.named_parameters())
    ids = torch.arange(3, 60)[None]
    with torch.inference_mode():
        torch.testing.assert_close(smoothed(ids).logits, source(ids).logits, rtol=1e-4, atol=1e-4)


def test_the_seed_recipe_loads_and_is_flagged_for_what_it_is(sound_run, family):
    run = sound_run(family, "seed_recipe")
    failing = {g.name: g for g in run.verify() if not g.passed}
    assert set(failing) == {
        "smoothing preserves the logits",
        "smoothing scales as declared",
        "all other tensors unchanged",
        "weights on the declared grid",
        "quantized layers as declared",
        "metadata match the tensors",
        "int8 activations at run time",
        "int8 layers match the reference",
    }
    assert "embed_tokens" in failing["all other tensors unchanged"].measured
    assert "0 of 4 groups folded" in failing["smoothing scales as declared"].measured
    assert "14 float" in failing["int8 activations at run time"].measured
    assert "0 of 15 Linears are int8" in failing["quantized layers as declared"].measured
    with run.outputs():
        model, _ = load_variant(run.job)
    weight = model.model.layers[0].self_attn.q_proj.weight
    assert len(weight.unique()) <= 255  # one grid for the whole tensor
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_the_seed_recipe_is_evaluated_like_any_variant(sound_run):
    from helpers.evaluation.engine import ask_all

    run = sound_run("llama", "seed_recipe")
    with run.outputs():
        model, tokenizer = load_variant(run.job)
        predictions = ask_all(model, tokenizer, run.job.study)
    assert {name: len(found) for name, found in predictions.items()} == {"arc": 6, "squad_v2": 6}


def test_what_cannot_be_checked_does_not_hold():
    @gate("a gate")
    def broken(evidence):
        return evidence["missing"], "measured", "limit"

    result = broken({})
    assert not result.passed
    assert result.measured == "could not be checked: KeyError: 'missing'"
    assert broken({"missing": 1}) == Gate("a gate", True, "measured", "limit")


def test_a_record_passes_only_if_there_is_something_and_all_of_it_holds():
    held, failed = Gate("a", True, "1", "1"), Gate("b", False, "2", "1")
    assert checkpoint_gates_record([held])["passed"]
    assert not checkpoint_gates_record([held, failed])["passed"]
    assert not checkpoint_gates_record([])["passed"]
    assert json.loads(json.dumps(checkpoint_gates_record([failed])))["gates"] == [
        {"name": "b", "passed": False, "measured": "2", "limit": "1"}
    ]


def test_verifying_changes_nothing(sound_run):
    run = sound_run("llama", "o3")
    assert run.job.recipe.quantized  # its study file is written now
    before = {p: p.read_bytes() for p in run.root.rglob("*") if p.is_file()}
    run.verify()
    assert {p: p.read_bytes() for p in run.root.rglob("*") if p.is_file()} == before
