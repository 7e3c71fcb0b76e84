"""Gates on how a variant answers: does it end, repeat itself, keep the format, echo, read?

All of them are held against the baseline on the same items. A baseline that behaves no
better makes a set uninformative, which `validity` decides; it does not make a variant
invalid. So the baseline, held against itself, passes.
"""

import math

from helpers.core.gates import Gate
from helpers.evaluation.answer_parsing import normalize_answer
from helpers.evaluation.trivial_answers import (
    answer_of,
    best_degenerate,
    example_answers,
    loops,
    lost_its_answers,
    readable,
)
from helpers.study.schema import EvaluationSet

FORMAT_DROP = 0.25  # losing this share of readable answers is a broken run, not a lower score
CONDUCT_MARGIN = 0.25  # the same for endless, looping and echoing answers


def conduct_gates(
    wanted: EvaluationSet, predictions: list[dict], baseline: list[dict]
) -> list[Gate]:
    """The gates on how one set was answered.

    Args:
        predictions: the variant's, at least one.
        baseline: the study's baseline's on the same items; at least one.
    """
    return [
        end_gate(predictions, baseline),
        loop_gate(predictions, baseline),
        format_gate(predictions, baseline),
        one_answer_gate(predictions, baseline),
        echo_gate(wanted, predictions, baseline),
        fixed_answer_gate(wanted, predictions, baseline),
    ]


def end_gate(predictions: list[dict], baseline: list[dict]) -> Gate:
    """The cap on new tokens stops few more answers than it stops of the baseline."""
    capped = (_share(p["finish_reason"] == "length" for p in s) for s in (predictions, baseline))
    return _more_often("answers end", "stopped by the cap", *capped)


def loop_gate(predictions: list[dict], baseline: list[dict]) -> Gate:
    """Few more answers end in a loop than of the baseline's."""
    looping = (_share(loops(p["output"]) for p in s) for s in (predictions, baseline))
    return _more_often("answers do not loop", "end in a loop", *looping)


def format_gate(predictions: list[dict], baseline: list[dict]) -> Gate:
    """The share of readable answers is not far below the baseline's."""
    found, before = readable(predictions), readable(baseline)
    return Gate(
        "format kept",
        before - found <= FORMAT_DROP,
        f"{_percent(found)} of the answers are readable",
        f"at most {_points(FORMAT_DROP)} points below the baseline's {_percent(before)}",
    )


def one_answer_gate(predictions: list[dict], baseline: list[dict]) -> Gate:
    """Questions with different right answers do not all get the same one."""
    different = len(set(map(answer_of, predictions)))
    return Gate(
        "answers differ",
        not lost_its_answers(predictions, baseline),
        f"{different} different answers to {len(predictions)} items",
        "more than one, unless the baseline gives that one but for as few as chance may take "
        f"(here it gives {len(set(map(answer_of, baseline)))})",
    )


def echo_gate(wanted: EvaluationSet, predictions: list[dict], baseline: list[dict]) -> Gate:
    """The answers of the prompt's worked examples are not given far more often than due."""
    examples = example_answers(wanted)

    def echoes(rows: list[dict]) -> float:
        return _share(p["parsed"] and normalize_answer(p["parsed"]) in examples for p in rows)

    due = _share(any(normalize_answer(g) in examples for g in p["golds"]) for p in predictions)
    said = "are the answer of a worked example"
    return _more_often("examples not echoed", said, echoes(predictions), max(due, echoes(baseline)))


def fixed_answer_gate(wanted: EvaluationSet, predictions: list[dict], baseline: list[dict]) -> Gate:
    """Where the baseline beats the best fixed answer clearly, the variant beats it too.

    Clearly: by more than two standard errors. The verdict asks the same with the
    study's own confidence; this gate needs none of its statistics.
    """
    fixed = best_degenerate(wanted.adapter, predictions)
    score, before = (_share(p["score"] for p in rows) for rows in (predictions, baseline))
    clearly = fixed.score + 2 * math.sqrt(max(0.0, before * (1 - before)) / len(baseline))
    return Gate(
        "beats fixed answers",
        before <= clearly or score > fixed.score,
        f"{_percent(score)} right, baseline {_percent(before)}",
        f"more than {_percent(fixed.score)} (always {fixed.answer}), "
        f"if the baseline has more than {_percent(clearly)}",
    )


def _more_often(name: str, said: str, found: float, before: float) -> Gate:
    limit, measured = before + CONDUCT_MARGIN, f"{_percent(found)} {said}"
    if limit >= 1:  # no share is above it; `validity` calls such a set uninformative
        return Gate(name, True, measured, f"none: the baseline itself has {_percent(before)}")
    told = f"at most {_points(CONDUCT_MARGIN)} points above {_percent(before)}"
    return Gate(name, found <= limit, measured, told)


def _share(values) -> float:
    listed = [float(value or 0) for value in values]
    return math.fsum(listed) / len(listed)


def _percent(fraction: float) -> str:
    return f"{100 * fraction:.1f} %"


def _points(fraction: float) -> str:
    return f"{100 * fraction:.0f}"
