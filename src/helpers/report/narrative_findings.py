"""The key findings: sentences that hold numbers, each computed from the records."""

from helpers.report import executive_controls
from helpers.report.estimates import TokenDifference, token_difference
from helpers.report.markdown import (
    capitalized,
    code,
    count,
    dataset_name,
    escape,
    listed,
    number,
    p_value,
    percent,
    points,
    signed4,
    span,
    two_decimals,
)
from helpers.report.outliers_narrative import outlier_finding
from helpers.report.results import Results
from helpers.report.results_data import VariantResults
from helpers.statistics.comparison import VariantPredictions, paired_comparison

MOST_FINDINGS = 8


def key_findings(results: Results) -> list[str]:
    """The key findings, each with its numbers."""
    sentences = [gates_finding(results), executive_controls.noise_sentence(results)]
    sentences += [token_finding(results, v) for v in results.studied_variants]
    sentences += [
        smoothing_finding(results, model, v)
        for v in results.studied_variants
        for model in results.models
    ]
    sentences += [outlier_finding(results, model) for model in results.models[:1]]
    sentences += [size_finding(results)]
    sentences += [training_summary(results, model) for model in results.training]
    return list(filter(None, sentences))[:MOST_FINDINGS]


def token_finding(results: Results, variant: str) -> str:
    """The variant's token-level effect on every model, beside the noise floor."""
    evaluations = [results.evaluations[model, variant] for model in results.models]
    evaluations = [e for e in evaluations if e.failed_check is None]
    if not evaluations:
        return ""
    tokens = [results.token_estimates[e.key] for e in evaluations]
    ratios = [executive_controls.kl_over_noise_floor(results, e) for e in evaluations]
    noise_clause = (
        ""
        if None in ratios
        else (f" ({listed([number(t, 2) for t in ratios])} times the effect of rounding alone)")
    )
    return (
        f"Token by token, `{variant}` shifts the next-token distribution of "
        f"{listed([code(e.model) for e in evaluations])} by a KL of "
        f"{listed([number(t['kl'].value) for t in tokens])} nats{noise_clause}, keeps "
        f"{listed([percent(t['top1_agreement'].value) for t in tokens])} of the most likely "
        "tokens, and changes perplexity "
        f"{listed([_perplexity_change(results, e) for e in evaluations])}."
    )


def _perplexity_change(results: Results, variant: VariantResults) -> str:
    baseline = results.baseline_of(variant.model)
    before, after = (two_decimals(e.shared_text["perplexity"]) for e in (baseline, variant))
    loss = token_difference(baseline, variant, "nll", results.rules)
    return f"from {before} to {after} ({nats_with_interval(loss)})"


def gates_finding(results: Results) -> str:
    """The number of passed checks; recipes broken on purpose are counted separately."""
    evaluations = list(results.evaluations.values())
    broken_on_purpose = [e for e in evaluations if results.role(e.variant) == "broken on purpose"]
    others = [e for e in evaluations if e not in broken_on_purpose]
    total = sum(len(e.gates) for e in others)
    failed = [(e, gate) for e in others for gate in e.failed_gates]
    parts = [
        _failed_gates_sentence(failed, total) if failed else _passed_gates_sentence(others, total)
    ]
    for variant in dict.fromkeys(e.variant for e in broken_on_purpose):
        failures = [
            f"{len(e.failed_gates)} of {len(e.gates)} checks in `{e.model}`"
            for e in broken_on_purpose
            if e.variant == variant
        ]
        parts.append(f"`{variant}`, broken on purpose, fails {listed(failures)}.")
    return " ".join(parts)


def _passed_gates_sentence(evaluations: list[VariantResults], total: int) -> str:
    checkpoint_count = sum(e.verification is not None for e in evaluations)
    checkpoints = f"{count(checkpoint_count, 'checkpoint')} and " if checkpoint_count else ""
    return (
        f"All {total} checks on {checkpoints}{count(len(evaluations), 'evaluation')} passed: "
        "each table below describes the model and the variant that it names."
    )


