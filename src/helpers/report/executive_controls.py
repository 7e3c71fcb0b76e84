"""The controls, shown as what they are: their duties, and what rounding alone is worth."""

from helpers.evaluation.trivial_answers import status_and_answer
from helpers.report.markdown import Markup, Rows, code, count, escape, listed, number, percent
from helpers.report.results import Results
from helpers.report.results_data import VariantResults
from helpers.statistics.controls import Role

ROLE_PURPOSES: dict[Role, str] = {
    "baseline": "reference of every comparison",
    "repetition": "reproducibility of a run",
    "noise floor": "effect of rounding alone",
    "smoothing alone": "effect of smoothing alone",
    "broken on purpose": "detection of a broken recipe",
    "without smoothing": "cost of int8 without smoothing",
}
EQUALITY_ROLES: tuple[Role, ...] = ("repetition", "smoothing alone")


def control_table(results: Results) -> Rows | None:
    """Every control of every model: its purpose, expected and observed outcome."""
    rows = []
    for (model, variant), outcome in results.control_outcomes.items():
        as_expected = "yes" if outcome.ok else "**NO**"
        row = {"control": code(variant), "model": code(model), "shows": ROLE_PURPOSES[outcome.role]}
        row |= {
            "expected": outcome.expected,
            "as expected": Markup(as_expected),
            "observed": outcome.observed,
        }
        rows.append(row)
    return rows or None


def failed_control_bullets(results: Results) -> list[str]:
    """One bullet that names every control with an unexpected outcome; empty if there is none."""
    failed = {at: outcome for at, outcome in results.control_outcomes.items() if not outcome.ok}
    if not failed:
        return []
    failures = [
        f"`{variant}` of `{model}` was expected to {escape(outcome.expected)}, but "
        f"{escape(outcome.observed)}"
        for (model, variant), outcome in failed.items()
    ]
    return [
        f"**⚠ {len(failed)} of {count(len(results.control_outcomes), 'control')} FAILED. Do not "
        f"rely on any result below before this is explained.** {'; '.join(failures)}."
    ]


def sound_control_bullets(results: Results) -> list[str]:
    """One bullet if all controls behaved as expected; empty if the baseline is the only one."""
    outcomes = {
        v: outcome
        for (_, v), outcome in results.control_outcomes.items()
        if outcome.role != "baseline"
    }
    if not outcomes or not all(outcome.ok for outcome in results.control_outcomes.values()):
        return []
    names = [f"`{variant}` ({outcome.role})" for variant, outcome in outcomes.items()]
    return [f"**All controls behaved as expected** in every model: {listed(names)}."]


def headline_variants(results: Results) -> list[str]:
    """The variants with their own row: all except those that must equal the baseline."""
    return [v for v in results.variants if results.role(v) not in EQUALITY_ROLES]


def variant_label(results: Results, variant: str) -> Markup:
    """The variant's name, with its role if it is a control."""
    role = results.role(variant)
    shown_roles = {"noise floor", "smoothing alone", "repetition", "broken on purpose"}
    return Markup(f"`{variant}` ({role})" if role in shown_roles else f"`{variant}`")


def noise_sentence(results: Results) -> str:
    """The effect of rounding alone on answers, KL and top-1 agreement, from the noise floor."""
    if (name := results.noise_floor) is None:
        return ""
    dtype, study_dtype = results.study.variants[name].dtype, results.runtime.dtype
    variants = [results.evaluations[model, name] for model in results.models]
    if any(e.failed_check for e in variants):
        return f"The noise floor `{name}` failed a check, so the effect of rounding is unknown."
    tokens = [results.token_estimates[e.key] for e in variants]
    changed = [changed_answers(e, results.baseline_of(e.model)) for e in variants]
    return (
        f"Rounding alone changes answers. `{name}` computes with the weights of "
        f"`{results.study.baseline}`, in {dtype} instead of {study_dtype}. In "
        f"{listed([code(e.model) for e in variants])}"
        f" it shifts the next-token distribution by a KL of "
        f"{listed([number(t['kl'].value) for t in tokens])} nats, keeps "
        f"{listed([percent(t['top1_agreement'].value) for t in tokens])} of the most likely "
        f"tokens, and changes {listed([str(n) for n, _ in changed])} of "
        f"{count(changed[0][1], 'answer')}. A difference no larger than this is no evidence "
        "about quantization."
    )


def changed_answers(variant: VariantResults, baseline: VariantResults) -> tuple[int, int]:
    """(answers that are not the baseline's, all answers) over every evaluation set."""
    changed = total = 0
    for name, rows in baseline.predictions.items():
        after = {row["id"]: status_and_answer(row) for row in variant.predictions[name]}
        changed += sum(status_and_answer(row) != after[row["id"]] for row in rows)
        total += len(rows)
    return changed, total


def kl_over_noise_floor(results: Results, variant: VariantResults) -> float | None:
    """The variant's KL divided by the noise floor's; None if either is missing or zero."""
    if (name := results.noise_floor) is None:
        return None
    floor = results.evaluations[variant.model, name].shared_text["kl"]
    kl = variant.shared_text["kl"]
    return kl / floor if floor and kl is not None else None
