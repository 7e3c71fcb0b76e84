"""Verdicts on paired comparisons: valid or not, informative or not, and the conclusion.

Scores are 0 or 1. Independent items take the exact McNemar test and the Tango interval; items that
share passages a sign-flip test and a bootstrap over the passages.

Three questions in a fixed order. Is this a measurement of the variant at all (*invalid*)? Does the
evaluation set tell this baseline from a fixed answer (*uninformative*)? Only then: what does the
test say? Significance cannot certify garbage.

*Invalid* is said of a variant: it failed a check, or its answers are degenerate. A variant that
emits nothing may beat a weak baseline on questions that have no answer, with a small p.
*Uninformative* is said of the items: the baseline itself does not tell them from a fixed answer,
so nothing follows about ability, whatever the variant scores.

Left out on purpose: winners, relative changes of percentages, p-values of comparisons that are
invalid, and verdicts on comparisons nobody declared beforehand.

Controls are variants whose outcome is known in advance; without them a study can be wrong and look
sound. A variant is recognised as a control from its settings, never from its name. Each must do
one thing:

- the noise floor, the baseline in another float type, differs from it by rounding alone;
- smoothing alone leaves every answer as it was, up to ties within rounding;
- the baseline evaluated once more answers the same;
- the known broken recipe fails checks;
- a variant's twin without smoothing is what it claims, or nothing is smoothing's merit.

Imports no torch.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from helpers.core.errors import StudyError
from helpers.core.records import WHOLE_VARIANT
from helpers.evaluation.checks.integrity import FORMAT_DROP
from helpers.evaluation.checks.numeric_gates import kl_per_token, kl_resolution
from helpers.evaluation.scoring import (
    best_fixed_answer,
    capped_share,
    collapsed_to_one_answer,
    is_one_answer,
    looping_share,
    readable_share,
    status_and_answer,
)
from helpers.statistics.intervals import (
    BootstrapMean,
    Interval,
    bootstrap_difference,
    bootstrap_mean,
    detectable_loss,
    detectable_mean_difference,
    holm,
    paired_binary,
    tango_interval,
    tost_from_interval,
    wilson_interval,
)
from helpers.study.schema import Comparison, Study, Variant

Role = Literal[
    "baseline",
    "repetition",
    "noise floor",
    "smoothing alone",
    "broken on purpose",
    "without smoothing",
]
TIE_RATE_CONFIDENCE = (
    0.95  # of the limit on the rate of ties, independent of the study's confidence
)
MOST_DEVIATIONS = 4.0  # standard deviations; the largest change that rounding explains


@dataclass(frozen=True)
class VariantAnswers:
    """The answers of one variant of one model, and its checks.

    Attributes:
        predictions: by evaluation set.
        passages: rows of the shared text.
        gates: every gate on it, as recorded.
    """

    predictions: Mapping[str, list[dict]]
    passages: list[dict]
    gates: list[dict]

    @property
    def failed_gates(self) -> list[dict]:
        return [gate for gate in self.gates if not gate["passed"]]

    @property
    def failed_variant_gates(self) -> list[dict]:
        """Failed gates on the variant itself, not on one evaluation set."""
        guarded = [(gate, gate.get("invalidates", WHOLE_VARIANT)) for gate in self.failed_gates]
        return [gate for gate, what in guarded if what == WHOLE_VARIANT]


@dataclass(frozen=True)
class ControlOutcome:
    """The expected and the observed outcome of a control, in the program's own words."""

    role: Role
    expected: str
    observed: str
    ok: bool


def role_of(study: Study, name: str) -> Role | None:
    """A variant's role as a control; None if the study asks about it."""
    recipe = study.variants[name]
    if name == study.baseline:
        return "baseline"
    if recipe.recipe == "seed":
        return "broken on purpose"
    if recipe.dtype:
        return "noise floor"
    if not recipe.compressed and not recipe.kv:
        return "repetition" if recipe.is_unmodified else "smoothing alone"
    smoothed_twins = [n for n, other in study.variants.items() if is_unsmoothed_twin(recipe, other)]
    return "without smoothing" if smoothed_twins else None


def is_unsmoothed_twin(plain: Variant, smoothed: Variant) -> bool:
    """Whether the two differ only by smoothing, which the first lacks."""
    same_scheme = all(
        getattr(plain, setting) == getattr(smoothed, setting)
        for setting in ("scheme", "rounding", "ignore", "protect", "kv")
    )
    known = same_scheme and not plain.made_elsewhere
    return known and plain.quantized and plain.smooth is None and smoothed.smooth is not None


