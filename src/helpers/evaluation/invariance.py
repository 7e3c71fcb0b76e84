"""Whether an answer depends on the other items of its batch.

A few items are asked again in a batch of one. In float32 on a CPU a model has to answer
the same, quantized or not: the engine reads every text at the shape it has alone. On
other runtimes a quantized model need not: a last bit that differs tips values over a
rounding edge, and after a few layers every rounding is drawn anew (NOTES.md). There the
share of changed answers is recorded as the variant's own noise floor. Its
log-probabilities have a limit: were all of quantization's effect on them noise, two
independent draws of it would differ by √2 times its size; as much again is left for the
small sample. A larger change is no rounding. The asking is in `evidence`; imports no torch.
"""

import math

from helpers.study.gates import Gate
from helpers.study.hashing import sha256_text
from helpers.study.schema import Study

SAMPLE = 4  # items of each evaluation set
DRAWS = 2.0  # √2 for two independent draws, √2 for a sample of a few items
ROUNDING = 1e-5  # of stored log-probabilities, with room


def sample(ids: list[str], *, seed: int) -> set[str]:
    """The ids asked again, the same for every variant."""
    return set(sorted(ids, key=lambda i: sha256_text(f"{seed}:alone:{i}"))[:SAMPLE])


def invariance_gate(
    study: Study, variant: str, rows: list[dict], baseline: list[dict], alone: list[dict]
) -> Gate:
    """The sampled items are answered alone as they were answered among others."""
    batched = {row["id"]: row for row in rows}
    pairs = [(batched[a["id"]], a) for a in alone if a["id"] in batched]
    changed = [b["id"] for b, a in pairs if _said(a) != _said(b)]
    told = f"{len(changed)} of {len(pairs)} answers change"
    if exact(study, variant):
        passed = bool(pairs) and not changed
        return Gate("same answer alone", passed, told, "none changes")
    floats = {row["id"]: row for row in baseline}
    moved = _rms_change(pairs)
    own = _rms_change([(floats[b["id"]], b) for b, _ in pairs if b["id"] in floats])
    if moved is None or own is None or variant == study.baseline:
        finite = not any(a["finish_reason"] == "nonfinite" for _, a in pairs)
        limit = "some are asked, logits are finite; the share is the variant's noise floor"
        return Gate("same answer alone", bool(pairs) and finite, told, limit)
    limit = DRAWS * own + ROUNDING
    return Gate(
        "same answer alone",
        moved <= limit,
        f"{told}; log-probabilities by {moved:.2g}",
        f"at most {limit:.2g}, {DRAWS:g} times what separates them from the baseline",
    )


def exact(study: Study, variant: str) -> bool:
    """Whether the variant's runtime computes a text the same in any company."""
    runtime = study.runtime
    simulated = study.variants[variant].quantized and runtime.quantized != "int8"
    return (runtime.device, runtime.dtype) == ("cpu", "float32") and not simulated


def _said(row: dict) -> tuple:
    return row["status"], row["parsed"], row["output"]


def _rms_change(pairs: list[tuple[dict, dict]]) -> float | None:
    """Root mean square change of the options' log-probabilities; None if there are none."""
    squares = [
        (x - y) ** 2
        for one, other in pairs
        for x, y in zip(one.get("logprobs", ()), other.get("logprobs", ()), strict=False)
    ]
    return math.sqrt(math.fsum(squares) / len(squares)) if squares else None
