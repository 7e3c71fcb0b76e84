"""Gates on numbers: ranges, shared text, distance from float, independence of the batch.

Scores and metrics must be in their range: a percent filed as a fraction is not. Figures and token
counts of the shared text are held to those computed a second time (`second_opinion`).

The float states that a variant is held against must be those of the baseline that was evaluated. A
quantized model that answers exactly as the float one was not quantized when it was asked. A float
variant (smoothed only, or computed with in another float type) may differ by rounding alone. How
far that is depends on depth and outliers, so the limit is measured: the KL of the float model
itself when every weight is off by one rounding (`evaluation_data`).

A few items are asked again in a batch of one. In float32 on a CPU a model has to answer the same,
quantized or not, and give every option the same log-probability: the engine reads every text at
the shape it has alone. On other runtimes, and in bfloat16, it need not: a last bit that differs
tips values over a rounding edge, and after a few layers every rounding is drawn anew (NOTES.md).
There the share of changed answers is recorded as the variant's own noise floor. Its
log-probabilities have a limit: were all of its distance from the baseline noise, two independent
draws of it would differ by √2 times its size; as much again is left for the small sample. A larger
change is no rounding. A generated text must at least be more like its own than like other items'
texts, else answers were mixed up. Imports no torch.
"""

import math
from collections import Counter
from itertools import permutations

from helpers.core.records import Gate, largest, none_of, sha256_text
from helpers.evaluation.scoring import token_f1
from helpers.study.schema import Study, Variant

COUNTS = ("items", "answered", "abstained", "unparsed", "prompt_tokens", "output_tokens")
COUNTS += ("has_answer_items", "no_answer_items", "passages", "tokens")
UNBOUNDED = ("median_absolute_difference", "kl")
LOGLIKELIHOODS = ("gold_nats_per_token", "foil_nats_per_token")
KL_ROUNDING = 1e-6  # a KL of zero may be slightly negative


def range_gate(rows: list[dict], metrics: dict[str, dict], name: str) -> Gate:
    """Scores and fractions lie in [0, 1], counts are whole numbers, perplexity is at least 1."""
    scores = [(r["id"], key, r[key]) for r in rows for key in ("score", "f1") if key in r]
    outside = [f"{key} {value} of {i}" for i, key, value in scores if not 0 <= value <= 1]
    for dataset, values in metrics.items():
        outside += [f"{dataset} {k} = {v}" for k, v in values.items() if not in_range(k, v)]
    return none_of(name, outside, len(rows) + sum(map(len, metrics.values())), "values are outside")


def in_range(metric: str, value) -> bool:
    """Whether a metric's value is possible; None, for one that cannot be computed, is."""
    if value is None:
        return True
    if metric == "finish_reasons":
        return all(isinstance(n, int) and n > 0 for n in value.values())
    if metric == "harness":
        return all(map(math.isfinite, value.values()))
    if metric in COUNTS:
        return isinstance(value, int) and value >= 0
    if metric == "perplexity":
        return 1 <= value < math.inf
    if metric in LOGLIKELIHOODS:
        return -math.inf < value <= 0
    if metric in UNBOUNDED:
        return -KL_ROUNDING <= value < math.inf
    return 0 <= value <= 1


ROOM = 10.0  # times the rounding measured on one passage, a single sample
EPS = 2.0**-22  # two roundings of float32
STORED_DIGITS = 1e-5  # relative; the KL of a token is stored in six digits


def recomputed_gates(
    rows: list[dict], means: dict, recomputation, *, is_baseline: bool
) -> list[Gate]:
    """The gates on the rows of the shared text.

    Args:
        rows: as the evaluation stored them.
        means: `perplexity`, `kl`, `top1_agreement`, as the evaluation stored them.
        recomputation: rows and token counts from `second_opinion`; None if they were not
        computed.
    """
    recomputed = recomputation.rows if recomputation else []
    counts = recomputation.token_counts if recomputation else {}
    gates = [
        logits_gate(rows, recomputed),
        token_counts_gate(rows, counts),
        tokens_gate(rows, recomputation.unread if recomputation else ["any of them"]),
        means_gate(rows, means),
    ]
    return [*gates, itself_gate(rows)] if is_baseline else gates


