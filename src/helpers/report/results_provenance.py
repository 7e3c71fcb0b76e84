"""Whether a study's records belong together: each names, by hash, the files it read.

They must be those of the stage before. A checkpoint is followed from its making through its
verification to its evaluation, so that none of the three can be of another one.
"""

from collections.abc import Mapping

from helpers.core.errors import StudyError
from helpers.core.hashing import sha256_file, sha256_folder
from helpers.report.results_data import QUANTIZATION_STAGE, CalibrationResults, VariantResults
from helpers.study.study_run import Job


def check_provenance(
    job: Job,
    calibrations: Mapping[str, CalibrationResults],
    evaluations: Mapping[tuple[str, str], VariantResults],
    training: Mapping[str, dict],
) -> None:
    """Follow the hashes from stage to stage.

    Raises:
        StudyError: a record names files of another run; the message names the notebook.
    """
    files = {
        model: calibration.record["inputs"]["model"] for model, calibration in calibrations.items()
    }
    for model, record in training.items():
        start = job.study.models[model].finetune.start
        if record["inputs"]["source_model"] != files[start]:
            raise StudyError(
                f"{model}: was fine-tuned from other model files than {start} was calibrated with; "
                "run 00_finetuning and 01_calibration again"
            )
        losses = (evaluations[m, job.study.baseline].passage_losses for m in (model, start))
        if next(losses) == next(losses):
            raise StudyError(
                f"{model}: reads every passage exactly as {start} does, so its training changed "
                "nothing; look at its learning rate and run 00_finetuning again"
            )
    for (model, _), evaluated in evaluations.items():
        _check_evaluation(job, evaluated, files[model])
        floats = evaluations[model, job.study.baseline].record["inputs"]["float_states"]
        if evaluated.record["inputs"]["float_states"] != floats:
            raise StudyError(
                f"{model}/{evaluated.variant}: its KL was computed against other states than those "
                f"of {job.study.baseline}; run 03_evaluation again"
            )


def _check_evaluation(job: Job, variant: VariantResults, model_files: str) -> None:
    at, parameters = f"{variant.model}/{variant.variant}", variant.record["parameters"]
    if (parameters["model"], parameters["variant"]) != (variant.model, variant.variant):
        raise StudyError(f"{at}: its record is of another run; run 03_evaluation again")
    if variant.quantization is None:
        model_read, action, stage = (
            variant.record["inputs"]["variant"],
            "was evaluated",
            "03_evaluation",
        )
    else:
        _check_checkpoint(job, variant, at)
        model_read, action, stage = (
            variant.quantization["inputs"]["model"],
            "was quantized",
            QUANTIZATION_STAGE,
        )
    if model_read != model_files:
        raise StudyError(
            f"{at}: {action} from other model files than {variant.model} was calibrated with; "
            f"run 01_calibration and {stage} again"
        )


def _check_checkpoint(job: Job, variant: VariantResults, at: str) -> None:
    verified, evaluated = variant.verification, variant.record["inputs"]["variant"]
    if (verified["model"], verified["variant"]) != (variant.model, variant.variant):
        raise StudyError(
            f"{at}: its verification.json is of another run; run {QUANTIZATION_STAGE} again"
        )
    if verified["checkpoint"] != evaluated:
        raise StudyError(
            f"{at}: the evaluated checkpoint is not the verified one; run {QUANTIZATION_STAGE} "
            "and 03_evaluation again"
        )
    activations = job.paths.calibration(variant.model) / "activations.safetensors"
    if variant.quantization["inputs"]["calibration"] != sha256_file(activations):
        raise StudyError(
            f"{at}: its checkpoint has another calibration; run {QUANTIZATION_STAGE} again"
        )
    checkpoint = job.paths.checkpoint(variant.model, variant.variant)
    if checkpoint.is_dir() and evaluated != sha256_folder(checkpoint):  # weights may be gone
        raise StudyError(f"{at}: its checkpoint changed since; run 03_evaluation again")
