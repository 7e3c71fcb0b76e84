"""An answer read and scored a second time, from its text or its log-probabilities.

The second opinion on `answer_parsing` and `scoring`. Of their code only the reading of numbers that
are no plain decimals is used: it is a convention, and has no second source. Imports no torch.
"""

import math
import re
from fractions import Fraction

from helpers.evaluation.scoring import number_scores
from helpers.sources.items import Item
from helpers.study.schema import EvaluationSet

ROUNDING = 1e-6  # precision of stored log-probabilities; within it, the stored answer wins a tie
BOX = r"\boxed{"
DECIMAL = re.compile(r"[+-]?[0-9]{1,30}(\.[0-9]{1,30})?")
ARTICLE = re.compile(r"(?<!\w)(?:the|an|a)(?!\w)")
PUNCTUATION = set("!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~")


def rescored(evaluation_set: EvaluationSet, item: Item, row: dict) -> dict:
    """The fields of a prediction, derived again from its output or its log-probabilities."""
    fields = {"id": item.id, "cluster": item.cluster, "golds": list(item.golds)}
    if evaluation_set.ask.protocol == "loglikelihood":
        return fields | _chosen_option(item, row, in_bytes=evaluation_set.ask.normalize == "bytes")
    text, nonfinite = row["output"], row["finish_reason"] == "nonfinite"
    answer_text = box_of(text) if evaluation_set.ask.answer == "boxed" else text
    parsed, status = (
        (None, "unparsed")
        if nonfinite
        else _parsed_answer(item, evaluation_set.adapter, answer_text)
    )
    fields |= {"parsed": parsed, "status": status}
    return fields | _scores(item, evaluation_set.adapter, parsed, status)


def _chosen_option(item: Item, row: dict, *, in_bytes: bool) -> dict:
    """The option with the largest log-probability, per byte of its text if the study says so."""
    stored = row.get("logprobs", [])
    if len(stored) != len(item.labels) or not all(map(math.isfinite, stored)):
        return {"parsed": None, "status": "unparsed", "finish_reason": "nonfinite", "score": 0.0}
    sizes = [len(o.strip().encode()) if in_bytes else 1 for o in item.options]
    best = max(s / n for s, n in zip(stored, sizes, strict=True))
    tied = [
        label
        for label, s, n in zip(item.labels, stored, sizes, strict=True)
        if (s + ROUNDING) / n >= best
    ]
    parsed = row["parsed"] if row["parsed"] in tied else tied[0]
    fields = {"parsed": parsed, "output": parsed, "status": "answered", "finish_reason": "scored"}
    kept = {"labels": list(item.labels)} | ({"option_bytes": sizes} if in_bytes else {})
    fields |= {key: value for key, value in kept.items() if key in row}  # older rows have none
    return fields | {"score": 1.0 if parsed in item.golds else 0.0}


def box_of(text: str) -> str | None:
    """The content of the last box to open, among those that close."""
    at = text.rfind(BOX)
    while at >= 0:
        depth = 1
        for place in range(at + len(BOX), len(text)):
            depth += {"{": 1, "}": -1}.get(text[place], 0)
            if depth == 0:
                return text[at + len(BOX) : place]
        at = text.rfind(BOX, 0, at)
    return None


def _parsed_answer(item: Item, adapter: str, raw: str | None) -> tuple[str | None, str]:
    """(parsed answer, status)."""
    answer = (raw or "").strip()
    if not answer:
        return None, "unparsed"
    if adapter == "squad_v2" and " ".join(words_of(answer, or_itself=False)) == "unanswerable":
        return None, "abstained"
    if adapter in ("squad_v2", "openmath"):
        return answer, "answered"
    matching = [label for label in item.labels if _label(label) == _label(answer)]
    return (matching[0], "answered") if matching else (None, "unparsed")


def _label(text: str) -> str:
    text = text.strip()
    while text.endswith("."):
        text = text[:-1]
    return text.casefold()


def _scores(item: Item, adapter: str, parsed: str | None, status: str) -> dict:
    if adapter == "openmath":
        score, difference = _number(parsed, item.golds[0])
        return {"score": score, "absolute_difference": difference}
    if adapter != "squad_v2":
        return {"score": 1.0 if parsed is not None and parsed in item.golds else 0.0}
    if not item.golds:
        abstention_score = 1.0 if status == "abstained" else 0.0
        return {"score": abstention_score, "f1": abstention_score}
    if parsed is None:
        return {"score": 0.0, "f1": 0.0}
    words, gold_words = words_of(parsed), [words_of(gold) for gold in item.golds]
    return {
        "score": 1.0 if words in gold_words else 0.0,
        "f1": max(_f1(words, gold) for gold in gold_words),
    }


def words_of(text: str, *, or_itself: bool = True) -> list[str]:
    """SQuAD's normalized words; if there are none, the text itself."""
    letters = "".join(c for c in text.lower() if c not in PUNCTUATION)
    words = ARTICLE.sub(" ", letters).split()
    return words or ([text.strip().casefold()] if or_itself else [])


def _f1(words: list[str], gold: list[str]) -> float:
    unmatched, hits = list(gold), 0
    for word in words:
        if word in unmatched:
            unmatched.remove(word)
            hits += 1
    return 2 * hits / (len(words) + len(gold))


def _number(parsed: str | None, gold: str) -> tuple[float, float | None]:
    """(1 if right, absolute difference): integers must be equal, others within a millionth."""
    if parsed is None:
        return 0.0, None
    matches = [DECIMAL.fullmatch(text.strip()) for text in (parsed, gold)]
    if None in matches:
        return number_scores(parsed, gold)
    value, expected = (Fraction(match[0]) for match in matches)
    tolerance = (
        0 if value % 1 == expected % 1 == 0 else max(abs(expected), Fraction(1, 10**6)) / 10**6
    )
    return 1.0 if abs(value - expected) <= tolerance else 0.0, float(abs(value - expected))
