"""Graded scores for programs: the blocks `graded`, `pooled`, `finetuning_cost` of summary.json.

Differences are fractions 0-1 or nats a token, as `unit` says. A study without graded scores
has none of the blocks.
"""

from helpers.statistics.graded_study import (
    FineTuningCost,
    GradedStudy,
    GradedVerdict,
    PooledVerdict,
)


def graded_blocks(graded: GradedStudy) -> dict:
    """The three blocks; empty without graded scores."""
    if not graded.comparisons:
        return {}
    abilities = [
        dict(zip(("model", "dataset", "variant"), at, strict=True))
        | {"able": ability.able, "mean": ability.mean, "unit": ability.unit}
        for at, ability in graded.abilities.items()
    ]
    comparisons = [c.model_dump() | verdict_row(v) for c, v in graded.comparisons.items()]
    return {
        "graded": {"abilities": abilities, "comparisons": comparisons},
        "pooled": [_pooled_row(at, pooled) for at, pooled in graded.pooled.items()],
        "finetuning_cost": [_cost_row(cost) for cost in graded.finetuning],
    }


def verdict_row(verdict: GradedVerdict) -> dict:
    """One verdict with its numbers."""
    row = {
        "verdict": verdict.kind,
        "reason": verdict.reason,
        "primary": verdict.declared,
        "margin": verdict.margin,
        "holm_p": verdict.holm_p,
    }
    if (found := verdict.comparison) is None:
        return row
    return row | {
        "unit": found.unit,
        "n": found.n,
        "clusters": found.clusters,
        "delta": found.delta,
        "low": found.interval.low,
        "high": found.interval.high,
        "equivalence_low": found.equivalence.low,
        "equivalence_high": found.equivalence.high,
        "p": None if verdict.kind == "invalid" else found.p,
        "smallest_detectable_difference": found.detectable,
        "identical_scores": found.identical,
    }


def _pooled_row(at: tuple[str, str], pooled: PooledVerdict) -> dict:
    row = {"model": at[0], "variant": at[1], "sets": list(pooled.sets)}
    row |= verdict_row(pooled.verdict) | {"recovery": None}
    if recovered := pooled.recovery:
        low, high = recovered.interval.low, recovered.interval.high
        row["recovery"] = {"value": recovered.value, "low": low, "high": high}
    return row


def _cost_row(cost: FineTuningCost) -> dict:
    return {
        "start": cost.start,
        "finetuned": cost.finetuned,
        "variant": cost.variant,
        "sets": {name: verdict_row(verdict) for name, verdict in cost.sets.items()},
        "pooled_sets": list(cost.pooled_sets),
        "pooled": verdict_row(cost.pooled) if cost.pooled else None,
        "kl": verdict_row(cost.kl) if cost.kl else None,
    }
