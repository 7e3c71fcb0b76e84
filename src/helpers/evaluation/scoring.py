"""One item's answer as a prediction: parsed, told apart, scored against the golds.

An answer is *answered*, *abstained* (it says, and says only, that there is none) or
*unparsed*. Unparsed answers score zero, on unanswerable questions too: silence is not
an abstention.
"""

import math
from collections import Counter
from fractions import Fraction

from helpers.core.plain_text import valid_unicode
from helpers.evaluation.answer_parsing import is_abstention, last_boxed, normalize_answer
from helpers.sources.exact_numbers import gold_number, parse_number
from helpers.sources.items import Item, label_key

RELATIVE_TOLERANCE = Fraction(1, 10**6)


def score_options(item: Item, logprobs: list[float], continuations, *, normalize: str) -> dict:
    """The prediction of a log-likelihood protocol: the option with the best score.

    Args:
        logprobs: summed log-probability of each continuation.
        continuations: the texts they belong to.
        normalize: `bytes` divides each sum by its text's UTF-8 length without the leading space.
    """
    if not all(map(math.isfinite, logprobs)):
        return _prediction(item, output="", parsed=None, status="unparsed", finish="nonfinite")
    lengths = [len(c.strip().encode("utf-8")) if normalize == "bytes" else 1 for c in continuations]
    scores = [s / n for s, n in zip(logprobs, lengths, strict=True)]
    best = item.labels[max(range(len(scores)), key=scores.__getitem__)]
    made = _prediction(item, output=best, parsed=best, status="answered", finish="scored")
    made["score"] = float(best in item.golds)
    made["logprobs"] = [round(s, 6) for s in logprobs]
    return made


def score_text(item: Item, adapter: str, text: str, *, answer: str, finish: str) -> dict:
    """The prediction of a generate protocol.

    Args:
        text: what the model wrote, its end-of-turn token removed; half a surrogate pair
            is stored as U+FFFD.
        answer: `boxed` takes the last complete box; `text` takes all of it.
        finish: why generation ended.
    """
    text = valid_unicode(text)
    raw = last_boxed(text) if answer == "boxed" else text.strip()
    parsed, status = _parse(item, adapter, raw)
    if finish == "nonfinite":
        parsed, status = None, "unparsed"
    made = _prediction(item, output=text, parsed=parsed, status=status, finish=finish)
    if adapter == "squad_v2":
        made["score"], made["f1"] = squad_scores(parsed, status, item.golds)
    elif adapter == "openmath":
        made["score"], made["absolute_difference"] = number_scores(parsed, item.golds[0])
    else:
        made["score"] = float(parsed is not None and parsed in item.golds)
    return made


def _prediction(item: Item, *, output: str, parsed, status: str, finish: str) -> dict:
    return {
        "id": item.id,
        "cluster": item.cluster,
        "golds": list(item.golds),
        "output": output,
        "parsed": parsed,
        "status": status,
        "finish_reason": finish,
        "score": 0.0,
    }


def _parse(item: Item, adapter: str, raw: str | None) -> tuple[str | None, str]:
    """(parsed answer, status)."""
    if raw is None or not raw.strip():
        return None, "unparsed"
    if adapter == "squad_v2":
        return (None, "abstained") if is_abstention(raw) else (raw.strip(), "answered")
    if adapter == "openmath":
        return raw.strip(), "answered"
    wanted = label_key(raw)
    for label in item.labels:
        if label_key(label) == wanted:
            return label, "answered"
    return None, "unparsed"


def squad_scores(parsed: str | None, status: str, golds) -> tuple[float, float]:
    """(exact match, token F1), the best over all golds; 1 and 1 for a due abstention.

    SQuAD 2.0's official evaluation, but that an unparsed answer never counts as empty.
    """
    if not golds:
        due = float(status == "abstained")
        return due, due
    if parsed is None:
        return 0.0, 0.0
    exact = max(float(_words(parsed) == _words(gold)) for gold in golds)
    return exact, max(token_f1(parsed, gold) for gold in golds)


def _words(text: str) -> list[str]:
    """The normalised words; of a text that has none ("A", "!") the text itself is its word.

    Compared without words, any article would be the right answer to vitamin "A".
    """
    return normalize_answer(text).split() or [text.strip().casefold()]


def token_f1(answer: str, gold: str) -> float:
    """Harmonic mean of precision and recall over normalized words."""
    words, wanted = _words(answer), _words(gold)
    shared = sum((Counter(words) & Counter(wanted)).values())
    return 2 * shared / (len(words) + len(wanted))


def number_scores(parsed: str | None, gold: str) -> tuple[float, float | None]:
    """(right or not, |answer - gold| if both are numbers).

    Numbers agree within a relative tolerance of 1e-6, which is for decimals cut short: two
    whole numbers have to be the same. Golds that are no numbers have to be matched as text
    without spaces.
    """
    if parsed is None:
        return 0.0, None
    value, wanted = parse_number(parsed), gold_number(gold)
    if value is None or wanted is None:
        same = "".join(parsed.split()) == "".join(gold.split())
        return float(same), None
    difference = abs(value - wanted)
    whole = value.denominator == wanted.denominator == 1
    tolerance = 0 if whole else RELATIVE_TOLERANCE * max(abs(wanted), Fraction(1, 10**6))
    right = difference <= tolerance
    return float(right), _finite_float(difference)


def _finite_float(value: Fraction) -> float | None:
    try:
        return float(value)
    except OverflowError:
        return None
