"""What was found, as tables: the headline, one model's comparisons, its token-level cost."""

from helpers.evaluation.trivial_answers import FixedAnswer, best_fixed_answer
from helpers.report.estimates import (
    Estimate,
    main_metric,
    token_difference,
)
from helpers.report.executive_controls import (
    EQUALITY_ROLES,
    headline_variants,
    kl_over_noise_floor,
    variant_label,
)
from helpers.report.markdown import (
    MISSING,
    Markup,
    Rows,
    code,
    dataset_name,
    escape,
    number,
    p_value,
    percent,
    percent_span,
    points,
    signed4,
    two_decimals,
    with_span,
)
from helpers.report.results import Results
from helpers.report.results_data import VariantResults
from helpers.statistics.comparison import VariantPredictions
from helpers.statistics.validity import uninformative_reason
from helpers.statistics.verdicts import Verdict
from helpers.study.schema import Comparison

ROLES = {role: "control: expected to equal the baseline" for role in EQUALITY_ROLES}
ROLES |= {"noise floor": "noise floor: flips by rounding alone"}


def headline_table(results: Results) -> Rows:
    """Every variant of every model: checks, token-level cost, and each evaluation set.

    Controls that must equal the baseline have their own table. The last row gives the score of
    the best constant answer on the same items.
    """
    rows, variants_shown = [], headline_variants(results)
    for model in results.models:
        shown = [e for e in results.variants_of(model) if e.variant in variants_shown]
        rows += [_headline_row(results, e) for e in shown]
    fixed = {"model": "any", "variant": "best constant answer"}
    fixed |= dict.fromkeys(("checks", "perplexity", "KL [nats]", "top-1"), MISSING)
    for name, best in best_fixed_answers(results).items():
        fixed[dataset_name(name)] = Markup(f"{percent(best.score)} ({escape(best.answer)})")
    return [*rows, fixed]


def _headline_row(results: Results, variant: VariantResults) -> dict:
    tokens = results.token_estimates[variant.key]
    row = {"model": code(variant.model), "variant": variant_label(results, variant.variant)}
    row["checks"] = checks_cell(variant)
    row |= {
        "perplexity": two_decimals(tokens["perplexity"].value),
        "KL [nats]": number(tokens["kl"].value),
        "top-1": percent(tokens["top1_agreement"].value),
    }
    for name, evaluation_set in results.study.evaluation.datasets.items():
        main = main_estimate(results, variant, name)
        mark = "" if variant.failed_check_on(name) is None else "\u00a0✗"
        if (verdict := verdict_on(results, variant, name)) is not None:
            mark = {"invalid": "\u00a0✗", "uninformative": "\u00a0○"}.get(verdict.kind, mark)
        elif uninformative_reason(
            evaluation_set.adapter, predictions_of(variant, name), results.rules
        ):
            mark = "\u00a0○"
        row[dataset_name(name)] = Markup(percent_span(main.value, main.interval) + mark)
    return row


def predictions_of(variant: VariantResults, dataset: str) -> VariantPredictions:
    """The variant's predictions of one evaluation set, in the type that verdicts take."""
    return VariantPredictions(
        variant.variant, variant.predictions[dataset], variant.failed_check_on(dataset)
    )


def verdict_on(results: Results, variant: VariantResults, dataset: str) -> Verdict | None:
    """The verdict against the study's baseline; None for the baseline itself."""
    for comparison, verdict in results.verdicts.items():
        at = (comparison.model, comparison.dataset, comparison.variant)
        if at == (variant.model, dataset, variant.variant) and (
            comparison.baseline == results.study.baseline
        ):
            return verdict
    return None


def main_estimate(results: Results, variant: VariantResults, dataset: str) -> Estimate:
    """Accuracy or exact match of one variant on one evaluation set."""
    adapter = results.study.evaluation.datasets[dataset].adapter
    return results.dataset_estimates[*variant.key, dataset][main_metric(adapter)]


def best_fixed_answers(results: Results) -> dict[str, FixedAnswer]:
    """The best constant answer of every evaluation set; all models have the same items."""
    first = results.baseline_of(results.models[0])
    datasets = results.study.evaluation.datasets
    return {
        name: best_fixed_answer(evaluation_set.adapter, first.predictions[name])
        for name, evaluation_set in datasets.items()
    }


