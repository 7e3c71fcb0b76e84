"""The chapter a study file asks for with `old_rules_chapter`: the old rules, looked at.

It stands alone. It is the only place that imports `helpers.statistics.naive_rules`, it hands
nothing but finished text to the notebook, and nothing else in the library imports it.
"""

from dataclasses import replace

from IPython.display import Markdown

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
from helpers.report.tables_headline import verdict_on, verdict_text
from helpers.statistics import naive_rules
from helpers.statistics.comparison import VariantPredictions
from helpers.statistics.naive_rules import NaiveConclusion
from helpers.statistics.verdicts import Verdict

OPENING = """## What the old rules would have concluded

This chapter is about rules, not about models. The report that this project redoes let the
higher score win, told differences in percent of a percentage, and read SQuAD by its official
rule, for which an answer without a box is the empty answer: right wherever a question has
none. Below, these rules are applied to this study's own answers. Beside them stands what this
study concludes from the same answers. No number of this chapter is used anywhere else.
"""


def chapter(results: Results) -> list[Markdown]:
    """The whole chapter; nothing where the study file does not ask for it."""
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
        parts += [f"### Why {dataset_name(dataset)} rewards silence"]
        parts += [markdown_table(_empty_answer_table(results, dataset))]
        parts += [_certified_sentences(results, model, dataset) for model in results.models]
    for dataset in _datasets_of(results, "openmath"):
        parts += [f"### Why the mean difference on {dataset_name(dataset)} is no score"]
        parts += [markdown_table(_mean_difference_table(results, dataset))]
        parts += [
            "It is over the answers that are numbers, so it can shrink as a model answers less. "
            "This study takes the median and names its coverage."
        ]
    return [Markdown("\n\n".join(filter(None, parts)) + "\n")]


def _datasets_of(results: Results, adapter: str) -> list[str]:
    return [n for n, s in results.study.evaluation.datasets.items() if s.adapter == adapter]


def _predictions_of(results: Results, model: str, variant: str, dataset: str) -> VariantPredictions:
    return VariantPredictions(variant, results.evaluations[model, variant].predictions[dataset])


def _naive_conclusion(results: Results, model: str, variant: str, dataset: str) -> NaiveConclusion:
    adapter = results.study.evaluation.datasets[dataset].adapter
    sides = (_predictions_of(results, model, v, dataset) for v in (results.study.baseline, variant))
    return naive_rules.naive_conclusion(adapter, *sides)


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
                    "what this study concludes": Markup(
                        verdict_text(replace(verdict, reason=""), results.rules.margin)
                    ),
                }
            )
    return rows


def _verdict(results: Results, model: str, variant: str, dataset: str) -> Verdict:
    return verdict_on(results, results.evaluations[model, variant], dataset)


def _reason_bullets(results: Results, model: str) -> str:
    """Why each variant is invalid or its items say nothing, each reason once."""
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
        rates = [naive_rules.win_rate(list(by_set.values()), s) for s in ("baseline", "variant")]
        won = [dataset_name(d) for d, old in by_set.items() if old.winner == "variant"]
        text = (
            f"between `{results.study.baseline}` and `{variant}` the “win rates” are "
            f"{percent(rates[0])} and {percent(rates[1])}"
        )
        texts.append(f"{text} (it “wins” {listed(won)})" if won else text)
    return f"By the old rules, {'; '.join(texts)}."


def _empty_answer_table(results: Results, dataset: str) -> Rows:
    rows, last_counts = [], None
    for model in results.models:
        for variant in (results.study.baseline, *results.study.old_rules_chapter):
            counts = naive_rules.empty_answers(
                _predictions_of(results, model, variant, dataset).predictions
            )
            row = {"model": code(model), "variant": code(variant)}
            row["exact match, official rule"] = percent(counts.exact_match)
            row |= {"HasAns": percent(counts.has_answer), "NoAns": percent(counts.no_answer)}
            row["empty answers"] = f"{counts.empty} of {counts.items}"
            row["of them unparsed"] = str(counts.unparsed)
            rows.append(row)
            last_counts = counts
    silent_row = {"model": "any", "variant": "always the empty answer"}
    silent_row["exact match, official rule"] = percent(last_counts.unanswerable / last_counts.items)
    silent_row |= {"HasAns": percent(0.0), "NoAns": percent(1.0)}
    silent_row |= {
        "empty answers": f"{last_counts.items} of {last_counts.items}",
        "of them unparsed": MISSING,
    }
    return [*rows, silent_row]


def _certified_sentences(results: Results, model: str, dataset: str) -> str:
    """The “win” of each variant that says nothing, and the p that would have certified it."""
    sentences, adapter = [], results.study.evaluation.datasets[dataset].adapter
    for variant in results.study.old_rules_chapter:
        old = _naive_conclusion(results, model, variant, dataset)
        counts = naive_rules.empty_answers(
            _predictions_of(results, model, variant, dataset).predictions
        )
        if old.winner == "baseline" or 2 * counts.empty <= counts.items:
            continue
        sides = [
            _predictions_of(results, model, v, dataset) for v in (results.study.baseline, variant)
        ]
        p = naive_rules.naive_mcnemar_p(adapter, *sides)
        consequence = (
            "so that a test of significance alone would have certified it"
            if p <= results.rules.alpha
            else "so that at least a test of significance would have held it back"
        )
        sentences.append(
            f"In `{model}`, {percent(counts.unanswerable / counts.items)} of the questions have no "
            f"answer. `{variant}` says nothing readable to {counts.unparsed} of "
            f"{count(counts.items, 'question')}; the official rule finds it right on "
            f"{percent(counts.no_answer)} of those without an answer, on "
            f"{percent(counts.has_answer)} of those with one, and so on "
            f"{percent(counts.exact_match)} of all, where `{results.study.baseline}` has "
            f"{percent(old.before)}. Exact McNemar on these scores gives p {_p_with_sign(p)}, "
            f"{consequence}. "
            "This study looks at the answers first: an unparsed one scores zero, and degeneracy "
            "is decided before any test."
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
            mean, n = naive_rules.mean_absolute_difference(answers)
            row = {"model": code(model), "variant": code(variant)}
            row["numbers among the answers"] = f"{n} of {len(answers)}"
            row["mean absolute difference over these"] = number(mean)
            row["right"] = f"{sum(a['score'] for a in answers):.0f} of {len(answers)}"
            rows.append(row)
    return rows
