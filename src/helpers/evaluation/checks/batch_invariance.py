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

# Items of each evaluation set. A generated answer makes dozens of sequential decisions,
# and takes as long as ten scored items.
SAMPLE = {"loglikelihood": 4, "generate": 1}
DRAWS = 2.0  # √2 for two independent draws, √2 for a sample of a few items
ROUNDING = 1e-5  # stored precision of log-probabilities, with a margin


def sampled_ids(ids: list[str], protocol: str, *, seed: int) -> set[str]:
    """Ids of the items to ask alone, the same for every variant."""
    order = sorted(ids, key=lambda i: sha256_text(f"{seed}:alone:{i}"))
    return set(order[: SAMPLE[protocol]])


def invariance_gate(
    study: Study, variant: str, rows: list[dict], baseline: list[dict], alone: list[dict]
) -> Gate:
    """The sampled items get the same answers alone as in their batch."""
    batched = {row["id"]: row for row in rows}
    pairs = [(batched[a["id"]], a) for a in alone if a["id"] in batched]
    changed = [b["id"] for b, a in pairs if _answer(a) != _answer(b)]
    changes = f"{len(changed)} of {len(pairs)} answers change"
    if is_batch_invariant(study, variant):
        return _exactly_alone(pairs, changed, changes)
    if any("logprobs" in row for row in alone) and variant != study.baseline:
        return _options_alone(pairs, {row["id"]: row for row in baseline}, changes)
    finite = not any(a["finish_reason"] == "nonfinite" for _, a in pairs)
    own_overlap, other_overlap = _word_overlaps(pairs, rows)
    return Gate(
        "answers independent of the batch",
        bool(pairs) and finite and own_overlap >= other_overlap,
        f"{changes}; words in common {own_overlap:.2f}, with other items' answers "
        f"{other_overlap:.2f}",
        "each is more like its own answer in the batch than like others'; logits are finite",
    )


def _exactly_alone(pairs: list[tuple[dict, dict]], changed: list[str], changes: str) -> Gate:
    """No answer changes; log-probabilities change by no more than their stored precision."""
    if not any("logprobs" in row for pair in pairs for row in pair):
        return Gate(
            "answers independent of the batch", bool(pairs) and not changed, changes, "none changes"
        )
    largest_difference = _largest_change(pairs)
    return Gate(
        "answers independent of the batch",
        bool(pairs) and not changed and largest_difference <= ROUNDING,
        f"{changes}; log-probabilities of options by {largest_difference:.2g} at most",
        f"none changes; log-probabilities by {ROUNDING:g}",
    )


def _options_alone(
    pairs: list[tuple[dict, dict]], baseline_rows: dict[str, dict], changes: str
) -> Gate:
    """Log-probabilities change by no more than their distance from the baseline's.

    Both answers are compared with the baseline, and the smaller distance counts: a batch that
    was mixed up lies far from the baseline and must not widen its own limit.
    """
    difference = rms_change(pairs)
    distances = [
        rms_change([(baseline_rows[pair[side]["id"]], pair[side]) for pair in pairs])
        for side in (0, 1)
    ]
    if difference is None or None in distances:
        return Gate(
            "answers independent of the batch",
            False,
            changes,
            "log-probabilities are there to compare",
        )
    limit = DRAWS * min(distances) + ROUNDING
    return Gate(
        "answers independent of the batch",
        difference <= limit,
        f"{changes}; log-probabilities by {difference:.2g}",
        f"at most {limit:.2g}, {DRAWS:g} times what separates them from the baseline",
    )


def repeat_gate(alone: list[dict], repeated: list[dict]) -> Gate:
    """An item asked alone twice gets the same answer: nothing is random."""
    first = {row["id"]: row for row in alone}
    changed = [row["id"] for row in repeated if _answer(row) != _answer(first[row["id"]])]
    changes = f"{len(changed)} of {len(repeated)} answers change" + (
        f" ({changed[0]})" if changed else ""
    )
    return Gate("answers repeatable", bool(repeated) and not changed, changes, "none")


def is_batch_invariant(study: Study, variant: str) -> bool:
    """Whether the variant's runtime computes a text independently of its batch."""
    runtime, recipe = study.runtime, study.variants[variant]
    simulated = recipe.quantized and runtime.quantized != "int8"
    dtype = recipe.dtype or runtime.dtype
    return (runtime.device, dtype) == ("cpu", "float32") and not simulated


def _answer(row: dict) -> tuple:
    return row["status"], row["parsed"], row["output"]


def _word_overlaps(pairs: list[tuple[dict, dict]], rows: list[dict]) -> tuple[float, float]:
    """Mean word F1 of answers alone with (the same items', other items') answers in the batch."""
    own_overlaps = [token_f1(a["output"], b["output"]) for b, a in pairs]
    other_overlaps = [
        token_f1(a["output"], row["output"])
        for _, a in pairs
        for row in rows
        if row["id"] != a["id"]
    ]
    means = [
        math.fsum(overlaps) / len(overlaps) if overlaps else 0.0
        for overlaps in (own_overlaps, other_overlaps)
    ]
    return means[0], means[1]


def _largest_change(pairs: list[tuple[dict, dict]]) -> float:
    """The largest change of an option's log-probability; infinite if one is missing or NaN."""
    changes = [0.0]
    for first, second in pairs:
        before, after = first.get("logprobs", ()), second.get("logprobs", ())
        changes += [abs(x - y) for x, y in zip(before, after, strict=False)]
        changes += [math.inf] * (len(before) != len(after))
    return largest(changes)


def rms_change(pairs: list[tuple[dict, dict]]) -> float | None:
    """Root mean square change of the options' log-probabilities; None if there are none."""
    squares = [
        (x - y) ** 2
        for first, second in pairs
        for x, y in zip(first.get("logprobs", ()), second.get("logprobs", ()), strict=False)
    ]
    return math.sqrt(math.fsum(squares) / len(squares)) if squares else None
