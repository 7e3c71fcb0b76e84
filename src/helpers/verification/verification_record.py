"""verification.json: every gate on a checkpoint, beside the checkpoint that it was held against."""

from helpers.core.hashing import sha256_folder
from helpers.core.records import write_json
from helpers.study.study_run import Job
from helpers.verification.gate_decorator import as_record
from helpers.verification.variant_gates import verify_checkpoint


def write_verification(job: Job, *, source_hash: str, made: dict) -> dict:
    """Verify the job's checkpoint as it is saved; returns what verification.json holds.

    Args:
        source_hash: content hash of the source's folder before the run.
        made: what the record of the quantization will say.
    """
    checkpoint = sha256_folder(job.paths.checkpoint(job.model, job.variant))
    verified = {"model": job.model, "variant": job.variant, "checkpoint": checkpoint}
    verified |= as_record(verify_checkpoint(job, source_hash=source_hash, record=made))
    write_json(job.paths.variant(job.model, job.variant) / "verification.json", verified)
    return verified
