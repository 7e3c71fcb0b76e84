"""The executive summary, made from verdicts and controls alone; no other number enters it.

First whether the controls did what they must, since otherwise nothing below counts. Then
the answer in one sentence a variant, every declared verdict in a small table, and what each
kind of verdict means, with its places. It has to read well for any mixture of verdicts.
"""

from helpers.report.executive_controls import broken_controls, controls_kept
from helpers.report.markdown import (
    MISSING,
    Markup,
    Rows,
    code,
    count,
    dataset_name,
    escape,
    listed,
    percent_plain,
    points,
    span,
)
from helpers.report.results import Results
from helpers.statistics.verdicts import Verdict
from helpers.study.schema import Comparison

Judged = tuple[Comparison, Verdict]
INFORMATIVE = ("worse", "better", "equivalent", "inconclusive")
WORDS = {
    "worse": "**worse**",
    "better": "**better**",
    "equivalent": "equivalent",
    "inconclusive": "inconclusive",
    "uninformative": "uninformative",
    "invalid": "**invalid**",
}


def answer(results: Results) -> str:
    """What was found, in a sentence for each variant the study declared comparisons of."""
    declared = results.primary()
    if not declared:
        return (
            "**Answer.** No comparison was declared in advance, so this study gives no verdict; "
            "all that follows is exploratory."
        )
    told = [_answer_of(results, list(group)) for group in by_pair(declared).values()]
    if len(told) == 1:
        return f"**Answer.** {told[0]}"
    return "**Answer.**\n\n" + "\n".join(f"- {sentence}" for sentence in told)


def by_pair(declared: list[Judged]) -> dict[tuple[str, str], list[Judged]]:
    """Declared comparisons by (variant, baseline), in the study file's order."""
    found: dict[tuple[str, str], list[Judged]] = {}
    for c, verdict in declared:
        found.setdefault((c.variant, c.baseline), []).append((c, verdict))
    return found


def _answer_of(results: Results, group: list[Judged]) -> str:
    """One variant against one baseline: lost or not, in how many comparisons that can tell."""
    c, _ = group[0]
    kinds = [verdict.kind for _, verdict in group]
    able, n = [k for k in kinds if k in INFORMATIVE], len(kinds)
    if not able:
        return f"Nothing can be said of `{c.variant}`: {_unable(kinds, c.baseline)}."
    where = f"in the {_of(len(able), n)} that can show one"
    if n == len(able):
        where = "in the one comparison declared" if n == 1 else f"in the {n} comparisons declared"
    if worse := kinds.count("worse"):
        text = f"`{c.variant}` is worse than `{c.baseline}` in {_of(worse, n)}"
        better = kinds.count("better")
        return f"{text}, and better in {better}." if better else f"{text}."
    if better := kinds.count("better"):
        told = f"`{c.variant}` is better than `{c.baseline}` in {_of(better, n)}"
        return f"No loss was found {where}; {told}."
    if set(able) == {"equivalent"}:
        return (
            f"`{c.variant}` is equivalent to `{c.baseline}` within ±{_margin(results)} points "
            f"{where.replace('show one', 'show a difference')}."
        )
    return (
        f"No loss of `{c.variant}` against `{c.baseline}` was found {where}, which is no proof "
        "that there is none."
    )


def _of(part: int, n: int) -> str:
    return f"{part} of {count(n, 'declared comparison')}"


def _unable(kinds: list[str], baseline: str) -> str:
    invalid, n = kinds.count("invalid"), len(kinds)
    blind = f"`{baseline}` itself shows no ability that could be lost"
    if invalid == n:
        return "its one comparison is invalid" if n == 1 else f"all {n} comparisons are invalid"
    if not invalid:
        return f"where it was compared, {blind}"
    return f"of {n} comparisons {invalid} {_is(invalid)} invalid, and in the others {blind}"


def _is(n: int) -> str:
    return "is" if n == 1 else "are"


def _margin(results: Results) -> str:
    return f"{100 * results.rules.margin:g}"


def verdict_table(results: Results) -> Rows:
    """Every declared verdict in a word: a row for each variant and model, a column a set."""
    rows = []
    for (variant, baseline), group in by_pair(results.primary()).items():
        for model in dict.fromkeys(c.model for c, _ in group):
            against = "" if baseline == results.study.baseline else f" vs `{baseline}`"
            row = {"variant": Markup(f"`{variant}`{against}"), "model": code(model)}
            found = {c.dataset: v.kind for c, v in group if c.model == model}
            for dataset in results.study.evaluation.datasets:
                kind = found.get(dataset)
                row[dataset_name(dataset)] = Markup(WORDS[kind]) if kind else MISSING
            rows.append(row)
    return rows


