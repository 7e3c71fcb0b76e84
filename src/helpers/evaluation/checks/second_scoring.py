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


def second_reading_gate(wanted: EvaluationSet, rows: list[dict]) -> Gate:
    """Status, score and end of every written answer are those of a second reading."""
    odd = [f"{row['id']}: {told}" for row in rows if (told := misread(wanted, row))]
    return none_of("answers read a second time", odd, len(rows), "say otherwise")


def misread(wanted: EvaluationSet, row: dict) -> str:
    """What of a row does not follow from its text, in words; empty if all does."""
    if wanted.ask.protocol != "generate":
        return ""
    written, cap, end = row["output_tokens"], wanted.ask.max_new_tokens, row["finish_reason"]
    if written > cap or (end == "length") != (end not in ENDED and written == cap):
        return f"{written} tokens, ended by {end}"
    if end == "nonfinite":
        return ""
    said = last_box(row["output"]) if wanted.ask.answer == "boxed" else row["output"]
    said = (said or "").strip()
    abstained = wanted.adapter == "squad_v2" and UNANSWERABLE.fullmatch(said) is not None
    status = "unparsed" if not said else "abstained" if abstained else "answered"
    labelled = wanted.adapter in ("arc", "boolq")
    if row["status"] != status and not (labelled and row["status"] == "unparsed"):
        return f"status {row['status']}"
    score, f1 = _scores(wanted.adapter, said, status, row["golds"])
    if score is not None and row["score"] != score:
        return f"score {row['score']:g}"
    if f1 is not None and abs(row["f1"] - f1) > 1e-9:
        return f"F1 {row['f1']:g}"
    return ""


ENDED = ("stop", "answer", "nonfinite")


def last_box(text: str) -> str | None:
    """What stands in the last box whose braces close; None if there is none."""
    at = len(text)
    while (at := text.rfind(BOX, 0, at)) >= 0:
        depth = 1
        for place in range(at + len(BOX), len(text)):
            depth += {"{": 1, "}": -1}.get(text[place], 0)
            if not depth:
                return text[at + len(BOX) : place]
    return None


def _bare(text: str) -> list[str]:
    """Words without ASCII punctuation and articles, as SQuAD's official script has them."""
    kept = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(ARTICLE.split(kept)).split()


def _f1(said: list[str], gold: list[str]) -> float:
    shared = sum(min(said.count(word), gold.count(word)) for word in set(said))
    return 2 * shared / (len(said) + len(gold))


def _scores(adapter: str, said: str, status: str, golds) -> tuple[float | None, float | None]:
    """(score, F1); None where it is not computed here."""
    if adapter == "squad_v2":
        if not golds:
            return (float(status == "abstained"),) * 2
        if status != "answered":
            return 0.0, 0.0
        words, due = _bare(said), [_bare(gold) for gold in golds]
        if not all((words, *due)):
            return None, None  # nothing but articles; the official script makes them equal
        return float(words in due), max(_f1(words, gold) for gold in due)
    if status == "unparsed":
        return 0.0, None
    if adapter != "openmath":
        return None, None
    return _number(said, golds[0]), None


def _number(said: str, gold: str) -> float | None:
    """1 or 0 where both are plain numbers, or the same text; None where it takes more to tell."""
    if said == gold:
        return 1.0
    if not (PLAIN.fullmatch(said) and PLAIN.fullmatch(gold)):
        return None
    try:
        one, other = Decimal(said), Decimal(gold)
    except InvalidOperation:
        return None
    if one == other:
        return 1.0
    whole = one == one.to_integral() and other == other.to_integral()
    near = abs(one - other) <= TOLERANCE * max(abs(other), TOLERANCE)
    return float(near and not whole)
