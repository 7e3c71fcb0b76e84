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

ROUNDING = 1e-6  # of stored log-probabilities; a tie within it goes to the stored answer
BOX = r"\boxed{"
DECIMAL = re.compile(r"[+-]?[0-9]{1,30}(\.[0-9]{1,30})?")
ARTICLE = re.compile(r"(?<!\w)(?:the|an|a)(?!\w)")
PUNCTUATION = set("!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~")


def rescored(wanted: EvaluationSet, item: Item, row: dict) -> dict:
    """What a prediction has to hold, made again from its raw output or its log-probabilities."""
    told = {"id": item.id, "cluster": item.cluster, "golds": list(item.golds)}
    if wanted.ask.protocol == "loglikelihood":
        return told | _chosen(item, row, in_bytes=wanted.ask.normalize == "bytes")
    text, broken = row["output"], row["finish_reason"] == "nonfinite"
    raw = box_of(text) if wanted.ask.answer == "boxed" else text
    parsed, status = (None, "unparsed") if broken else _read(item, wanted.adapter, raw)
    told |= {"parsed": parsed, "status": status}
    return told | _scored(item, wanted.adapter, parsed, status)


def _chosen(item: Item, row: dict, *, in_bytes: bool) -> dict:
    """The option with the largest log-probability, for each byte of its text if so declared."""
    stored = row.get("logprobs", [])
    if len(stored) != len(item.labels) or not all(map(math.isfinite, stored)):
        return {"parsed": None, "status": "unparsed", "finish_reason": "nonfinite", "score": 0.0}
    sizes = [len(o.strip().encode()) if in_bytes else 1 for o in item.options]
    best = max(s / n for s, n in zip(stored, sizes, strict=True))
    near = [
        label
        for label, s, n in zip(item.labels, stored, sizes, strict=True)
        if (s + ROUNDING) / n >= best
    ]
    parsed = row["parsed"] if row["parsed"] in near else near[0]
    told = {"parsed": parsed, "output": parsed, "status": "answered", "finish_reason": "scored"}
    return told | {"score": 1.0 if parsed in item.golds else 0.0}


def box_of(text: str) -> str | None:
    """The content of the box that begins last, among those that end."""
    at = text.rfind(BOX)
    while at >= 0:
        depth = 1
        for place in range(at + len(BOX), len(text)):
            depth += {"{": 1, "}": -1}.get(text[place], 0)
            if depth == 0:
                return text[at + len(BOX) : place]
        at = text.rfind(BOX, 0, at)
    return None


def _read(item: Item, adapter: str, raw: str | None) -> tuple[str | None, str]:
    """(parsed answer, status)."""
    said = (raw or "").strip()
    if not said:
        return None, "unparsed"
    if adapter == "squad_v2" and " ".join(words_of(said, or_itself=False)) == "unanswerable":
        return None, "abstained"
    if adapter in ("squad_v2", "openmath"):
        return said, "answered"
    same = [label for label in item.labels if _label(label) == _label(said)]
    return (same[0], "answered") if same else (None, "unparsed")


def _label(text: str) -> str:
    text = text.strip()
    while text.endswith("."):
        text = text[:-1]
    return text.casefold()


def _scored(item: Item, adapter: str, parsed: str | None, status: str) -> dict:
    if adapter == "openmath":
        score, difference = _number(parsed, item.golds[0])
        return {"score": score, "absolute_difference": difference}
    if adapter != "squad_v2":
        return {"score": 1.0 if parsed is not None and parsed in item.golds else 0.0}
    if not item.golds:
        due = 1.0 if status == "abstained" else 0.0
        return {"score": due, "f1": due}
    if parsed is None:
        return {"score": 0.0, "f1": 0.0}
    said, golds = words_of(parsed), [words_of(gold) for gold in item.golds]
    return {"score": 1.0 if said in golds else 0.0, "f1": max(_f1(said, gold) for gold in golds)}


def words_of(text: str, *, or_itself: bool = True) -> list[str]:
    """SQuAD's words; of a text that has none, the text itself."""
    kept = "".join(c for c in text.lower() if c not in PUNCTUATION)
    words = ARTICLE.sub(" ", kept).split()
    return words or ([text.strip().casefold()] if or_itself else [])


def _f1(said: list[str], gold: list[str]) -> float:
    left, hits = list(gold), 0
    for word in said:
        if word in left:
            left.remove(word)
            hits += 1
    return 2 * hits / (len(said) + len(gold))


def _number(parsed: str | None, gold: str) -> tuple[float, float | None]:
    """(right or not, distance): equal if both are whole, else within a millionth."""
    if parsed is None:
        return 0.0, None
    pair = [DECIMAL.fullmatch(text.strip()) for text in (parsed, gold)]
    if None in pair:
        return number_scores(parsed, gold)
    value, due = (Fraction(match[0]) for match in pair)
    room = 0 if value % 1 == due % 1 == 0 else max(abs(due), Fraction(1, 10**6)) / 10**6
    return 1.0 if abs(value - due) <= room else 0.0, float(abs(value - due))
