"""Graded scores of a whole study: every comparison, one answer a model, and recipes over draws.

Holm's family of the graded scores is the comparisons that are declared to be judged by them, one
test each. The family of right and wrong is another; where there are both, either has half the
level. A comparison that is invalid by its answers is invalid here too.
Comparisons that nobody declared are exploratory: those of one variant are a family of their
own, as are its pooled differences over the models, and its costs of fine-tuning over the sets.

A set on which the noise floor differs from the baseline, by more than chance and not inside the
margin, is uninformative for that model: there the score measures rounding.

A set whose rows hold no log-probabilities has no graded scores, and nothing is said about it.

Each draw of a variant is calibrated on items of its own and answers the same option sets and reads
the same shared text. The mean over draws is a figure of the recipe, and its interval holds for
items and checkpoints not seen; that of the first checkpoint alone holds for other items only. The
two spreads are kept apart (`helpers.statistics.graded`).

Graded scores get a verdict, by the margins of the study. Those of one variant, over models and
sets, are a Holm family of their own, and so are its pooled differences over the models, and its
costs of fine-tuning: no other family of the study is touched. Accuracy, KL and loss have intervals
and no test.

A figure to which one draw has no valid answer is invalid: to leave that draw out would choose
draws by their result. Imports no torch.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from helpers.core.errors import StudyError
from helpers.core.files import draw_name
from helpers.core.records import WHOLE_VARIANT, failed_check
from helpers.evaluation.predictions import SHARED_TEXT
from helpers.statistics.graded import (
    Ability,
    DrawsOfSet,
    Estimate,
    GradedComparison,
    RecipeEstimate,
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
    pooled_recipe,
    recovery,
    scored,
)
from helpers.statistics.intervals import Interval, MeanEstimate, clustered_mean, holm
from helpers.statistics.verdicts import (
    DecisionRules,
    VariantAnswers,
    VariantPredictions,
    Verdict,
    decision_rules,
    invalid_reason,
    paired_predictions,
    role_of,
    shared_level,
)
from helpers.study.schema import (
    AnySet,
    Comparison,
    FineTunedModel,
    LogLikelihood,
    MadeModel,
    RotatedModel,
    Study,
)

Place = tuple[str, str, str]  # model, evaluation set, variant
KL_UNIT: Unit = "nats a token"
NO_ABILITY = "the float model shows no ability that could be lost"
ROUNDING_MOVES = "rounding alone moves the score by more than the margin"
INSIDE_MARGIN = "the difference is nevertheless inside the margin"
NO_SCORES = "its graded scores are missing or not finite"

Measure = Literal["graded score", "accuracy", "KL", "loss"]
POOLED = "pooled"
OTHER_TEXT = "it read other tokens of the shared text"
NOT_FINITE = "a passage has no finite sum"

Draws = Mapping[tuple[str, str], Sequence[VariantAnswers]]  # (model, variant): the second on


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
class MadeModelCost:
    """What quantization costs a fine-tuned or rotated model less what it costs its start.

    Attributes:
        sets: by evaluation set; `pooled` over the sets informative for both, named in
            `pooled_sets`; None without such a set.
        kl: of the shared text, in nats a token; None where the two read other tokens.
    """

    start: str
    made: str
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
    finetuning: tuple[MadeModelCost, ...]
    rotation: tuple[MadeModelCost, ...]


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
        costs = (tuple(self._costs_of(kind)) for kind in (FineTunedModel, RotatedModel))
        return GradedStudy(self.abilities, self.blind, comparisons, by_model, *costs)

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

    def _costs_of(self, kind: type[MadeModel]) -> Iterator[MadeModelCost]:
        """Of every variant of every model that was made in this way."""
        for made, source in self.study.models.items():
            if not isinstance(source, kind):
                continue
            for variant in self.study.variants:
                models, variants = (source.start, made), (self.study.baseline, variant)
                there = {(m, v) for m in models for v in variants}
                if variant == self.study.baseline or not there <= self.answers.keys():
                    continue
                if cost := self._cost(source.start, made, variant):
                    yield cost

    def _cost(self, start: str, made: str, variant: str) -> MadeModelCost | None:
        baseline, models = self.study.baseline, (start, made)
        names = [
            name
            for name in self.study.evaluation.datasets
            if all((m, name, v) in self.scores for m in models for v in (baseline, variant))
            and self.scores[start, name, baseline].ids == self.scores[made, name, baseline].ids
        ]
        invalid = {
            n: next((r for m in models if (r := self._invalid(m, n, variant))), "") for n in names
        }
        blind = {
            n: next((r for m in models if (r := self.blind[m, n, baseline])), "") for n in names
        }
        pairs = {n: (self._sides(start, n, variant), self._sides(made, n, variant)) for n in names}
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
        kl = self._kl_cost(start, made, variant)
        if not sets and kl is None:
            return None
        return MadeModelCost(start, made, variant, sets, tuple(kept), pooled, kl)

    def _cost_of_set(self, start, made, tests: int) -> GradedComparison:
        estimate = cost_difference(start, made)
        changes = paired_differences(*made) - paired_differences(*start)
        return self._compared(estimate, "probability", tests, not changes.any())

    def _pooled_cost(self, kept: list[str], pairs: dict, invalid: dict) -> GradedVerdict:
        if reasons := [invalid[n] for n in kept if invalid[n]]:
            return GradedVerdict("invalid", reasons[0], None, self.margin("probability"))
        estimate = pooled_cost_difference(*({n: pairs[n][i] for n in kept} for i in (0, 1)))
        comparison = self._compared(
            estimate, "probability", 1, estimate.mean == 0 and estimate.degenerate
        )
        return self._verdict(comparison, "", None)

    def _kl_cost(self, start: str, made: str, variant: str) -> GradedVerdict | None:
        sides = [self.answers[m, variant] for m in (start, made)]
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


@dataclass(frozen=True)
class RecipeFigure:
    """One figure of a recipe, variant minus baseline.

    Attributes:
        place: an evaluation set, `pooled`, or `shared_text`.
        unit: of the graded score; accuracy is a fraction, KL and loss are nats a token.
        reason: why it is invalid, or the remark of its verdict.
        estimate: over draws and items; None if invalid.
        interval: of the estimate, for draws and items not seen.
        first: of the first checkpoint alone.
        verdict: of a graded score; None for other measures.
    """

    place: str
    measure: Measure
    unit: Unit
    reason: str = ""
    estimate: RecipeEstimate | None = None
    interval: Interval | None = None
    first: MeanEstimate | None = None
    verdict: GradedVerdict | None = None


@dataclass(frozen=True)
class Recipe:
    """A variant of a model over all its draws.

    Attributes:
        start: empty; or the model that this one was trained from here, whose differences are taken
            off: what fine-tuning adds to the recipe's cost.
    """

    model: str
    variant: str
    draws: int
    figures: tuple[RecipeFigure, ...]
    start: str = ""


def study_recipes(
    study: Study,
    answers: Mapping[tuple[str, str], VariantAnswers],
    draws: Draws,
    verdicts: Mapping[Comparison, Verdict],
    graded: GradedStudy,
) -> tuple[Recipe, ...]:
    """Every variant of which more than one checkpoint was made, model by model.

    Then, for every model that was fine-tuned here, its differences minus those of its start.

    Args:
        answers: of the first draws, by (model, variant).
        draws: of all further draws.
        verdicts: of right and wrong: which comparisons of the first draw are invalid.
        graded: on which sets a model has an ability to lose.
    """
    recipes = []
    for variant in dict.fromkeys(variant for _, variant in draws):
        models = [model for model in study.models if (model, variant) in draws]
        sides = {
            model: _RecipeAnswers(study, answers, draws, verdicts, graded, model, variant)
            for model in models
        }
        trained = {
            model: source.finetune.start
            for model, source in study.models.items()
            if isinstance(source, FineTunedModel) and {model, source.finetune.start} <= sides.keys()
        }
        costs = {model: _RecipeCost(sides[start], sides[model]) for model, start in trained.items()}
        recipes += _recipes_of_variant(study, sides)
        recipes += _recipes_of_variant(study, costs)
    order = {at: place for place, at in enumerate(draws)}
    return tuple(sorted(recipes, key=lambda r: (bool(r.start), order[r.model, r.variant])))


@dataclass(frozen=True)
class _RecipeAnswers:
    """A variant of a model: its baseline and its draws, on option sets and the shared text."""

    study: Study
    answers: Mapping[tuple[str, str], VariantAnswers]
    further: Draws
    verdicts: Mapping[Comparison, Verdict]
    graded: GradedStudy
    model: str
    variant: str
    start_model: str = ""

    @property
    def baseline(self) -> VariantAnswers:
        return self.answers[self.model, self.study.baseline]

    @property
    def draws(self) -> list[VariantAnswers]:
        at = self.model, self.variant
        return [self.answers[at], *self.further[at]]

    @property
    def sets(self) -> list[str]:
        return list(self.study.with_option_sets_only.evaluation.datasets)

    def problem(self, name: str) -> str:
        """Why an option set says nothing about the recipe; empty if it does."""
        c = Comparison(
            model=self.model, dataset=name, baseline=self.study.baseline, variant=self.variant
        )
        if c in self.verdicts and self.verdicts[c].kind == "invalid":
            return self.verdicts[c].reason
        before = self._predictions(self.study.baseline, self.baseline, name)
        adapter, rules = self.study.evaluation.datasets[name].adapter, decision_rules(self.study)
        for number, draw in enumerate(self.draws, start=1):
            after = self._predictions(draw_name(self.variant, number), draw, name)
            paired_predictions(before, after)  # refuses other items
            if number > 1 and (reason := invalid_reason(adapter, before, after, rules)):
                return reason
        return ""

    def _predictions(self, name: str, answers: VariantAnswers, of_set: str) -> VariantPredictions:
        check = failed_check(answers.gates, [WHOLE_VARIANT, of_set])
        return VariantPredictions(name, answers.predictions[of_set], check)

    def text_problem(self, key: str) -> str:
        """Why the shared text says nothing about the recipe; empty if it does."""
        tokens = {row["id"]: row["tokens"] for row in self.baseline.passages}
        for number, draw in enumerate([self.baseline, *self.draws]):
            name = draw_name(self.variant, number) if number else self.study.baseline
            if check := failed_check(draw.gates, [WHOLE_VARIANT, SHARED_TEXT]):
                return f"{name} failed a check: {check}"
            if {row["id"]: row["tokens"] for row in draw.passages} != tokens:
                return f"{name}: {OTHER_TEXT}"
            if any(row[key] is None for row in draw.passages):
                return f"{name}: {NOT_FINITE}"
        return "" if len(tokens) > 1 else "the shared text has one passage"

    def scores(self, name: str) -> list[Scored]:
        """Graded scores of the baseline and of every draw; empty if one has none."""
        rule = length_rule(self.study.evaluation.datasets[name])
        sides = [graded_scores(a.predictions[name], rule) for a in (self.baseline, *self.draws)]
        scores = [side for side in sides if side is not None]
        return scores if len(scores) == len(sides) else []

    def blind(self, name: str) -> str | None:
        """Why the model has nothing to lose on a set; None without graded scores there."""
        return self.graded.blind.get((self.model, name, self.study.baseline))

    def graded_differences(self, name: str) -> DrawsOfSet:
        before, *after = self.scores(name)
        return DrawsOfSet(
            np.array([paired_differences(before, side) for side in after]), before.clusters
        )

    def accuracy_differences(self, name: str) -> DrawsOfSet:
        before = {row["id"]: row for row in self.baseline.predictions[name]}
        ids = sorted(before)
        right = [{row["id"]: row["score"] for row in d.predictions[name]} for d in self.draws]
        table = np.array([[scores[i] - before[i]["score"] for i in ids] for scores in right])
        return DrawsOfSet(table, [before[i]["cluster"] or i for i in ids])

    def text_differences(self, key: str) -> DrawsOfSet:
        """KL is held against the float model already; of the loss, the baseline's is taken off."""
        before = {row["id"]: row for row in self.baseline.passages}
        ids = sorted(before)
        tokens = np.array([before[i]["tokens"] for i in ids], dtype=float)
        start = np.array([before[i][key] if key == "nll" else 0.0 for i in ids])
        sums = [{row["id"]: row[key] for row in draw.passages} for draw in self.draws]
        table = np.array([[of_draw[i] for i in ids] for of_draw in sums]) - start
        return DrawsOfSet(table / tokens, ids, tokens)