def control_outcome(
    study: Study, name: str, answers: VariantAnswers, baseline: VariantAnswers
) -> ControlOutcome | None:
    """Expected and observed outcome of a variant; None if it is no control."""
    role = role_of(study, name)
    match role:
        case None:
            return None
        case "baseline" | "noise floor":
            expected = "pass every check" if role == "baseline" else "differ by rounding alone"
            return ControlOutcome(
                role,
                expected,
                _describe_checks(answers),
                bool(answers.gates) and not answers.failed_gates,
            )
        case "without smoothing":
            passed = bool(answers.gates) and not answers.failed_variant_gates
            return ControlOutcome(
                role, "pass every check on the whole variant", _describe_checks(answers), passed
            )
        case "broken on purpose":
            return ControlOutcome(
                role, "fail a check", _describe_checks(answers), bool(answers.failed_variant_gates)
            )
    return _equality_outcome(role, answers, baseline)


def _describe_checks(answers: VariantAnswers) -> str:
    total, failed = len(answers.gates), answers.failed_gates
    if not failed:
        return f"all {total} checks pass"
    return f"{len(failed)} of {total} checks fail ({failed[0]['name']}: {failed[0]['measured']})"


def _equality_outcome(
    role: Role, answers: VariantAnswers, baseline: VariantAnswers
) -> ControlOutcome:
    """The outcome of a control that must equal the baseline, up to ties within rounding."""
    total = changed = unexplained = 0
    for name, before in baseline.predictions.items():
        pairs = _pairs_by_id(before, answers.predictions[name])
        changed_pairs = [(b, a) for b, a in pairs if status_and_answer(b) != status_and_answer(a)]
        total, changed = total + len(pairs), changed + len(changed_pairs)
        unexplained += unexplained_changes(
            changed_pairs, answers.passages, tokens=sum(a["output_tokens"] for _, a in pairs)
        )
    observed = f"{total - changed} of {total} answers equal the baseline's"
    if changed:
        observed += f", {unexplained} of the others differ by more than ties within rounding"
    ok = bool(answers.gates) and not answers.failed_gates and not unexplained
    expected = "answer as the baseline does, up to ties within rounding"
    return ControlOutcome(role, expected, f"{observed}; {_describe_checks(answers)}", ok)


def _pairs_by_id(before: list[dict], after: list[dict]) -> list[tuple[dict, dict]]:
    rows = {row["id"]: row for row in after}
    return [(row, rows[row["id"]]) for row in before]


def unexplained_changes(
    changed: list[tuple[dict, dict]], passages: list[dict], *, tokens: int
) -> int:
    """The number of changed answers of one set that ties within rounding do not explain.

    If options are scored, a changed choice is a tie if no option's log-probability moved by
    more than rounding moves it. Generated texts have no probabilities; for them the shared text
    gives the rate of tokens whose top choice rounding changes, and this rate bounds the number
    of changed answers.

    Args:
        changed: (baseline's, variant's) rows with different answers.
        passages: the variant's rows of the shared text.
        tokens: all tokens the variant wrote in this set.
    """
    scored = [pair for pair in changed if "logprobs" in pair[0]]
    moved_choices = sum(not _within_rounding(*pair, passages) for pair in scored)
    expected_ties = tie_rate(passages) * tokens
    most_ties = math.floor(expected_ties + 2 * math.sqrt(expected_ties))
    return moved_choices + max(0, len(changed) - len(scored) - most_ties)


def _within_rounding(before: dict, after: dict, passages: list[dict]) -> bool:
    """Whether no option's log-probability moved by more than the KL of rounding explains."""
    kl = abs(kl_per_token(passages)) + kl_resolution(passages)
    limit = MOST_DEVIATIONS * math.sqrt(2 * kl) * after["output_tokens"]
    pairs = zip(before["logprobs"], after.get("logprobs", ()), strict=True)
    return all(abs(b - a) <= limit for b, a in pairs)


def tie_rate(passages: list[dict]) -> float:
    """Upper limit of the share of tokens whose top choice rounding changes."""
    tokens = sum(row["tokens"] for row in passages)
    if not tokens:
        return 0.0
    changed_tokens = tokens - sum(row["top1_agreements"] for row in passages)
    return wilson_interval(changed_tokens, tokens, confidence=TIE_RATE_CONFIDENCE).high


