"""What the parts of a recipe do: its calibration items, and weights or activations alone.

Calibrations: variants are compared that differ in their calibration alone. A checkpoint is one draw
of its recipe, and other items of the same kind give another KL. With n draws of the recipe from the
study's own calibration, of mean m and standard deviation s, the KL of one more lies in
m ± t s sqrt(1 + 1/n) at the study's confidence, t of n − 1 degrees of freedom (the interval of a
future observation, for draws that are normal). A variant's KL outside of it is no draw of that
recipe. All read the same text, so that the text adds nothing to the spread.

Weights or activations: two rulers that differ from an int8 variant only by leaving activations or
weights float say what either part costs; what both together cost beyond the sum is not additive.
All three answer the same items and read the same text, so that the intervals are of paired
differences. Imports no torch.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import sqrt
from statistics import mean, stdev

from scipy import stats

from helpers.core.records import WHOLE_VARIANT, failed_check
from helpers.evaluation.predictions import SHARED_TEXT
from helpers.statistics.graded import Scored, kl_difference, pooled_difference
from helpers.statistics.graded_study import KL_UNIT, graded_scores, length_rule
from helpers.statistics.intervals import MeanEstimate
from helpers.statistics.verdicts import VariantAnswers
from helpers.study.schema import PRESETS, Study, Variant

FEWEST_DRAWS = 3  # of two, the interval is wider than twelve standard deviations


@dataclass(frozen=True)
class CalibrationEffect:
    """A variant beside the draws of the same recipe from the study's own calibration.

    Attributes:
        reference: the variant made from the study's own calibration.
        draws: how many checkpoints of the reference have a KL.
        kl: of the variant, nats a token; None if it failed a check or is not finite.
        low, high: where the KL of another draw of the reference lies; None of too few draws.
    """

    model: str
    variant: str
    reference: str
    draws: int
    kl: float | None
    low: float | None
    high: float | None

    @property
    def place(self) -> str:
        """`above`, `below` or `within` what another draw gives; `unknown` without both."""
        if self.kl is None or self.low is None or self.high is None:
            return "unknown"
        return "below" if self.kl < self.low else "above" if self.kl > self.high else "within"


def calibration_effects(
    study: Study,
    answers: Mapping[tuple[str, str], VariantAnswers],
    draws: Mapping[tuple[str, str], Sequence[VariantAnswers]],
) -> tuple[CalibrationEffect, ...]:
    """Every variant of a named calibration that has a reference, model by model.

    Args:
        answers: of the first draws, by (model, variant).
        draws: of all further draws.
    """
    return tuple(
        _effect(study, model, variant, reference, answers, draws)
        for model in study.models
        for variant, recipe in study.variants.items()
        if recipe.calibration and (reference := _reference(study, recipe))
    )


def _reference(study: Study, recipe: Variant) -> str | None:
    """The first variant of the same recipe that is made from the study's own calibration."""
    own = _without_calibration(recipe)
    return next(
        (
            name
            for name, other in study.variants.items()
            if not other.calibration and _without_calibration(other) == own
        ),
        None,
    )


def _without_calibration(recipe: Variant) -> Variant:
    return recipe.model_copy(update={"calibration": None, "repeats": 1})


def _effect(study, model, variant, reference, answers, draws) -> CalibrationEffect:
    of_reference = [answers[model, reference], *draws.get((model, reference), ())]
    kls = [kl for kl in map(_kl, of_reference) if kl is not None]
    low = high = None
    if len(kls) >= FEWEST_DRAWS and len(kls) == len(of_reference):
        quantile = stats.t.ppf((1 + study.statistics.confidence) / 2, len(kls) - 1)
        half = float(quantile) * stdev(kls) * sqrt(1 + 1 / len(kls))
        low, high = mean(kls) - half, mean(kls) + half
    kl = _kl(answers[model, variant])
    return CalibrationEffect(model, variant, reference, len(kls), kl, low, high)


def _kl(of_variant: VariantAnswers) -> float | None:
    """KL in nats a token over the shared text; None if it cannot be used."""
    sums = [row["kl"] for row in of_variant.passages]
    if None in sums or not sums or failed_check(of_variant.gates, [WHOLE_VARIANT, SHARED_TEXT]):
        return None
    return sum(sums) / sum(row["tokens"] for row in of_variant.passages)


Answers = Mapping[tuple[str, str], VariantAnswers]
Draws = Mapping[tuple[str, str], Sequence[VariantAnswers]]
PARTS = ("both", "weights", "activations", "not_additive")


@dataclass(frozen=True)
class PartOfLoss:
    """What one part changes, in the unit of its measure.

    Attributes:
        draws: by draw; the first is the checkpoint that the report is about.
        low, high: interval over items of the first draw.
    """

    draws: tuple[float, ...]
    low: float
    high: float


@dataclass(frozen=True)
class Decomposition:
    """One measure of an int8 variant, apart by weights and activations.

    Attributes:
        weights, activations: the rulers that round these alone.
        measure: `graded score`, variant minus baseline, pooled; or `KL`.
        sets: the evaluation sets of a graded score.
        parts: by name of `PARTS`; empty if `reason` says why there are none.
    """

    model: str
    variant: str
    weights: str
    activations: str
    measure: str
    unit: str
    sets: tuple[str, ...]
    parts: Mapping[str, PartOfLoss]
    reason: str = ""


