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
from helpers.statistics.comparison import DecisionRules, VariantPredictions, score_interval

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