@dataclass(frozen=True)
class VariantPredictions:
    """One variant's predictions of one evaluation set; `failed_check` names one it failed."""

    variant: str
    predictions: list[dict]
    failed_check: str | None = None


@dataclass(frozen=True)
class DecisionRules:
    """The study's confidence, power, margin, resampling, and what is declared.

    Attributes:
        family: comparisons that are declared to be judged by right and wrong.
        scores: 2 where graded scores judge declared comparisons too: they share the level.
    """

    confidence: float
    power: float
    margin: float
    resamples: int
    seed: int
    family: int
    scores: int = 1

    @property
    def alpha(self) -> float:
        return round(1 - self.confidence, 12)

    @property
    def random(self) -> dict:
        return {"resamples": self.resamples, "seed": self.seed}


@dataclass(frozen=True)
class PairedComparison:
    """Two variants on the same items, scored 0 or 1; delta is variant minus baseline.

    Attributes:
        clusters: independent units: passages where items share them, else items.
        equivalence: the interval at 1 - 2 alpha, for the equivalence test.
        detectable: smallest loss detected with the study's power, None if there is none.
        identical: every answer is the same, not only every score.
    """

    n: int
    clusters: int
    losses: int
    gains: int
    delta: float
    interval: Interval
    equivalence: Interval
    p: float
    method: str
    detectable: float | None
    identical: bool


def decision_rules(study: Study) -> DecisionRules:
    """The study's statistical settings."""
    s = study.statistics
    family = len(s.declared("accuracy"))
    return DecisionRules(s.confidence, s.power, s.margin, s.resamples, study.seed, family, s.scores)


def shared_level(p_values: Mapping[Comparison, float], scores: int) -> dict[Comparison, float]:
    """Holm's p over one score's declared tests, times the scores that share the level."""
    return {key: min(1.0, scores * p) for key, p in holm(p_values).items()}


def paired_predictions(
    baseline: VariantPredictions, variant: VariantPredictions
) -> list[tuple[dict, dict]]:
    """Both predictions of every item, in the order of the items' ids.

    Items with different prompts are paired too: `verdicts` calls such a comparison invalid.

    Raises:
        StudyError: the items differ.
    """
    before = {p["id"]: p for p in baseline.predictions}
    after = {p["id"]: p for p in variant.predictions}
    names = f"{variant.variant} and {baseline.variant}"
    if unpaired_ids := sorted(before.keys() ^ after.keys()):
        raise StudyError(
            f"{names} answered different items ({unpaired_ids[0]}); run 03_evaluation again"
        )
    return [(before[key], after[key]) for key in sorted(before)]


def paired_comparison(
    baseline: VariantPredictions, variant: VariantPredictions, rules: DecisionRules, *, alpha: float
) -> PairedComparison:
    """Losses, gains, difference, interval and test of one comparison.

    Args:
        alpha: level of the test for which the smallest detectable loss is computed.
    """
    pairs = paired_predictions(baseline, variant)
    before, after = ([p[i]["score"] for p in pairs] for i in (0, 1))
    binary = paired_binary(before, after, confidence=rules.confidence)
    losses, gains, n = binary.losses, binary.gains, binary.n
    clusters = [_cluster_of(b) for b, _ in pairs]
    units = len(set(clusters))
    if units == n:
        level = 1 - 2 * rules.alpha
        equivalence = tango_interval(losses, gains, n, confidence=level)
        interval, p, method = binary.interval, binary.p, "exact McNemar, Tango interval"
        detectable = _detectable_loss(n, gains / n, alpha, rules.power)
    else:
        differences = [a - b for b, a in zip(before, after, strict=True)]
        bootstrap = bootstrap_difference(
            differences, clusters, confidence=rules.confidence, **rules.random
        )
        equivalence_bootstrap = bootstrap_mean(
            differences, clusters, confidence=1 - 2 * rules.alpha, **rules.random
        )
        interval, equivalence, p = (
            _clustered_interval(bootstrap),
            _clustered_interval(equivalence_bootstrap),
            bootstrap.p,
        )
        method = "sign-flip test and bootstrap by passage"
        detectable = _detectable_by_passage(bootstrap, alpha, rules.power)
    identical = all(status_and_answer(b) == status_and_answer(a) for b, a in pairs)
    return PairedComparison(
        n,
        units,
        losses,
        gains,
        binary.delta,
        interval,
        equivalence,
        p,
        method,
        detectable,
        identical,
    )


