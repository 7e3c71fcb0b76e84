"""A recipe over its draws: what several checkpoints of one variant show together.

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

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from helpers.core.files import draw_name
from helpers.core.records import WHOLE_VARIANT, failed_check
from helpers.evaluation.predictions import SHARED_TEXT
from helpers.statistics.graded import (
    DrawsOfSet,
    RecipeEstimate,
    Scored,
    Unit,
    comparison_of,
    judge_graded,
    paired_differences,
    pooled_recipe,
)
from helpers.statistics.graded_study import (
    INSIDE_MARGIN,
    KL_UNIT,
    NO_SCORES,
    GradedStudy,
    GradedVerdict,
    graded_scores,
    length_rule,
)
from helpers.statistics.intervals import Interval, MeanEstimate, holm
from helpers.statistics.verdicts import (
    VariantAnswers,
    VariantPredictions,
    Verdict,
    decision_rules,
    invalid_reason,
    paired_predictions,
)
from helpers.study.schema import Comparison, FineTunedModel, Study

Measure = Literal["graded score", "accuracy", "KL", "loss"]
POOLED = "pooled"
OTHER_TEXT = "it read other tokens of the shared text"
NOT_FINITE = "a passage has no finite sum"

Draws = Mapping[tuple[str, str], Sequence[VariantAnswers]]  # (model, variant): the second on


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
