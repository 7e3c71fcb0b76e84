"""Gates on how far a variant is from the float model it is held against, and on that model.

The float states it is held against must be those of the baseline that was evaluated. A
quantized model that answers exactly as the float one was not quantized when it was asked. A
float variant (smoothed only, or computed with in another float type) may differ by rounding
alone. How far that is depends on depth and outliers, so the limit is measured: the KL of the
float model itself when every weight is off by one rounding, in `float_reference`. Imports no torch.
"""

import math
from collections import Counter
from itertools import permutations

from helpers.core.gates import Gate, largest
from helpers.study.schema_variants import Variant

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
    if recipe.claim.quantized:
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