def logits_gate(rows: list[dict], recomputed: list[dict]) -> Gate:
    """Loss, KL (also of each token) and top-1 agreement of a few passages follow from logits.

    Two full float64 logit matrices give the expected figures.
    """
    stored = {row["id"]: row for row in rows}
    differences, example = [], ""
    for row in recomputed:
        if row["id"] not in stored:
            differences.append(f"{row['id']} was not read")
            continue
        differences += _differences(stored[row["id"]], row)
        example = example or f"nll {row['nll']:.6g}, KL {row['kl']:.3g} computed again"
    expected_count = min(2, len(rows))
    if len(recomputed) != expected_count:
        differences.append(
            f"{len(recomputed)} of {expected_count} passages could be computed again"
        )
    return Gate(
        "shared-text figures recomputed",
        bool(recomputed) and not differences,
        "; ".join(differences) or f"{len(recomputed)} passages agree ({example})",
        "the stored figures, but for rounding measured on the baseline",
    )


def _differences(stored: dict, recomputed: dict) -> list[str]:
    """Messages about the figures that differ by more than rounding."""
    differences, resolution = [], recomputed["tokens"] * LARGEST_LOGPROB * EPS
    for name in ("nll", "kl"):
        limit = ROOM * recomputed[f"{name}_blur"] + resolution
        value = stored[name]
        if value is None or not abs(value - recomputed[name]) <= limit:
            shown = "none" if value is None else f"{value:.6g}"
            differences.append(
                f"{name} {shown} of {stored['id']}, again {recomputed[name]:.6g} ± {limit:.2g}"
            )
    if abs(stored["top1_agreements"] - recomputed["top1_agreements"]) > recomputed["ties"]:
        differences.append(
            f"{stored['top1_agreements']} top-1 agreements of {stored['id']}, "
            f"again {recomputed['top1_agreements']} ± {recomputed['ties']}"
        )
    if recomputed["token_kl"] is not None:
        differences += _differing_tokens(stored, recomputed)
    return differences


def _differing_tokens(stored: dict, recomputed: dict) -> list[str]:
    """A message about the tokens whose KL differs by more than rounding, with the first of them.

    The largest rounding error of the passage's tokens bounds each: that of one token is a single
    draw and may be 0.
    """
    values, expected = stored.get("token_kl", []), recomputed["token_kl"]
    if len(values) != len(expected):
        return [f"{len(values)} tokens of {stored['id']} have a KL, again {len(expected)}"]
    limit = ROOM * max(recomputed["token_kl_blur"]) + LARGEST_LOGPROB * EPS
    differing = [
        (place, kl, again)
        for place, (kl, again) in enumerate(zip(values, expected, strict=True))
        if kl is None or not abs(kl - again) <= limit + STORED_DIGITS * abs(again)
    ]
    if not differing:
        return []
    place, kl, again = differing[0]
    shown = "none" if kl is None else f"{kl:.6g}"
    return [
        f"KL of {len(differing)} tokens of {stored['id']}, first token {place}: {shown}, "
        f"again {again:.6g} ± {limit:.2g}"
    ]


def token_counts_gate(rows: list[dict], counts: dict[str, int]) -> Gate:
    """The stored number of predicted tokens of every passage is the tokenizer's own count."""
    differing = [
        f"{row['tokens']} of {row['id']}, {counts.get(row['id'], 'none')} by the tokenizer"
        for row in rows
        if counts.get(row["id"]) != row["tokens"]
    ]
    differing += sorted(counts.keys() - {row["id"] for row in rows})
    differing += [] if counts else ["no passage was tokenized again"]
    return none_of("passage token counts", differing, len(rows), "passages have other counts")


def tokens_gate(rows: list[dict], unread: list[str]) -> Gate:
    """Every passage was read as the token ids of the source's own tokenizer."""
    return none_of("passages tokenized by the source", unread, len(rows), "were read otherwise")


