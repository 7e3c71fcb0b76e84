"""Answers without a model: constants, copies of worked examples, repetition loops.

Everything here is counted on the items a variant was asked. What it means for a verdict
is in `verdicts` and `integrity`. Imports no torch and no statistics.
"""

from collections import Counter
from dataclasses import dataclass

from helpers.evaluation.scoring import last_boxed, normalize_answer
from helpers.sources.chat import EXAMPLES
from helpers.sources.items import parse_number
from helpers.study.schema import EvaluationSet

LONGEST_UNIT = 60  # the most characters of a repeated piece
LOOP = 24  # the fewest characters of a loop
REPEATS = 4
MOST_LOST = 5  # exceptions; a sign test gives 2 × ½⁵ = 6 % for 5, 2 × ½⁶ = 3 % for 6
MOST_LOST_SHARE = 0.25  # the largest share of answers that counts as exceptions


@dataclass(frozen=True)
class FixedAnswer:
    """A fixed answer and its score on the same items."""

    answer: str
    score: float


def best_fixed_answer(adapter: str, predictions: list[dict]) -> FixedAnswer:
    """The fixed answer with the best score on these items: a label, number, text or abstention.

    Echoing one worked example is a fixed answer too, so it never scores more.
    """
    golds = [p["golds"] for p in predictions]
    abstaining = FixedAnswer(
        "abstaining", sum(not golds_of_item for golds_of_item in golds) / len(golds)
    )
    readings = {"arc": _label_position, "openmath": _gold_value, "squad_v2": normalize_answer}
    key_of = readings.get(adapter, str)
    counts = Counter(
        key for golds_of_item in golds for key in {key_of(text) for text in golds_of_item}
    )
    if not counts:
        return abstaining
    best = min(counts, key=lambda key: (-counts[key], str(key)))
    fixed_answer = FixedAnswer(f"answering “{best}”", counts[best] / len(golds))
    return (
        abstaining
        if adapter == "squad_v2" and abstaining.score >= fixed_answer.score
        else fixed_answer
    )


def _label_position(label: str) -> str:
    """Labels "1" to "5" as "A" to "E", since they name the same positions."""
    return "ABCDE"[int(label) - 1] if label in ("1", "2", "3", "4", "5") else label


def _gold_value(gold: str):
    value = parse_number(gold)
    return gold if value is None else value


def status_and_answer(prediction: dict) -> tuple[str, str | None]:
    """The status and the parsed answer, without the wording."""
    return prediction["status"], prediction["parsed"]


def readable_share(predictions: list[dict]) -> float:
    """Share of answers that could be parsed, including abstentions."""
    return sum(p["status"] != "unparsed" for p in predictions) / len(predictions)


def capped_share(predictions: list[dict]) -> float:
    """Share of answers that the token limit stopped."""
    return sum(p["finish_reason"] == "length" for p in predictions) / len(predictions)


def looping_share(predictions: list[dict]) -> float:
    """Share of answers that end in a loop."""
    return sum(ends_in_loop(p.get("output", "")) for p in predictions) / len(predictions)


def is_one_answer(predictions: list[dict]) -> bool:
    """Whether questions with different gold answers all got the same answer."""
    golds = {tuple(p["golds"]) for p in predictions}
    return len({status_and_answer(p) for p in predictions}) == 1 and len(golds) > 1


def collapsed_to_one_answer(predictions: list[dict], baseline: list[dict]) -> bool:
    """Whether all answers are the same although the baseline's answers differ significantly.

    A baseline with nearly constant answers may lose its few exceptions to rounding. That is
    tolerated if an exact sign test could not tell their number from chance, if they are a
    small share, and if the remaining answer is the baseline's usual one.
    """
    [(usual_answer, times)] = Counter(map(status_and_answer, baseline)).most_common(1)
    exceptions = len(baseline) - times
    may_be_chance = exceptions <= min(MOST_LOST, MOST_LOST_SHARE * len(baseline))
    is_usual = status_and_answer(predictions[0]) == usual_answer
    return is_one_answer(predictions) and not (may_be_chance and is_usual)


def example_answers(evaluation_set: EvaluationSet) -> set[str]:
    """The normalized answers of the worked examples in this set's prompts."""
    shots = evaluation_set.ask.shots if evaluation_set.ask.protocol == "generate" else 0
    answers = (
        last_boxed(answer) or answer for _, answer in EXAMPLES[evaluation_set.adapter][:shots]
    )
    return {normalize_answer(text) for text in answers}


def ends_in_loop(text: str) -> bool:
    """Whether a text ends in repetitions of one piece.

    At least the last 24 characters repeat a piece of at most 60 characters four times or
    more; the last repetition may be incomplete.
    """
    ends = ((unit, text[-max(LOOP, REPEATS * unit) :]) for unit in range(1, LONGEST_UNIT + 1))
    return any(
        len(end) >= max(LOOP, REPEATS * unit) and end[unit:] == end[:-unit] for unit, end in ends
    )
