"""Text of the report: every sentence that holds a number computes it from the records.

The question, the key findings, the method and the limits.
"""

from helpers.report import executive
from helpers.report.estimates import TokenDifference, VariantResults, token_difference
from helpers.report.markdown import (
    code,
    count,
    dataset_name,
    escape,
    listed,
    number,
    p_value,
    percent,
    percent_plain,
    points,
    signed4,
    span,
    two_decimals,
)
from helpers.report.results import Results
from helpers.statistics.verdicts import VariantPredictions, paired_comparison

MOST_FINDINGS = 8


def key_findings(results: Results) -> list[str]:
    """The key findings, each with its numbers."""
    sentences = [gates_finding(results), executive.noise_sentence(results)]
    sentences += [token_finding(results, v) for v in results.studied_variants]
    sentences += [smoothing_finding(results, v) for v in results.studied_variants]
    return list(filter(None, sentences))[:MOST_FINDINGS]


def token_finding(results: Results, variant: str) -> str:
    """The variant's token-level effect on every model, beside the noise floor."""
    evaluations = [results.evaluations[model, variant] for model in results.models]
    evaluations = [e for e in evaluations if e.failed_check is None]
    if not evaluations:
        return ""
    tokens = [results.token_estimates[e.key] for e in evaluations]
    ratios = [executive.kl_over_noise_floor(results, e) for e in evaluations]
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


def smoothing_finding(results: Results, variant: str) -> str:
    """The effect of smoothing on every model, against the same scheme without it."""
    if (control := results.unsmoothed_twin(variant)) is None:
        return ""
    clauses, passages = [], 0
    for model in results.models:
        plain, smooth = (results.evaluations[model, name] for name in (control, variant))
        if plain.failed_check or smooth.failed_check:
            continue
        change = token_difference(plain, smooth, "kl", results.rules)
        clauses.append(_smoothing_clause(results, plain, smooth, change))
        passages = change.passages
    if not clauses:
        return ""
    return (
        f"Smoothing, by `{variant}` against `{control}`: {'; '.join(clauses)}. Exploratory, over "
        f"{count(passages, 'passage')}."
    )


def _smoothing_clause(
    results: Results, plain: VariantResults, smooth: VariantResults, change: TokenDifference
) -> str:
    """`in `base` it helps (KL 0.0233 instead of 0.0418 nats per token, …)`."""
    verdict = "it has no detectable effect"
    if change.p is not None and change.p <= results.rules.alpha:
        verdict = f"it {'helps' if change.value < 0 else 'hurts'}"
    before, after = (number(e.shared_text["kl"]) for e in (plain, smooth))
    p = "" if change.p is None else f", p {_p_with_sign(change.p)}"
    return (
        f"in `{smooth.model}` {verdict} (KL {after} instead of {before}, "
        f"{nats_with_interval(change)}{p})"
    )


def _p_with_sign(p: float) -> str:
    text = p_value(p)
    return text if text.startswith("<") else f"= {text}"


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


def question_sentence(results: Results) -> str:
    """The study's question."""
    roles = (None, "without smoothing")
    variants_asked = [
        v for v in results.compared if results.role(v) in roles or v in results.studied_variants
    ]
    variants = [code(n) for n in variants_asked or results.compared]
    models = [code(n) for n in results.models]
    return (
        f"**Question.** What does quantization with {listed(variants)} cost "
        f"{listed(models)}, against `{results.study.baseline}` on the same items, "
        "and how sure are we?"
    )


def bullets(sentences: list[str]) -> str:
    return "\n".join(f"- {sentence}" for sentence in sentences)


def dataset_model_places(pairs: list[tuple[str, str]]) -> str:
    """(dataset, model) pairs, dataset by dataset: `ARC of base and tuned, BoolQ of tuned`."""
    models: dict[str, list[str]] = {}
    for dataset, model in dict.fromkeys(pairs):
        models.setdefault(dataset, []).append(f"`{model}`")
    return ", ".join(f"{dataset_name(d)} of {listed(names)}" for d, names in models.items())


def uninformative_finding(results: Results) -> str:
    """Evaluation sets on which the baseline is uninformative."""
    baseline = results.study.baseline
    places = [
        (c.dataset, c.model)
        for c, v in results.verdicts.items()
        if v.kind == "uninformative" and c.baseline == baseline
    ]
    if not places:
        return ""
    return (
        f"By right or wrong, no ability can be measured on {dataset_model_places(places)}: there "
        f"`{baseline}` itself is seldom readable or does not clearly beat the best constant answer."
    )