def checks_cell(variant: VariantResults) -> str:
    """`70 of 70`: the number of passed checks on the checkpoint and on the evaluation."""
    total = len(variant.gates)
    return f"{total - len(variant.failed_gates)} of {total}" + ("" if variant.passed else " ✗")


def comparison_table(results: Results, model: str) -> Rows:
    """Every comparison of one model: flips both ways, difference, tests, verdict."""
    rows, reasons_shown = [], set()
    for c, verdict in ordered_comparisons(results, model):
        row = _comparison_row(results, c, verdict)
        if verdict.kind == "exploratory" and (role := results.role(c.variant)):
            row["verdict"] = Markup(ROLES.get(role, "exploratory"))
        if verdict.kind == "uninformative" and (c.dataset, verdict.reason) in reasons_shown:
            row["verdict"] = Markup("uninformative, as above")
        if verdict.kind == "invalid" and verdict.reason in {reason for _, reason in reasons_shown}:
            row["verdict"] = Markup("**invalid**, as above")
        reasons_shown.add((c.dataset, verdict.reason))
        rows.append(row)
    return rows


def ordered_comparisons(results: Results, model: str) -> list[tuple[Comparison, Verdict]]:
    """One model's comparisons, dataset by dataset, the declared ones first in each."""
    datasets = list(results.study.evaluation.datasets)
    comparisons = [(c, v) for c, v in results.verdicts.items() if c.model == model]
    return sorted(comparisons, key=lambda cv: (datasets.index(cv[0].dataset), not cv[1].primary))


def _comparison_row(results: Results, c: Comparison, verdict: Verdict) -> dict:
    paired = verdict.paired
    tested = verdict.kind != "invalid"
    against = "" if c.baseline == results.study.baseline else f" vs `{c.baseline}`"
    units = f" ({paired.clusters} passages)" if paired.clusters < paired.n else ""
    return {
        "dataset": dataset_name(c.dataset),
        "variant": Markup(f"{variant_label(results, c.variant)}{against}"),
        "verdict": Markup(verdict_text(verdict, results.rules.margin)),
        "items": f"{paired.n}{units}",
        "lost": str(paired.losses),
        "gained": str(paired.gains),
        "Δ [points]": with_span(paired.delta, paired.interval, points),
        "p": p_value(paired.p if tested else None),
        "Holm p": p_value(verdict.holm_p),
        "detectable loss": _loss_cell(paired.detectable),
    }


def _loss_cell(fraction: float | None) -> str:
    return "none" if fraction is None else f"{100 * fraction:.1f}"


def verdict_text(verdict: Verdict, margin: float) -> str:
    """The verdict in words, with its reason; safe as Markdown."""
    word = {
        "worse": "**worse**",
        "better": "**better**",
        "equivalent": f"**equivalent within ±{100 * margin:.1f} points**",
        "inconclusive": "**inconclusive** (no difference detected)",
        "uninformative": "**uninformative**" if verdict.primary else "uninformative",
        "invalid": "**invalid**",
        "exploratory": "exploratory",
    }[verdict.kind]
    return f"{word}: {escape(verdict.reason)}" if verdict.reason else word


def token_table(results: Results, model: str) -> Rows:
    """Perplexity, its change, KL and top-1 agreement, with intervals by passage."""
    baseline, rows = results.baseline_of(model), []
    for variant in results.variants_of(model):
        tokens = results.token_estimates[variant.key]
        row = {"variant": variant_label(results, variant.variant)}
        row["perplexity"] = two_decimals(tokens["perplexity"].value)
        if variant is baseline:
            row |= {"Δ loss [nats/token]": MISSING, "KL [nats/token]": "0"}
            if results.noise_floor:
                row["KL / noise floor"] = "0"
            row["top-1 agreement"] = "100.0 %"
        else:
            loss = token_difference(baseline, variant, "nll", results.rules)
            row["Δ loss [nats/token]"] = with_span(loss.value, loss.interval, signed4)
            kl = tokens["kl"]
            row["KL [nats/token]"] = with_span(kl.value, kl.interval, number)
            if results.noise_floor:
                row["KL / noise floor"] = number(kl_over_noise_floor(results, variant), 2)
            top = tokens["top1_agreement"]
            row["top-1 agreement"] = percent_span(top.value, top.interval)
        rows.append(row)
    return rows
