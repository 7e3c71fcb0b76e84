"""Operations of calibration and quantization, and of fine-tuning, counted before anything runs.

    python -m helpers.cost.quantization_operations demo

prints them for every such job of a study, as JSON. Checks, probes and the choice of α are
counted with the job that makes them. See `helpers.cost.operations` for what counts.
"""

import json
import sys
from collections import Counter

from helpers.core.errors import StudyError
from helpers.core.paths import StudyPaths
from helpers.cost.operations import (
    Size,
    count_finetuning,
    folder_to_count,
    reading_operations,
    size_of,
    weight_passes,
    without_weight_passes,
)
from helpers.quantization import sensitivity, sqnr
from helpers.quantization.calibration import first_judging_item
from helpers.runtime.batching import token_budget_batches
from helpers.sources.chat_conversations import calibration_tokens
from helpers.sources.models import load_tokenizer
from helpers.sources.sampling import calibration_items
from helpers.study import stages
from helpers.study.loading import load_study, study_file
from helpers.study.schema import Study
from helpers.study.schema_variants import Variant
from helpers.study.study_run import Job
from helpers.verification.checkpoint_files import PROBE_TOKENS, PROBES

LOOKS = 11  # rows of `sensitivity_rows`; also the number of candidate α of `auto`
KEPT = 25  # passes over a checkpoint's weights: quantize, save, hash, load, compare
SIMULATED = 4  # passes over all weights to round them for one simulated forward pass


def count_calibration(study: Study, size: Size, tokenizer) -> Counter:
    """One pass over the calibration items, and the longest once more for its figure."""
    lengths = list(map(len, _tokens(study, tokenizer)))
    batches = token_budget_batches(lengths, batch_tokens=study.calibration.batch_tokens)
    padded = sum(len(b) * max(lengths[i] for i in b) for b in batches)
    return reading_operations(size, _dtype(study), padded + max(lengths)) + weight_passes(size, 4)


def count_quantization(study: Study, variant: Variant, size: Size, tokenizer) -> Counter:
    """The choice of α, the SQNR of each Linear, the sensitivity analysis, and the checks."""
    tokens, dtype = _tokens(study, tokenizer), _dtype(study)
    judge_lengths = list(map(len, tokens[first_judging_item(len(tokens)) :]))
    probe_tokens, judge_tokens = sum(judge_lengths[: sensitivity.JUDGES]), sum(judge_lengths)
    curves = 2 if variant.smooth and not variant.recipe else 1
    sqnr_tokens = sum(map(len, tokens[: sqnr.ITEMS]))
    counts = reading_operations(size, dtype, sqnr_tokens * (1 + 2 * curves)) + reading_operations(
        size, dtype, probe_tokens, head=probe_tokens
    )
    weight_roundings = 2 * curves * min(sqnr.ITEMS, len(tokens))
    alpha = variant.smooth.alpha if variant.smooth else None
    if isinstance(alpha, tuple):
        counts += reading_operations(
            size, dtype, judge_tokens * (1 + len(alpha)), head=judge_tokens * (1 + len(alpha))
        )
        weight_roundings += len(alpha)
    elif alpha == "auto":
        counts += reading_operations(size, dtype, judge_tokens * (1 + 2 * LOOKS))
        weight_roundings += 2 * LOOKS * len(judge_lengths)
    if variant.quantized:
        counts += reading_operations(size, dtype, probe_tokens * LOOKS, head=probe_tokens * LOOKS)
        weight_roundings += LOOKS
    gate_tokens = PROBES * PROBE_TOKENS
    counts += reading_operations(size, "float32", 3 * gate_tokens, head=3 * gate_tokens)
    counts += reading_operations(size, dtype, 5 * gate_tokens, head=2 * gate_tokens)
    return counts + weight_passes(size, KEPT + SIMULATED * weight_roundings)


def count_run(study: Study, run: stages.Run, size: Size, tokenizer) -> Counter:
    """Counts of one job of fine-tuning, calibration or quantization."""
    match run.stage:
        case "finetuning":
            return count_finetuning(study, run.model, size, tokenizer)
        case "calibration":
            return count_calibration(study, size, tokenizer)
    return count_quantization(study, study.variants[run.variant], size, tokenizer)


def quantization_stage_operations(job: Job, tokenizer, *, stage: str) -> dict[str, int]:
    """Operations of a calibration or quantization job by arithmetic, for its record."""
    size = size_of(folder_to_count(job.study, job.model, job.paths))
    run = stages.Run(stage, job.model, job.variant)
    return without_weight_passes(count_run(job.study, run, size, tokenizer))


def _dtype(study: Study) -> str:
    return "float32" if study.runtime.dtype == "auto" else study.runtime.dtype


def _tokens(study: Study, tokenizer) -> list[list[int]]:
    items = calibration_items(study)
    return [calibration_tokens(tokenizer, item, study.calibration.adapter) for item in items]


def main(study_name: str) -> None:
    """Print the counts of a study's jobs, the reasons for missing counts, and Linear shapes."""
    study, paths = load_study(study_name), StudyPaths(study_file(study_name).stem)
    stages_here, jobs, shapes, uncounted = ("finetuning", "calibration", "quantization"), {}, [], {}
    runs = [run for run in stages.runs(study) if run.stage in stages_here]
    for model in study.models:
        try:
            folder = folder_to_count(study, model, paths)
            size = size_of(folder)
            tokenizer = load_tokenizer(folder, enable_thinking=study.enable_thinking)
            model_runs = [run for run in runs if run.model == model]
            jobs |= {run.name: count_run(study, run, size, tokenizer) for run in model_runs}
            shapes += size.shapes
        except StudyError as error:
            uncounted[model] = str(error)
    report = {"jobs": jobs, "uncounted": uncounted, "shapes": sorted(set(shapes))}
    print(json.dumps(report))


if __name__ == "__main__":
    main(sys.argv[1])