def means_gate(rows: list[dict], means: dict) -> Gate:
    """Figures of the whole text follow from its passages, and their KL from that of the tokens."""
    tokens = sum(row["tokens"] for row in rows)
    complete = tokens > 0 and all(row[key] is not None for row in rows for key in ("nll", "kl"))
    if not complete:
        return Gate("shared-text means recomputed", False, "a passage has no figures", "each has")
    loss, kl = (sum(row[key] for row in rows) / tokens for key in ("nll", "kl"))
    expected = {"perplexity": math.exp(min(loss, 700.0)), "kl": kl}
    expected["top1_agreement"] = sum(row["top1_agreements"] for row in rows) / tokens
    differing = [
        f"{name} {means.get(name)}, {value:.9g} by the passages"
        for name, value in expected.items()
        if means.get(name) is None
        or not math.isclose(means[name], value, rel_tol=1e-9, abs_tol=1e-12)
    ]
    differing += [
        f"KL {row['kl']:.9g} of {row['id']}, {summed:.9g} by its tokens"
        for row, summed in ((row, _summed_kl(row)) for row in rows)
        if not math.isclose(row["kl"], summed, rel_tol=STORED_DIGITS, abs_tol=KL_ROUNDING)
    ]
    return none_of("shared-text means recomputed", differing, len(expected), "are others")


def _summed_kl(row: dict) -> float:
    """The KL of a passage by its tokens; NaN if one is not finite, the stored sum without any."""
    tokens = row.get("token_kl", [row["kl"]])
    return math.nan if None in tokens else math.fsum(tokens)


def itself_gate(rows: list[dict]) -> Gate:
    """The baseline agrees with itself: KL 0 and every top-1 token equal."""
    differing = [
        f"{row['id']}: KL {row['kl']}, {row['top1_agreements']} of {row['tokens']}"
        for row in rows
        if row["kl"] != 0 or row["top1_agreements"] != row["tokens"]
    ]
    return none_of("baseline agrees with itself", differing, len(rows), "passages differ from it")


# Nats per token: allowed change of a passage's loss by other kernels for the same model.
SAME_MODEL = {"float32": 1e-3, "bfloat16": 1e-2}
ALL_ORDERS = 5  # the most options for which all orders are tried: 120
LARGEST_LOGPROB = 32.0  # nats; bounds the absolute rounding error of a float32 log-probability
EPS32 = 2.0**-23
MOST_BY_ROUNDING = 0.05  # nats per token; one rounding of bfloat16 changes a real model by 0.006


def reference_gates(recipe: Variant, passages: list[dict], perturbed: list[dict]) -> list[Gate]:
    """The gates that apply to a recipe; none for the unmodified model.

    Args:
        passages: the variant's rows of the shared text.
        perturbed: rows of some of these passages, read by the float model after one rounding
            of every weight; only for float variants.
    """
    if recipe.is_lossy:
        return [differs_gate(passages)]
    if recipe.dtype:
        return [differs_gate(passages), rounding_gate(passages, perturbed)]
    return [] if recipe.is_unmodified else [rounding_gate(passages, perturbed)]


def same_reference_gate(read_now: list[dict], baseline: list[dict], *, dtype: str) -> Gate:
    """The float states that the variant is compared with give the evaluated baseline's losses."""
    stored = {row["id"]: row for row in baseline}
    pairs = [(row, stored[row["id"]]) for row in read_now if row["id"] in stored]
    finite = [(a, b) for a, b in pairs if a["nll"] is not None and b["nll"] is not None]
    largest_change = largest(abs(a["nll"] - b["nll"]) / a["tokens"] for a, b in finite)
    return Gate(
        "float reference is the baseline",
        len(finite) == len(read_now) > 0 and largest_change <= SAME_MODEL[dtype],
        f"the float model's loss on {len(read_now)} passages is {largest_change:.2g} nats a token "
        "from the baseline's",
        f"at most {SAME_MODEL[dtype]:g}",
    )


def options_gate(rows: list[dict], baseline: list[dict]) -> Gate:
    """No other order of the options fits the baseline's log-probabilities better.

    Rounding or a collapse changes them but does not move them from one option to another.
    Covers the items with the most common number of options, with one order for all of them.
    """
    baseline_logprobs = {row["id"]: row.get("logprobs", []) for row in baseline}
    pairs = [(baseline_logprobs.get(row["id"], []), row.get("logprobs", [])) for row in rows]
    pairs = [(b, a) for b, a in pairs if len(b) == len(a) > 1]
    sizes = Counter(len(a) for _, a in pairs)
    size = max(sizes, key=sizes.get, default=0)
    compared = [(b, a) for b, a in pairs if len(a) == size]
    fit_by_order = {
        order: math.fsum(b[i] * a[j] for b, a in compared for i, j in enumerate(order))
        for order in _orders(size)
    }
    best = max(fit_by_order, key=fit_by_order.get, default=())
    is_kept = bool(compared) and fit_by_order[best] <= fit_by_order[tuple(range(size))]
    order = " ".join(str(i + 1) for i in best)
    return Gate(
        "options in the baseline's order",
        is_kept,
        f"over {len(compared)} items with {size} options, order {order} fits best",
        "the order they were asked in",
    )


