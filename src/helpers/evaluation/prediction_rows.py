"""What a line of a predictions file has to hold before anything is computed from it.

A file may have been cut, edited or swapped since it was written; whatever is wrong with
it is one line that names the file, the line and the field. Imports no torch.
"""

import math
from collections.abc import Callable
from typing import Any

from helpers.core.errors import StudyError
from helpers.evaluation.metrics import STATUSES

PASSAGES = "passages"  # rows of the shared text, beside the adapters
FINISH_REASONS = ("stop", "answer", "length", "nonfinite", "scored")


def _text(value: Any) -> bool:
    return isinstance(value, str)


def _name(value: Any) -> bool:
    return isinstance(value, str) and value != ""


def _texts(value: Any) -> bool:
    return isinstance(value, list) and all(map(_text, value))


def _some_texts(value: Any) -> bool:
    return _texts(value) and value != []


def _count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**53


def _number(value: Any) -> bool:
    """A finite number; one too large for a float is none."""
    try:
        return not isinstance(value, bool) and math.isfinite(value)
    except (OverflowError, TypeError):
        return False


def _fraction(value: Any) -> bool:
    return _number(value) and 0 <= value <= 1


def _or_none(fits: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or fits(value)


ANSWER: dict[str, Callable[[Any], bool]] = {
    "id": _name,
    "cluster": _text,
    "golds": _some_texts,
    "output": _text,
    "parsed": _or_none(_text),
    "status": STATUSES.__contains__,
    "finish_reason": FINISH_REASONS.__contains__,
    "prompt_hash": _name,
    "prompt_tokens": _count,
    "output_tokens": _count,
    "score": _fraction,
}
FIELDS: dict[str, dict[str, Callable[[Any], bool]]] = {
    "arc": ANSWER,
    "boolq": ANSWER,
    "squad_v2": ANSWER | {"golds": _texts, "f1": _fraction},
    "openmath": ANSWER | {"absolute_difference": _or_none(_number)},
    PASSAGES: {
        "id": _name,
        "tokens": lambda value: _count(value) and value > 0,
        "nll": _or_none(_number),
        "kl": _or_none(_number),
        "top1_agreements": _count,
    },
}


def _sum(value: Any) -> bool:
    """A log-likelihood; None where it was not finite."""
    return value is None or (_number(value) and value <= 0)


def _sums(value: Any) -> bool:
    return isinstance(value, list) and value != [] and all(map(_sum, value))


def _size(value: Any) -> bool:
    return _count(value) and value > 0


def _sizes(value: Any) -> bool:
    return isinstance(value, list) and value != [] and all(map(_size, value))


GOLDS: dict[str, Callable[[Any], bool]] = {  # of written answers; older rows have none of them
    "gold_loglikelihoods": _sums,
    "gold_tokens": _sizes,
    "foil_loglikelihood": _sum,
    "foil_tokens": _or_none(_size),
    "foil": _or_none(_name),
    "gold_hash": _name,
}


def refuse_odd_rows(rows: list, *, kind: str, place: str) -> None:
    """Make sure that every row is one of its kind, and no id occurs twice.

    Args:
        kind: the adapter of the evaluation set, or `PASSAGES`.
        place: the file, for the message.

    Raises:
        StudyError: a row lacks a field or holds an impossible one; names file, line, field.
    """
    seen: dict[str, int] = {}
    for number, row in enumerate(rows, start=1):
        odd = _odd_field(row, FIELDS[kind])
        if odd is None and row["id"] in seen:
            odd = f"repeats the id of line {seen[row['id']]}"
        if odd:
            raise StudyError(f"{place}: line {number} {odd}; run 03_evaluation again")
        seen[row["id"]] = number


def _odd_field(row: Any, fields: dict[str, Callable[[Any], bool]]) -> str | None:
    if not isinstance(row, dict):
        return "is no row of named values"
    if any(name in row for name in GOLDS):
        fields = fields | GOLDS
    for name, fits in fields.items():
        if name not in row:
            return f"lacks {name!r}"
        if not fits(row[name]):
            return f"has {name} = {_shown(row[name])}, which cannot be"
    logprobs = row.get("logprobs", [])
    if not isinstance(logprobs, list) or not all(map(_number, logprobs)):
        return "has log-probabilities that are no numbers"
    if len(row.get("gold_loglikelihoods", ())) != len(row.get("gold_tokens", ())):
        return "has another number of gold_loglikelihoods than of gold_tokens"
    if (row.get("foil") is None) != (row.get("foil_tokens") is None):
        return "has a foil without its tokens, or tokens of none"
    return None


def _shown(value: Any) -> str:
    return (
        repr(value)[:60]
        if isinstance(value, str | int | float | None)
        else f"a {type(value).__name__}"
    )
