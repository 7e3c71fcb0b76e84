"""A variant as llmcompressor's recipe file: `oneshot` makes of it the checkpoint made here."""

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from tools.recipe import main, recipe_of, text_of
from transformers import AutoModelForCausalLM

from helpers.core.errors import StudyError
from helpers.quantization.calibration import smoothing_groups
from helpers.sources.model_files import load_config
from helpers.sources.models import load_tokenizer
from helpers.verification.checkpoint_files import CheckpointFiles
from quantized_run import VARIANTS


def tensors_by_one_shot(run, tmp_path):
    """What llmcompressor makes of the exported recipe, from the study's calibration texts."""
    from llmcompressor import oneshot

    with run.outputs():
        job = run.job
        evidence = CheckpointFiles(job, source_hash="")
        texts, source = evidence.tokens, evidence.source_folder
        recipe = tmp_path / "recipe.yaml"
        recipe.write_text(text_of(job), "utf-8")
        rows = [{"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in texts]
        oneshot(
            model=AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32),
            processor=load_tokenizer(source, enable_thinking=None),
            dataset=Dataset.from_list(rows),
            recipe=str(recipe),
            max_seq_length=max(map(len, texts)),
            num_calibration_samples=len(texts),
            shuffle_calibration_samples=False,
            output_dir=str(tmp_path / "made"),
        )
    return load_file(tmp_path / "made" / "model.safetensors")


def test_without_smoothing_the_checkpoint_is_the_same(sound_run, tmp_path):
    run = sound_run("qwen3", "rtn_w8a8")
    theirs = tensors_by_one_shot(run, tmp_path)
    ours = load_file(run.checkpoint / "model.safetensors")
    assert theirs.keys() == ours.keys()
    int8 = [name for name, tensor in ours.items() if tensor.dtype == torch.int8]
    assert int8
    for name in ours:
        assert torch.equal(theirs[name], ours[name]), name


@pytest.mark.parametrize("variant", ["w8a8_grid", "o3_down", "o3_optional"])
def test_scales_are_folded_at_the_same_places_with_the_same_alpha(variant, sound_run, tmp_path):
    """Equation 4 with llmcompressor's max − min, from inputs that are recorded here."""
    run = sound_run("llama", variant)
    theirs = tensors_by_one_shot(run, tmp_path)
    ours = load_file(run.checkpoint / "model.safetensors")
    source = load_file(run.root / "source" / "model.safetensors")
    changed = {n for n in source if n in ours and not n.endswith("proj.weight")}
    changed = {n for n in changed if not torch.equal(source[n], ours[n])}
    assert changed == {
        n for n in source if "proj" not in n and n in theirs and (source[n] != theirs[n]).any()
    }
    with run.outputs():
        evidence = CheckpointFiles(run.job, source_hash="")
        model, alphas = evidence.source_model, evidence.alphas
        groups = smoothing_groups(load_config(run.root / "source"), evidence.claim.smooth.targets)
        group = next(g for g in groups if g.producer == "model.layers.0.input_layernorm")
        low, high = [], []

        def observe(_, args: tuple) -> None:
            low.append(args[0].amin((0, 1)))
            high.append(args[0].amax((0, 1)))

        hook = model.get_submodule(group.consumers[0]).register_forward_pre_hook(observe)
        for ids in evidence.tokens:
            model(torch.tensor([ids]))
        hook.remove()
    spread = torch.stack(high).amax(0) - torch.stack(low).amin(0)
    weights = torch.cat([source[f"{name}.weight"] for name in group.consumers])
    alpha = alphas[group.consumers[0]]
    expected = spread**alpha / (2 * weights.abs().amax(0)) ** (1 - alpha)
    key = f"{group.producer}.weight"
    torch.testing.assert_close(source[key] / theirs[key], expected, rtol=1e-3, atol=0)


def test_gptq_has_the_settings_that_the_study_rounds_with(sound_run):
    from llmcompressor.recipe import Recipe

    run = sound_run("llama", "gptq_w8a8")
    with run.outputs():
        smoothing, gptq = Recipe.create_instance(text_of(run.job)).modifiers
    assert smoothing.smoothing_strength == VARIANTS["gptq_w8a8"]["smooth"]["alpha"]
    assert (gptq.block_size, gptq.dampening_frac, gptq.actorder) == (128, 0.01, "static")
    assert gptq.ignore == ["lm_head"]


def test_protected_linears_are_those_that_were_chosen(sound_run):
    run = sound_run("llama", "protected")
    with run.outputs():
        recipe = recipe_of(run.job)["quant_stage"]["quant_modifiers"]
        chosen = run.job.claim.ignore[1:]
        assert f"{len(chosen)} of 14 Linears chosen" in text_of(run.job).splitlines()[0]
    assert set(recipe["QuantizationModifier"]["ignore"]) == {"lm_head", *chosen}


def test_patterns_of_ignored_linears_become_their_names(sound_run):
    run = sound_run("llama", "down_float")
    with run.outputs():
        recipe = recipe_of(run.job)["quant_stage"]["quant_modifiers"]
    ignored = recipe["QuantizationModifier"]["ignore"]
    assert "lm_head" in ignored
    assert "model.layers.1.mlp.down_proj" in ignored


@pytest.mark.parametrize(
    ("variant", "problem"),
    [
        ("noquant", "is float, and llmcompressor has no recipe for it"),
        ("smooth_only", "is float, and llmcompressor has no recipe for it"),
        ("seed_recipe", "is broken on purpose, and llmcompressor has no recipe for it"),
    ],
)
def test_what_llmcompressor_cannot_make_is_refused(variant, problem, sound_run):
    run = sound_run("llama", "rtn_w8a8")
    run.variant = variant
    with run.outputs(), pytest.raises(StudyError, match=problem):
        recipe_of(run.job)


def test_an_alpha_for_each_group_is_refused(sound_run):
    run = sound_run("llama", "o3_auto")
    with run.outputs(), pytest.raises(StudyError, match=r"smooth\.alpha: chose \d+ values"):
        recipe_of(run.job)


def test_the_command_prints_the_file_or_says_why_not(sound_run, capsys):
    run = sound_run("llama", "rtn_w8a8")
    with run.outputs():
        study = str(run.root / "study.yaml")
        run.job  # noqa: B018 - writes the study file
        assert main([study, "base", "rtn_w8a8"]) == 0
        printed = capsys.readouterr().out
        assert printed.startswith("# rtn_w8a8 of base in the study study: int8 weights per channel")
        assert main([study, "base", "noquant"]) == 1
        assert capsys.readouterr().err.startswith("make: variants.noquant: is float")
