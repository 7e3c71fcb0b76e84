"""Text of the report, from the executive summary to the limits.

Every sentence that holds a number computes it from the records.

The executive summary rests on verdicts and controls only. Controls that failed, since otherwise
nothing below counts; they are shown with their duties, and with what rounding alone is worth. The
answer in one sentence a variant, every declared verdict in a small table, and what each kind of
verdict means, with its places. It has to read well for any mixture of verdicts.

Then the question, the key findings, the method and the limits.
"""

from helpers.evaluation.scoring import status_and_answer
from helpers.report.estimates import TokenDifference, VariantResults, token_difference
from helpers.report.markdown import (
    MISSING,
    Markup,
    Rows,
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
from helpers.statistics.verdicts import Role, VariantPredictions, Verdict, paired_comparison
from helpers.study.inputs import UNKNOWN_ORIGIN
from helpers.study.schema import Comparison

ROLE_PURPOSES: dict[Role, str] = {
    "baseline": "reference of every comparison",
    "repetition": "reproducibility of a run",
    "noise floor": "effect of rounding alone",
    "smoothing alone": "effect of smoothing alone",
    "broken on purpose": "detection of a broken recipe",
    "without smoothing": "cost of int8 without smoothing",
}
EQUALITY_ROLES: tuple[Role, ...] = ("repetition", "smoothing alone")
MOST_FINDINGS = 8


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
    """The variant's name, with its role if it is a control, or that it is a simulated ruler."""
    role = "simulated" if results.study.variants[variant].ruler else results.role(variant)
    shown_roles = {"noise floor", "smoothing alone", "repetition", "broken on purpose", "simulated"}
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


JudgedComparison = tuple[Comparison, Verdict]
INFORMATIVE = ("worse", "better", "equivalent", "inconclusive")
VERDICT_WORDS = {
    "worse": "**worse**",
    "better": "**better**",
    "equivalent": "equivalent",
    "inconclusive": "inconclusive",
    "uninformative": "uninformative",
    "invalid": "**invalid**",
}


def answer_sentences(results: Results, heading: str = "Answer") -> str:
    """The answer by right or wrong: one sentence for each variant with declared comparisons."""
    declared = results.declared_verdicts()
    if not declared:
        return (
            f"**{heading}.** No comparison was declared in advance, so this gives no verdict; "
            "all that follows is exploratory."
        )
    sentences = [
        _answer_sentence(results, list(group))
        for group in by_variant_and_baseline(declared).values()
    ]
    if len(sentences) == 1:
        return f"**{heading}.** {sentences[0]}"
    return f"**{heading}.**\n\n" + "\n".join(f"- {sentence}" for sentence in sentences)


def by_variant_and_baseline(
    declared: list[JudgedComparison],
) -> dict[tuple[str, str], list[JudgedComparison]]:
    """Declared comparisons by (variant, baseline), in the study file's order."""
    groups: dict[tuple[str, str], list[JudgedComparison]] = {}
    for c, verdict in declared:
        groups.setdefault((c.variant, c.baseline), []).append((c, verdict))
    return groups


def _answer_sentence(results: Results, group: list[JudgedComparison]) -> str:
    """One variant against one baseline: the outcome and the number of informative comparisons."""
    c, _ = group[0]
    kinds = [verdict.kind for _, verdict in group]
    informative, n = [k for k in kinds if k in INFORMATIVE], len(kinds)
    if not informative:
        return f"No conclusion about `{c.variant}` is possible: {_why_nothing_shown(kinds)}."
    comparisons = f"in the {_of_declared(len(informative), n)} that could show one"
    if n == len(informative):
        comparisons = (
            "in the one comparison declared" if n == 1 else f"in the {n} comparisons declared"
        )
    if worse := kinds.count("worse"):
        text = f"`{c.variant}` is worse than `{c.baseline}` in {_of_declared(worse, n)}"
        better = kinds.count("better")
        return f"{text}, and better in {better}." if better else f"{text}."
    if better := kinds.count("better"):
        better_clause = f"`{c.variant}` is better than `{c.baseline}` in {_of_declared(better, n)}"
        return f"No loss was detected {comparisons}; {better_clause}."
    if set(informative) == {"equivalent"}:
        return (
            f"`{c.variant}` is equivalent to `{c.baseline}` within ±{_margin(results)} points "
            f"{comparisons.replace('show one', 'show a difference')}."
        )
    return (
        f"No loss of `{c.variant}` against `{c.baseline}` was detected {comparisons}. This does "
        "not prove that there is none."
    )


def _of_declared(part: int, n: int) -> str:
    return f"{part} of {count(n, 'declared comparison')}"


def _why_nothing_shown(kinds: list[str]) -> str:
    invalid, n = kinds.count("invalid"), len(kinds)
    if invalid in (0, n):
        kind = "invalid" if invalid else "uninformative"
        return f"its one comparison is {kind}" if n == 1 else f"all {n} comparisons are {kind}"
    are, others_are = _is_or_are(invalid), _is_or_are(n - invalid)
    return (
        f"of {n} comparisons, {invalid} {are} invalid and {n - invalid} {others_are} uninformative"
    )


def _is_or_are(n: int) -> str:
    return "is" if n == 1 else "are"


def _margin(results: Results) -> str:
    return f"{100 * results.rules.margin:g}"


def verdict_table(results: Results) -> Rows:
    """Every declared verdict in one word: a row per variant and model, a column per set."""
    rows = []
    for (variant, baseline), group in by_variant_and_baseline(results.declared_verdicts()).items():
        for model in dict.fromkeys(c.model for c, _ in group):
            against = "" if baseline == results.study.baseline else f" vs `{baseline}`"
            row = {"variant": Markup(f"`{variant}`{against}"), "model": code(model)}
            kinds = {c.dataset: v.kind for c, v in group if c.model == model}
            for dataset in results.study.evaluation.datasets:
                kind = kinds.get(dataset)
                row[dataset_name(dataset)] = Markup(VERDICT_WORDS[kind]) if kind else MISSING
            rows.append(row)
    return rows


def verdict_bullets(results: Results) -> list[str]:
    """One bullet for each kind of verdict: its places and its meaning."""
    writers = {
        "worse": _worse,
        "better": _better,
        "equivalent": _equivalent,
        "inconclusive": _inconclusive,
        "uninformative": _uninformative,
        "invalid": _invalid,
    }
    verdicts_by_writer = (
        (write, results.declared_verdicts(kind)) for kind, write in writers.items()
    )
    bullets = [write(results, judged) for write, judged in verdicts_by_writer if judged]
    return [*bullets, *sound_control_bullets(results)]


def judged_places(results: Results, judged: list[JudgedComparison]) -> str:
    """`ARC of base and tuned, BoolQ of tuned`, with the variant where the study has several."""
    several = len(by_variant_and_baseline(results.declared_verdicts())) > 1
    models_by_place: dict[tuple[str, str], list[str]] = {}
    for c, _ in judged:
        models = models_by_place.setdefault((c.dataset, c.variant), [])
        if f"`{c.model}`" not in models:
            models.append(f"`{c.model}`")
    texts_by_variant: dict[str, list[str]] = {}
    for (dataset, variant), models in models_by_place.items():
        texts_by_variant.setdefault(variant, []).append(
            f"{dataset_name(dataset)} of {listed(models)}"
        )
    if not several:
        return ", ".join(text for texts in texts_by_variant.values() for text in texts)
    return "; ".join(
        f"`{variant}` on {', '.join(texts)}" for variant, texts in texts_by_variant.items()
    )


def _with_difference(results: Results, judged: list[JudgedComparison]) -> str:
    texts = [
        f"{judged_places(results, [(c, v)])}: {points(v.paired.delta)} points "
        f"{span(v.paired.interval, points)}{f', {escape(v.reason)}' if v.reason else ''}"
        for c, v in judged
    ]
    return "; ".join(texts)


def _worse(results: Results, judged: list[JudgedComparison]) -> str:
    return (
        f"**Worse**, by more than chance explains: {_with_difference(results, judged)}. Brackets "
        f"give the {percent_plain(results.rules.confidence)} interval."
    )


def _better(results: Results, judged: list[JudgedComparison]) -> str:
    return (
        f"**Better**, by more than chance explains: {_with_difference(results, judged)}. Rounding "
        "rarely helps; look at the items before you rely on this."
    )


def _equivalent(results: Results, judged: list[JudgedComparison]) -> str:
    return (
        f"**Equivalent within ±{_margin(results)} points** by right or wrong: "
        f"{judged_places(results, judged)}. Any difference there is "
        "smaller than the margin that the study declared harmless."
    )


def _inconclusive(results: Results, judged: list[JudgedComparison]) -> str:
    """Where no difference was detected, and the smallest loss that would have been."""
    places = judged_places(results, judged)
    text = f"**Inconclusive** by right or wrong (no difference detected): {places}."
    if detectable := [(c, v) for c, v in judged if v.paired.detectable is not None]:
        text += (
            " The smallest loss that would be detected with "
            f"{percent_plain(results.rules.power)} power {_detectable_range(results, detectable)}."
        )
    if undetectable := [(c, v) for c, v in judged if v.paired.detectable is None]:
        places = judged_places(results, undetectable)
        text += f" On {places}, the items are too few to detect even a total loss."
    return text


def _detectable_range(results: Results, judged: list[JudgedComparison]) -> str:
    """`is 14 points`, or `ranges from 5 points (ARC of base) to 17 points (BoolQ of base)`."""
    in_order = sorted(judged, key=lambda cv: cv[1].paired.detectable)
    ends = [in_order[0], in_order[-1]]
    smallest, largest = (f"{100 * v.paired.detectable:.0f} points" for _, v in ends)
    if smallest == largest:
        return f"is {smallest}"
    places = [judged_places(results, [end]) for end in ends]
    return f"ranges from {smallest} ({places[0]}) to {largest} ({places[1]})"


def _uninformative(results: Results, judged: list[JudgedComparison]) -> str:
    baselines = listed([f"`{b}`" for b in dict.fromkeys(c.baseline for c, _ in judged)])
    return (
        f"**Uninformative** by right or wrong: {judged_places(results, judged)}. There, "
        f"{baselines} itself does not clearly beat a constant answer or is seldom "
        "readable, so no loss could be detected."
    )


def _invalid(results: Results, judged: list[JudgedComparison]) -> str:
    reasons: dict[str, dict[str, None]] = {}
    for c, verdict in judged:
        shortened = short_reason(verdict.reason.removeprefix(f"{c.variant} "))
        reasons.setdefault(c.variant, {})[shortened] = None
    reason_text = "; ".join(
        f"`{v}`: {escape(listed(list(shortened)))}" for v, shortened in reasons.items()
    )
    return (
        f"**Invalid**: {judged_places(results, judged)}. This concerns the run, not "
        f"quantization. Reasons: {reason_text}."
    )


def short_reason(reason: str) -> str:
    """A reason without its measured values, which are in the tables."""
    return reason.partition(" (")[0]


def key_findings(results: Results) -> list[str]:
    """The key findings, each with its numbers."""
    sentences = [gates_finding(results), elsewhere_finding(results), noise_sentence(results)]
    sentences += [token_finding(results, v) for v in results.studied_variants]
    sentences += [smoothing_finding(results, v) for v in results.studied_variants]
    return list(filter(None, sentences))[:MOST_FINDINGS]


def elsewhere_finding(results: Results) -> str:
    """The checkpoints that were not made by this study, and what follows; empty without any."""
    given = [code(v) for v in results.variants if results.study.variants[v].made_elsewhere]
    return f"{listed(given)}: {UNKNOWN_ORIGIN}." if given else ""


def token_finding(results: Results, variant: str) -> str:
    """The variant's token-level effect on every model, beside the noise floor."""
    evaluations = [results.evaluations[model, variant] for model in results.models]
    evaluations = [e for e in evaluations if e.failed_check is None]
    if not evaluations:
        return ""
    tokens = [results.token_estimates[e.key] for e in evaluations]
    ratios = [kl_over_noise_floor(results, e) for e in evaluations]
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


def rotation_summary(results: Results, model: str) -> str:
    """From which model another one was rotated, and that its function stays."""
    settings = results.study.models[model].rotate
    rotations = listed([r.upper() for r in settings.rotations])
    return (
        f"`{model}` is `{settings.start}` rotated by {rotations} "
        "(llmcompressor's SpinQuant): the same function in other weights."
    )


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
    """Whether a variant changes a fine-tuned or rotated model more than its start, by KL."""
    start = results.study.models[model].start
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
