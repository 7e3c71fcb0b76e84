"""The chapter on naive rules: conclusions of the earlier report's rules from the same answers.

A study file asks for it with `old_rules_chapter`. The rules certified a broken model; they are the
subject of this chapter and never a tool. What they conclude stands beside what this project
concludes:

- the higher score wins, whatever the difference, and a tie goes to the baseline;
- differences are told in percent of a percentage;
- a win rate counts the sets won;
- SQuAD is read by its official rule, and an answer without a box is the empty answer, which is
  right wherever the question has no answer;
- the mean absolute difference of numbers is over the answers that parse, however few.

The chapter stands alone: it hands nothing but finished text to the notebook, and nothing else in
the library imports it.
"""

from dataclasses import dataclass, replace
from typing import Literal

from IPython.display import Markdown

from helpers.evaluation.scoring import normalize_answer
from helpers.report.markdown import (
    MISSING,
    Markup,
    Rows,
    code,
    count,
    dataset_name,
    escape,
    listed,
    markdown_table,
    number,
    p_value,
    percent,
    signed,
)
from helpers.report.narrative import bullets
from helpers.report.results import Results
from helpers.report.tables import verdict_on, verdict_text
from helpers.statistics.intervals import mcnemar_exact
from helpers.statistics.verdicts import VariantPredictions, Verdict, paired_predictions

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


OPENING = """## The conclusions of the earlier report's rules

The report that this project redoes declared the higher score the winner, gave differences in
percent of a percentage, and scored SQuAD by its official metric. That metric treats an answer
without a box as the empty answer, which is correct for every question without an answer. This
chapter applies these rules to this study's answers and compares the conclusions with this study's
verdicts. No number of this chapter is used anywhere else.
"""


def chapter(results: Results) -> list[Markdown]:
    """The whole chapter; empty if the study file does not ask for it."""
    if not results.study.old_rules_chapter:
        return []
    parts = [OPENING]
    for model in results.models:
        parts += [f"### Model `{model}`: two conclusions from the same answers"]
        parts += [
            markdown_table(_conclusion_table(results, model)),
            _win_rate_sentence(results, model),
        ]
        parts += [_reason_bullets(results, model)]
    for dataset in _datasets_of(results, "squad_v2"):
        parts += [f"### Why {dataset_name(dataset)} rewards empty answers"]
        parts += [markdown_table(_empty_answer_table(results, dataset))]
        parts += [_certified_sentences(results, model, dataset) for model in results.models]
    for dataset in _datasets_of(results, "openmath"):
        parts += [f"### Why the mean difference on {dataset_name(dataset)} is no score"]
        parts += [markdown_table(_mean_difference_table(results, dataset))]
        parts += [
            "It averages only the answers that are numbers, so it can fall if a model answers "
            "less. This study takes the median and states its coverage."
        ]
    return [Markdown("\n\n".join(filter(None, parts)) + "\n")]


def _datasets_of(results: Results, adapter: str) -> list[str]:
    return [n for n, s in results.study.evaluation.datasets.items() if s.adapter == adapter]


def _predictions_of(results: Results, model: str, variant: str, dataset: str) -> VariantPredictions:
    return VariantPredictions(variant, results.evaluations[model, variant].predictions[dataset])


def _naive_conclusion(results: Results, model: str, variant: str, dataset: str) -> NaiveConclusion:
    adapter = results.study.evaluation.datasets[dataset].adapter
    sides = (_predictions_of(results, model, v, dataset) for v in (results.study.baseline, variant))
    return naive_conclusion(adapter, *sides)


def _conclusion_table(results: Results, model: str) -> Rows:
    rows = []
    for variant in results.study.old_rules_chapter:
        for dataset in results.study.evaluation.datasets:
            old = _naive_conclusion(results, model, variant, dataset)
            verdict = _verdict(results, model, variant, dataset)
            winner = variant if old.winner == "variant" else results.study.baseline
            rows.append(
                {
                    "variant": code(variant),
                    "dataset": dataset_name(dataset),
                    "before": percent(old.before),
                    "after": percent(old.after),
                    "“relative change”": _relative_change_cell(old.relative_change),
                    "old “winner”": code(winner),
                    "verdict of this study": Markup(
                        verdict_text(replace(verdict, reason=""), results.rules.margin)
                    ),
                }
            )
    return rows


def _verdict(results: Results, model: str, variant: str, dataset: str) -> Verdict:
    return verdict_on(results, results.evaluations[model, variant], dataset)


