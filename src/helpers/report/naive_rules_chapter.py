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
from helpers.statistics.comparison import Answers
from helpers.statistics.naive_rules import OldConclusion
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
        parts += [markdown_table(_conclusions(results, model)), _win_rates(results, model)]
        parts += [_reasons(results, model)]
    for dataset in _of_adapter(results, "squad_v2"):
        parts += [f"### Why {dataset_name(dataset)} rewards silence"]
        parts += [markdown_table(_silence(results, dataset))]
        parts += [_certified(results, model, dataset) for model in results.models]
    for dataset in _of_adapter(results, "openmath"):
        parts += [f"### Why the mean difference on {dataset_name(dataset)} is no score"]
        parts += [markdown_table(_mean_differences(results, dataset))]
        parts += [
            "It is over the answers that are numbers, so it can shrink as a model answers less. "
            "This study takes the median and names its coverage."
        ]
    return [Markdown("\n\n".join(filter(None, parts)) + "\n")]


def _of_adapter(results: Results, adapter: str) -> list[str]:
    return [n for n, s in results.study.evaluation.datasets.items() if s.adapter == adapter]


def _answers(results: Results, model: str, variant: str, dataset: str) -> Answers:
    return Answers(variant, results.evaluations[model, variant].predictions[dataset])


def _concluded(results: Results, model: str, variant: str, dataset: str) -> OldConclusion:
    adapter = results.study.evaluation.datasets[dataset].adapter
    sides = (_answers(results, model, v, dataset) for v in (results.study.baseline, variant))
    return naive_rules.conclude(adapter, *sides)


def _conclusions(results: Results, model: str) -> Rows:
    rows = []
    for variant in results.study.old_rules_chapter:
        for dataset in results.study.evaluation.datasets:
            old = _concluded(results, model, variant, dataset)
            verdict = _verdict(results, model, variant, dataset)
            winner = variant if old.winner == "variant" else results.study.baseline
            rows.append(
                {
                    "variant": code(variant),
                    "dataset": dataset_name(dataset),
                    "before": percent(old.before),
                    "after": percent(old.after),
                    "“relative change”": _relative(old.relative_change),
                    "old “winner”": code(winner),
                    "what this study concludes": Markup(
                        verdict_text(replace(verdict, reason=""), results.rules.margin)
                    ),
                }
            )
    return rows


def _verdict(results: Results, model: str, variant: str, dataset: str) -> Verdict:
    return verdict_on(results, results.evaluations[model, variant], dataset)


def _reasons(results: Results, model: str) -> str:
    """Why each variant is invalid or its items say nothing, each reason once."""
    told = []
    for variant in results.study.old_rules_chapter:
        sets: dict[tuple[str, str], list[str]] = {}
        for dataset in results.study.evaluation.datasets:
            verdict = _verdict(results, model, variant, dataset)
            if verdict.kind in ("invalid", "uninformative"):
                key = (verdict.kind, verdict.reason)
                sets.setdefault(key, []).append(dataset_name(dataset))
        told += [
            f"`{variant}` on {listed(names)}, {kind}: {escape(reason.removeprefix(f'{variant} '))}"
            for (kind, reason), names in sets.items()
        ]
    return bullets([f"{text}." for text in told])


def _relative(change: float | None) -> str:
    return MISSING if change is None else f"{signed(100 * change, 0)} %"


def _win_rates(results: Results, model: str) -> str:
    told = []
    for variant in results.study.old_rules_chapter:
        by_set = {
            dataset: _concluded(results, model, variant, dataset)
            for dataset in results.study.evaluation.datasets
        }
        rates = [naive_rules.win_rate(list(by_set.values()), s) for s in ("baseline", "variant")]
        won = [dataset_name(d) for d, old in by_set.items() if old.winner == "variant"]
        text = (
            f"between `{results.study.baseline}` and `{variant}` the “win rates” are "
            f"{percent(rates[0])} and {percent(rates[1])}"
        )
        told.append(f"{text} (it “wins” {listed(won)})" if won else text)
    return f"By the old rules, {'; '.join(told)}."


def _silence(results: Results, dataset: str) -> Rows:
    rows, fixed = [], None
    for model in results.models:
        for variant in (results.study.baseline, *results.study.old_rules_chapter):
            found = naive_rules.empty_answers(
                _answers(results, model, variant, dataset).predictions
            )
            row = {"model": code(model), "variant": code(variant)}
            row["exact match, official rule"] = percent(found.exact_match)
            row |= {"HasAns": percent(found.has_answer), "NoAns": percent(found.no_answer)}
            row["empty answers"] = f"{found.empty} of {found.items}"
            row["of them unparsed"] = str(found.unparsed)
            rows.append(row)
            fixed = found
    silent = {"model": "any", "variant": "always the empty answer"}
    silent["exact match, official rule"] = percent(fixed.unanswerable / fixed.items)
    silent |= {"HasAns": percent(0.0), "NoAns": percent(1.0)}
    silent |= {"empty answers": f"{fixed.items} of {fixed.items}", "of them unparsed": MISSING}
    return [*rows, silent]


def _certified(results: Results, model: str, dataset: str) -> str:
    """The “win” of each variant that says nothing, and the p that would have certified it."""
    told, adapter = [], results.study.evaluation.datasets[dataset].adapter
    for variant in results.study.old_rules_chapter:
        old = _concluded(results, model, variant, dataset)
        found = naive_rules.empty_answers(_answers(results, model, variant, dataset).predictions)
        if old.winner == "baseline" or 2 * found.empty <= found.items:
            continue
        sides = [_answers(results, model, v, dataset) for v in (results.study.baseline, variant)]
        p = naive_rules.certifying_p(adapter, *sides)
        judged = (
            "so that a test of significance alone would have certified it"
            if p <= results.rules.alpha
            else "so that at least a test of significance would have held it back"
        )
        told.append(
            f"In `{model}`, {percent(found.unanswerable / found.items)} of the questions have no "
            f"answer. `{variant}` says nothing readable to {found.unparsed} of "
            f"{count(found.items, 'question')}; the official rule finds it right on "
            f"{percent(found.no_answer)} of those without an answer, on "
            f"{percent(found.has_answer)} of those with one, and so on "
            f"{percent(found.exact_match)} of all, where `{results.study.baseline}` has "
            f"{percent(old.before)}. Exact McNemar on these scores gives p {_is(p)}, {judged}. "
            "This study looks at the answers first: an unparsed one scores zero, and degeneracy "
            "is decided before any test."
        )
    return " ".join(told)


def _is(p: float) -> str:
    shown = p_value(p)
    return shown if shown.startswith("<") else f"= {shown}"


def _mean_differences(results: Results, dataset: str) -> Rows:
    rows = []
    for model in results.models:
        for variant in (results.study.baseline, *results.study.old_rules_chapter):
            answers = _answers(results, model, variant, dataset).predictions
            mean, n = naive_rules.mean_absolute_difference(answers)
            row = {"model": code(model), "variant": code(variant)}
            row["numbers among the answers"] = f"{n} of {len(answers)}"
            row["mean absolute difference over these"] = number(mean)
            row["right"] = f"{sum(a['score'] for a in answers):.0f} of {len(answers)}"
            rows.append(row)
    return rows
