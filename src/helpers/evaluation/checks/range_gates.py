"""Whether scores and metrics are in their range: a percent filed as a fraction is not."""

import math

from helpers.core.gates import Gate, none_of

COUNTS = ("items", "answered", "abstained", "unparsed", "prompt_tokens", "output_tokens")
COUNTS += ("has_answer_items", "no_answer_items", "passages", "tokens")
UNBOUNDED = ("median_absolute_difference", "kl")
LOGLIKELIHOODS = ("gold_nats_per_token", "foil_nats_per_token")
ROUNDING = 1e-6  # a KL of zero may be slightly negative


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
    if metric in COUNTS:
        return isinstance(value, int) and value >= 0
    if metric == "perplexity":
        return 1 <= value < math.inf
    if metric in LOGLIKELIHOODS:
        return -math.inf < value <= 0
    if metric in UNBOUNDED:
        return -ROUNDING <= value < math.inf
    return 0 <= value <= 1