def kl_comparison_sentence(results: Results, model: str, variant: str) -> str:
    """Whether a variant changes a fine-tuned model more than its start model, by KL."""
    start = results.study.models[model].finetune.start
    pair = results.evaluations[start, variant], results.evaluations[model, variant]
    change = token_difference(*pair, "kl", results.rules)
    comparison = f"`{model}` and `{start}` without a detectable difference"
    if change.p is not None and change.p <= results.rules.alpha:
        comparison = f"`{model}` {'more' if change.value > 0 else 'less'} than `{start}`"
    kls = [number(e.shared_text["kl"]) for e in pair]
    return (
        f"`{variant}` changes {comparison}: a KL of {kls[1]} against {kls[0]} nats per token "
        f"({nats_with_interval(change)}; exploratory)."
    )


def controls_sentence(results: Results) -> str:
    """How many controls behaved as expected."""
    as_expected = sum(outcome.ok for outcome in results.control_outcomes.values())
    return (
        f"A control is a variant whose outcome is known in advance. {as_expected} of "
        f"{count(len(results.control_outcomes), 'control')} behaved as expected."
    )


def headline_legend(results: Results) -> str:
    """How to read the headline table."""
    level = percent_plain(results.rules.confidence)
    return (
        f"Brackets: {level} interval, in percent. ✗: invalid, do not compare. "
        f"○: uninformative, because `{results.study.baseline}` itself does not clearly beat the "
        "best constant answer on these items or is seldom readable. KL and top-1 agreement "
        f"compare with `{results.study.baseline}`, over "
        f"{results.baseline_of(results.models[0]).shared_text['tokens']:,} tokens of "
        f"{count(results.baseline_of(results.models[0]).shared_text['passages'], 'passage')}."
    )


def method_paragraph(results: Results) -> str:
    """How comparisons are computed and how verdicts are named."""
    rules = results.rules
    level, equivalence_level = percent_plain(rules.confidence), percent_plain(1 - 2 * rules.alpha)
    shared = ""
    if rules.scores > 1:
        shared = "Graded scores judge comparisons too and have half of the level, so p is doubled. "
    return (
        "Every variant answers the same prompts; items are paired by id and by the hash of the "
        "prompt. Scores are 0 or 1. Independent items take the exact McNemar test and the Tango "
        "interval; items that share passages take a sign-flip test and a bootstrap over passages. "
        f"{count(rules.family, 'comparison')} "
        f"{'was' if rules.family == 1 else 'were'} declared in advance. Holm's correction "
        f"covers all of them; an invalid one stays in with p = 1. {shared}*Worse* or *better* "
        f"requires a Holm p of at most {rules.alpha:g}; *equivalent* requires the "
        f"{equivalence_level} interval inside ±{100 * rules.margin:g} points. "
        "The detectable loss is the smallest loss detected with "
        f"{percent_plain(rules.power)} power, for a declared comparison at Holm's strictest level. "
        f"Intervals are at {level}. All other comparisons are exploratory: they have intervals "
        "and uncorrected p-values but no verdict. If an interval and a test disagree, the "
        "test decides. Whether an evaluation is valid is decided before any test."
    )


def conclusion_sentences(results: Results) -> list[str]:
    """The limits of what the verdicts show."""
    sentences = []
    if uninformative := uninformative_finding(results):
        sentences.append(
            f"{uninformative} A larger or stronger model could answer these questions."
        )
    sentences.append(
        "Token-level measures detect far smaller changes than the items do, but on one kind of "
        "text, and a KL is not a loss of accuracy."
    )
    sentences.append(
        "Two correct int8 implementations give different numbers: a change of one part in ten "
        "million in the embeddings flips rounding decisions. These cascade through the layers "
        "and can change the logits of a quantized model about as much as quantization itself "
        "does. Rounding noise therefore decides in part which single items flip; NOTES.md has "
        "the measurement."
    )
    return sentences


def declared_verdicts_title(results: Results) -> str:
    """The verdicts of the declared comparisons, counted: a figure's title."""
    words = {
        "worse": "worse",
        "better": "better",
        "equivalent": f"equivalent within ±{100 * results.rules.margin:.1f} points",
        "inconclusive": "inconclusive",
        "uninformative": "uninformative",
        "invalid": "invalid",
    }
    kinds = [v.kind for _, v in results.declared_verdicts()]
    if not kinds:
        return "Right or wrong: no comparison was declared in advance"
    counts = [f"{kinds.count(k)} {w}" for k, w in words.items() if k in kinds]
    return f"Right or wrong, {count(len(kinds), 'declared comparison')}: {listed(counts)}"
