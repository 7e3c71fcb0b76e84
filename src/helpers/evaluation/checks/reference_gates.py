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

# Nats a token that other kernels for the same model may move the loss of a passage by.
SAME_MODEL = {"float32": 1e-3, "bfloat16": 1e-2}
ALL_ORDERS = 5  # options; 120 orders
LARGEST_LOGPROB = 32.0  # nats; a float32 of that size is known to one rounding
EPS32 = 2.0**-23
MOST_BY_ROUNDING = 0.05  # nats a token; one rounding of bfloat16 takes a real model by 0.006


def reference_gates(recipe: Variant, passages: list[dict], shaken: list[dict]) -> list[Gate]:
    """The gates that apply to a recipe; none to the model as it is loaded.

    Args:
        passages: the variant's rows of the shared text.
        shaken: rows of some of these passages, read by the float model with every weight
            off by one rounding; needed for a float variant only.
    """
    if recipe.claim.quantized:
        return [moved_gate(passages)]
    if recipe.dtype:
        return [moved_gate(passages), rounding_gate(passages, shaken)]
    return [] if recipe.is_unmodified else [rounding_gate(passages, shaken)]


def same_reference_gate(read_now: list[dict], baseline: list[dict], *, dtype: str) -> Gate:
    """The float model the variant is held against reads as the evaluated baseline did."""
    stored = {row["id"]: row for row in baseline}
    pairs = [(row, stored[row["id"]]) for row in read_now if row["id"] in stored]
    finite = [(a, b) for a, b in pairs if a["nll"] is not None and b["nll"] is not None]
    moved = largest(abs(a["nll"] - b["nll"]) / a["tokens"] for a, b in finite)
    return Gate(
        "held against the baseline",
        len(finite) == len(read_now) > 0 and moved <= SAME_MODEL[dtype],
        f"the float model's loss on {len(read_now)} passages is {moved:.2g} nats a token from "
        "the baseline's",
        f"at most {SAME_MODEL[dtype]:g}",
    )


def options_gate(rows: list[dict], baseline: list[dict]) -> Gate:
    """No other order of the options fits the baseline's log-probabilities better.

    Rounding shakes them, a collapse too, but neither moves them from one option to another.
    Of the items with the most common number of options; the order is one for all of them.
    """
    before = {row["id"]: row.get("logprobs", []) for row in baseline}
    pairs = [(before.get(row["id"], []), row.get("logprobs", [])) for row in rows]
    pairs = [(b, a) for b, a in pairs if len(b) == len(a) > 1]
    sizes = Counter(len(a) for _, a in pairs)
    size = max(sizes, key=sizes.get, default=0)
    chosen = [(b, a) for b, a in pairs if len(a) == size]
    fits = {
        order: math.fsum(b[i] * a[j] for b, a in chosen for i, j in enumerate(order))
        for order in _orders(size)
    }
    best = max(fits, key=fits.get, default=())
    kept = bool(chosen) and fits[best] <= fits[tuple(range(size))]
    order = " ".join(str(i + 1) for i in best)
    return Gate(
        "options in the baseline's order",
        kept,
        f"over {len(chosen)} items with {size} options, order {order} fits best",
        "the order they were asked in",
    )


def _orders(size: int) -> list[tuple[int, ...]]:
    """Every order of a few options; of many, turned round and shifted."""
    if size <= ALL_ORDERS:
        return list(permutations(range(size)))
    shifted = [tuple((i + k) % size for i in range(size)) for k in range(size)]
    return [*shifted, tuple(reversed(range(size)))]


def moved_gate(passages: list[dict]) -> Gate:
    """Other arithmetic leaves a trace: not one passage is read as by the float model.

    A KL that is no number is none of another arithmetic.
    """
    alike = sum(row["kl"] in (0, None) or math.isnan(row["kl"]) for row in passages)
    return Gate(
        "other arithmetic than the float model's",
        bool(passages) and not alike,
        f"{alike} of {len(passages)} passages give the float model's very distributions, or no KL",
        "none",
    )


def rounding_gate(passages: list[dict], shaken: list[dict]) -> Gate:
    """The float variant is no further from the float model than rounding takes one."""
    asked = {row["id"] for row in shaken}
    rows = [row for row in passages if row["id"] in asked]
    found, blur = kl_a_token(rows), resolution(rows)
    limit = min(kl_a_token(shaken) + blur, MOST_BY_ROUNDING)  # NaN stays NaN
    return Gate(
        "apart by rounding alone",
        -blur <= found <= limit,  # False for NaN as well
        f"KL {found:.2g} nats a token over {len(asked)} passages",
        f"at most {limit:.2g}, what one rounding of every weight makes of the float model",
    )


def resolution(rows: list[dict]) -> float:
    """How well a mean KL over these passages is known: its terms are rounded, each anew."""
    tokens = sum(row["tokens"] for row in rows)
    return LARGEST_LOGPROB * EPS32 / math.sqrt(tokens) if tokens else 0.0


def kl_a_token(rows: list[dict]) -> float:
    """KL per token over some passages; NaN where one has none, or there are none."""
    if not rows or any(row["kl"] is None for row in rows):
        return math.nan
    return math.fsum(row["kl"] for row in rows) / sum(row["tokens"] for row in rows)
