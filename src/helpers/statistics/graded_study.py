"""Graded scores of a whole study: every comparison, one answer a model, the cost of fine-tuning.

Holm's family of the graded scores is the comparisons that are declared to be judged by them, one
test each. The family of right and wrong is another; where there are both, either has half the
level. A comparison that is invalid by its answers is invalid here too.
Comparisons that nobody declared are exploratory: those of one variant are a family of their
own, as are its pooled differences over the models, and its costs of fine-tuning over the sets.

A set on which the noise floor differs from the baseline, by more than chance and not inside the
margin, is uninformative for that model: there the score measures rounding.

A set whose rows hold no log-probabilities has no graded scores, and nothing is said about it.
Imports no torch.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from helpers.core.errors import StudyError
from helpers.core.records import WHOLE_VARIANT, failed_check
from helpers.evaluation.predictions import SHARED_TEXT
from helpers.statistics.graded import (
    Ability,
    Estimate,
    GradedComparison,
    Recovery,
    Scored,
    Unit,
    ability,
    comparison_of,
    cost_difference,
    judge_graded,
    kl_difference,
    missing_scores,
    paired_differences,
    pooled_cost_difference,
    pooled_difference,
    recovery,
    scored,
)
from helpers.statistics.intervals import clustered_mean, holm
from helpers.statistics.verdicts import (
    DecisionRules,
    VariantAnswers,
    Verdict,
    decision_rules,
    role_of,
    shared_level,
)
from helpers.study.schema import AnySet, Comparison, FineTunedModel, LogLikelihood, Study

Place = tuple[str, str, str]  # model, evaluation set, variant
KL_UNIT: Unit = "nats a token"
NO_ABILITY = "the float model shows no ability that could be lost"
ROUNDING_MOVES = "rounding alone moves the score by more than the margin"
INSIDE_MARGIN = "the difference is nevertheless inside the margin"
NO_SCORES = "its graded scores are missing or not finite"


@dataclass(frozen=True)
class GradedVerdict:
    """One judged difference of graded scores, or of differences.

    Attributes:
        kind: `invalid`, or a word of `judge_graded`.
        comparison: None where a side has no finite scores.
        holm_p: adjusted p, None outside a family.
        declared: whether the study declared the comparison.
        margin: largest harmless difference, in the comparison's unit.
    """

    kind: str
    reason: str
    comparison: GradedComparison | None
    margin: float
    holm_p: float | None = None
    declared: bool = False


@dataclass(frozen=True)
class PooledVerdict:
    """One variant of one model over its informative sets, each with the same weight."""

    sets: tuple[str, ...]
    verdict: GradedVerdict
    recovery: Recovery | None


@dataclass(frozen=True)
class FineTuningCost:
    """What quantization costs the fine-tuned model less what it costs its start.

    Attributes:
        sets: by evaluation set; `pooled` over the sets informative for both, named in
            `pooled_sets`; None without such a set.
        kl: of the shared text, in nats a token; None where the two read other tokens.
    """

    start: str
    finetuned: str
    variant: str
    sets: dict[str, GradedVerdict]
    pooled_sets: tuple[str, ...]
    pooled: GradedVerdict | None
    kl: GradedVerdict | None


@dataclass(frozen=True)
class GradedStudy:
    """Everything that graded scores say about a study; empty without any.

    Attributes:
        abilities: by (model, evaluation set, baseline).
        blind: why a set says nothing about a model, by the same keys; empty if it does.
        pooled: by (model, variant), against the study's baseline.
    """

    abilities: dict[Place, Ability]
    blind: dict[Place, str]
    comparisons: dict[Comparison, GradedVerdict]
    pooled: dict[tuple[str, str], PooledVerdict]
    finetuning: tuple[FineTuningCost, ...]


def length_rule(evaluation_set: AnySet) -> str:
    """How a set's option log-likelihoods are compared: `bytes` or `none`."""
    ask = evaluation_set.ask
    return ask.normalize if isinstance(ask, LogLikelihood) else "none"


