"""The rules of the report this project began with: the subject of one chapter, never a tool.

They certified a broken model. A study file may ask for a chapter that applies them to the
study's own answers and shows what they conclude beside what this project concludes; only
that chapter, `helpers.report.naive_rules_chapter`, imports this module. What they were:

- the higher score wins, whatever the difference, and a tie goes to the baseline;
- differences are told in percent of a percentage;
- a win rate counts the sets won;
- SQuAD is read by its official rule, and an answer without a box is the empty answer, which
  is right wherever the question has no answer;
- the mean absolute difference of numbers is over the answers that parse, however few.
"""

from dataclasses import dataclass
from typing import Literal

from helpers.evaluation.answer_parsing import normalize_answer
from helpers.statistics.comparison import VariantPredictions, paired_predictions
from helpers.statistics.intervals import mcnemar_exact

Side = Literal["baseline", "variant"]


@dataclass(frozen=True)
class NaiveConclusion:
    """The earlier report's conclusion about one comparison.

    Attributes:
        before, after: the scores, as fractions.
        relative_change: (after - before) / before; None if `before` is 0.
        winner: the side with the higher score; the baseline at a tie.
    """

    before: float
    after: float
    relative_change: float | None
    winner: Side


@dataclass(frozen=True)
class EmptyAnswers:
    """How the official metric rewards empty answers, on one SQuAD set.

    Attributes:
        empty: answers that the official metric takes as empty: unparsed ones and abstentions.
        unparsed: those of them that could not be parsed.
        unanswerable: questions without an answer.
        has_answer, no_answer: exact match on the questions with and without one.
    """

    items: int
    empty: int
    unparsed: int
    unanswerable: int
    exact_match: float
    has_answer: float | None
    no_answer: float | None


def naive_score(adapter: str, row: dict) -> float:
    """The earlier report's 0/1 score of one answer."""
    return official_exact_match(row) if adapter == "squad_v2" else row["score"]


def official_exact_match(row: dict) -> float:
    """SQuAD 2.0's official exact match of the text that was parsed, empty if there is none.

    Rajpurkar et al., arXiv:1806.03822: without gold answers the gold is the empty text.
    """
    prediction = normalize_answer(row["parsed"] or "")
    return float(any(prediction == normalize_answer(gold) for gold in row["golds"] or [""]))


def naive_conclusion(
    adapter: str, baseline: VariantPredictions, variant: VariantPredictions
) -> NaiveConclusion:
    """The earlier report's conclusion about two variants on the same items."""
    pairs = paired_predictions(baseline, variant)
    before, after = (sum(naive_score(adapter, p[i]) for p in pairs) / len(pairs) for i in (0, 1))
    change = (after - before) / before if before else None
    return NaiveConclusion(before, after, change, "variant" if after > before else "baseline")


def win_rate(conclusions: list[NaiveConclusion], side: Side) -> float:
    """Share of the sets on which one side has the higher score."""
    return sum(c.winner == side for c in conclusions) / len(conclusions)


def naive_mcnemar_p(
    adapter: str, baseline: VariantPredictions, variant: VariantPredictions
) -> float:
    """Exact McNemar p of the earlier report's scores, without a check of the answers."""
    pairs = [
        (naive_score(adapter, b), naive_score(adapter, a))
        for b, a in paired_predictions(baseline, variant)
    ]
    return mcnemar_exact(sum(b > a for b, a in pairs), sum(a > b for b, a in pairs))


def empty_answers(rows: list[dict]) -> EmptyAnswers:
    """The composition of a SQuAD score by the official metric."""
    scores: dict[bool, list[float]] = {True: [], False: []}  # by whether the question has an answer
    for row in rows:
        scores[bool(row["golds"])].append(official_exact_match(row))
    return EmptyAnswers(
        items=len(rows),
        empty=sum(not normalize_answer(row["parsed"] or "") for row in rows),
        unparsed=sum(row["status"] == "unparsed" for row in rows),
        unanswerable=len(scores[False]),
        exact_match=_mean(scores[True] + scores[False]),
        has_answer=_mean(scores[True]) if scores[True] else None,
        no_answer=_mean(scores[False]) if scores[False] else None,
    )


def mean_absolute_difference(rows: list[dict]) -> tuple[float | None, int]:
    """(mean over the answers that are numbers, the number of these answers)."""
    differences = [
        row["absolute_difference"] for row in rows if row["absolute_difference"] is not None
    ]
    return (_mean(differences) if differences else None), len(differences)


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
