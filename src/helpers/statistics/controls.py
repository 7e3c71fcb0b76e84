"""Controls: variants whose outcome is known beforehand, and whether it came about.

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

from helpers.core.gates import WHOLE_VARIANT
from helpers.evaluation.checks.reference_gates import kl_per_token, kl_resolution
from helpers.evaluation.trivial_answers import status_and_answer
from helpers.statistics.intervals import wilson_interval
from helpers.study.schema import Study
from helpers.study.schema_variants import Variant

Role = Literal[
    "baseline",
    "repetition",
    "noise floor",
    "smoothing alone",
    "broken on purpose",
    "without smoothing",
]
SURE = 0.95  # of a limit on the rate of ties; a study's own confidence is about its verdicts
SPREAD = 4.0  # standard deviations: a movement by rounding is this large at most


@dataclass(frozen=True)
class Asked:
    """What one variant of one model answered, and its checks.

    Attributes:
        predictions: by evaluation set.
        passages: rows of the shared text.
        gates: every gate on it, as recorded.
    """

    predictions: Mapping[str, list[dict]]
    passages: list[dict]
    gates: list[dict]

    @property
    def failed(self) -> list[dict]:
        return [gate for gate in self.gates if not gate["passed"]]

    @property
    def failed_whole(self) -> list[dict]:
        """Those on the variant itself, not on how it answers one evaluation set."""
        guarded = [(gate, gate.get("invalidates", WHOLE_VARIANT)) for gate in self.failed]
        return [gate for gate, what in guarded if what == WHOLE_VARIANT]


@dataclass(frozen=True)
class Duty:
    """What a control must do, and what it did; the words are of the program, not of a model."""

    role: Role
    must: str
    found: str
    done: bool


def role_of(study: Study, name: str) -> Role | None:
    """What a variant is there for; None for one that the study asks about."""
    recipe = study.variants[name]
    if name == study.baseline:
        return "baseline"
    if recipe.recipe == "seed":
        return "broken on purpose"
    if recipe.dtype:
        return "noise floor"
    if not recipe.quantized:
        return "repetition" if recipe.is_unmodified else "smoothing alone"
    twins = [n for n, other in study.variants.items() if is_unsmoothed_twin(recipe, other)]
    return "without smoothing" if twins else None


def is_unsmoothed_twin(plain: Variant, smoothed: Variant) -> bool:
    """Whether the two differ by the smoothing alone, which the first lacks."""
    same = (plain.scheme, plain.ignore) == (smoothed.scheme, smoothed.ignore)
    return same and plain.quantized and plain.smooth is None and smoothed.smooth is not None


def duty(study: Study, name: str, asked: Asked, baseline: Asked) -> Duty | None:
    """Whether a variant did what it is there for; None for one that is no control."""
    role = role_of(study, name)
    match role:
        case None:
            return None
        case "baseline" | "noise floor":
            must = "pass every check" if role == "baseline" else "differ by rounding alone"
            return Duty(role, must, _checks(asked), bool(asked.gates) and not asked.failed)
        case "without smoothing":
            sound = bool(asked.gates) and not asked.failed_whole
            return Duty(role, "be what it claims", _checks(asked), sound)
        case "broken on purpose":
            return Duty(role, "fail a check", _checks(asked), bool(asked.failed_whole))
    return _equal(role, asked, baseline)


def _checks(asked: Asked) -> str:
    total, failed = len(asked.gates), asked.failed
    if not failed:
        return f"all {total} checks hold"
    return f"{len(failed)} of {total} checks fail ({failed[0]['name']}: {failed[0]['measured']})"


def _equal(role: Role, asked: Asked, baseline: Asked) -> Duty:
    """Sound by its checks, and no answer changed that rounding does not explain."""
    items = changed = odd = 0
    for name, before in baseline.predictions.items():
        pairs = _pairs(before, asked.predictions[name])
        other = [(b, a) for b, a in pairs if status_and_answer(b) != status_and_answer(a)]
        items, changed = items + len(pairs), changed + len(other)
        odd += unexplained(other, asked.passages, tokens=sum(a["output_tokens"] for _, a in pairs))
    told = f"{items - changed} of {items} answers are the baseline's"
    if changed:
        told += f", {odd} of the others beyond ties within rounding"
    done = bool(asked.gates) and not asked.failed and not odd
    must = "answer as the baseline does, up to ties within rounding"
    return Duty(role, must, f"{told}; {_checks(asked)}", done)


def _pairs(before: list[dict], after: list[dict]) -> list[tuple[dict, dict]]:
    rows = {row["id"]: row for row in after}
    return [(row, rows[row["id"]]) for row in before]


def unexplained(changed: list[tuple[dict, dict]], passages: list[dict], *, tokens: int) -> int:
    """How many changed answers of one set are more than ties within rounding.

    Where options are scored, a changed choice is a tie if no option's log-probability
    moved by more than rounding moves it. A generated text shows no probabilities: as many
    may change as there are tokens that lie as near to another one as those of the shared
    text whose top choice changed.

    Args:
        changed: (baseline's, variant's) rows with different answers.
        passages: the variant's rows of the shared text.
        tokens: all tokens the variant wrote in this set.
    """
    scored = [pair for pair in changed if "logprobs" in pair[0]]
    moved = sum(not _tied(*pair, passages) for pair in scored)
    ties = tie_rate(passages) * tokens
    allowed = math.floor(ties + 2 * math.sqrt(ties))
    return moved + max(0, len(changed) - len(scored) - allowed)


def _tied(before: dict, after: dict, passages: list[dict]) -> bool:
    """No option moved by more than so small a KL moves a log-probability, token by token."""
    kl = abs(kl_per_token(passages)) + kl_resolution(passages)
    limit = SPREAD * math.sqrt(2 * kl) * after["output_tokens"]
    pairs = zip(before["logprobs"], after.get("logprobs", ()), strict=True)
    return all(abs(b - a) <= limit for b, a in pairs)


def tie_rate(passages: list[dict]) -> float:
    """Upper limit of the share of tokens whose top choice rounding changes."""
    tokens = sum(row["tokens"] for row in passages)
    if not tokens:
        return 0.0
    other = tokens - sum(row["top1_agreements"] for row in passages)
    return wilson_interval(other, tokens, confidence=SURE).high