def _orders(size: int) -> list[tuple[int, ...]]:
    """All orders of a few options; for many options, the rotations and the reversal."""
    if size <= ALL_ORDERS:
        return list(permutations(range(size)))
    shifted = [tuple((i + k) % size for i in range(size)) for k in range(size)]
    return [*shifted, tuple(reversed(range(size)))]


def differs_gate(passages: list[dict]) -> Gate:
    """No passage gives exactly the float model's distributions, since the arithmetic differs.

    A missing or NaN KL fails the gate.
    """
    identical = sum(row["kl"] in (0, None) or math.isnan(row["kl"]) for row in passages)
    return Gate(
        "outputs differ from float",
        bool(passages) and not identical,
        f"{identical} of {len(passages)} passages give the float model's very distributions, "
        "or no KL",
        "none",
    )


def rounding_gate(passages: list[dict], perturbed: list[dict]) -> Gate:
    """The float variant differs from the float model by no more than one rounding of weights."""
    ids = {row["id"] for row in perturbed}
    rows = [row for row in passages if row["id"] in ids]
    kl, resolution = kl_per_token(rows), kl_resolution(rows)
    limit = min(kl_per_token(perturbed) + resolution, MOST_BY_ROUNDING)  # NaN stays NaN
    return Gate(
        "outputs within rounding of float",
        -resolution <= kl <= limit,  # False for NaN as well
        f"KL {kl:.2g} nats a token over {len(ids)} passages",
        f"at most {limit:.2g}, what one rounding of every weight makes of the float model",
    )


def kl_resolution(rows: list[dict]) -> float:
    """The resolution of a mean KL over these passages: each of its terms is rounded."""
    tokens = sum(row["tokens"] for row in rows)
    return LARGEST_LOGPROB * EPS32 / math.sqrt(tokens) if tokens else 0.0


def kl_per_token(rows: list[dict]) -> float:
    """KL per token over some passages; NaN if one has no KL, or without passages."""
    if not rows or any(row["kl"] is None for row in rows):
        return math.nan
    return math.fsum(row["kl"] for row in rows) / sum(row["tokens"] for row in rows)


# Items of each evaluation set. A generated answer makes dozens of sequential decisions,
# and takes as long as ten scored items.
SAMPLE = {"loglikelihood": 4, "target": 4, "generate": 1}
# Further items of a generated set whose golds alone are read alone, where an answer depends on its
# batch: how far the variant lies from the baseline cannot be told from one item's few golds.
GOLD_SAMPLE = 8
DRAWS = 2.0  # √2 for two independent draws, √2 for a sample of a few items
LOGPROB_ROUNDING = 1e-5  # stored precision of log-probabilities, with a margin


def sampled_ids(ids: list[str], protocol: str, *, seed: int) -> set[str]:
    """Ids of the items to ask alone, the same for every variant."""
    return set(_alone_order(ids, seed=seed)[: SAMPLE[protocol]])


def gold_sample_ids(ids: list[str], *, seed: int) -> set[str]:
    """Ids of the further items whose golds are read alone."""
    first = SAMPLE["generate"]
    return set(_alone_order(ids, seed=seed)[first : first + GOLD_SAMPLE])


def _alone_order(ids: list[str], *, seed: int) -> list[str]:
    return sorted(ids, key=lambda i: sha256_text(f"{seed}:alone:{i}"))


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
        bool(pairs) and not changed and largest_difference <= LOGPROB_ROUNDING,
        f"{changes}; log-probabilities of options by {largest_difference:.2g} at most",
        f"none changes; log-probabilities by {LOGPROB_ROUNDING:g}",
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
    limit = DRAWS * min(distances) + LOGPROB_ROUNDING
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
    simulated = recipe.ruler or (recipe.quantized and runtime.quantized != "int8")
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