@dataclass(frozen=True)
class _RecipeCost:
    """The differences of a fine-tuned model minus those of its start, draw by draw.

    Draws of one number have the same calibration items in both models.
    """

    start: _RecipeAnswers
    finetuned: _RecipeAnswers

    @property
    def study(self) -> Study:
        return self.finetuned.study

    @property
    def model(self) -> str:
        return self.finetuned.model

    @property
    def variant(self) -> str:
        return self.finetuned.variant

    @property
    def start_model(self) -> str:
        return self.start.model

    @property
    def draws(self) -> list[VariantAnswers]:
        return self.finetuned.draws

    @property
    def sets(self) -> list[str]:
        return self.finetuned.sets

    def problem(self, name: str) -> str:
        return self.start.problem(name) or self.finetuned.problem(name)

    def text_problem(self, key: str) -> str:
        tokens = [
            {row["id"]: row["tokens"] for row in side.baseline.passages}
            for side in (self.start, self.finetuned)
        ]
        other = "" if tokens[0] == tokens[1] else f"{self.model}: {OTHER_TEXT}"
        return self.start.text_problem(key) or self.finetuned.text_problem(key) or other

    def scores(self, name: str) -> list[Scored]:
        start = self.start.scores(name)
        return start and self.finetuned.scores(name)

    def blind(self, name: str) -> str | None:
        reasons = self.start.blind(name), self.finetuned.blind(name)
        return None if None in reasons else reasons[0] or reasons[1]

    def graded_differences(self, name: str) -> DrawsOfSet:
        return _minus(self.finetuned.graded_differences(name), self.start.graded_differences(name))

    def accuracy_differences(self, name: str) -> DrawsOfSet:
        start = self.start.accuracy_differences(name)
        return _minus(self.finetuned.accuracy_differences(name), start)

    def text_differences(self, key: str) -> DrawsOfSet:
        return _minus(self.finetuned.text_differences(key), self.start.text_differences(key))


