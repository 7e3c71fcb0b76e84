"""Text made from numbers: every sentence that holds a number computes it from the records."""

from helpers.evaluation.comparison import Answers, compare
from helpers.evaluation.verdicts import Kind
from helpers.report.estimates import TokenDifference, token_difference, token_estimates
from helpers.report.formats import (
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
from helpers.report.outlier_sentences import collapsed, outlier_finding
from helpers.report.results import Results

CALLED: dict[Kind, str] = {
    "invalid": "invalid (a check failed or the answers are degenerate)",
    "worse": "worse",
    "better": "better",
    "equivalent": "equivalent within ±{margin} points",
    "undetected": "without a detectable difference",
    "uninformative": "uninformative (the baseline itself shows no ability there)",
}


def question(results: Results) -> str:
    """What the study asks."""
    variants, models = ([code(n) for n in names] for names in (results.compared, results.models))
    return (
        f"**Question.** What does quantization as {listed(variants)} cost "
        f"{listed(models)}, against `{results.study.baseline}` on the same items, "
        "and how sure are we?"
    )


def executive_summary(results: Results) -> str:
    """The answer in one paragraph: verdicts first, then what single tokens show."""
    parts = [primary_summary(results), sensitivity(results)]
    for model in results.models:
        parts += [token_summary(results, model, name) for name in subjects(results)]
    parts.append(collapses(results))
    return "**Answer.** " + " ".join(filter(None, parts))


def subjects(results: Results) -> list[str]:
    """The variants the study declared comparisons about; all of them if it declared none."""
    declared = [c.variant for c, _ in results.primary() if c.variant != results.study.baseline]
    return list(dict.fromkeys(declared)) or results.compared


def primary_summary(results: Results) -> str:
    """How many declared comparisons came out how, and which."""
    declared = results.primary()
    if not declared:
        return "No comparison was declared in advance, so none gets a verdict."
    parts = []
    for kind, words in CALLED.items():
        found = [c for c, v in declared if v.kind == kind]
        if found:
            where = places([(c.dataset, c.model) for c in found])
            said = words.format(margin=f"{100 * results.rules.margin:.1f}")
            parts.append(f"{len(found)} {'is' if len(found) == 1 else 'are'} {said}: {where}")
    opening = f"Of {count(len(declared), 'comparison')} declared in advance"
    return f"{opening}, {'; '.join(parts)}."


def places(pairs: list[tuple[str, str]]) -> str:
    """(dataset, model) pairs, dataset by dataset: `ARC of base and tuned, BoolQ of tuned`."""
    models: dict[str, list[str]] = {}
    for dataset, model in dict.fromkeys(pairs):
        models.setdefault(dataset, []).append(f"`{model}`")
    return ", ".join(f"{dataset_name(d)} of {listed(names)}" for d, names in models.items())


def sensitivity(results: Results) -> str:
    """What the null results could have missed."""
    told = []
    for c, verdict in results.primary("undetected"):
        loss = verdict.paired.detectable
        size = "more than there is to lose" if loss is None else f"{100 * loss:.1f} points"
        told.append(f"{size} on {dataset_name(c.dataset)} of `{c.model}`")
    if not told:
        return ""
    return (
        f"A loss has to be this large to be found with {percent(results.rules.power)} "
        f"probability: {listed(told)}."
    )


def token_summary(results: Results, model: str, variant: str) -> str:
    """What the variant does to single tokens of one model, against its control if it has one."""
    found, baseline = results.evaluations[model, variant], results.baseline_of(model)
    rules, tokens = results.rules, token_estimates(found, results.rules)
    loss = token_difference(baseline, found, "nll", rules)
    text = (
        f"Token by token, `{variant}` takes the perplexity of `{model}` from "
        f"{two_decimals(baseline.shared_text['perplexity'])} to "
        f"{two_decimals(found.shared_text['perplexity'])} "
        f"({nats(loss)}), shifts the next-token distribution by a KL of "
        f"{number(tokens['kl'].value)} nats and keeps {percent(tokens['top1_agreement'].value)} "
        "of the top-1 tokens."
    )
    return (
        text if found.problem is None else f"{text} It failed a check, so this counts for nothing."
    )


def nats(difference: TokenDifference) -> str:
    """A mean difference per token with its interval."""
    interval = f" {span(difference.interval, signed4)}" if difference.interval else ""
    return f"{signed4(difference.value)}{interval} nats a token"


def collapses(results: Results) -> str:
    """Which variants lost the model altogether, by perplexity."""
    found: dict[str, list[str]] = {}
    for model in results.models:
        base = results.baseline_of(model).shared_text["perplexity"]
        for e in results.compared_in(model):
            level = e.shared_text["perplexity"]
            if collapsed(level, base):
                told = f"{two_decimals(level)} against {two_decimals(base)} for `{model}`"
                found.setdefault(e.variant, []).append(told)
    told = [f"under `{variant}` ({listed(levels)})" for variant, levels in found.items()]
    return f"Perplexity collapses {listed(told)}." if told else ""


def findings(results: Results) -> list[str]:
    """Three to six key findings, each with the numbers behind it."""
    told = [gates_finding(results)]
    for model in results.models:
        told += [smoothing_finding(results, model, v) for v in subjects(results)]
    told += [outlier_finding(results, model) for model in results.models[:1]]
    told += [blind_finding(results), size_finding(results)]
    told += [training_summary(results, model) for model in results.training]
    return list(filter(None, told))[:6]


def bullets(sentences: list[str]) -> str:
    return "\n".join(f"- {sentence}" for sentence in sentences)


def gates_finding(results: Results) -> str:
    """How many checks held."""
    everything = list(results.evaluations.values())
    made = sum(e.verification is not None for e in everything)
    total = sum(len(e.gates) for e in everything)
    failed = [(e, gate) for e in everything for gate in e.failed_gates]
    if not failed:
        checkpoints = f"{count(made, 'checkpoint')} and " if made else ""
        return (
            f"All {total} checks on {checkpoints}{count(len(everything), 'evaluation')} hold: "
            "each table below is about the model and the variant it names."
        )
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


def blind_finding(results: Results) -> str:
    """Evaluation sets on which the baseline itself shows no ability."""
    baseline = results.study.baseline
    found = [
        (c.dataset, c.model)
        for c, v in results.verdicts.items()
        if v.kind == "uninformative" and c.baseline == baseline
    ]
    if not found:
        return ""
    return (
        f"Nothing about ability can be read from {places(found)}: there `{baseline}` itself is "
        "seldom readable, or does not clearly beat the best fixed answer."
    )


def size_finding(results: Results) -> str:
    """How large the quantized files are."""
    told = {}
    for e in results.evaluations.values():
        if e.quantization and e.variant in subjects(results):
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


def models_compared(results: Results) -> str:
    """Whether quantization moves a fine-tuned model more than the one it came from."""
    told = []
    for model in results.training:
        told.append(training_summary(results, model))
        start = results.study.models[model].finetune.start
        for name in subjects(results):
            pair = results.evaluations[start, name], results.evaluations[model, name]
            change = token_difference(*pair, "kl", results.rules)
            sure = change.p is not None and change.p <= results.rules.alpha
            more = "more" if sure and change.value > 0 else "less"
            verdict = f"`{model}` {more} than `{start}`" if sure else "both detectably alike"
            verdict = (
                verdict if sure else f"`{model}` and `{start}` without a detectable difference"
            )
            kls = [number(e.shared_text["kl"]) for e in pair]
            told.append(
                f"`{name}` moves {verdict}: a KL of {kls[1]} against {kls[0]} nats a token "
                f"({nats(change)}; exploratory)."
            )
    return " ".join(told) or "This study has no model that it fine-tuned itself."


def legend(results: Results) -> str:
    """How to read the headline table."""
    level = percent(results.rules.confidence)
    return (
        f"In brackets the {level} interval, in percent. ✗: invalid, not to be compared. "
        f"○: uninformative, since `{results.study.baseline}` itself does not clearly beat the best "
        "fixed answer on these items, or is seldom readable. KL and top-1 agreement are against "
        f"`{results.study.baseline}`, over "
        f"{results.baseline_of(results.models[0]).shared_text['tokens']:,} tokens of "
        f"{count(results.baseline_of(results.models[0]).shared_text['passages'], 'passage')}."
    )


def method(results: Results) -> str:
    """How comparisons are made and called."""
    rules = results.rules
    level, narrow = percent(rules.confidence), percent(1 - 2 * rules.alpha)
    return (
        "Every variant answers the same items in the same words; items are paired by id and by "
        "the hash of the prompt. Scores are 0 or 1: exact McNemar test and Tango interval, or, "
        "where items share passages, a sign-flip test and a bootstrap over passages. "
        f"{count(rules.family, 'comparison')} "
        f"{'was' if rules.family == 1 else 'were'} declared in advance; Holm's correction runs "
        "over all of them, and one that is invalid stays in with p = 1. *Worse* or *better* needs "
        f"a Holm p of at most {rules.alpha:g}; *equivalent* needs the {narrow} interval "
        f"inside ±{100 * rules.margin:.1f} points. The detectable loss is the smallest found with "
        f"{percent(rules.power)} power, for a declared comparison at Holm's strictest level. "
        f"Intervals are at {level}. All other comparisons are exploratory: they have intervals "
        "and uncorrected p-values, but no verdict. Where an interval and a test disagree, the "
        "test decides. Whether an evaluation is valid is decided "
        "before any test is looked at."
    )


def conclusions(results: Results) -> list[str]:
    """What can be said, what cannot, and why not."""
    declared = results.primary()
    told = [primary_summary(results)]
    undetected = results.primary("undetected")
    if undetected:
        sizes = sorted({v.paired.n for _, v in undetected})
        told.append(
            f"No detectable difference is not equality: with {listed([str(n) for n in sizes])} "
            f"items a smaller loss would go unseen. {sensitivity(results)}"
        )
    if blind := blind_finding(results):
        told.append(f"{blind} A larger or stronger model could answer these questions.")
    if len(declared) and results.primary("invalid"):
        told.append("What is invalid is a statement about the run, never about quantization.")
    told.append(
        "The token-level figures see far smaller changes than the items do, but on one kind of "
        "text, and a KL is not a loss of ability."
    )
    told.append(
        "Two correct int8 implementations do not give the same numbers: a relative change of "
        "1e-7 in the embeddings tips rounding decisions, which cascade through the layers, and "
        "can move the logits of a quantized model about as far as quantization itself moves "
        "them. Which single items flip is thus partly a draw of rounding noise; NOTES.md has the "
        "measurement."
    )
    return told


def forest_claim(results: Results, model: str) -> str:
    """The forest plot's title: how the model's declared comparisons came out."""
    words = {
        "worse": "worse",
        "better": "better",
        "equivalent": f"equivalent within ±{100 * results.rules.margin:.1f} points",
        "undetected": "with no detectable difference",
        "uninformative": "uninformative",
        "invalid": "invalid",
    }
    kinds = [v.kind for c, v in results.primary() if c.model == model]
    if not kinds:
        return f"{model}: nothing was declared in advance"
    told = [f"{kinds.count(k)} {w}" for k, w in words.items() if k in kinds]
    return f"{model}, {count(len(kinds), 'declared comparison')}: {listed(told)}"
