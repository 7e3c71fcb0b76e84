"""Whether an answer depends on the other items of its batch.

A few items are asked again in a batch of one. In float32 on a CPU a model has to answer
the same, quantized or not, and give every option the same log-probability: the engine reads
every text at the shape it has alone. On
other runtimes, and in bfloat16, it need not: a last bit that differs tips values over a
rounding edge, and after a few layers every rounding is drawn anew (NOTES.md). There the
share of changed answers is recorded as the variant's own noise floor. Its
log-probabilities have a limit: were all of its distance from the baseline noise, two
independent draws of it would differ by √2 times its size; as much again is left for the
small sample. A larger change is no rounding. A generated text must at least be more like
its own than like other items' texts, else answers were mixed up. The asking is in
`evaluation_data`; imports no torch.
"""

import math

from helpers.core.gates import Gate, largest
from helpers.core.hashing import sha256_text
from helpers.evaluation.scoring import token_f1
from helpers.study.schema import Study

# Items of each evaluation set. A written answer is dozens of decisions, one after the other,
# and takes as long alone as ten scored ones.
SAMPLE = {"loglikelihood": 4, "generate": 1}
DRAWS = 2.0  # √2 for two independent draws, √2 for a sample of a few items
ROUNDING = 1e-5  # of stored log-probabilities, with room


def sample(ids: list[str], protocol: str, *, seed: int) -> set[str]:
    """The ids asked again, the same for every variant."""
    order = sorted(ids, key=lambda i: sha256_text(f"{seed}:alone:{i}"))
    return set(order[: SAMPLE[protocol]])


def invariance_gate(
    study: Study, variant: str, rows: list[dict], baseline: list[dict], alone: list[dict]
) -> Gate:
    """The sampled items are answered alone as they were answered among others."""
    batched = {row["id"]: row for row in rows}
    pairs = [(batched[a["id"]], a) for a in alone if a["id"] in batched]
    changed = [b["id"] for b, a in pairs if _said(a) != _said(b)]
    told = f"{len(changed)} of {len(pairs)} answers change"
    if exact(study, variant):
        return _exactly_alone(pairs, changed, told)
    if any("logprobs" in row for row in alone) and variant != study.baseline:
        return _options_alone(pairs, {row["id"]: row for row in baseline}, told)
    finite = not any(a["finish_reason"] == "nonfinite" for _, a in pairs)
    own, others = _likeness(pairs, rows)
    return Gate(
        "same answer alone",
        bool(pairs) and finite and own >= others,
        f"{told}; words in common {own:.2f}, with other items' answers {others:.2f}",
        "each is more like its own answer in the batch than like others'; logits are finite",
    )


def _exactly_alone(pairs: list[tuple[dict, dict]], changed: list[str], told: str) -> Gate:
    """No answer changes, and no option's log-probability by more than it is stored to."""
    if not any("logprobs" in row for pair in pairs for row in pair):
        return Gate("same answer alone", bool(pairs) and not changed, told, "none changes")
    moved = _largest_change(pairs)
    return Gate(
        "same answer alone",
        bool(pairs) and not changed and moved <= ROUNDING,
        f"{told}; log-probabilities of options by {moved:.2g} at most",
        f"none changes; log-probabilities by {ROUNDING:g}",
    )


def _options_alone(pairs: list[tuple[dict, dict]], floats: dict[str, dict], told: str) -> Gate:
    """Log-probabilities move no more than they are away from the baseline's.

    The baseline is held against both answers, and the nearer one counts: a batch that was
    mixed up is far from it, and must not widen its own limit.
    """
    moved = rms_change(pairs)
    distances = [
        rms_change([(floats[pair[side]["id"]], pair[side]) for pair in pairs]) for side in (0, 1)
    ]
    if moved is None or None in distances:
        return Gate("same answer alone", False, told, "log-probabilities are there to compare")
    limit = DRAWS * min(distances) + ROUNDING
    return Gate(
        "same answer alone",
        moved <= limit,
        f"{told}; log-probabilities by {moved:.2g}",
        f"at most {limit:.2g}, {DRAWS:g} times what separates them from the baseline",
    )


def repeat_gate(alone: list[dict], again: list[dict]) -> Gate:
    """Asked once more in the same way, an item gets the same answer: nothing is drawn by lot."""
    first = {row["id"]: row for row in alone}
    odd = [row["id"] for row in again if _said(row) != _said(first[row["id"]])]
    told = f"{len(odd)} of {len(again)} answers change" + (f" ({odd[0]})" if odd else "")
    return Gate("same answer again", bool(again) and not odd, told, "none")


def exact(study: Study, variant: str) -> bool:
    """Whether the variant's runtime computes a text the same in any company."""
    runtime, recipe = study.runtime, study.variants[variant]
    simulated = recipe.quantized and runtime.quantized != "int8"
    dtype = recipe.dtype or runtime.dtype
    return (runtime.device, dtype) == ("cpu", "float32") and not simulated


def _said(row: dict) -> tuple:
    return row["status"], row["parsed"], row["output"]


def _likeness(pairs: list[tuple[dict, dict]], rows: list[dict]) -> tuple[float, float]:
    """Mean F1 of the words of an answer alone with its own in the batch, and with the others."""
    own = [token_f1(a["output"], b["output"]) for b, a in pairs]
    others = [
        token_f1(a["output"], row["output"])
        for _, a in pairs
        for row in rows
        if row["id"] != a["id"]
    ]
    mean = [math.fsum(found) / len(found) if found else 0.0 for found in (own, others)]
    return mean[0], mean[1]


def _largest_change(pairs: list[tuple[dict, dict]]) -> float:
    """The largest change of an option's log-probability; infinite where one has none, or NaN."""
    changes = [0.0]
    for one, other in pairs:
        before, after = one.get("logprobs", ()), other.get("logprobs", ())
        changes += [abs(x - y) for x, y in zip(before, after, strict=False)]
        changes += [math.inf] * (len(before) != len(after))
    return largest(changes)


def rms_change(pairs: list[tuple[dict, dict]]) -> float | None:
    """Root mean square change of the options' log-probabilities; None if there are none."""
    squares = [
        (x - y) ** 2
        for one, other in pairs
        for x, y in zip(one.get("logprobs", ()), other.get("logprobs", ()), strict=False)
    ]
    return math.sqrt(math.fsum(squares) / len(squares)) if squares else None
