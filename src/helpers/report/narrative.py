"""Text made from numbers: every sentence that holds a number computes it from the records."""

from helpers.report import executive, executive_controls, narrative_findings
from helpers.report.estimates import token_difference
from helpers.report.markdown import code, count, dataset_name, listed, number, percent_plain
from helpers.report.results import Results


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
        f"No ability can be measured on {dataset_model_places(places)}: there `{baseline}` "
        "itself is seldom readable or does not clearly beat the best constant answer."
    )


def model_comparison_sentences(results: Results) -> str:
    """Whether quantization changes a fine-tuned model more than its start model."""
    sentences = []
    for model in results.training:
        sentences.append(narrative_findings.training_summary(results, model))
        start = results.study.models[model].finetune.start
        for name in results.studied_variants:
            pair = results.evaluations[start, name], results.evaluations[model, name]
            change = token_difference(*pair, "kl", results.rules)
            significant = change.p is not None and change.p <= results.rules.alpha
            direction = "more" if significant and change.value > 0 else "less"
            comparison = (
                f"`{model}` {direction} than `{start}`" if significant else "both detectably alike"
            )
            comparison = (
                comparison
                if significant
                else f"`{model}` and `{start}` without a detectable difference"
            )
            kls = [number(e.shared_text["kl"]) for e in pair]
            sentences.append(
                f"`{name}` changes {comparison}: a KL of {kls[1]} against {kls[0]} nats per token "
                f"({narrative_findings.nats_with_interval(change)}; exploratory)."
            )
    return " ".join(sentences) or "This study fine-tunes no model."


def controls_sentence(results: Results) -> str:
    """How many controls behaved as expected."""
    as_expected = sum(outcome.ok for outcome in results.control_outcomes.values())
    return (
        f"A control is a variant whose outcome is known in advance. {as_expected} of "
        f"{count(len(results.control_outcomes), 'control')} behaved as expected."
    )


def token_figure_title(results: Results, model: str, variants: list[str]) -> str:
    """The title of the KL figure: the variant with the lowest KL, if significantly so."""
    evaluations = [results.evaluations[model, v] for v in variants]
    evaluations = sorted(evaluations, key=lambda e: e.shared_text["kl"])
    if len(evaluations) < 2:
        return f"{model}: KL from the float model under {variants[0]}"
    closest, furthest = evaluations[0], evaluations[-1]
    change = token_difference(closest, evaluations[1], "kl", results.rules)
    if change.p is None or change.p > results.rules.alpha:
        return f"{model}: no variant is detectably closest to the float model"
    ratio = number(furthest.shared_text["kl"] / closest.shared_text["kl"])
    return (
        f"{model}: {closest.variant} stays closest to the float model; {furthest.variant} is "
        f"{ratio} times as far"
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
    return (
        "Every variant answers the same prompts; items are paired by id and by the hash of the "
        "prompt. Scores are 0 or 1. Independent items take the exact McNemar test and the Tango "
        "interval; items that share passages take a sign-flip test and a bootstrap over passages. "
        f"{count(rules.family, 'comparison')} "
        f"{'was' if rules.family == 1 else 'were'} declared in advance. Holm's correction "
        "covers all of them; an invalid one stays in with p = 1. *Worse* or *better* requires "
        f"a Holm p of at most {rules.alpha:g}; *equivalent* requires the "
        f"{equivalence_level} interval inside ±{100 * rules.margin:g} points. "
        "The detectable loss is the smallest loss detected with "
        f"{percent_plain(rules.power)} power, for a declared comparison at Holm's strictest level. "
        f"Intervals are at {level}. All other comparisons are exploratory: they have intervals "
        "and uncorrected p-values but no verdict. If an interval and a test disagree, the "
        "test decides. Whether an evaluation is valid is decided before any test."
    )


def conclusion_sentences(results: Results) -> list[str]:
    """The verdicts again, and the limits of what they show."""
    sentences = list(executive.verdict_bullets(results))
    if uninformative := uninformative_finding(results):
        sentences.append(
            f"{uninformative} A larger or stronger model could answer these questions."
        )
    sentences.append(executive_controls.noise_sentence(results))
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
    return list(filter(None, sentences))


def forest_plot_title(results: Results, model: str) -> str:
    """The forest plot's title: the verdicts of the model's declared comparisons."""
    words = {
        "worse": "worse",
        "better": "better",
        "equivalent": f"equivalent within ±{100 * results.rules.margin:.1f} points",
        "inconclusive": "inconclusive",
        "uninformative": "uninformative",
        "invalid": "invalid",
    }
    kinds = [v.kind for c, v in results.declared_verdicts() if c.model == model]
    if not kinds:
        return f"{model}: no comparison was declared in advance"
    counts = [f"{kinds.count(k)} {w}" for k, w in words.items() if k in kinds]
    return f"{model}, {count(len(kinds), 'declared comparison')}: {listed(counts)}"