def score_interval(predictions: list[dict], rules: DecisionRules) -> Interval:
    """Interval of one variant's share of right answers: Wilson, or clustered by passage."""
    scores = [p["score"] for p in predictions]
    clusters = [_cluster_of(p) for p in predictions]
    if len(set(clusters)) == len(scores):
        return wilson_interval(int(sum(scores)), len(scores), confidence=rules.confidence)
    bootstrap = bootstrap_mean(scores, clusters, confidence=rules.confidence, **rules.random)
    if bootstrap.degenerate:  # resampling shows no spread: the passages are the independent items
        right_passages = round(bootstrap.mean * bootstrap.clusters)
        return wilson_interval(right_passages, bootstrap.clusters, confidence=rules.confidence)
    return bootstrap.interval


def _cluster_of(prediction: dict) -> str:
    return prediction["cluster"] or prediction["id"]


def _clustered_interval(bootstrap: BootstrapMean) -> Interval:
    """The bootstrap's interval; Tango's on the passages if resampling shows no spread."""
    if not bootstrap.degenerate:
        return bootstrap.interval
    flips = round(abs(bootstrap.mean) * bootstrap.clusters)
    losses, gains = (flips, 0) if bootstrap.mean < 0 else (0, flips)
    return tango_interval(
        losses, gains, bootstrap.clusters, confidence=bootstrap.interval.confidence
    )


def _detectable_loss(n: int, gain_rate: float, alpha: float, power: float) -> float | None:
    if gain_rate >= 0.5:
        return None
    return detectable_loss(n, gain_rate=gain_rate, alpha=alpha, power=power)


def _detectable_by_passage(bootstrap: BootstrapMean, alpha: float, power: float) -> float | None:
    if bootstrap.degenerate:
        return _detectable_loss(bootstrap.clusters, 0.0, alpha, power)
    units = bootstrap.clusters
    if 2.0 ** (1 - units) > alpha:  # not even if every passage loses
        return None

    error = bootstrap.standard_error
    loss = detectable_mean_difference(error, clusters=units, alpha=alpha, power=power)
    return loss if loss <= 1 else None


LARGEST_BROKEN_SHARE = 0.5  # of a baseline's answers: truncated at the token limit, or looping
SMALLEST_READABLE_SHARE = 0.5  # with fewer readable answers, the score measures the format


def _percent(fraction: float) -> str:
    return f"{100 * fraction:.1f} %"


def _mean_score(predictions: list[dict]) -> float:
    return sum(p["score"] for p in predictions) / len(predictions)


def invalid_reason(
    adapter: str, baseline: VariantPredictions, variant: VariantPredictions, rules: DecisionRules
) -> str | None:
    """Why the comparison does not measure the variant; None if it does."""
    for side in (variant, baseline):
        if side.failed_check:
            return f"{side.variant} failed a check: {side.failed_check}"
        if any(p["finish_reason"] == "nonfinite" for p in side.predictions):
            return f"{side.variant} computed logits that are not finite"
    before, after = baseline.predictions, variant.predictions
    hashes = {p["id"]: p["prompt_hash"] for p in before}
    if other_prompts := [p["id"] for p in after if p["prompt_hash"] != hashes.get(p["id"])]:
        text = f"{len(other_prompts)} of its items had other prompts or tokens"
        return f"{text} ({min(other_prompts)})"
    if readable_share(before) - readable_share(after) > FORMAT_DROP:
        share = f"{_percent(readable_share(after))} of its answers are readable"
        return f"{share}, against {_percent(readable_share(before))} for {baseline.variant}"
    if collapsed_to_one_answer(after, before):
        return "it gives the same answer to every question"
    fixed_answer = best_fixed_answer(adapter, after)
    if (
        uninformative_reason(adapter, baseline, rules) is None
        and _mean_score(after) <= fixed_answer.score
    ):
        share = f"{_percent(fixed_answer.score)} of these items"
        return f"it does not beat always {fixed_answer.answer} ({share})"
    return None


