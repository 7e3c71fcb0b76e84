"""All gates on one variant, from the files alone.

What the run that made the checkpoint held in memory is not asked: a bug in smoothing or
compression would vouch for itself there. The gates lie in `checkpoint_gates` (tensors),
`checkpoint_metadata_gates` (what they are said to be), `runtime_gates` (what the loaded checkpoint
computes) and `calibration_gates`.
"""

from helpers.core.activity import Bar
from helpers.study.schema_variants import Variant
from helpers.study.study_run import Job
from helpers.verification import (
    alpha_gates,
    calibration_gates,
    checkpoint_gates,
    checkpoint_metadata_gates,
    record_gates,
    runtime_gates,
    tokenizer_gates,
)
from helpers.verification.checkpoint_files import CheckpointFiles
from helpers.verification.gate_decorator import Gate

# Order: gates without a model, gates that run the source, gates that run the checkpoint. The
# model slot holds one model, and in this order each model is loaded once or twice.
FILE_CHECKS = (
    checkpoint_gates.smoothing_gate,
    checkpoint_gates.unchanged_gate,
    checkpoint_gates.source_gate,
    calibration_gates.items_gate,
    calibration_gates.leakage_gate,
    tokenizer_gates.tokenizer_gate,
)
RECORD_CHECKS = (  # these gates need the calibration's own files
    calibration_gates.texts_gate,
    calibration_gates.order_gate,
    calibration_gates.surface_gate,
)
INT8_FILE_CHECKS = (
    checkpoint_gates.grid_gate,
    checkpoint_metadata_gates.census_gate,
    checkpoint_metadata_gates.metadata_gate,
)
SOURCE_MODEL_CHECKS = (calibration_gates.statistics_gate, runtime_gates.function_gate)
CHECKPOINT_MODEL_CHECKS = (runtime_gates.reload_gate,)
INT8_LAYER_CHECKS = (runtime_gates.activations_gate, runtime_gates.kernel_gate)


def checks_of(claim: Variant) -> tuple:
    """The gates that apply to a variant's declared scheme."""
    model_checks = (*SOURCE_MODEL_CHECKS, *CHECKPOINT_MODEL_CHECKS)
    alpha_is_chosen = claim.smooth is not None and not isinstance(claim.smooth.alpha, float)
    if alpha_is_chosen:
        model_checks = (alpha_gates.alpha_choice_gate, *model_checks)
    if not claim.quantized:
        return (*FILE_CHECKS, checkpoint_gates.float_weights_gate, *model_checks)
    static = (checkpoint_gates.static_gate,) if claim.scheme[1] == "tensor_static" else ()
    return (*FILE_CHECKS, *INT8_FILE_CHECKS, *static, *model_checks, *INT8_LAYER_CHECKS)


def verify_checkpoint(job: Job, *, source_hash: str, record: dict | None = None) -> list[Gate]:
    """Run all gates on the job's saved checkpoint.

    Args:
        job: names the model and variant whose checkpoint, source and calibration are read.
        source_hash: content hash of the source's folder before the run.
        record: results that the quantization will record; None skips the gates on them.
    """
    evidence = CheckpointFiles(job, source_hash=source_hash, record=record)
    evidence.release()  # frees the memory that quantization left in use
    checks = checks_of(job.recipe.claim)
    if record:  # the gates on the record run the source, so they come first
        checks = (*RECORD_CHECKS, *record_gates.record_gates_of(job.recipe.claim), *checks)
    gates = Bar(checks, desc="checks on the checkpoint", unit="check")
    return [check(evidence) for check in gates]