def _failed_gates_sentence(failed: list[tuple[VariantResults, dict]], total: int) -> str:
    first: dict[str, str] = {}
    for e, gate in failed:
        failures = f"{escape(gate['name'])} ({escape(gate['measured'])})"
        first.setdefault(f"`{e.model}`/`{e.variant}`", failures)
    failures = "; ".join(f"{variant}: {failure}" for variant, failure in first.items())
    return (
        f"{len(failed)} of {total} checks fail (first failure of each variant: {failures}); "
        "the results that they guard are invalid."
    )


def smoothing_finding(results: Results, model: str, variant: str) -> str:
    """The effect of smoothing, against the same scheme without it."""
    if (control := results.unsmoothed_twin(variant)) is None:
        return ""
    plain, smooth = (results.evaluations[model, name] for name in (control, variant))
    if plain.failed_check or smooth.failed_check:
        return ""
    change = token_difference(plain, smooth, "kl", results.rules)
    kls = [number(e.shared_text["kl"]) for e in (plain, smooth)]
    kl_change = (
        f"the KL from the float model is {kls[0]} nats per token under `{control}` and {kls[1]} "
        f"under `{variant}`"
    )
    if change.p is None or change.p > results.rules.alpha:
        verdict = "no effect of smoothing itself is detectable"
    else:
        verdict = f"smoothing itself {'helps' if change.value < 0 else 'hurts'}"
    p = (
        ""
        if change.p is None
        else f", p {_p_with_sign(change.p)} over {count(change.passages, 'passage')}"
    )
    return f"In `{model}`, {verdict}: {kl_change} ({nats_with_interval(change)}{p}; exploratory)."


def _p_with_sign(p: float) -> str:
    text = p_value(p)
    return text if text.startswith("<") else f"= {text}"


def size_finding(results: Results) -> str:
    """The size of the quantized files."""
    linears = {}
    for e in results.evaluations.values():
        if results.study.variants[e.variant].quantized and e.variant in results.studied_variants:
            sizes = e.quantization["results"]
            share = sum(sizes["bytes_after"].values()) / sum(sizes["bytes_before"].values())
            linears[e.variant, percent(share)] = sizes["quantized_linears"]
    parts = [
        f"`{variant}` is {share} of the float model's size, with {count(n, 'Linear')} in int8"
        for (variant, share), n in linears.items()
    ]
    return f"{capitalized(listed(parts))}." if parts else ""


def training_summary(results: Results, model: str) -> str:
    """The effect of fine-tuning: held-out loss, and accuracy on word problems."""
    training = results.training[model]["results"]
    start = results.study.models[model].finetune.start
    text = (
        f"Fine-tuning `{start}` into `{model}` changes the loss on held-out problems from "
        f"{training['heldout_loss_before']:.3f} to {training['heldout_loss_after']:.3f} nats per "
        "answer token"
    )
    changes = []
    for name, evaluation_set in results.study.evaluation.datasets.items():
        if evaluation_set.adapter != "openmath":
            continue
        before, after = (
            VariantPredictions(m, results.baseline_of(m).predictions[name]) for m in (start, model)
        )
        comparison = paired_comparison(before, after, results.rules, alpha=results.rules.alpha)
        scores = [sum(p["score"] for p in a.predictions) / comparison.n for a in (before, after)]
        changes.append(
            f"{dataset_name(name)} from {percent(scores[0])} to {percent(scores[1])} "
            f"({points(comparison.delta)} {span(comparison.interval, points)} points; exploratory)"
        )
    return text + (f", and {listed(changes)}." if changes else ".")


def nats_with_interval(difference: TokenDifference) -> str:
    """A mean difference per token with its interval."""
    interval = f" {span(difference.interval, signed4)}" if difference.interval else ""
    return f"{signed4(difference.value)}{interval} nats per token"
