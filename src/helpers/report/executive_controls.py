"""The controls, shown as what they are: their duties, and what rounding alone is worth."""

from helpers.evaluation.trivial_answers import status_and_answer
from helpers.report.estimates import token_estimates
from helpers.report.markdown import Markup, Rows, code, count, escape, listed, number, percent
from helpers.report.results import Results
from helpers.report.results_data import Evaluated
from helpers.statistics.controls import Role

SHOWS: dict[Role, str] = {
    "baseline": "what the others are held against",
    "repetition": "whether a run repeats",
    "noise floor": "what rounding alone is worth",
    "smoothing alone": "whether smoothing itself changes anything",
    "broken on purpose": "whether a broken recipe is seen",
    "without smoothing": "what int8 costs without smoothing",
}
EQUAL: tuple[Role, ...] = ("repetition", "smoothing alone")


def duties(results: Results) -> Rows | None:
    """Every control of every model: what it shows, what it must do, and whether it did."""
    rows = []
    for (model, variant), duty in results.duties.items():
        verdict = "yes" if duty.done else "**NO**"
        row = {"control": code(variant), "model": code(model), "shows": SHOWS[duty.role]}
        row |= {"must": duty.must, "did it": Markup(verdict), "found": duty.found}
        rows.append(row)
    return rows or None


def broken_controls(results: Results) -> list[str]:
    """The first thing a reader must know: a control that did not do its duty."""
    failed = {at: duty for at, duty in results.duties.items() if not duty.done}
    if not failed:
        return []
    told = [
        f"`{variant}` of `{model}` must {escape(duty.must)}, but {escape(duty.found)}"
        for (model, variant), duty in failed.items()
    ]
    return [
        f"**⚠ {len(failed)} of {count(len(results.duties), 'control')} FAILED. Believe nothing "
        f"below before this is explained.** {'; '.join(told)}."
    ]


def controls_kept(results: Results) -> list[str]:
    """That all controls did what they must, where there are any beside the baseline."""
    found = {v: duty for (_, v), duty in results.duties.items() if duty.role != "baseline"}
    if not found or not all(duty.done for duty in results.duties.values()):
        return []
    told = [f"`{variant}` ({duty.role})" for variant, duty in found.items()]
    return [f"**Controls** did what they must, in every model: {listed(told)}."]


def shown_beside(results: Results) -> list[str]:
    """The variants worth a row of their own: all but those that must equal the baseline."""
    return [v for v in results.variants if results.role(v) not in EQUAL]


def label(results: Results, variant: str) -> Markup:
    """The variant's name, with its role where a reader could take it for a subject."""
    role = results.role(variant)
    named = {"noise floor", "smoothing alone", "repetition", "broken on purpose"}
    return Markup(f"`{variant}` ({role})" if role in named else f"`{variant}`")


def noise_sentence(results: Results) -> str:
    """What single flips, KL and top-1 agreement are worth, from the noise floor's records."""
    if (name := results.noise_floor) is None:
        return ""
    dtype, own = results.study.variants[name].dtype, results.runtime.dtype
    found = [results.evaluations[model, name] for model in results.models]
    if any(e.problem for e in found):
        return f"The noise floor `{name}` failed a check, so it shows nothing."
    tokens = [token_estimates(e, results.rules) for e in found]
    changed = [changed_answers(e, results.baseline_of(e.model)) for e in found]
    return (
        f"Rounding alone has a size. `{name}` is `{results.study.baseline}` with the same "
        f"weights, computed in {dtype} instead of {own}. In "
        f"{listed([code(e.model) for e in found])}"
        f" it moves the next-token distribution by a KL of "
        f"{listed([number(t['kl'].value) for t in tokens])} nats, keeps "
        f"{listed([percent(t['top1_agreement'].value) for t in tokens])} of the most likely "
        f"tokens, and changes {listed([str(n) for n, _ in changed])} of "
        f"{count(changed[0][1], 'answer')}. A difference no larger than that says nothing about "
        "quantization."
    )


def changed_answers(variant: Evaluated, baseline: Evaluated) -> tuple[int, int]:
    """(answers that are not the baseline's, all answers) over every evaluation set."""
    changed = total = 0
    for name, rows in baseline.predictions.items():
        after = {row["id"]: status_and_answer(row) for row in variant.predictions[name]}
        changed += sum(status_and_answer(row) != after[row["id"]] for row in rows)
        total += len(rows)
    return changed, total


def times_the_noise(results: Results, found: Evaluated) -> float | None:
    """The variant's KL over the noise floor's; None where either is missing or zero."""
    if (name := results.noise_floor) is None:
        return None
    floor = results.evaluations[found.model, name].shared_text["kl"]
    kl = found.shared_text["kl"]
    return kl / floor if floor and kl is not None else None