def _reason_bullets(results: Results, model: str) -> str:
    """Why each variant is invalid or its items are uninformative, each reason once."""
    texts = []
    for variant in results.study.old_rules_chapter:
        datasets_by_reason: dict[tuple[str, str], list[str]] = {}
        for dataset in results.study.evaluation.datasets:
            verdict = _verdict(results, model, variant, dataset)
            if verdict.kind in ("invalid", "uninformative"):
                key = (verdict.kind, verdict.reason)
                datasets_by_reason.setdefault(key, []).append(dataset_name(dataset))
        texts += [
            f"`{variant}` on {listed(names)}, {kind}: {escape(reason.removeprefix(f'{variant} '))}"
            for (kind, reason), names in datasets_by_reason.items()
        ]
    return bullets([f"{text}." for text in texts])


def _relative_change_cell(change: float | None) -> str:
    return MISSING if change is None else f"{signed(100 * change, 0)} %"


def _win_rate_sentence(results: Results, model: str) -> str:
    texts = []
    for variant in results.study.old_rules_chapter:
        by_set = {
            dataset: _naive_conclusion(results, model, variant, dataset)
            for dataset in results.study.evaluation.datasets
        }
        rates = [win_rate(list(by_set.values()), s) for s in ("baseline", "variant")]
        won = [dataset_name(d) for d, old in by_set.items() if old.winner == "variant"]
        text = (
            f"between `{results.study.baseline}` and `{variant}` the “win rates” are "
            f"{percent(rates[0])} and {percent(rates[1])}"
        )
        texts.append(f"{text} (it “wins” {listed(won)})" if won else text)
    return f"By these rules, {'; '.join(texts)}."


def _empty_answer_table(results: Results, dataset: str) -> Rows:
    rows, last_counts = [], None
    for model in results.models:
        for variant in (results.study.baseline, *results.study.old_rules_chapter):
            counts = empty_answers(_predictions_of(results, model, variant, dataset).predictions)
            row = {"model": code(model), "variant": code(variant)}
            row["exact match, official metric"] = percent(counts.exact_match)
            row |= {"HasAns": percent(counts.has_answer), "NoAns": percent(counts.no_answer)}
            row["empty answers"] = f"{counts.empty} of {counts.items}"
            row["of them unparsed"] = str(counts.unparsed)
            rows.append(row)
            last_counts = counts
    silent_row = {"model": "any", "variant": "always the empty answer"}
    silent_row["exact match, official metric"] = percent(
        last_counts.unanswerable / last_counts.items
    )
    silent_row |= {"HasAns": percent(0.0), "NoAns": percent(1.0)}
    silent_row |= {
        "empty answers": f"{last_counts.items} of {last_counts.items}",
        "of them unparsed": MISSING,
    }
    return [*rows, silent_row]


def _certified_sentences(results: Results, model: str, dataset: str) -> str:
    """The “win” of each variant without readable answers, and the p that would certify it."""
    sentences, adapter = [], results.study.evaluation.datasets[dataset].adapter
    for variant in results.study.old_rules_chapter:
        old = _naive_conclusion(results, model, variant, dataset)
        counts = empty_answers(_predictions_of(results, model, variant, dataset).predictions)
        if old.winner == "baseline" or 2 * counts.empty <= counts.items:
            continue
        sides = [
            _predictions_of(results, model, v, dataset) for v in (results.study.baseline, variant)
        ]
        p = naive_mcnemar_p(adapter, *sides)
        consequence = (
            "so a significance test alone would have certified it"
            if p <= results.rules.alpha
            else "so a significance test would at least have rejected it"
        )
        sentences.append(
            f"In `{model}`, {percent(counts.unanswerable / counts.items)} of the questions have no "
            f"answer. `{variant}` gives no readable answer to {counts.unparsed} of "
            f"{count(counts.items, 'question')}; the official metric counts it correct on "
            f"{percent(counts.no_answer)} of those without an answer, on "
            f"{percent(counts.has_answer)} of those with one, and so on "
            f"{percent(counts.exact_match)} of all, where `{results.study.baseline}` has "
            f"{percent(old.before)}. Exact McNemar on these scores gives p {_p_with_sign(p)}, "
            f"{consequence}. "
            "This study looks at the answers first: an unparsed answer scores zero, and degenerate "
            "answers are invalid before any test."
        )
    return " ".join(sentences)


def _p_with_sign(p: float) -> str:
    text = p_value(p)
    return text if text.startswith("<") else f"= {text}"


def _mean_difference_table(results: Results, dataset: str) -> Rows:
    rows = []
    for model in results.models:
        for variant in (results.study.baseline, *results.study.old_rules_chapter):
            answers = _predictions_of(results, model, variant, dataset).predictions
            mean, n = mean_absolute_difference(answers)
            row = {"model": code(model), "variant": code(variant)}
            row["numbers among the answers"] = f"{n} of {len(answers)}"
            row["mean absolute difference over these"] = number(mean)
            row["right"] = f"{sum(a['score'] for a in answers):.0f} of {len(answers)}"
            rows.append(row)
    return rows