def _minus(of_set: DrawsOfSet, start: DrawsOfSet) -> DrawsOfSet:
    return replace(of_set, differences=of_set.differences - start.differences)


Sides = Mapping[str, _RecipeAnswers] | Mapping[str, _RecipeCost]  # by model


def _recipes_of_variant(study: Study, sides: Sides) -> list[Recipe]:
    """The recipes of one variant, whose graded scores are tested together."""
    graded: dict[tuple[str, str], str] = {}  # (model, set): why it is invalid
    for model, side in sides.items():
        for name in side.sets:
            if side.blind(name) is not None:
                no_scores = "" if side.scores(name) else NO_SCORES
                graded[model, name] = side.problem(name) or no_scores
    pooled = {model: [n for n in side.sets if side.blind(n) == ""] for model, side in sides.items()}
    pooled = {model: names for model, names in pooled.items() if names}
    differences = {
        at: [sides[at[0]].graded_differences(at[1])]
        for at, problem in graded.items()
        if not problem
    }
    problems = {
        (model, POOLED): _first_problem(graded, model, names) for model, names in pooled.items()
    }
    for (model, _), problem in problems.items():
        if not problem:
            tables = [differences[model, name][0] for name in pooled[model]]
            differences[model, POOLED] = tables
    judged = _judged(study, sides, graded, differences) | _judged(
        study, sides, problems, differences
    )
    return [
        Recipe(
            model, side.variant, len(side.draws), tuple(_figures(side, judged)), side.start_model
        )
        for model, side in sides.items()
    ]


