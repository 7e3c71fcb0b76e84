"""Whether a comparison measures anything, decided before any test is looked at.

*Invalid* is said of a variant: it failed a check, or its answers are degenerate. A variant
that emits nothing may beat a weak baseline on questions that have no answer, with a small p.
*Uninformative* is said of the items: the baseline itself does not tell them from a fixed
answer, so nothing follows about ability, whatever the variant scores.
"""

from helpers.evaluation.checks.behavior import FORMAT_DROP
from helpers.evaluation.trivial_answers import (
    best_fixed_answer,
    capped_share,
    collapsed_to_one_answer,
    is_one_answer,
    looping_share,
    readable_share,
)
from helpers.statistics.comparison import Answers, Rules, score_interval

MOST_BROKEN = 0.5  # of a baseline's answers: cut off by the cap, or running in a loop
FEWEST_READABLE = 0.5  # a baseline read less often than this measures the format, not the ability


def _percent(fraction: float) -> str:
    return f"{100 * fraction:.1f} %"


def _score(predictions: list[dict]) -> float:
    return sum(p["score"] for p in predictions) / len(predictions)


def invalid_reason(adapter: str, baseline: Answers, variant: Answers, rules: Rules) -> str | None:
    """Why this is no measurement of the variant; None if it may be one."""
    for side in (variant, baseline):
        if side.problem:
            return f"{side.variant} failed a check: {side.problem}"
        if any(p["finish_reason"] == "nonfinite" for p in side.predictions):
            return f"{side.variant} computed logits that are not finite"
    before, after = baseline.predictions, variant.predictions
    hashes = {p["id"]: p["prompt_hash"] for p in before}
    if other := [p["id"] for p in after if p["prompt_hash"] != hashes.get(p["id"])]:
        told = f"{len(other)} of its items were asked in other words or tokens"
        return f"{told} ({min(other)})"
    if readable_share(before) - readable_share(after) > FORMAT_DROP:
        shares = f"{_percent(readable_share(after))} of its answers are readable"
        return f"{shares}, against {_percent(readable_share(before))} for {baseline.variant}"
    if collapsed_to_one_answer(after, before):
        return "it gives the same answer to every question"
    fixed = best_fixed_answer(adapter, after)
    if uninformative_reason(adapter, baseline, rules) is None and _score(after) <= fixed.score:
        return f"it does not beat always {fixed.answer} ({_percent(fixed.score)} of these items)"
    return None


def uninformative_reason(adapter: str, baseline: Answers, rules: Rules) -> str | None:
    """Why these items say nothing about ability, with this baseline; None if they may.

    The baseline has to beat the best fixed answer by more than chance: the lower limit of
    its interval lies above it.
    """
    asked, name = baseline.predictions, baseline.variant
    if (share := readable_share(asked)) < FEWEST_READABLE:
        return f"only {_percent(share)} of {name}'s own answers are readable"
    if is_one_answer(asked):
        return f"{name} itself gives the same answer to every question"
    fixed, score = best_fixed_answer(adapter, asked), _score(asked)
    if score_interval(asked, rules).low <= fixed.score:
        clearly = "clearly " if score > fixed.score else ""
        shares = f"{_percent(score)} against {_percent(fixed.score)}"
        return f"{name} itself does not {clearly}beat always {fixed.answer} ({shares})"
    if (share := capped_share(asked)) > MOST_BROKEN:
        return f"{_percent(share)} of {name}'s own answers are stopped by the cap"
    if (share := looping_share(asked)) > MOST_BROKEN:
        return f"{_percent(share)} of {name}'s own answers end in a loop"
    return None