def meanings(results: Results) -> list[str]:
    """One bullet for each kind of verdict that occurs: where, and what it means there."""
    tellers = {
        "worse": _worse,
        "better": _better,
        "equivalent": _equivalent,
        "inconclusive": _inconclusive,
        "uninformative": _uninformative,
        "invalid": _invalid,
    }
    found = ((tell, results.primary(kind)) for kind, tell in tellers.items())
    told = [tell(results, judged) for tell, judged in found if judged]
    return [*broken_controls(results), *told, *controls_kept(results)]


def places(results: Results, judged: list[Judged]) -> str:
    """`ARC of base and tuned, BoolQ of tuned`, with the variant where the study has several."""
    several = len(by_pair(results.primary())) > 1
    where: dict[tuple[str, str], list[str]] = {}
    for c, _ in judged:
        models = where.setdefault((c.dataset, c.variant), [])
        if f"`{c.model}`" not in models:
            models.append(f"`{c.model}`")
    told: dict[str, list[str]] = {}
    for (dataset, variant), models in where.items():
        told.setdefault(variant, []).append(f"{dataset_name(dataset)} of {listed(models)}")
    if not several:
        return ", ".join(text for texts in told.values() for text in texts)
    return "; ".join(f"`{variant}` on {', '.join(texts)}" for variant, texts in told.items())


def _with_size(results: Results, judged: list[Judged]) -> str:
    found = [
        f"{places(results, [(c, v)])}: {points(v.paired.delta)} points "
        f"{span(v.paired.interval, points)}{f', {escape(v.reason)}' if v.reason else ''}"
        for c, v in judged
    ]
    return "; ".join(found)


def _worse(results: Results, judged: list[Judged]) -> str:
    return (
        f"**Worse**, by more than chance explains: {_with_size(results, judged)}. In brackets "
        f"the {percent_plain(results.rules.confidence)} interval."
    )


def _better(results: Results, judged: list[Judged]) -> str:
    return (
        f"**Better**, by more than chance explains: {_with_size(results, judged)}. Rounding "
        "rarely helps, so look at the items before believing it."
    )


def _equivalent(results: Results, judged: list[Judged]) -> str:
    return (
        f"**Equivalent within ±{_margin(results)} points**: {places(results, judged)}. If "
        "anything is lost or gained there, it is less than what the study declared harmless."
    )


def _inconclusive(results: Results, judged: list[Judged]) -> str:
    """Where nothing was found, and how large a loss would have had to be."""
    text = f"**Inconclusive** (no difference detected): {places(results, judged)}."
    if seen := [(c, v) for c, v in judged if v.paired.detectable is not None]:
        text += (
            f" A loss may be there all the same: with these items the chance to find it reaches "
            f"{percent_plain(results.rules.power)} only from {_reach(results, seen)} on."
        )
    if blind := [(c, v) for c, v in judged if v.paired.detectable is None]:
        text += f" On {places(results, blind)} the items are too few to find even a total loss."
    return text


def _reach(results: Results, judged: list[Judged]) -> str:
    """The smallest detectable loss, or the span of them with the places at both ends."""
    in_order = sorted(judged, key=lambda cv: cv[1].paired.detectable)
    ends = [in_order[0], in_order[-1]]
    least, most = (f"{100 * v.paired.detectable:.0f} points" for _, v in ends)
    if least == most:
        return least
    where = [places(results, [end]) for end in ends]
    return f"{least} ({where[0]}) to {most} ({where[1]})"


def _uninformative(results: Results, judged: list[Judged]) -> str:
    baselines = listed([f"`{b}`" for b in dict.fromkeys(c.baseline for c, _ in judged)])
    return (
        f"**Uninformative**: {places(results, judged)}. There {baselines} itself does not clearly "
        "beat a fixed answer, or is seldom readable, so that no ability could be lost."
    )


def _invalid(results: Results, judged: list[Judged]) -> str:
    reasons: dict[str, dict[str, None]] = {}
    for c, verdict in judged:
        short = brief(verdict.reason.removeprefix(f"{c.variant} "))
        reasons.setdefault(c.variant, {})[short] = None
    why = "; ".join(f"`{v}`: {escape(listed(list(short)))}" for v, short in reasons.items())
    return (
        f"**Invalid**: {places(results, judged)}. This is about the run and says nothing of "
        f"quantization. Why: {why}."
    )


def brief(reason: str) -> str:
    """A reason without what was measured, which stands in the tables."""
    return reason.partition(" (")[0]