def uninformative_reason(
    adapter: str, baseline: VariantPredictions, rules: DecisionRules
) -> str | None:
    """Why these items cannot show a loss of this baseline; None if they can.

    The baseline must beat the best constant answer significantly: the lower limit of its
    interval must exceed the constant answer's score.
    """
    predictions, name = baseline.predictions, baseline.variant
    if (share := readable_share(predictions)) < SMALLEST_READABLE_SHARE:
        return f"only {_percent(share)} of {name}'s own answers are readable"
    if is_one_answer(predictions):
        return f"{name} itself gives the same answer to every question"
    fixed_answer, score = best_fixed_answer(adapter, predictions), _mean_score(predictions)
    if score_interval(predictions, rules).low <= fixed_answer.score:
        clearly = "clearly " if score > fixed_answer.score else ""
        scores = f"{_percent(score)} against {_percent(fixed_answer.score)}"
        return f"{name} itself does not {clearly}beat always {fixed_answer.answer} ({scores})"
    if (share := capped_share(predictions)) > LARGEST_BROKEN_SHARE:
        return f"{_percent(share)} of {name}'s own answers are stopped by the cap"
    if (share := looping_share(predictions)) > LARGEST_BROKEN_SHARE:
        return f"{_percent(share)} of {name}'s own answers end in a loop"
    return None


Kind = Literal[
    "worse", "better", "equivalent", "inconclusive", "uninformative", "invalid", "exploratory"
]


@dataclass(frozen=True)
class Verdict:
    """The conclusion of one comparison; `holm_p` is None without a valid declared test."""

    kind: Kind
    reason: str
    primary: bool
    holm_p: float | None
    paired: PairedComparison


def study_verdicts(
    study: Study,
    answers: Mapping[tuple[str, str, str], VariantPredictions],
    disagreements: Mapping[Comparison, str] = MappingProxyType({}),
) -> dict[Comparison, Verdict]:
    """Every variant against the study's baseline, and every declared comparison.

    Holm's family is all comparisons declared to be judged by right and wrong; if graded scores
    judge some too, either family has half the level. An invalid one stays in it with p = 1, so that
    a failed check never eases the test of another. A comparison with a missing side stays in it
    too and gets no verdict.

    Args:
        answers: by (model, dataset, variant).
        disagreements: comparisons whose figures do not follow from the answers, with the
            reason: they are invalid.
    """
    rules, primary = decision_rules(study), study.statistics.declared("accuracy")
    others = study.statistics.declared("graded")
    comparisons = [*primary, *others, *_baseline_comparisons(study)]
    compared, p_values = {}, dict.fromkeys(primary, 1.0)
    for c in dict.fromkeys(comparisons):
        if not {(c.model, c.dataset, name) for name in (c.baseline, c.variant)} <= answers.keys():
            continue
        baseline, variant = (answers[c.model, c.dataset, v] for v in (c.baseline, c.variant))
        adapter = study.evaluation.datasets[c.dataset].adapter
        alpha = rules.alpha / (rules.family * rules.scores) if c in primary else rules.alpha
        paired = paired_comparison(baseline, variant, rules, alpha=alpha)
        reasons = (
            disagreements.get(c) or invalid_reason(adapter, baseline, variant, rules),
            uninformative_reason(adapter, baseline, rules),
        )
        compared[c] = paired, reasons
        if c in primary and not reasons[0]:
            p_values[c] = paired.p
    holm_p_values = shared_level(p_values, rules.scores)
    return {
        c: decide_verdict(p, *reasons, holm_p_values.get(c), rules)
        for c, (p, reasons) in compared.items()
    }


def _baseline_comparisons(study: Study) -> list[Comparison]:
    return [
        Comparison(model=model, dataset=dataset, baseline=study.baseline, variant=variant)
        for model in study.models
        for dataset in study.evaluation.datasets
        for variant in study.variants
        if variant != study.baseline
    ]


def decide_verdict(
    paired: PairedComparison,
    invalid: str | None,
    uninformative: str | None,
    holm_p: float | None,
    rules: DecisionRules,
) -> Verdict:
    """The verdict of one comparison; `holm_p` is None for one that was not declared."""
    primary = holm_p is not None
    identical = f"identical answers on all {paired.n} items" if paired.identical else ""
    within_margin = tost_from_interval(paired.equivalence, margin=rules.margin, alpha=rules.alpha)
    if invalid:
        return Verdict("invalid", invalid, primary, None, paired)
    if uninformative:
        return Verdict("uninformative", uninformative, primary, holm_p, paired)
    if holm_p is None:
        return Verdict("exploratory", identical, primary, None, paired)
    if holm_p <= rules.alpha and paired.delta != 0:
        reason = "the difference is nevertheless inside the margin" if within_margin else ""
        return Verdict("worse" if paired.delta < 0 else "better", reason, primary, holm_p, paired)
    return Verdict(
        "equivalent" if within_margin else "inconclusive", identical, primary, holm_p, paired
    )
