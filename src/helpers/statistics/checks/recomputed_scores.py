"""Every figure of summary.csv a second time, from the answers alone.

The second opinion on `metrics` and the report's estimates: none of their code is used. A
figure is (value, low, high, n); the limits are None where it has no interval.
"""

import math
import statistics
from collections import Counter

from helpers.statistics.checks.recomputed_statistics import Drawing, clustered_mean, wilson

Figure = tuple[float | None, float | None, float | None, int]
LARGEST = 700.0  # nats a token; e to more than this is no float


def shared_text_figures(rows: list[dict], drawing: Drawing) -> dict[str, Figure]:
    """Perplexity, KL and top-1 agreement over the tokens of the shared text."""
    loss, low, high, tokens = token_figure(rows, "nll", drawing)
    perplexity: Figure = (None, None, None, tokens)
    if loss is not None and loss <= LARGEST:
        lowest, highest = (None if x is None else math.exp(x) for x in (low, high))
        perplexity = (math.exp(loss), lowest, highest, tokens)
    return {
        "perplexity": perplexity,
        "kl": token_figure(rows, "kl", drawing),
        "top1_agreement": token_figure(rows, "top1_agreements", drawing),
    }


def token_figure(rows: list[dict], key: str, drawing: Drawing) -> Figure:
    """A mean per token over passages that count by their tokens."""
    tokens = [row["tokens"] for row in rows]
    if any(row[key] is None for row in rows):
        return None, None, None, sum(tokens)
    each = [row[key] / row["tokens"] for row in rows]
    names = [row["id"] for row in rows]
    found = clustered_mean(each, names, drawing, weights=tokens, interval=True)
    return found.mean, found.low, found.high, sum(tokens)


def loss_change(baseline: list[dict], variant: list[dict], drawing: Drawing) -> Figure:
    """Change of the loss per token, paired by passage."""
    before = {row["id"]: row for row in baseline}
    lengths = [{row["id"]: row["tokens"] for row in rows} for rows in (baseline, variant)]
    if lengths[0] != lengths[1]:
        return None, None, None, 0
    pairs = sorted(((row["id"], row, before[row["id"]]) for row in variant), key=lambda x: x[0])
    tokens = [row["tokens"] for _, row, _ in pairs]
    if any(None in (a["nll"], b["nll"]) for _, a, b in pairs):
        return None, None, None, sum(tokens)
    each = [(a["nll"] - b["nll"]) / a["tokens"] for _, a, b in pairs]
    names = [name for name, _, _ in pairs]
    found = clustered_mean(each, names, drawing, weights=tokens, interval=True)
    return found.mean, found.low, found.high, sum(tokens)


def dataset_figures(adapter: str, rows: list[dict], drawing: Drawing) -> dict[str, Figure]:
    """The figures of one evaluation set by name, the main one first."""
    n, readable = len(rows), sum(row["status"] != "unparsed" for row in rows)
    found: dict[str, Figure] = {}
    if adapter == "squad_v2":
        found["exact_match"], found["f1"] = score_figure(rows, drawing), _f1(rows, drawing)
        for name, answerable in (("has_answer", True), ("no_answer", False)):
            if part := [row for row in rows if bool(row["golds"]) == answerable]:
                found[f"{name}_exact_match"] = score_figure(part, drawing)
                found[f"{name}_f1"] = _f1(part, drawing)
    else:
        found["accuracy"] = score_figure(rows, drawing)
    if adapter == "openmath":
        gaps = [r["absolute_difference"] for r in rows if r["absolute_difference"] is not None]
        median = statistics.median(gaps) if gaps else None
        found["median_absolute_difference"] = (median, None, None, len(gaps))
        found["median_absolute_difference_coverage"] = _share(len(gaps), n, drawing)
    elif adapter != "squad_v2":
        found["macro_f1"] = (_macro_f1(rows), None, None, n)
    return found | {"format_success": _share(readable, n, drawing)}


def score_figure(rows: list[dict], drawing: Drawing) -> Figure:
    """Share of right answers: Wilson's interval, or a bootstrap where items share passages."""
    n, right = len(rows), sum(row["score"] for row in rows)
    names = [row["cluster"] or row["id"] for row in rows]
    if len(set(names)) == 1:
        return right / n, None, None, n
    if len(set(names)) == n:
        return right / n, *wilson(int(right), n, drawing.confidence), n
    found = clustered_mean([r["score"] for r in rows], names, drawing, interval=True)
    limits = (found.low, found.high)
    if found.low is None:  # every passage alike: the passages are the items
        limits = wilson(round(found.mean * found.clusters), found.clusters, drawing.confidence)
    return found.mean, *limits, n


def _f1(rows: list[dict], drawing: Drawing) -> Figure:
    names = [row["cluster"] or row["id"] for row in rows]
    found = clustered_mean([row["f1"] for row in rows], names, drawing, interval=True)
    return found.mean, found.low, found.high, len(rows)


def _share(part: int, n: int, drawing: Drawing) -> Figure:
    return part / n, *wilson(part, n, drawing.confidence), n


def _macro_f1(rows: list[dict]) -> float:
    """Mean over the gold classes of 2 hits / (times said + times due)."""
    due = Counter(row["golds"][0] for row in rows)
    said = Counter(row["parsed"] for row in rows)
    hits = Counter(row["parsed"] for row in rows if row["parsed"] == row["golds"][0])
    return math.fsum(2 * hits[c] / (said[c] + due[c]) for c in due) / len(due)


def best_fixed_score(adapter: str, rows: list[dict]) -> float:
    """What the best fixed answer scores: one label, one text, or always abstaining.

    Of word problems only golds in the same words or digits are taken for one answer.
    """
    golds = [[_bare(gold, adapter) for gold in row["golds"]] for row in rows]
    due = Counter(text for texts in golds for text in set(texts))
    best = max(due.values(), default=0)
    if adapter == "squad_v2":
        best = max(best, sum(not texts for texts in golds))
    return best / len(rows)


def _bare(gold: str, adapter: str) -> str:
    if adapter == "arc" and gold.isdigit():
        return chr(ord("A") + int(gold) - 1)
    if adapter == "squad_v2":
        words = "".join(c for c in gold.lower() if c.isalnum() or c.isspace()).split()
        return " ".join(word for word in words if word not in ("a", "an", "the"))
    return gold.strip().removeprefix("$").replace(",", "").removesuffix(".0")
