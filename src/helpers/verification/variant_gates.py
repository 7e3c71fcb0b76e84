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
from helpers.verification.checkpoint_files import Evidence
from helpers.verification.gate_decorator import Gate

# First what needs no model, then what runs the source, then what runs the checkpoint: the
# evidence holds one model at a time, and in this order each is loaded once or twice.
ON_FILES = (
    checkpoint_gates.smoothing_gate,
    checkpoint_gates.kept_gate,
    checkpoint_gates.source_gate,
    calibration_gates.items_gate,
    calibration_gates.leak_gate,
    tokenizer_gates.tokenizer_gate,
)
ON_RECORDS = (  # what a calibration alone has left, and the making of the checkpoint told
    calibration_gates.texts_gate,
    calibration_gates.order_gate,
    calibration_gates.picture_gate,
)
ON_INT8_FILES = (
    checkpoint_gates.grid_gate,
    checkpoint_metadata_gates.census_gate,
    checkpoint_metadata_gates.metadata_gate,
)
ON_THE_SOURCE = (calibration_gates.statistics_gate, runtime_gates.function_gate)
ON_THE_CHECKPOINT = (runtime_gates.reload_gate,)
ON_INT8_LAYERS = (runtime_gates.activations_gate, runtime_gates.kernel_gate)


def checks(claim: Variant) -> tuple:
    """The gates that apply to what a variant claims to be."""
    running = (*ON_THE_SOURCE, *ON_THE_CHECKPOINT)
    chosen = claim.smooth is not None and not isinstance(claim.smooth.alpha, float)
    if chosen:
        running = (alpha_gates.choice_gate, *running)
    if not claim.quantized:
        return (*ON_FILES, checkpoint_gates.float_weights_gate, *running)
    static = (checkpoint_gates.static_gate,) if claim.scheme[1] == "tensor_static" else ()
    return (*ON_FILES, *ON_INT8_FILES, *static, *running, *ON_INT8_LAYERS)


def verify(job: Job, *, source_hash: str, made: dict | None = None) -> list[Gate]:
    """Hold the job's checkpoint, as saved, to all it claims.

    Args:
        job: the model and variant whose checkpoint, source and calibration are read.
        source_hash: content hash of the source's folder before the run.
        made: what the record of the quantization will say; None asks nothing of it.
    """
    evidence = Evidence(job, source_hash=source_hash, made=made)
    evidence.let_go()  # of what the making of the checkpoint left behind
    asked = checks(job.recipe.claim)
    if made:  # those on the record run the source, and so come first
        asked = (*ON_RECORDS, *record_gates.on_record(job.recipe.claim), *asked)
    gates = Bar(asked, desc="checks on the checkpoint", unit="check")
    return [check(evidence) for check in gates]
