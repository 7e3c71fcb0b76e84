"""Whether a comparison measures anything, decided before any test is looked at.

*Invalid* is said of a variant: it failed a check, or its answers are degenerate. A variant
that emits nothing may beat a weak baseline on questions that have no answer, with a small p.
*Uninformative* is said of the items: the baseline itself does not tell them from a fixed
answer, so nothing follows about ability, whatever the variant scores.
"""

from collections import Counter
from dataclasses import dataclass

from helpers.evaluation.comparison import Answers, Rules, answer_of, score_interval
from helpers.evaluation.parsing import parse_number

FORMAT_DROP = 0.25  # losing this share of readable answers is a broken run, not a lower score
FEWEST_READABLE = 0.5  # a baseline read less often than this measures the format, not the ability


@dataclass(frozen=True)
class Degenerate:
    """The best score a fixed answer gets on the same items."""

    answer: str
    score: float


def best_degenerate(adapter: str, predictions: list[dict]) -> Degenerate:
    """The fixed answer that scores best on these items: a label, a number, or abstaining."""
    golds = [p["golds"] for p in predictions]
    if adapter == "squad_v2":
        return Degenerate("abstaining", sum(not g for g in golds) / len(golds))
    read = {"arc": _position, "openmath": _number}.get(adapter, str)
    said = Counter(key for g in golds for key in {read(text) for text in g})
    best = min(said, key=lambda key: (-said[key], str(key)))
    return Degenerate(f"answering “{best}”", said[best] / len(golds))


def _position(label: str) -> str:
    """Labels "1" to "5" name the same places as "A" to "E"."""
    return "ABCDE"[int(label) - 1] if label in "12345" else label


def _number(gold: str):
    value = parse_number(gold)
    return gold if value is None else value


def _readable(predictions: list[dict]) -> float:
    return sum(p["status"] != "unparsed" for p in predictions) / len(predictions)


def _one_answer(predictions: list[dict]) -> bool:
    """Whether questions with different right answers all got the same one."""
    golds = {tuple(p["golds"]) for p in predictions}
    return len({answer_of(p) for p in predictions}) == 1 and len(golds) > 1


def _percent(fraction: float) -> str:
    return f"{100 * fraction:.1f} %"


def _score(predictions: list[dict]) -> float:
    return sum(p["score"] for p in predictions) / len(predictions)


def invalid_reason(adapter: str, baseline: Answers, variant: Answers, rules: Rules) -> str | None:
    """Why this is no measurement of the variant; None if it may be one."""
    for side in (variant, baseline):
        if side.problem:
            return f"{side.variant} failed a check: {side.problem}"
        if any(p["finish_reason"] == "nonfinite" for p in side.predictions):
            return f"{side.variant} computed logits that are not finite"
    before, after = baseline.predictions, variant.predictions
    if _readable(before) - _readable(after) > FORMAT_DROP:
        shares = f"{_percent(_readable(after))} of its answers are readable"
        return f"{shares}, against {_percent(_readable(before))} for {baseline.variant}"
    if _one_answer(after) and not _one_answer(before):
        return "it gives the same answer to every question"
    fixed = best_degenerate(adapter, after)
    if uninformative_reason(adapter, baseline, rules) is None and _score(after) <= fixed.score:
        return f"it does not beat always {fixed.answer} ({_percent(fixed.score)} of these items)"
    return None


def uninformative_reason(adapter: str, baseline: Answers, rules: Rules) -> str | None:
    """Why these items say nothing about ability, with this baseline; None if they may.

    The baseline has to beat the best fixed answer by more than chance: the lower limit of
    its interval lies above it.
    """
    asked, name = baseline.predictions, baseline.variant
    if (share := _readable(asked)) < FEWEST_READABLE:
        return f"only {_percent(share)} of {name}'s own answers are readable"
    if _one_answer(asked):
        return f"{name} itself gives the same answer to every question"
    fixed, score = best_degenerate(adapter, asked), _score(asked)
    if score_interval(asked, rules).low > fixed.score:
        return None
    clearly = "clearly " if score > fixed.score else ""
    shares = f"{_percent(score)} against {_percent(fixed.score)}"
    return f"{name} itself does not {clearly}beat always {fixed.answer} ({shares})"