def graded_scores(rows: Sequence[dict], normalize: str) -> Scored | None:
    """The graded scores of rows; None if a row lacks what they are made from.

    None too where fewer than two clusters have a score: nothing could be estimated.
    """
    if not rows or missing_scores(rows):
        return None
    options = [row for row in rows if "logprobs" in row]
    if normalize == "bytes" and any("option_bytes" not in row for row in options):
        return None  # rows from before the lengths were kept
    if not all(x is not None and math.isfinite(x) for row in options for x in row["logprobs"]):
        return None
    scores = scored(rows, normalize=normalize)
    return scores if len(set(scores.clusters)) > 1 else None


def graded_study(
    study: Study,
    answers: Mapping[tuple[str, str], VariantAnswers],
    verdicts: Mapping[Comparison, Verdict],
) -> GradedStudy:
    """All graded comparisons of a study, pooled differences and costs of fine-tuning.

    Args:
        answers: by (model, variant).
        verdicts: of right and wrong: which comparisons there are, and which are invalid.
    """
    return _StudyScores(study, answers, verdicts).judged()


class _StudyScores:
    """The scores of a study and the rules it judges them by."""

    def __init__(self, study: Study, answers: Mapping, verdicts: Mapping[Comparison, Verdict]):
        self.study, self.answers, self.verdicts = study, answers, verdicts
        self.rules: DecisionRules = decision_rules(study)
        self.scores: dict[Place, Scored] = {}
        for (model, variant), variant_answers in answers.items():
            for name, evaluation_set in study.evaluation.datasets.items():
                rows = variant_answers.predictions[name]
                scores = graded_scores(rows, length_rule(evaluation_set))
                if scores is not None:
                    self.scores[model, name, variant] = scores
        sides = {(c.model, c.dataset, c.baseline) for c in verdicts}
        self.abilities = {
            at: ability(self.scores[at], confidence=self.rules.confidence)
            for at in self.scores
            if at in sides
        }
        self.blind = {at: self._blind_reason(at) for at in self.abilities}

    def judged(self) -> GradedStudy:
        comparisons = self._comparisons()
        others = [v for v in self.study.variants if v != self.study.baseline]
        pooled = {at: verdict for v in others for at, verdict in self._pooled_of_variant(v).items()}
        by_model = {
            (m, v): pooled[m, v] for m in self.study.models for v in others if (m, v) in pooled
        }
        costs = tuple(self._finetuning())
        return GradedStudy(self.abilities, self.blind, comparisons, by_model, costs)

    def _blind_reason(self, at: Place) -> str:
        """Why nothing can be said about a model on a set; empty if something can."""
        model, name, _ = at
        if not self.abilities[at].able:
            return NO_ABILITY
        if (model, name, self.study.baseline) not in self.scores:
            return ""
        for variant in self.study.variants:
            rounded = self.scores.get((model, name, variant))
            if role_of(self.study, variant) != "noise floor" or rounded is None:
                continue
            rounding = self._pair(self.scores[model, name, self.study.baseline], rounded, 1)
            if rounding.p <= self.rules.alpha and not self._is_inside(rounding):
                return ROUNDING_MOVES
        return ""

    def _is_inside(self, comparison: GradedComparison) -> bool:
        return comparison.is_inside(self.margin(comparison.unit))

    def margin(self, unit: Unit) -> float:
        margins = self.study.statistics.graded_margins
        return margins.probability if unit == "probability" else margins.nats

    def _compared(self, estimate: Estimate, unit: Unit, tests: int, identical: bool):
        """An estimate with what is said of it; `tests` shares the level of the detectable size."""
        return comparison_of(
            estimate, unit=unit, confidence=self.rules.confidence, power=self.rules.power,
            alpha=self.rules.alpha / max(1, tests), identical=identical,
        )  # fmt: skip

    def _verdict(self, comparison: GradedComparison, blind: str, holm_p: float | None, **fields):
        margin = self.margin(comparison.unit)
        adjusted = comparison.p if holm_p is None else holm_p
        better = fields.pop("higher_is_better", True)
        kind = judge_graded(
            comparison, able=not blind, adjusted_p=adjusted, margin=margin, higher_is_better=better
        )
        reason = blind
        if kind in ("worse", "better"):
            reason = INSIDE_MARGIN if self._is_inside(comparison) else ""
        return GradedVerdict(kind, reason, comparison, margin, holm_p, **fields)

    def _comparisons(self) -> dict[Comparison, GradedVerdict]:
        declared, scores = self.study.statistics.declared("graded"), self.rules.scores
        families: dict[str, dict[Comparison, float]] = {"": dict.fromkeys(declared, 1.0)}
        members = {c: "" if c in declared else c.variant for c in self.verdicts}
        for c, family in members.items():
            families.setdefault(family, {})[c] = 1.0
        compared: dict[Comparison, GradedComparison | None] = {}
        for c, family in members.items():
            before = self.scores.get((c.model, c.dataset, c.baseline))
            after = self.scores.get((c.model, c.dataset, c.variant))
            if before is None:
                continue
            compared[c] = None
            if after is not None:
                tests = len(families[family]) * (1 if family else scores)
                comparison = self._pair(before, after, tests)
                compared[c] = comparison
                if self.verdicts[c].kind != "invalid":
                    families[family][c] = comparison.p
        holm_p = {
            c: p
            for family, p_values in families.items()
            for c, p in shared_level(p_values, 1 if family else scores).items()
        }
        return {
            c: self._comparison_verdict(c, comparison, holm_p[c], declared=c in declared)
            for c, comparison in compared.items()
        }

    def _comparison_verdict(
        self, c: Comparison, comparison: GradedComparison | None, holm_p: float, *, declared: bool
    ) -> GradedVerdict:
        verdict = self.verdicts[c]
        if verdict.kind == "invalid" or comparison is None:
            reason = verdict.reason if verdict.kind == "invalid" else NO_SCORES
            margin = self.margin("probability")
            return GradedVerdict("invalid", reason, comparison, margin, declared=declared)
        blind = self.blind[c.model, c.dataset, c.baseline]
        return self._verdict(comparison, blind, holm_p, declared=declared)

    def _pair(self, before: Scored, after: Scored, tests: int) -> GradedComparison:
        changes = paired_differences(before, after)
        estimate = clustered_mean(changes, before.clusters)
        return self._compared(estimate, "probability", tests, not changes.any())

    def _invalid(self, model: str, name: str, variant: str) -> str:
        """Why a variant's scores on a set count for nothing; empty if they count."""
        if variant == self.study.baseline:
            return ""
        baseline = self.study.baseline
        c = Comparison(model=model, dataset=name, baseline=baseline, variant=variant)
        if c in self.verdicts and self.verdicts[c].kind == "invalid":
            return self.verdicts[c].reason
        return "" if (model, name, variant) in self.scores else NO_SCORES

    def _pooled_of_variant(self, variant: str) -> dict[tuple[str, str], PooledVerdict]:
        """By (model, variant), over the sets on which the model's baseline has an ability.

        A variant that is invalid on one of these sets has no pooled difference: to leave that
        set out would choose sets by their result.
        """
        verdicts, models = {}, {m: self._able_sets(m) for m in self.study.models}
        models = {m: able for m, able in models.items() if able}
        compared = {}
        for model, able in models.items():
            if not any(self._invalid(model, name, variant) for name in able):
                pairs = {n: self._sides(model, n, variant) for n in able}
                identical = all(not paired_differences(*pair).any() for pair in pairs.values())
                compared[model] = self._compared(
                    pooled_difference(pairs), "probability", len(models), identical
                )
        holm_p = holm({m: compared[m].p if m in compared else 1.0 for m in models})
        for model, able in models.items():
            if model not in compared:
                reason = next(r for n in able if (r := self._invalid(model, n, variant)))
                verdict = GradedVerdict("invalid", reason, None, self.margin("probability"))
                verdicts[model, variant] = PooledVerdict(able, verdict, None)
                continue
            pairs = {n: self._sides(model, n, variant) for n in able}
            verdict = self._verdict(compared[model], "", holm_p[model])
            recovered = recovery(pairs, confidence=self.rules.confidence)
            verdicts[model, variant] = PooledVerdict(able, verdict, recovered)
        return verdicts

    def _able_sets(self, model: str) -> tuple[str, ...]:
        return tuple(
            name
            for name in self.study.evaluation.datasets
            if self.blind.get((model, name, self.study.baseline)) == ""
        )

    def _sides(self, model: str, name: str, variant: str) -> tuple[Scored, Scored]:
        return self.scores[model, name, self.study.baseline], self.scores[model, name, variant]

    def _finetuning(self):
        for finetuned, source in self.study.models.items():
            if not isinstance(source, FineTunedModel):
                continue
            start = source.finetune.start
            for variant in self.study.variants:
                there = {(m, v) for m in (start, finetuned) for v in (self.study.baseline, variant)}
                if variant == self.study.baseline or not there <= self.answers.keys():
                    continue
                if cost := self._cost(start, finetuned, variant):
                    yield cost

    def _cost(self, start: str, finetuned: str, variant: str) -> FineTuningCost | None:
        baseline, models = self.study.baseline, (start, finetuned)
        names = [
            name
            for name in self.study.evaluation.datasets
            if all((m, name, v) in self.scores for m in models for v in (baseline, variant))
            and self.scores[start, name, baseline].ids == self.scores[finetuned, name, baseline].ids
        ]
        invalid = {
            n: next((r for m in models if (r := self._invalid(m, n, variant))), "") for n in names
        }
        blind = {
            n: next((r for m in models if (r := self.blind[m, n, baseline])), "") for n in names
        }
        pairs = {
            n: (self._sides(start, n, variant), self._sides(finetuned, n, variant)) for n in names
        }
        compared = {n: self._cost_of_set(*pairs[n], len(names)) for n in names}
        holm_p = holm({n: 1.0 if invalid[n] else compared[n].p for n in names})
        sets = {}
        for n in names:
            if invalid[n]:
                margin = self.margin("probability")
                sets[n] = GradedVerdict("invalid", invalid[n], compared[n], margin)
            else:
                sets[n] = self._verdict(compared[n], blind[n], holm_p[n])
        kept = [n for n in names if not blind[n]]
        pooled = self._pooled_cost(kept, pairs, invalid) if kept else None
        kl = self._kl_cost(start, finetuned, variant)
        if not sets and kl is None:
            return None
        return FineTuningCost(start, finetuned, variant, sets, tuple(kept), pooled, kl)

    def _cost_of_set(self, base, finetuned, tests: int) -> GradedComparison:
        estimate = cost_difference(base, finetuned)
        changes = paired_differences(*finetuned) - paired_differences(*base)
        return self._compared(estimate, "probability", tests, not changes.any())

    def _pooled_cost(self, kept: list[str], pairs: dict, invalid: dict) -> GradedVerdict:
        if reasons := [invalid[n] for n in kept if invalid[n]]:
            return GradedVerdict("invalid", reasons[0], None, self.margin("probability"))
        estimate = pooled_cost_difference(*({n: pairs[n][i] for n in kept} for i in (0, 1)))
        comparison = self._compared(
            estimate, "probability", 1, estimate.mean == 0 and estimate.degenerate
        )
        return self._verdict(comparison, "", None)

    def _kl_cost(self, start: str, finetuned: str, variant: str) -> GradedVerdict | None:
        sides = [self.answers[m, variant] for m in (start, finetuned)]
        guarded = [WHOLE_VARIANT, SHARED_TEXT]
        for side in sides:
            if reason := failed_check(side.gates, guarded):
                return GradedVerdict("invalid", reason, None, self.margin(KL_UNIT))
        if len(sides[0].passages) < 2:
            return None
        try:
            estimate = kl_difference(*(side.passages for side in sides))
        except StudyError:  # other tokens, or a passage without a finite KL
            return None
        identical = estimate.mean == 0 and estimate.degenerate
        comparison = self._compared(estimate, KL_UNIT, 1, identical)
        return self._verdict(comparison, "", None, higher_is_better=False)
