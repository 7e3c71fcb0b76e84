"""Gates on how a variant answers: does it end, repeat itself, keep the format, echo, read?

All of them are held against the baseline on the same items. A baseline that behaves no
better makes a set uninformative, which `validity` decides; it does not make a variant
invalid. So the baseline, held against itself, passes.
"""

import math

from helpers.core.gates import Gate
from helpers.evaluation.answer_parsing import normalize_answer
from helpers.evaluation.trivial_answers import (
    best_fixed_answer,
    collapsed_to_one_answer,
    ends_in_loop,
    example_answers,
    readable_share,
    status_and_answer,
)
from helpers.study.schema import EvaluationSet

FORMAT_DROP = 0.25  # a larger drop in parsable answers means a broken run, not a lower score
BEHAVIOR_MARGIN = 0.25  # the same for endless, looping and echoing answers


def behavior_gates(
    evaluation_set: EvaluationSet, predictions: list[dict], baseline: list[dict]
) -> list[Gate]:
    """The gates on the answering behaviour in one set.

    Args:
        predictions: the variant's, at least one.
        baseline: the baseline's on the same items, at least one.
    """
    return [
        end_gate(predictions, baseline),
        loop_gate(predictions, baseline),
        format_gate(predictions, baseline),
        one_answer_gate(predictions, baseline),
        echo_gate(evaluation_set, predictions, baseline),
        fixed_answer_gate(evaluation_set, predictions, baseline),
    ]


def end_gate(predictions: list[dict], baseline: list[dict]) -> Gate:
    """The token limit stops hardly more answers than it stops of the baseline."""
    capped = (
        _mean_share(p["finish_reason"] == "length" for p in s) for s in (predictions, baseline)
    )
    return _not_more_often_gate("answers within the token limit", "stopped by the cap", *capped)


def loop_gate(predictions: list[dict], baseline: list[dict]) -> Gate:
    """Hardly more answers end in a loop than of the baseline's."""
    looping = (_mean_share(ends_in_loop(p["output"]) for p in s) for s in (predictions, baseline))
    return _not_more_often_gate("answers do not loop", "end in a loop", *looping)


def format_gate(predictions: list[dict], baseline: list[dict]) -> Gate:
    """The share of readable answers is not far below the baseline's."""
    share, baseline_share = readable_share(predictions), readable_share(baseline)
    return Gate(
        "answers parse",
        baseline_share - share <= FORMAT_DROP,
        f"{_percent(share)} of the answers are readable",
        f"at most {_points(FORMAT_DROP)} points below the baseline's {_percent(baseline_share)}",
    )


def one_answer_gate(predictions: list[dict], baseline: list[dict]) -> Gate:
    """Questions with different gold answers do not all get the same answer."""
    distinct_answers = len(set(map(status_and_answer, predictions)))
    return Gate(
        "answers not constant",
        not collapsed_to_one_answer(predictions, baseline),
        f"{distinct_answers} different answers to {len(predictions)} items",
        "more than one, unless the baseline gives that one but for as few as chance may take "
        f"(here it gives {len(set(map(status_and_answer, baseline)))})",
    )


def echo_gate(evaluation_set: EvaluationSet, predictions: list[dict], baseline: list[dict]) -> Gate:
    """The prompt's worked examples are not given as answers far more often than they are gold."""
    examples = example_answers(evaluation_set)

    def echo_share(rows: list[dict]) -> float:
        return _mean_share(p["parsed"] and normalize_answer(p["parsed"]) in examples for p in rows)

    gold_share = _mean_share(
        any(normalize_answer(g) in examples for g in p["golds"]) for p in predictions
    )
    description = "are the answer of a worked example"
    return _not_more_often_gate(
        "examples not echoed",
        description,
        echo_share(predictions),
        max(gold_share, echo_share(baseline)),
    )


def fixed_answer_gate(
    evaluation_set: EvaluationSet, predictions: list[dict], baseline: list[dict]
) -> Gate:
    """If the baseline clearly beats the best fixed answer, the variant beats it too.

    Clearly: by more than two standard errors. The verdict tests the same at the study's
    own confidence level; this gate uses none of that code.
    """
    fixed_answer = best_fixed_answer(evaluation_set.adapter, predictions)
    score, baseline_score = (
        _mean_share(p["score"] for p in rows) for rows in (predictions, baseline)
    )
    threshold = fixed_answer.score + 2 * math.sqrt(
        max(0.0, baseline_score * (1 - baseline_score)) / len(baseline)
    )
    return Gate(
        "beats fixed answers",
        baseline_score <= threshold or score > fixed_answer.score,
        f"{_percent(score)} right, baseline {_percent(baseline_score)}",
        f"more than {_percent(fixed_answer.score)} (always {fixed_answer.answer}), "
        f"if the baseline has more than {_percent(threshold)}",
    )


def _not_more_often_gate(name: str, description: str, share: float, baseline_share: float) -> Gate:
    limit, measured = baseline_share + BEHAVIOR_MARGIN, f"{_percent(share)} {description}"
    if limit >= 1:  # no share can exceed it; `validity` calls such a set uninformative
        return Gate(
            name, True, measured, f"none: the baseline itself has {_percent(baseline_share)}"
        )
    wording = f"at most {_points(BEHAVIOR_MARGIN)} points above {_percent(baseline_share)}"
    return Gate(name, share <= limit, measured, wording)


def _mean_share(values) -> float:
    numbers = [float(value or 0) for value in values]
    return math.fsum(numbers) / len(numbers)


def _percent(fraction: float) -> str:
    return f"{100 * fraction:.1f} %"


def _points(fraction: float) -> str:
    return f"{100 * fraction:.0f}"
