"""The key findings: sentences that hold numbers, each computed from the records."""

from helpers.report import executive_controls
from helpers.report.estimates import TokenDifference, token_difference, token_estimates
from helpers.report.markdown import (
    capital,
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
from helpers.report.results_data import Evaluated
from helpers.statistics.comparison import Answers, compare

MOST_FINDINGS = 8


def findings(results: Results) -> list[str]:
    """The key findings, each with the numbers behind it."""
    told = [gates_finding(results), executive_controls.noise_sentence(results)]
    told += [token_finding(results, v) for v in results.subjects]
    told += [
        smoothing_finding(results, model, v) for v in results.subjects for model in results.models
    ]
    told += [outlier_finding(results, model) for model in results.models[:1]]
    told += [size_finding(results)]
    told += [training_summary(results, model) for model in results.training]
    return list(filter(None, told))[:MOST_FINDINGS]


def token_finding(results: Results, variant: str) -> str:
    """What the variant does to single tokens of every model, beside what rounding does."""
    found = [results.evaluations[model, variant] for model in results.models]
    found = [e for e in found if e.problem is None]
    if not found:
        return ""
    tokens = [token_estimates(e, results.rules) for e in found]
    times = [executive_controls.times_the_noise(results, e) for e in found]
    noise = (
        ""
        if None in times
        else (f" ({listed([number(t, 2) for t in times])} times what rounding alone does)")
    )
    return (
        f"Token by token, `{variant}` moves the next-token distribution of "
        f"{listed([code(e.model) for e in found])} by a KL of "
        f"{listed([number(t['kl'].value) for t in tokens])} nats{noise}, keeps "
        f"{listed([percent(t['top1_agreement'].value) for t in tokens])} of the most likely "
        f"tokens, and takes perplexity {listed([_perplexities(results, e) for e in found])}."
    )


def _perplexities(results: Results, found: Evaluated) -> str:
    baseline = results.baseline_of(found.model)
    before, after = (two_decimals(e.shared_text["perplexity"]) for e in (baseline, found))
    loss = token_difference(baseline, found, "nll", results.rules)
    return f"from {before} to {after} ({nats(loss)})"


def gates_finding(results: Results) -> str:
    """How many checks held; a recipe that is broken on purpose is counted apart."""
    everything = list(results.evaluations.values())
    meant = [e for e in everything if results.role(e.variant) == "broken on purpose"]
    counted = [e for e in everything if e not in meant]
    total = sum(len(e.gates) for e in counted)
    failed = [(e, gate) for e in counted for gate in e.failed_gates]
    parts = [_failed_gates(failed, total) if failed else _all_gates(counted, total)]
    for variant in dict.fromkeys(e.variant for e in meant):
        told = [
            f"{len(e.failed_gates)} of {len(e.gates)} checks in `{e.model}`"
            for e in meant
            if e.variant == variant
        ]
        parts.append(f"`{variant}`, broken on purpose, fails {listed(told)}.")
    return " ".join(parts)


def _all_gates(counted: list[Evaluated], total: int) -> str:
    made = sum(e.verification is not None for e in counted)
    checkpoints = f"{count(made, 'checkpoint')} and " if made else ""
    return (
        f"All {total} checks on {checkpoints}{count(len(counted), 'evaluation')} hold: "
        "each table below is about the model and the variant it names."
    )


def _failed_gates(failed: list[tuple[Evaluated, dict]], total: int) -> str:
    first: dict[str, str] = {}
    for e, gate in failed:
        told = f"{escape(gate['name'])} ({escape(gate['measured'])})"
        first.setdefault(f"`{e.model}`/`{e.variant}`", told)
    told = "; ".join(f"{who}: {what}" for who, what in first.items())
    return (
        f"{len(failed)} of {total} checks fail (the first of each: {told}); "
        "what they guard is invalid."
    )


def smoothing_finding(results: Results, model: str, variant: str) -> str:
    """What the smoothing itself did, against the same scheme without it."""
    if (control := results.unsmoothed(variant)) is None:
        return ""
    plain, smooth = (results.evaluations[model, name] for name in (control, variant))
    if plain.problem or smooth.problem:
        return ""
    change = token_difference(plain, smooth, "kl", results.rules)
    kls = [number(e.shared_text["kl"]) for e in (plain, smooth)]
    told = f"the KL from the float model goes from {kls[0]} to {kls[1]} nats a token"
    if change.p is None or change.p > results.rules.alpha:
        verdict = "no effect of smoothing itself is detectable"
    else:
        verdict = f"smoothing itself {'helps' if change.value < 0 else 'hurts'}"
    p = "" if change.p is None else f", p {_p(change.p)} over {count(change.passages, 'passage')}"
    return (
        f"In `{model}`, {verdict}: from `{control}` to `{variant}` {told} ({nats(change)}{p}; "
        "exploratory)."
    )


def _p(p: float) -> str:
    shown = p_value(p)
    return shown if shown.startswith("<") else f"= {shown}"


def size_finding(results: Results) -> str:
    """How large the quantized files are."""
    told = {}
    for e in results.evaluations.values():
        if results.study.variants[e.variant].quantized and e.variant in results.subjects:
            made = e.quantization["results"]
            share = sum(made["bytes_after"].values()) / sum(made["bytes_before"].values())
            told[e.variant, percent(share)] = made["quantized_linears"]
    parts = [
        f"`{variant}` is {share} of the float model's size, with {count(n, 'Linear')} in int8"
        for (variant, share), n in told.items()
    ]
    return f"{capital(listed(parts))}." if parts else ""


def training_summary(results: Results, model: str) -> str:
    """What the fine-tuning itself changed: held-out loss, and each shared evaluation set."""
    made = results.training[model]["results"]
    start = results.study.models[model].finetune.start
    text = (
        f"Fine-tuning `{start}` into `{model}` takes the loss on held-out problems from "
        f"{made['heldout_loss_before']:.3f} to {made['heldout_loss_after']:.3f} nats an answer "
        "token"
    )
    changes = []
    for name, wanted in results.study.evaluation.datasets.items():
        if wanted.adapter != "openmath":
            continue
        before, after = (
            Answers(m, results.baseline_of(m).predictions[name]) for m in (start, model)
        )
        found = compare(before, after, results.rules, alpha=results.rules.alpha)
        scores = [sum(p["score"] for p in a.predictions) / found.n for a in (before, after)]
        changes.append(
            f"{dataset_name(name)} from {percent(scores[0])} to {percent(scores[1])} "
            f"({points(found.delta)} {span(found.interval, points)} points; exploratory)"
        )
    return text + (f", and {listed(changes)}." if changes else ".")


def nats(difference: TokenDifference) -> str:
    """A mean difference per token with its interval."""
    interval = f" {span(difference.interval, signed4)}" if difference.interval else ""
    return f"{signed4(difference.value)}{interval} nats a token"
