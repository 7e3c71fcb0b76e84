"""Scores of an evaluation set from its predictions. Fractions are 0–1; imports no torch.

Whatever is averaged is averaged over all items: an answer that does not parse is wrong,
it does not shrink the denominator. The one exception, the median absolute difference of
numbers, carries its coverage beside it.
"""

import math
import statistics
from collections import Counter

from helpers.study.schema import Study

STATUSES = ("answered", "abstained", "unparsed")
LARGEST_NLL = 700.0  # nats per token; exp of more overflows a float


def all_metrics(study: Study, predictions: dict[str, list[dict]]) -> dict[str, dict]:
    """The metrics of every evaluation set of the study, by its name.

    Raises:
        ValueError: a set of the study has no predictions.
    """
    by_set = {}
    for name, evaluation_set in study.evaluation.datasets.items():
        if name not in predictions:
            raise ValueError(f"evaluation set {name!r} has no predictions; run 03_evaluation again")
        by_set[name] = set_metrics(evaluation_set.adapter, predictions[name])
    return by_set


def set_metrics(adapter: str, predictions: list[dict]) -> dict:
    """All metrics of one evaluation set.

    Args:
        adapter: `arc`, `boolq`, `squad_v2` or `openmath`.
        predictions: one per item, as `helpers.evaluation.engine` yields them.

    Raises:
        ValueError: there are no predictions, or an item occurs twice.
    """
    if not predictions:
        raise ValueError("there are no predictions to score; run 03_evaluation")
    if repeated := [i for i, n in Counter(p["id"] for p in predictions).items() if n > 1]:
        raise ValueError(f"item {repeated[0]} is predicted more than once; run 03_evaluation again")
    values = {"items": len(predictions), "accuracy": mean(p["score"] for p in predictions)}
    if adapter == "squad_v2":
        values = squad_metrics(predictions)
    elif adapter == "openmath":
        values |= number_metrics(predictions)
    else:
        values["macro_f1"] = macro_f1(predictions)
    return values | behavior_counts(predictions) | gold_metrics(predictions)


def gold_metrics(predictions: list[dict]) -> dict:
    """Graded scores of generated answers, in nats per token; empty if golds were not scored.

    Of an item's golds, the one with the highest mean per token counts. Values are None if a
    sum is not finite.
    """
    if not all("gold_loglikelihoods" in p for p in predictions):
        return {}
    golds = [gold_score(p) for p in predictions]
    foils = [(g, foil_score(p)) for g, p in zip(golds, predictions, strict=True) if p["foil"]]
    finite = None not in golds and all(foil is not None for _, foil in foils)
    return {
        "gold_nats_per_token": mean(golds) if finite else None,
        "foil_nats_per_token": mean(f for _, f in foils) if finite and foils else None,
        "gold_above_foil": mean(g > f for g, f in foils) if finite and foils else None,
    }


def gold_score(prediction: dict) -> float | None:
    """Log-likelihood of the best gold in nats per token; None if a sum is not finite."""
    sums, sizes = prediction["gold_loglikelihoods"], prediction["gold_tokens"]
    if None in sums:
        return None
    return max(s / n for s, n in zip(sums, sizes, strict=True))


def foil_score(prediction: dict) -> float | None:
    """Log-likelihood of the foil in nats per token; None if it is not finite."""
    value = prediction["foil_loglikelihood"]
    return None if value is None else value / prediction["foil_tokens"]


def behavior_counts(predictions: list[dict]) -> dict:
    """Counts of the answers' statuses, finish reasons and tokens."""
    statuses = Counter(p["status"] for p in predictions)
    finishes = Counter(p["finish_reason"] for p in predictions)
    return {
        **{status: statuses[status] for status in STATUSES},
        "format_success": 1.0 - statuses["unparsed"] / len(predictions),
        "finish_reasons": dict(sorted(finishes.items())),
        "prompt_tokens": sum(p["prompt_tokens"] for p in predictions),
        "output_tokens": sum(p["output_tokens"] for p in predictions),
    }


def macro_f1(predictions: list[dict]) -> float:
    """Unweighted mean of per-class F1 over the classes that occur as gold answers."""
    scores = []
    for label in sorted({p["golds"][0] for p in predictions}):
        true_positives = sum(p["parsed"] == label and p["golds"][0] == label for p in predictions)
        predicted = sum(p["parsed"] == label for p in predictions)
        actual = sum(p["golds"][0] == label for p in predictions)
        scores.append(2 * true_positives / (predicted + actual))
    return mean(scores)


def squad_metrics(predictions: list[dict]) -> dict:
    """Exact match and F1 over all items, and separately for items with and without an answer."""
    values = {"items": len(predictions), "exact_match": mean(p["score"] for p in predictions)}
    values["f1"] = mean(p["f1"] for p in predictions)
    parts = {
        "has_answer": [p for p in predictions if p["golds"]],
        "no_answer": [p for p in predictions if not p["golds"]],
    }
    for name, part in parts.items():
        values[f"{name}_items"] = len(part)
        values[f"{name}_exact_match"] = mean(p["score"] for p in part) if part else None
        values[f"{name}_f1"] = mean(p["f1"] for p in part) if part else None
    return values


def number_metrics(predictions: list[dict]) -> dict:
    """Median absolute difference over the numeric answers, and their share of all answers."""
    differences = [
        p["absolute_difference"] for p in predictions if p["absolute_difference"] is not None
    ]
    return {
        "median_absolute_difference": statistics.median(differences) if differences else None,
        "median_absolute_difference_coverage": len(differences) / len(predictions),
    }


def shared_text_metrics(rows: list[dict]) -> dict:
    """Perplexity, mean KL and top-1 agreement per token, over all passages.

    Perplexity and KL are None if they, or a passage's sum, are not finite.
    """
    tokens = sum(row["tokens"] for row in rows)
    nll = _finite_mean([row["nll"] for row in rows], tokens)
    return {
        "passages": len(rows),
        "tokens": tokens,
        "perplexity": None if nll is None or nll > LARGEST_NLL else math.exp(nll),
        "kl": _finite_mean([row["kl"] for row in rows], tokens),
        "top1_agreement": sum(row["top1_agreements"] for row in rows) / tokens,
    }


def _finite_mean(sums: list[float | None], tokens: int) -> float | None:
    if not all(s is not None and math.isfinite(s) for s in sums):
        return None
    return math.fsum(sums) / tokens


def mean(values) -> float:
    """Arithmetic mean of at least one value, summed exactly."""
    numbers = list(values)
    return math.fsum(numbers) / len(numbers)