def decompositions(
    study: Study, answers: Answers, draws: Draws, able: Mapping[str, Sequence[str]]
) -> tuple[Decomposition, ...]:
    """Every int8 variant that has both rulers, model by model.

    Args:
        answers: of the first draws, by (model, variant).
        draws: of all further draws.
        able: by model, the evaluation sets on which its float model has an ability.
    """
    return tuple(
        part
        for model in study.models
        for variant in study.variants
        if (alone := rulers_of(study, variant))
        for part in _decomposed(study, model, (variant, *alone), answers, draws, able[model])
    )


def rulers_of(study: Study, variant: str) -> tuple[str, str] | None:
    """The names of the rulers that round the weights and the activations of a variant alone."""
    recipe = study.variants[variant]
    if recipe.recipe or recipe.scheme != PRESETS["w8a8"] or recipe.rounding != "nearest":
        return None
    kept = _without_scheme(recipe)
    of_preset = {
        other.preset: name
        for name, other in reversed(study.variants.items())
        if other.ruler and _without_scheme(other) == kept
    }
    weights, activations = of_preset.get("w8a16"), of_preset.get("a8")
    return (weights, activations) if weights and activations else None


def _without_scheme(recipe: Variant) -> dict:
    return recipe.model_dump(exclude={"preset", "weights", "activations", "repeats"})


def _decomposed(study, model, names, answers, draws, able):
    """The two measures of one variant; `names`: it, and its rulers."""
    checkpoints = [[answers[model, n], *draws.get((model, n), ())] for n in names]
    count = min(map(len, checkpoints))
    of_draws = [[of_variant[k] for of_variant in checkpoints] for k in range(count)]
    baseline = answers[model, study.baseline]
    sets = tuple(n for n in able if all(n in side.predictions for o in of_draws for side in o))
    row = {"model": model, "variant": names[0], "weights": names[1], "activations": names[2]}
    for measure, unit, guarded in (
        ("graded score", "probability", sets),
        ("KL", KL_UNIT, (SHARED_TEXT,)),
    ):
        reason = _failure(names, of_draws, [WHOLE_VARIANT, *guarded])
        estimates: list[dict[str, MeanEstimate]] = []
        if not guarded:
            reason = "the float model shows no ability that could be lost"
        if not reason and measure == "KL":
            estimates = [_kl_parts(of_draw) for of_draw in of_draws]
        elif not reason:
            estimates = [_score_parts(study, sets, baseline, of_draw) for of_draw in of_draws]
        if not all(estimates):
            reason, estimates = "a value is not finite, or other tokens were read", []
        parts = {part: _part(estimates, part, study) for part in PARTS} if estimates else {}
        of_sets = sets if measure == "graded score" else ()
        yield Decomposition(
            **row, measure=measure, unit=unit, sets=of_sets, parts=parts, reason=reason
        )


def _failure(names: Sequence[str], of_draws, guarded: list[str]) -> str:
    """The first failed check that makes a part count for nothing."""
    for of_draw in of_draws:
        for name, side in zip(names, of_draw, strict=True):
            if failed := failed_check(side.gates, guarded):
                return f"{name} failed a check: {failed}"
    return ""


def _part(estimates: list[dict[str, MeanEstimate]], part: str, study: Study) -> PartOfLoss:
    limits = estimates[0][part].interval(study.statistics.confidence)
    return PartOfLoss(tuple(e[part].mean for e in estimates), limits.low, limits.high)


def _score_parts(study, sets, baseline, of_draw) -> dict[str, MeanEstimate]:
    """Pooled differences of graded scores from the baseline; empty if a score is missing."""
    pairs: dict[str, dict[str, tuple[Scored, Scored]]] = {part: {} for part in PARTS}
    for name in sets:
        rule = length_rule(study.evaluation.datasets[name])
        scored = [graded_scores(side.predictions[name], rule) for side in (baseline, *of_draw)]
        sides = [scores for scores in scored if scores is not None]
        if len(sides) < len(scored):
            return {}
        before, both, weights, activations = sides
        rest = both.scores - weights.scores - activations.scores + 2 * before.scores
        for part, scores in zip(
            PARTS, (both.scores, weights.scores, activations.scores, rest), strict=True
        ):
            pairs[part][name] = before, replace(both, scores=scores)
    return {part: pooled_difference(of_part) for part, of_part in pairs.items()}


def _kl_parts(of_draw: Sequence[VariantAnswers]) -> dict[str, MeanEstimate]:
    """KL a token of the shared text; empty if a passage has none, or the tokens differ."""
    rows = [{row["id"]: row for row in side.passages} for side in of_draw]
    tokens = [{name: row["tokens"] for name, row in of_side.items()} for of_side in rows]
    kls = [{name: row["kl"] for name, row in of_side.items()} for of_side in rows]
    if any(t != tokens[0] for t in tokens) or any(None in of_side.values() for of_side in kls):
        return {}
    both, weights, activations = kls
    rest = {name: both[name] - weights[name] - activations[name] for name in both}
    nothing = [{"id": name, "tokens": n, "kl": 0.0} for name, n in tokens[0].items()]
    return {
        part: kl_difference(nothing, [row | {"kl": values[row["id"]]} for row in nothing])
        for part, values in zip(PARTS, (both, weights, activations, rest), strict=True)
    }
