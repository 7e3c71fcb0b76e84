"""Checkpoints made elsewhere: told from their files what they are, and caught if they are not."""

import json

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM

from helpers.sources.models import load_tokenizer
from quantized_run import VARIANTS, QuantizedRun

MAPPINGS = [
    [["re:.*q_proj", "re:.*k_proj", "re:.*v_proj"], "re:.*input_layernorm"],
    [["re:.*gate_proj", "re:.*up_proj"], "re:.*post_attention_layernorm"],
]


def modifiers(kind: str) -> list:
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier

    rounding = GPTQModifier if "gptq" in kind else QuantizationModifier
    rounded = rounding(targets="Linear", scheme="W8A8", ignore=["lm_head"])
    smoothed = SmoothQuantModifier(smoothing_strength=0.8, mappings=MAPPINGS)
    return [smoothed, rounded] if "smooth" in kind else [rounded]


def make_elsewhere(source, folder, kind: str, dtype=torch.float32) -> None:
    """What `oneshot` of llmcompressor makes of a model, on random tokens of its own."""
    from llmcompressor import oneshot

    generator = torch.Generator().manual_seed(3)
    items = torch.randint(3, 250, (8, 40), generator=generator).tolist()
    rows = [{"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in items]
    oneshot(
        model=AutoModelForCausalLM.from_pretrained(source, dtype=dtype),
        processor=load_tokenizer(source, enable_thinking=None),
        dataset=Dataset.from_list(rows),
        recipe=modifiers(kind),
        max_seq_length=40,
        num_calibration_samples=len(items),
        output_dir=str(folder),
    )


def given_run(root, settings, kind: str, family="llama", dtype=torch.float32):
    """A calibrated run whose checkpoint was made elsewhere."""
    run = QuantizedRun(root, settings, "theirs")
    run.save_source(family)
    given = run.root / "given"
    run.variants = VARIANTS | {"theirs": {"checkpoint": {"folder": str(given)}}}
    make_elsewhere(run.root / "source", given, kind, dtype)
    run.calibrate()
    return run


@pytest.mark.parametrize("kind", ["smooth_gptq", "smooth_nearest", "gptq", "nearest"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_llmcompressor_made_is_told_from_its_files(kind, dtype, study_settings, tmp_path):
    run = given_run(tmp_path / "run", study_settings, kind, dtype=dtype)
    run.quantize()
    gates = run.verify()
    for g in gates:
        print(g)
    assert [g for g in gates if not g.passed] == []
