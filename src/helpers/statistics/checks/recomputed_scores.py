"""Every figure of summary.csv a second time, from the answers alone.

The second opinion on `metrics` and the report's estimates: none of their code is used. A
figure is (value, low, high, n); the limits are None where it has no interval.
"""

import math
import statistics
from collections import Counter

from helpers.statistics.checks.recomputed_statistics import (
    BootstrapSettings,
    clustered_mean,
    wilson_limits,
)

Figure = tuple[float | None, float | None, float | None, int]
LARGEST_LOSS = 700.0  # nats per token; exp of more overflows


def shared_text_figures(rows: list[dict], settings: BootstrapSettings) -> dict[str, Figure]:
    """Perplexity, KL and top-1 agreement over the tokens of the shared text."""
    loss, low, high, tokens = token_figure(rows, "nll", settings)
    perplexity: Figure = (None, None, None, tokens)
    if loss is not None and loss <= LARGEST_LOSS:
        lowest, highest = (None if x is None else math.exp(x) for x in (low, high))
        perplexity = (math.exp(loss), lowest, highest, tokens)
    return {
        "perplexity": perplexity,
        "kl": token_figure(rows, "kl", settings),
        "top1_agreement": token_figure(rows, "top1_agreements", settings),
    }


def token_figure(rows: list[dict], key: str, settings: BootstrapSettings) -> Figure:
    """A mean per token over passages, weighted by their tokens."""
    tokens = [row["tokens"] for row in rows]
    if any(row[key] is None for row in rows):
        return None, None, None, sum(tokens)
    means = [row[key] / row["tokens"] for row in rows]
    names = [row["id"] for row in rows]
    mean = clustered_mean(means, names, settings, weights=tokens, interval=True)
    return mean.mean, mean.low, mean.high, sum(tokens)


def loss_change(baseline: list[dict], variant: list[dict], settings: BootstrapSettings) -> Figure:
    """Change of the loss per token, paired by passage."""
    before = {row["id"]: row for row in baseline}
    lengths = [{row["id"]: row["tokens"] for row in rows} for rows in (baseline, variant)]
    if lengths[0] != lengths[1]:
        return None, None, None, 0
    pairs = sorted(((row["id"], row, before[row["id"]]) for row in variant), key=lambda x: x[0])
    tokens = [row["tokens"] for _, row, _ in pairs]
    if any(None in (a["nll"], b["nll"]) for _, a, b in pairs):
        return None, None, None, sum(tokens)
    changes = [(a["nll"] - b["nll"]) / a["tokens"] for _, a, b in pairs]
    names = [name for name, _, _ in pairs]
    mean = clustered_mean(changes, names, settings, weights=tokens, interval=True)
    return mean.mean, mean.low, mean.high, sum(tokens)


def dataset_figures(
    adapter: str, rows: list[dict], settings: BootstrapSettings
) -> dict[str, Figure]:
    """The figures of one evaluation set by name, the main one first."""
    n, readable = len(rows), sum(row["status"] != "unparsed" for row in rows)
    figures: dict[str, Figure] = {}
    if adapter == "squad_v2":
        figures["exact_match"], figures["f1"] = (
            score_figure(rows, settings),
            _f1_figure(rows, settings),
        )
        for name, answerable in (("has_answer", True), ("no_answer", False)):
            if part := [row for row in rows if bool(row["golds"]) == answerable]:
                figures[f"{name}_exact_match"] = score_figure(part, settings)
                figures[f"{name}_f1"] = _f1_figure(part, settings)
    else:
        figures["accuracy"] = score_figure(rows, settings)
    if adapter == "openmath":
        gaps = [r["absolute_difference"] for r in rows if r["absolute_difference"] is not None]
        median = statistics.median(gaps) if gaps else None
        figures["median_absolute_difference"] = (median, None, None, len(gaps))
        figures["median_absolute_difference_coverage"] = _share_figure(len(gaps), n, settings)
    elif adapter != "squad_v2":
        figures["macro_f1"] = (_macro_f1(rows), None, None, n)
    return figures | {"format_success": _share_figure(readable, n, settings)}


def score_figure(rows: list[dict], settings: BootstrapSettings) -> Figure:
    """Share of right answers: Wilson's interval, or a bootstrap if items share passages."""
    n, right = len(rows), sum(row["score"] for row in rows)
    names = [row["cluster"] or row["id"] for row in rows]
    if len(set(names)) == 1:
        return right / n, None, None, n
    if len(set(names)) == n:
        return right / n, *wilson_limits(int(right), n, settings.confidence), n
    mean = clustered_mean([r["score"] for r in rows], names, settings, interval=True)
    limits = (mean.low, mean.high)
    if mean.low is None:  # no spread: the passages are the items
        limits = wilson_limits(round(mean.mean * mean.clusters), mean.clusters, settings.confidence)
    return mean.mean, *limits, n


def _f1_figure(rows: list[dict], settings: BootstrapSettings) -> Figure:
    names = [row["cluster"] or row["id"] for row in rows]
    mean = clustered_mean([row["f1"] for row in rows], names, settings, interval=True)
    return mean.mean, mean.low, mean.high, len(rows)


def _share_figure(part: int, n: int, settings: BootstrapSettings) -> Figure:
    return part / n, *wilson_limits(part, n, settings.confidence), n


def _macro_f1(rows: list[dict]) -> float:
    """Mean over the gold classes of 2 hits / (answers + golds of the class)."""
    gold_counts = Counter(row["golds"][0] for row in rows)
    answer_counts = Counter(row["parsed"] for row in rows)
    hits = Counter(row["parsed"] for row in rows if row["parsed"] == row["golds"][0])
    return math.fsum(2 * hits[c] / (answer_counts[c] + gold_counts[c]) for c in gold_counts) / len(
        gold_counts
    )


def best_fixed_score(adapter: str, rows: list[dict]) -> float:
    """The score of the best constant answer: one label, one text, or always abstaining.

    For word problems, golds count as equal only if their text is equal.
    """
    golds = [[_normalized_gold(gold, adapter) for gold in row["golds"]] for row in rows]
    gold_counts = Counter(text for texts in golds for text in set(texts))
    best = max(gold_counts.values(), default=0)
    if adapter == "squad_v2":
        best = max(best, sum(not texts for texts in golds))
    return best / len(rows)


def _normalized_gold(gold: str, adapter: str) -> str:
    if adapter == "arc" and gold.isdigit():
        return chr(ord("A") + int(gold) - 1)
    if adapter == "squad_v2":
        words = "".join(c for c in gold.lower() if c.isalnum() or c.isspace()).split()
        return " ".join(word for word in words if word not in ("a", "an", "the"))
    return gold.strip().removeprefix("$").replace(",", "").removesuffix(".0")
