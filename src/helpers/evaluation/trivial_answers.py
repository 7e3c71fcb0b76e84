"""Answers that need no model: fixed ones, echoes of the prompt's examples, loops.

Everything here is counted on the items a variant was asked. What it means for a verdict
is in `validity` and `behavior`. Imports no torch and no statistics.
"""

from collections import Counter
from dataclasses import dataclass

from helpers.evaluation.answer_parsing import last_boxed, normalize_answer
from helpers.sources.chat_conversations import EXAMPLES
from helpers.sources.exact_numbers import parse_number
from helpers.study.schema import EvaluationSet

LONGEST_UNIT = 60  # characters; what a loop repeats
LOOP = 24  # characters a loop has at least
REPEATS = 4
MOST_LOST = 5  # answers that all changed one way by chance: 2 × ½⁵ = 6 %, 2 × ½⁶ = 3 %
MOST_LOST_SHARE = 0.25  # of all answers; more are no exceptions


@dataclass(frozen=True)
class Degenerate:
    """The best score a fixed answer gets on the same items."""

    answer: str
    score: float


def best_degenerate(adapter: str, predictions: list[dict]) -> Degenerate:
    """The fixed answer that scores best on these items: a label, number, text, or abstaining.

    An echo of a worked example is a fixed answer too, and so never scores more.
    """
    golds = [p["golds"] for p in predictions]
    abstaining = Degenerate("abstaining", sum(not g for g in golds) / len(golds))
    readings = {"arc": _position, "openmath": _number, "squad_v2": normalize_answer}
    read = readings.get(adapter, str)
    said = Counter(key for g in golds for key in {read(text) for text in g})
    if not said:
        return abstaining
    best = min(said, key=lambda key: (-said[key], str(key)))
    fixed = Degenerate(f"answering “{best}”", said[best] / len(golds))
    return abstaining if adapter == "squad_v2" and abstaining.score >= fixed.score else fixed


def _position(label: str) -> str:
    """Labels "1" to "5" name the same places as "A" to "E"."""
    return "ABCDE"[int(label) - 1] if label in ("1", "2", "3", "4", "5") else label


def _number(gold: str):
    value = parse_number(gold)
    return gold if value is None else value


def answer_of(prediction: dict) -> tuple[str, str | None]:
    """What was answered, apart from how it was worded."""
    return prediction["status"], prediction["parsed"]


def readable(predictions: list[dict]) -> float:
    """Share of answers that could be parsed, abstentions among them."""
    return sum(p["status"] != "unparsed" for p in predictions) / len(predictions)


def capped(predictions: list[dict]) -> float:
    """Share of answers that the cap on new tokens stopped."""
    return sum(p["finish_reason"] == "length" for p in predictions) / len(predictions)


def looping(predictions: list[dict]) -> float:
    """Share of answers that end in a loop."""
    return sum(loops(p.get("output", "")) for p in predictions) / len(predictions)


def one_answer(predictions: list[dict]) -> bool:
    """Whether questions with different right answers all got the same one."""
    golds = {tuple(p["golds"]) for p in predictions}
    return len({answer_of(p) for p in predictions}) == 1 and len(golds) > 1


def lost_its_answers(predictions: list[dict], baseline: list[dict]) -> bool:
    """Whether all answers have become one, and the baseline gave others that count.

    A baseline that nearly always says the same may lose its exceptions to rounding: as many
    as an exact sign test could not tell from chance, if they are few beside the rest, and if
    what is left is what the baseline says.
    """
    [(usual, times)] = Counter(map(answer_of, baseline)).most_common(1)
    exceptions = len(baseline) - times
    may_be_chance = exceptions <= min(MOST_LOST, MOST_LOST_SHARE * len(baseline))
    same = answer_of(predictions[0]) == usual
    return one_answer(predictions) and not (may_be_chance and same)


def example_answers(wanted: EvaluationSet) -> set[str]:
    """The answers of the worked examples in this set's prompts, as they are compared."""
    shots = wanted.ask.shots if wanted.ask.protocol == "generate" else 0
    boxed = (last_boxed(answer) or answer for _, answer in EXAMPLES[wanted.adapter][:shots])
    return {normalize_answer(text) for text in boxed}


def loops(text: str) -> bool:
    """Whether a text ends in one piece said over and over.

    The last 24 characters or more are a piece of at most 60, four times or more; the
    last time it may be cut short.
    """
    ends = ((unit, text[-max(LOOP, REPEATS * unit) :]) for unit in range(1, LONGEST_UNIT + 1))
    return any(
        len(end) >= max(LOOP, REPEATS * unit) and end[unit:] == end[:-unit] for unit, end in ends
    )
