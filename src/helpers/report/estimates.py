"""Every figure the report quotes about one variant, with its interval and how many it is over.

Items that share a passage, and the tokens of the shared text, are resampled by passage.
"""

import math
from dataclasses import dataclass

from helpers.report.results_data import VariantResults
from helpers.statistics.bootstrap import bootstrap_difference, bootstrap_mean
from helpers.statistics.comparison import DecisionRules, score_interval
from helpers.statistics.intervals import Interval, wilson_interval

MAIN_METRICS = {"squad_v2": "exact_match"}  # adapters whose 0/1 score is not called accuracy


@dataclass(frozen=True)
class Estimate:
    """A value over n items or tokens, with its interval if it has one."""

    value: float | None
    interval: Interval | None
    n: int


def main_metric(adapter: str) -> str:
    """The name of an adapter's 0/1 score."""
    return MAIN_METRICS.get(adapter, "accuracy")


def dataset_estimates(
    adapter: str, predictions: list[dict], metrics: dict, rules: DecisionRules
) -> dict[str, Estimate]:
    """The metrics of one evaluation set by name, the main one first."""
    n = len(predictions)
    estimates = {main_metric(adapter): _score_estimate(predictions, rules)}
    if adapter == "squad_v2":
        estimates["f1"] = _f1_estimate(predictions, rules)
        parts = (("has_answer", True), ("no_answer", False))
        for name, answerable in parts:
            part = [p for p in predictions if bool(p["golds"]) == answerable]
            if part:
                estimates[f"{name}_exact_match"] = _score_estimate(part, rules)
                estimates[f"{name}_f1"] = _f1_estimate(part, rules)
    elif adapter == "openmath":
        coverage = metrics["median_absolute_difference_coverage"]
        median = metrics["median_absolute_difference"]
        estimates["median_absolute_difference"] = Estimate(median, None, round(coverage * n))
        estimates["median_absolute_difference_coverage"] = _share_estimate(
            round(coverage * n), n, rules
        )
    else:
        estimates["macro_f1"] = Estimate(metrics["macro_f1"], None, n)
    readable = n - metrics["unparsed"]
    return estimates | {"format_success": _share_estimate(readable, n, rules)}


def _score_estimate(predictions: list[dict], rules: DecisionRules) -> Estimate:
    return Estimate(
        sum(p["score"] for p in predictions) / len(predictions),
        score_interval(predictions, rules) if _count_clusters(predictions) > 1 else None,
        len(predictions),
    )


def _count_clusters(predictions: list[dict]) -> int:
    return len({p["cluster"] or p["id"] for p in predictions})


def _f1_estimate(predictions: list[dict], rules: DecisionRules) -> Estimate:
    values = [p["f1"] for p in predictions]
    mean, interval = sum(values) / len(values), None
    if _count_clusters(predictions) > 1:
        clusters = [p["cluster"] or p["id"] for p in predictions]
        bootstrap = bootstrap_mean(values, clusters, confidence=rules.confidence, **rules.random)
        mean, interval = bootstrap.mean, None if bootstrap.degenerate else bootstrap.interval
    return Estimate(mean, interval, len(values))


def _share_estimate(successes: int, n: int, rules: DecisionRules) -> Estimate:
    return Estimate(successes / n, wilson_interval(successes, n, confidence=rules.confidence), n)


def token_estimates(evaluated: VariantResults, rules: DecisionRules) -> dict[str, Estimate]:
    """Perplexity, KL and top-1 agreement over the tokens of the shared text."""
    rows = evaluated.passages
    tokens = evaluated.shared_text["tokens"]
    loss = _token_mean([row["nll"] for row in rows], rows, rules)
    interval = loss.interval if evaluated.shared_text["perplexity"] is not None else None
    if interval is not None:
        limits = math.exp(interval.low), math.exp(interval.high)
        interval = Interval(*limits, interval.confidence)
    return {
        "perplexity": Estimate(evaluated.shared_text["perplexity"], interval, tokens),
        "kl": _token_mean([row["kl"] for row in rows], rows, rules),
        "top1_agreement": _token_mean([row["top1_agreements"] for row in rows], rows, rules),
    }


def _token_mean(sums: list[float | None], rows: list[dict], rules: DecisionRules) -> Estimate:
    """A mean per token with a bootstrap over passages; no interval from a single passage.

    The value is None if the sum of a passage is not finite.
    """
    tokens = [row["tokens"] for row in rows]
    if None in sums:
        return Estimate(None, None, sum(tokens))
    if len(rows) < 2:
        return Estimate(sum(sums) / sum(tokens), None, sum(tokens))
    bootstrap = bootstrap_mean(
        [s / t for s, t in zip(sums, tokens, strict=True)],
        [row["id"] for row in rows],
        weights=tokens,
        confidence=rules.confidence,
        **rules.random,
    )
    return Estimate(
        bootstrap.mean, None if bootstrap.degenerate else bootstrap.interval, sum(tokens)
    )


@dataclass(frozen=True)
class TokenDifference:
    """Mean difference per token of two variants on the same passages, with its test.

    `value` is None if a passage of either has no finite sum, or if their passages differ.
    """

    value: float | None
    interval: Interval | None
    p: float | None
    passages: int


def token_difference(
    baseline: VariantResults, variant: VariantResults, key: str, rules: DecisionRules
) -> TokenDifference:
    """Difference of `nll` or `kl` per token, variant minus baseline, paired by passage."""
    before = {row["id"]: row for row in baseline.passages}
    after = {row["id"]: row for row in variant.passages}
    if {k: r["tokens"] for k, r in before.items()} != {k: r["tokens"] for k, r in after.items()}:
        return TokenDifference(None, None, None, 0)  # a gate says so
    shared = sorted(before)
    tokens = [before[k]["tokens"] for k in shared]
    if any(side[k][key] is None for side in (before, after) for k in shared):
        return TokenDifference(None, None, None, len(shared))
    change = [after[k][key] - before[k][key] for k in shared]
    if len(shared) < 2:
        return TokenDifference(sum(change) / sum(tokens), None, None, len(shared))
    bootstrap = bootstrap_difference(
        [c / t for c, t in zip(change, tokens, strict=True)],
        shared,
        weights=tokens,
        confidence=rules.confidence,
        **rules.random,
    )
    interval = None if bootstrap.degenerate else bootstrap.interval
    return TokenDifference(bootstrap.mean, interval, bootstrap.p, bootstrap.clusters)
