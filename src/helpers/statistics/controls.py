"""Controls: variants whose outcome is known in advance, and whether they behaved as expected.

Without them a study can be wrong and look sound. A variant is recognised as a control from
what it is, never from its name. What each of them must do:

- the noise floor, the baseline in another float type, differs from it by rounding alone;
- smoothing alone leaves every answer as it was, up to ties within rounding;
- the baseline asked once more answers the same;
- the known broken recipe fails checks;
- a variant's twin without smoothing is what it claims, or nothing is smoothing's merit.

Imports no torch.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from helpers.core.records import WHOLE_VARIANT
from helpers.evaluation.checks.numeric_gates import kl_per_token, kl_resolution
from helpers.evaluation.trivial_answers import status_and_answer
from helpers.statistics.intervals import wilson_interval
from helpers.study.schema import Study, Variant

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
    if not recipe.quantized:
        return "repetition" if recipe.is_unmodified else "smoothing alone"
    smoothed_twins = [n for n, other in study.variants.items() if is_unsmoothed_twin(recipe, other)]
    return "without smoothing" if smoothed_twins else None


def is_unsmoothed_twin(plain: Variant, smoothed: Variant) -> bool:
    """Whether the two differ only by smoothing, which the first lacks."""
    same_scheme = (plain.scheme, plain.ignore) == (smoothed.scheme, smoothed.ignore)
    return same_scheme and plain.quantized and plain.smooth is None and smoothed.smooth is not None


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
