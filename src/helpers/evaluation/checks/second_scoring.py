r"""Every answer read and scored a second time, by none of the code that did it first.

The last box is found by counting braces from each that opens, the last one first. Numbers are
compared by `decimal`. Imports no torch.
"""

import re
import string
from decimal import Decimal, InvalidOperation

from helpers.core.gates import Gate, none_of
from helpers.study.schema import EvaluationSet

BOX = r"\boxed{"
UNANSWERABLE = re.compile(r"\W*unanswerable\W*", re.IGNORECASE)
ARTICLE = re.compile(r"\b(?:an?|the)\b")
PLAIN = re.compile(r"[+-]?\d+(?:\.\d+)?")
TOLERANCE = Decimal("1e-6")


def second_reading_gate(evaluation_set: EvaluationSet, rows: list[dict]) -> Gate:
    """Status, score and finish reason of every generated answer agree with a second scorer."""
    differing = [
        f"{row['id']}: {difference}"
        for row in rows
        if (difference := misread_part(evaluation_set, row))
    ]
    return none_of("answers scored a second time", differing, len(rows), "say otherwise")


def misread_part(evaluation_set: EvaluationSet, row: dict) -> str:
    """The first field of a row that does not follow from its text; empty if all do."""
    if evaluation_set.ask.protocol != "generate":
        return ""
    output_tokens, max_new_tokens, finish_reason = (
        row["output_tokens"],
        evaluation_set.ask.max_new_tokens,
        row["finish_reason"],
    )
    if output_tokens > max_new_tokens or (finish_reason == "length") != (
        finish_reason not in ENDED and output_tokens == max_new_tokens
    ):
        return f"{output_tokens} tokens, ended by {finish_reason}"
    if finish_reason == "nonfinite":
        return ""
    answer = (
        last_closed_box(row["output"]) if evaluation_set.ask.answer == "boxed" else row["output"]
    )
    answer = (answer or "").strip()
    abstained = evaluation_set.adapter == "squad_v2" and UNANSWERABLE.fullmatch(answer) is not None
    status = "unparsed" if not answer else "abstained" if abstained else "answered"
    labelled = evaluation_set.adapter in ("arc", "boolq")
    if row["status"] != status and not (labelled and row["status"] == "unparsed"):
        return f"status {row['status']}"
    score, f1 = _scores(evaluation_set.adapter, answer, status, row["golds"])
    if score is not None and row["score"] != score:
        return f"score {row['score']:g}"
    if f1 is not None and abs(row["f1"] - f1) > 1e-9:
        return f"F1 {row['f1']:g}"
    return ""


ENDED = ("stop", "answer", "nonfinite")


def last_closed_box(text: str) -> str | None:
    """The content of the last box whose braces close; None if there is none."""
    at = len(text)
    while (at := text.rfind(BOX, 0, at)) >= 0:
        depth = 1
        for place in range(at + len(BOX), len(text)):
            depth += {"{": 1, "}": -1}.get(text[place], 0)
            if not depth:
                return text[at + len(BOX) : place]
    return None


def _normalized_words(text: str) -> list[str]:
    """Words without ASCII punctuation and articles, as in SQuAD's official script."""
    letters = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(ARTICLE.split(letters)).split()


def _f1(words: list[str], gold: list[str]) -> float:
    shared = sum(min(words.count(word), gold.count(word)) for word in set(words))
    return 2 * shared / (len(words) + len(gold))


def _scores(adapter: str, answer: str, status: str, golds) -> tuple[float | None, float | None]:
    """(score, F1); None for one that is not computed here."""
    if adapter == "squad_v2":
        if not golds:
            return (float(status == "abstained"),) * 2
        if status != "answered":
            return 0.0, 0.0
        words, gold_words = _normalized_words(answer), [_normalized_words(gold) for gold in golds]
        if not all((words, *gold_words)):
            return None, None  # only articles: the official script treats such texts as equal
        return float(words in gold_words), max(_f1(words, gold) for gold in gold_words)
    if status == "unparsed":
        return 0.0, None
    if adapter != "openmath":
        return None, None
    return _number_score(answer, golds[0]), None


def _number_score(answer: str, gold: str) -> float | None:
    """1 or 0 for two plain numbers or equal texts; None if a plain comparison cannot decide."""
    if answer == gold:
        return 1.0
    if not (PLAIN.fullmatch(answer) and PLAIN.fullmatch(gold)):
        return None
    try:
        value, expected = Decimal(answer), Decimal(gold)
    except InvalidOperation:
        return None
    if value == expected:
        return 1.0
    whole = value == value.to_integral() and expected == expected.to_integral()
    near = abs(value - expected) <= TOLERANCE * max(abs(expected), TOLERANCE)
    return float(near and not whole)
