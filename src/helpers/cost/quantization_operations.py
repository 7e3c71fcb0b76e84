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
    folder_to_count,
    operations,
    read,
    size_of,
    touched,
    training,
)
from helpers.quantization import sensitivity, sqnr
from helpers.quantization.calibration import first_judge
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

LOOKS = 11  # of left_float: as quantized, every kind of Linear, two single ones; of α with auto
KEPT = 25  # times a checkpoint's weights are made, saved, hashed, loaded and compared
SIMULATED = 4  # passes over all weights that rounding them for one forward pass takes


def calibration(study: Study, size: Size, tokenizer) -> Counter:
    """One pass over the calibration items, and one of them again for its picture."""
    lengths = list(map(len, _tokens(study, tokenizer)))
    batches = token_budget_batches(lengths, batch_tokens=study.calibration.batch_tokens)
    padded = sum(len(b) * max(lengths[i] for i in b) for b in batches)
    return read(size, _dtype(study), padded + max(lengths)) + touched(size, 4)


def quantization(study: Study, variant: Variant, size: Size, tokenizer) -> Counter:
    """The choice of α, what it does to each Linear, Linears left float, and the checks."""
    tokens, dtype = _tokens(study, tokenizer), _dtype(study)
    judges = list(map(len, tokens[first_judge(len(tokens)) :]))
    few, judged = sum(judges[: sensitivity.JUDGES]), sum(judges)
    looks = 2 if variant.smooth and not variant.recipe else 1
    compared = sum(map(len, tokens[: sqnr.ITEMS]))
    counted = read(size, dtype, compared * (1 + 2 * looks)) + read(size, dtype, few, head=few)
    rounded = 2 * looks * min(sqnr.ITEMS, len(tokens))
    alpha = variant.smooth.alpha if variant.smooth else None
    if isinstance(alpha, tuple):
        counted += read(size, dtype, judged * (1 + len(alpha)), head=judged * (1 + len(alpha)))
        rounded += len(alpha)
    elif alpha == "auto":
        counted += read(size, dtype, judged * (1 + 2 * LOOKS))
        rounded += 2 * LOOKS * len(judges)
    if variant.quantized:
        counted += read(size, dtype, few * LOOKS, head=few * LOOKS)
        rounded += LOOKS
    probed = PROBES * PROBE_TOKENS
    counted += read(size, "float32", 3 * probed, head=3 * probed)
    counted += read(size, dtype, 5 * probed, head=2 * probed)
    return counted + touched(size, KEPT + SIMULATED * rounded)


def of_run(study: Study, run: stages.Run, size: Size, tokenizer) -> Counter:
    """What one job of fine-tuning, calibration or quantization takes."""
    match run.stage:
        case "finetuning":
            return training(study, run.model, size, tokenizer)
        case "calibration":
            return calibration(study, size, tokenizer)
    return quantization(study, study.variants[run.variant], size, tokenizer)


def for_record(job: Job, tokenizer, *, stage: str) -> dict[str, int]:
    """Operations of a calibration or quantization by arithmetic."""
    size = size_of(folder_to_count(job.study, job.model, job.paths))
    run = stages.Run(stage, job.model, job.variant)
    return operations(of_run(job.study, run, size, tokenizer))


def _dtype(study: Study) -> str:
    return "float32" if study.runtime.dtype == "auto" else study.runtime.dtype


def _tokens(study: Study, tokenizer) -> list[list[int]]:
    items = calibration_items(study)
    return [calibration_tokens(tokenizer, item, study.calibration.adapter) for item in items]


def main(study_name: str) -> None:
    """Print the counts of a study's jobs, why others have none, and the shapes of Linears."""
    study, paths = load_study(study_name), StudyPaths(study_file(study_name).stem)
    counted, jobs, shapes, uncounted = ("finetuning", "calibration", "quantization"), {}, [], {}
    runs = [run for run in stages.runs(study) if run.stage in counted]
    for model in study.models:
        try:
            folder = folder_to_count(study, model, paths)
            size = size_of(folder)
            tokenizer = load_tokenizer(folder, enable_thinking=study.enable_thinking)
            mine = [run for run in runs if run.model == model]
            jobs |= {run.name: of_run(study, run, size, tokenizer) for run in mine}
            shapes += size.shapes
        except StudyError as error:
            uncounted[model] = str(error)
    found = {"jobs": jobs, "uncounted": uncounted, "shapes": sorted(set(shapes))}
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1])
