"""Whether a study's records belong together: each names, by hash, the files it read.

They must be those of the stage before. A checkpoint is followed from its making through its
verification to its evaluation, so that none of the three can be of another one.
"""

from collections.abc import Mapping

from helpers.core.errors import StudyError
from helpers.core.hashing import sha256_file, sha256_folder
from helpers.report.results_data import MAKER, Calibrated, Evaluated
from helpers.study.study_run import Job


def refuse_broken_chain(
    job: Job,
    calibrations: Mapping[str, Calibrated],
    evaluations: Mapping[tuple[str, str], Evaluated],
    training: Mapping[str, dict],
) -> None:
    """Follow the hashes from stage to stage.

    Raises:
        StudyError: a record is about other files than it is filed under; names the notebook.
    """
    files = {model: found.record["inputs"]["model"] for model, found in calibrations.items()}
    for model, record in training.items():
        start = job.study.models[model].finetune.start
        if record["inputs"]["source_model"] != files[start]:
            raise StudyError(
                f"{model}: was fine-tuned from other model files than {start} was calibrated with; "
                "run 00_finetuning and 01_calibration again"
            )
        asked = (evaluations[m, job.study.baseline].losses_read for m in (model, start))
        if next(asked) == next(asked):
            raise StudyError(
                f"{model}: reads every passage exactly as {start} does, so its training changed "
                "nothing; look at its learning rate and run 00_finetuning again"
            )
    for (model, _), evaluated in evaluations.items():
        _refuse_other_evaluation(job, evaluated, files[model])
        floats = evaluations[model, job.study.baseline].record["inputs"]["float_states"]
        if evaluated.record["inputs"]["float_states"] != floats:
            raise StudyError(
                f"{model}/{evaluated.variant}: its KL is held against other states than those of "
                f"{job.study.baseline}; run 03_evaluation again"
            )


def _refuse_other_evaluation(job: Job, found: Evaluated, model_files: str) -> None:
    at, named = f"{found.model}/{found.variant}", found.record["parameters"]
    if (named["model"], named["variant"]) != (found.model, found.variant):
        raise StudyError(f"{at}: its record is of another run; run 03_evaluation again")
    if found.quantization is None:
        read, what, stage = found.record["inputs"]["variant"], "was evaluated", "03_evaluation"
    else:
        _refuse_other_checkpoint(job, found, at)
        read, what, stage = found.quantization["inputs"]["model"], "was quantized", MAKER
    if read != model_files:
        raise StudyError(
            f"{at}: {what} from other model files than {found.model} was calibrated with; "
            f"run 01_calibration and {stage} again"
        )


def _refuse_other_checkpoint(job: Job, found: Evaluated, at: str) -> None:
    verified, evaluated = found.verification, found.record["inputs"]["variant"]
    if (verified["model"], verified["variant"]) != (found.model, found.variant):
        raise StudyError(f"{at}: its verification.json is of another run; run {MAKER} again")
    if verified["checkpoint"] != evaluated:
        raise StudyError(
            f"{at}: another checkpoint was evaluated than was verified; run {MAKER} and "
            "03_evaluation again"
        )
    activations = job.paths.calibration(found.model) / "activations.safetensors"
    if found.quantization["inputs"]["calibration"] != sha256_file(activations):
        raise StudyError(f"{at}: was made from another calibration; run {MAKER} again")
    checkpoint = job.paths.checkpoint(found.model, found.variant)
    if checkpoint.is_dir() and evaluated != sha256_folder(checkpoint):  # weights may be gone
        raise StudyError(f"{at}: its checkpoint changed since; run 03_evaluation again")