def _first_problem(graded: Mapping, model: str, names: Sequence[str]) -> str:
    return next((graded[model, name] for name in names if graded[model, name]), "")


def _judged(
    study: Study,
    sides: Sides,
    family: Mapping[tuple[str, str], str],
    differences: Mapping[tuple[str, str], list[DrawsOfSet]],
) -> dict[tuple[str, str], RecipeFigure]:
    """The graded figures of one family, by (model, place).

    Args:
        family: every figure of it, with the reason why it is invalid, or none.
    """
    rules, margin = decision_rules(study), study.statistics.graded_margins.probability
    estimates = {
        at: pooled_recipe(differences[at]) for at, problem in family.items() if not problem
    }
    compared = {
        at: comparison_of(
            estimate, unit="probability", confidence=rules.confidence,
            alpha=rules.alpha / len(family), power=rules.power,
            identical=not any(of_set.differences.any() for of_set in differences[at]),
        )
        for at, estimate in estimates.items()
    }  # fmt: skip
    holm_p = holm({at: compared[at].p if at in compared else 1.0 for at in family})
    figures = {}
    for at, problem in family.items():
        model, place = at
        if problem:
            verdict = GradedVerdict("invalid", problem, None, margin)
            figures[at] = RecipeFigure(
                place, "graded score", "probability", problem, verdict=verdict
            )
            continue
        comparison, blind = compared[at], sides[model].blind(place) or ""
        kind = judge_graded(comparison, able=not blind, adjusted_p=holm_p[at], margin=margin)
        inside = kind in ("worse", "better") and comparison.is_inside(margin)
        reason = blind or (INSIDE_MARGIN if inside else "")
        verdict = GradedVerdict(kind, reason, comparison, margin, holm_p[at])
        first = pooled_recipe([_first_draw(of_set) for of_set in differences[at]]).items
        figures[at] = RecipeFigure(
            place, "graded score", "probability", reason, estimates[at], comparison.interval,
            first, verdict,
        )  # fmt: skip
    return figures


