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

    Labels and lengths are kept with the answer, so that its graded score follows from the row.

    Args:
        logprobs: summed log-probability of each continuation.
        continuations: the options' texts.
        normalize: `bytes` divides each sum by its text's UTF-8 length without the leading space.
    """
    if not all(map(math.isfinite, logprobs)):
        return _prediction(item, output="", parsed=None, status="unparsed", finish="nonfinite")
    lengths = [len(c.strip().encode("utf-8")) if normalize == "bytes" else 1 for c in continuations]
    scores = [s / n for s, n in zip(logprobs, lengths, strict=True)]
    best = item.labels[max(range(len(scores)), key=scores.__getitem__)]
    prediction = _prediction(item, output=best, parsed=best, status="answered", finish="scored")
    prediction["score"] = float(best in item.golds)
    prediction["logprobs"] = [round(s, 6) for s in logprobs]
    prediction["labels"] = list(item.labels)
    if normalize == "bytes":
        prediction["option_bytes"] = lengths
    return prediction


def score_text(item: Item, adapter: str, text: str, *, answer: str, finish: str) -> dict:
    """The prediction of a generate protocol.

    Args:
        text: the model's answer without its end-of-turn token; half a surrogate pair is
            stored as U+FFFD.
        answer: `boxed` takes the last complete box; `text` takes all of it.
        finish: the finish reason of the generation.
    """
    text = valid_unicode(text)
    answer_text = last_boxed(text) if answer == "boxed" else text.strip()
    parsed, status = _parse(item, adapter, answer_text)
    if finish == "nonfinite":
        parsed, status = None, "unparsed"
    prediction = _prediction(item, output=text, parsed=parsed, status=status, finish=finish)
    if adapter == "squad_v2":
        prediction["score"], prediction["f1"] = squad_scores(parsed, status, item.golds)
    elif adapter == "openmath":
        prediction["score"], prediction["absolute_difference"] = number_scores(
            parsed, item.golds[0]
        )
    else:
        prediction["score"] = float(parsed is not None and parsed in item.golds)
    return prediction


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


def _parse(item: Item, adapter: str, answer_text: str | None) -> tuple[str | None, str]:
    """(parsed answer, status)."""
    if answer_text is None or not answer_text.strip():
        return None, "unparsed"
    if adapter == "squad_v2":
        return (
            (None, "abstained") if is_abstention(answer_text) else (answer_text.strip(), "answered")
        )
    if adapter == "openmath":
        return answer_text.strip(), "answered"
    key = label_key(answer_text)
    for label in item.labels:
        if label_key(label) == key:
            return label, "answered"
    return None, "unparsed"


def squad_scores(parsed: str | None, status: str, golds) -> tuple[float, float]:
    """(exact match, token F1), the best over all golds; (1, 1) for a correct abstention.

    SQuAD 2.0's official evaluation, except that an unparsed answer never counts as empty.
    """
    if not golds:
        score = float(status == "abstained")
        return score, score
    if parsed is None:
        return 0.0, 0.0
    exact = max(float(_words(parsed) == _words(gold)) for gold in golds)
    return exact, max(token_f1(parsed, gold) for gold in golds)


def _words(text: str) -> list[str]:
    """The normalised words; a text without any ("A", "!") is itself one word.

    Without this rule, any article would match the gold answer "A" (as in vitamin A).
    """
    return normalize_answer(text).split() or [text.strip().casefold()]


def token_f1(answer: str, gold: str) -> float:
    """Harmonic mean of precision and recall over normalized words."""
    words, gold_words = _words(answer), _words(gold)
    shared = sum((Counter(words) & Counter(gold_words)).values())
    return 2 * shared / (len(words) + len(gold_words))


def number_scores(parsed: str | None, gold: str) -> tuple[float, float | None]:
    """(1 if right else 0, |answer - gold| if both are numbers).

    Numbers agree within a relative tolerance of 1e-6, which allows for rounded decimals; two
    integers must be equal. A gold that is not a number must match as text without spaces.
    """
    if parsed is None:
        return 0.0, None
    value, expected = parse_number(parsed), gold_number(gold)
    if value is None or expected is None:
        is_equal = "".join(parsed.split()) == "".join(gold.split())
        return float(is_equal), None
    difference = abs(value - expected)
    both_whole = value.denominator == expected.denominator == 1
    tolerance = 0 if both_whole else RELATIVE_TOLERANCE * max(abs(expected), Fraction(1, 10**6))
    is_right = difference <= tolerance
    return float(is_right), _finite_float(difference)


def _finite_float(value: Fraction) -> float | None:
    try:
        return float(value)
    except OverflowError:
        return None
