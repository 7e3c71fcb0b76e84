"""Part 6: Qwen3-0.6B's shapes with random weights, from calibration to an evaluation.

The evaluation reads 1,000 items of ARC's size: the shipped items, every fourth byte of them a
token, since a real tokenizer makes a token of four bytes. Nothing is shared between items.
"""

import os
import tempfile
from itertools import count, islice
from pathlib import Path

import torch

from benchmarks.gpu.part import Part
from helpers.evaluation.engine import evaluate
from helpers.evaluation.prompts import model_inputs, render_prompt
from helpers.inference.protocols import OptionTokens, option_loglikelihoods
from helpers.quantization import int8_cuda, variants
from helpers.quantization.calibration import run_calibration
from helpers.quantization.smoothing import same_alpha, smooth_variant_
from helpers.quantization.variants import load_int8
from helpers.sources.chat import calibration_tokens
from helpers.sources.models import load_model, load_tokenizer, random_model_folder
from helpers.sources.sampling import calibration_items, load_items
from helpers.study.loading import load_study
from helpers.study.schema import Batch

STUDY, VARIANT, SET = "smoke", "smoothquant_w8a8", "arc"
SEED = 20261123
ITEMS, CALIBRATED, BATCH = 1000, 128, 16384
DRY_ITEMS, DRY_CALIBRATED = 12, 4
BYTES_A_TOKEN = 4
GOAL_S = 60


def scratch() -> Path:
    """A scratch folder that all parts on one machine share."""
    folder = Path(tempfile.gettempdir()) / f"gpu-check-{os.getuid()}"
    folder.mkdir(exist_ok=True)
    os.environ |= {"STUDY_CACHE": str(folder), "STUDY_OUTPUTS": str(folder / "outputs")}
    return folder


def float_folder(part: Part) -> Path:
    """The model as a folder, made on first use; its weights are drawn on the device."""
    with torch.device(part.device):
        return random_model_folder("qwen3", size="tiny" if part.dry else "0.6b", seed=SEED)


def checkpoint_folder(part: Part) -> Path:
    return scratch() / ("checkpoint-dry" if part.dry else "checkpoint")


def run(part: Part) -> None:
    """Every stage with its time and the most memory the device held."""
    variants.quiet_llmcompressor()
    scratch()
    stages: list[dict] = []
    study = load_study(STUDY)
    with part.stage(stages, "making the model (not part of a study)"):
        folder = float_folder(part)
    quantized(part, stages, study, folder)
    items = asked_items(study, folder, DRY_ITEMS if part.dry else ITEMS)
    part.note("tokens asked", sum(len(i.context) + sum(map(len, i.options)) for i in items))
    if part.device == "cuda":
        with part.stage(stages, "proving and compiling the fused kernels, once a process"):
            int8_cuda.product_kind(0)
    for kind in ("int8", "bfloat16", "float32"):
        if part.over(need=6):
            return
        with part.stage(stages, f"loading, {kind}"):
            model = load(part, kind)
        with part.stage(stages, f"evaluating {len(items)} items, {kind}"):
            sums = dict(option_loglikelihoods(model, items, batch_tokens=BATCH))
        assert len(sums) == len(items)
        part.note(f"evaluation under {GOAL_S} s, {kind}", stages[-1]["seconds"] < GOAL_S)
        if kind == "int8":
            part.note("products chosen by the library", int8_cuda.chosen_tiles())
            with part.stage(stages, f"evaluating them again, every choice made, {kind}"):
                dict(option_loglikelihoods(model, items, batch_tokens=BATCH))
        del model
    if not part.over(need=12):
        whole_bytes(part, stages, study, load(part, "int8"), folder)


def load(part: Part, kind: str):
    """Load the model on one runtime; `int8` has its float parts in bfloat16."""
    if kind == "int8":
        dtype = torch.float32 if part.dry else torch.bfloat16
        return load_int8(checkpoint_folder(part), dtype=dtype, device=part.device)
    changes = {"device": part.device, "dtype": kind}
    return load_model(float_folder(part), load_study(STUDY).runtime.model_copy(update=changes))


def quantized(part: Part, stages: list[dict], study, folder: Path) -> None:
    """Calibrate, smooth, quantize, save."""
    tokenizer, settings = load_tokenizer(folder, enable_thinking=None), study.calibration
    number = DRY_CALIBRATED if part.dry else CALIBRATED
    changed = settings.model_copy(update={"items": number})
    items = calibration_items(study.model_copy(update={"calibration": changed}))
    tokens = [calibration_tokens(tokenizer, i, settings.adapter)[::BYTES_A_TOKEN] for i in items]
    part.note("tokens calibrated on", sum(map(len, tokens)))
    with part.stage(stages, "loading, bfloat16"):
        model = load(part, "bfloat16")
    with part.stage(stages, f"calibration on {len(items)} items"):
        statistics = run_calibration(model, tokens, batch_tokens=BATCH)
        absmax = {name: each.absmax for name, each in statistics.items()}
    variant = study.variants[VARIANT]
    with part.stage(stages, "smoothing and quantization"):
        alphas = same_alpha(model.config, variant.smooth.targets, variant.smooth.alpha)
        smoothed = smooth_variant_(model, absmax, variant, alphas)
        variants.quantize_variant_(model, variant, absmax, smoothed)
    with part.stage(stages, "saving the checkpoint"):
        variants.save_checkpoint(model, tokenizer, checkpoint_folder(part))


def asked_items(study, folder: Path, number: int) -> list[OptionTokens]:
    """So many items as token ids; an item that comes again is made of other bytes of its text."""
    tokenizer, wanted = load_tokenizer(folder, enable_thinking=None), study.evaluation.datasets[SET]
    known = load_items(wanted.source, adapter=wanted.adapter)
    asked = [model_inputs(tokenizer, render_prompt(item, wanted, tokenizer)) for item in known]
    every = (
        OptionTokens(
            tokens.context[turn % BYTES_A_TOKEN :: BYTES_A_TOKEN],
            [option[::BYTES_A_TOKEN] for option in tokens.options],
        )
        for turn in count()
        for tokens in asked
    )
    return list(islice(every, number))


def whole_bytes(part: Part, stages: list[dict], study, model, folder: Path) -> None:
    """The shipped items through the whole engine, a token a byte: four times the work an item."""
    tokenizer = load_tokenizer(folder, enable_thinking=None)
    evaluation_set = study.evaluation.datasets[SET]
    items = load_items(evaluation_set.source, adapter=evaluation_set.adapter)
    items = items[: DRY_ITEMS if part.dry else 200]
    with part.stage(stages, f"evaluating {len(items)} items, a token a byte, int8"):
        limits = Batch(tokens=BATCH, rows=64)
        predictions = list(evaluate(model, tokenizer, items, evaluation_set, limits=limits))
    assert len(predictions) == len(items)