def _first_draw(of_set: DrawsOfSet) -> DrawsOfSet:
    return DrawsOfSet(of_set.differences[:1], of_set.clusters, of_set.weights)


def _figures(side: _RecipeAnswers | _RecipeCost, judged: Mapping[tuple[str, str], RecipeFigure]):
    """Every figure of one model's recipe: its sets, the pooled score, the shared text."""
    confidence = decision_rules(side.study).confidence
    for name in side.sets:
        if (side.model, name) in judged:
            yield judged[side.model, name]
        problem = side.problem(name)
        table = None if problem else side.accuracy_differences(name)
        yield _measured(name, "accuracy", "probability", problem, table, confidence)
    if (side.model, POOLED) in judged:
        yield judged[side.model, POOLED]
    measures: tuple[tuple[Measure, str], ...] = (("KL", "kl"), ("loss", "nll"))
    for measure, key in measures:
        problem = side.text_problem(key)
        table = None if problem else side.text_differences(key)
        yield _measured(SHARED_TEXT, measure, KL_UNIT, problem, table, confidence)


def _measured(
    place: str,
    measure: Measure,
    unit: Unit,
    problem: str,
    table: DrawsOfSet | None,
    confidence: float,
) -> RecipeFigure:
    """A figure without a test."""
    if table is None:
        return RecipeFigure(place, measure, unit, problem)
    estimate = pooled_recipe([table])
    interval = estimate.interval(confidence)
    first = pooled_recipe([_first_draw(table)]).items
    return RecipeFigure(place, measure, unit, "", estimate, interval, first)
