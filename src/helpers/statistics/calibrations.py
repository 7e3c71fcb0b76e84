"""What another number or kind of calibration items changes, beyond the draws of the recipe.

Variants are compared that differ in their calibration alone. A checkpoint is one draw of its
recipe, and other items of the same kind give another KL. With n draws of the recipe from the
study's own calibration, of mean m and standard deviation s, the KL of one more lies in
m ± t s sqrt(1 + 1/n) at the study's confidence, t of n − 1 degrees of freedom (the interval of a
future observation, for draws that are normal). A variant's KL outside of it is no draw of that
recipe. All read the same text, so that the text adds nothing to the spread. Imports no torch.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import sqrt
from statistics import mean, stdev

from scipy import stats

from helpers.core.records import WHOLE_VARIANT, failed_check
from helpers.evaluation.predictions import SHARED_TEXT
from helpers.statistics.verdicts import VariantAnswers
from helpers.study.schema import Study, Variant

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
