"""Two variants on the same items: how many answers were lost and gained, and how sure that is.

Scores are 0 or 1. Independent items take the exact McNemar test and the Tango interval;
items that share passages a sign-flip test and a bootstrap over the passages. What the
numbers mean is in `verdicts`.
"""

from dataclasses import dataclass

from helpers.core.errors import StudyError
from helpers.evaluation.trivial_answers import status_and_answer
from helpers.statistics.bootstrap import BootstrapMean, bootstrap_difference, bootstrap_mean
from helpers.statistics.intervals import Interval, paired_binary, tango_interval, wilson_interval
from helpers.statistics.power import detectable_loss, detectable_mean_difference
from helpers.study.schema import Study


@dataclass(frozen=True)
class VariantPredictions:
    """One variant's predictions of one evaluation set; `failed_check` names one it failed."""

    variant: str
    predictions: list[dict]
    failed_check: str | None = None


@dataclass(frozen=True)
class DecisionRules:
    """The study's confidence, power, margin and resampling; `family` counts its declared tests."""

    confidence: float
    power: float
    margin: float
    resamples: int
    seed: int
    family: int

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
    return DecisionRules(s.confidence, s.power, s.margin, s.resamples, study.seed, len(s.primary))


def paired_predictions(
    baseline: VariantPredictions, variant: VariantPredictions
) -> list[tuple[dict, dict]]:
    """Both predictions of every item, in the order of the items' ids.

    Items with different prompts are paired too: `validity` calls such a comparison invalid.

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
