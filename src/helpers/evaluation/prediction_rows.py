"""What a line of a predictions file has to hold before anything is computed from it.

A file may have been cut, edited or swapped since it was written; whatever is wrong with
it is one line that names the file, the line and the field. Imports no torch.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from helpers.core.errors import StudyError
from helpers.evaluation.metrics import STATUSES

PASSAGES = "passages"  # rows of the shared text, beside the adapters
FINISH_REASONS = ("stop", "answer", "length", "nonfinite", "scored")

Name = Annotated[str, Field(min_length=1)]
Count = Annotated[int, Field(ge=0, lt=2**53)]
TokenCount = Annotated[int, Field(ge=1, lt=2**53)]
Fraction = Annotated[float, Field(ge=0, le=1)]
LogLikelihood = Annotated[float, Field(le=0)]  # in nats


class Row(BaseModel):
    """A line of a predictions file; fields that are not declared are not checked."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)

    id: Name


class AnswerRow(Row):
    """The prediction of one item."""

    cluster: str
    golds: Annotated[list[str], Field(min_length=1)]
    output: str
    parsed: str | None
    status: Literal[STATUSES]
    finish_reason: Literal[FINISH_REASONS]
    prompt_hash: Name
    prompt_tokens: Count
    output_tokens: Count
    score: Fraction
    logprobs: list[float] = []
    labels: list[Name] = []
    option_bytes: list[TokenCount] = []


class SquadRow(AnswerRow):
    """A prediction for SQuAD v2, where a question may have no gold answer."""

    golds: list[str]
    f1: Fraction


class NumberRow(AnswerRow):
    """A prediction of a number; the difference is None if either is not a number."""

    absolute_difference: float | None


class PassageRow(Row):
    """The figures of one passage of the shared text; None stands for a sum that is not finite."""

    tokens: TokenCount
    nll: float | None
    kl: float | None
    top1_agreements: Count


ROW_MODELS: dict[str, type[Row]] = {
    "arc": AnswerRow,
    "boolq": AnswerRow,
    "squad_v2": SquadRow,
    "openmath": NumberRow,
    PASSAGES: PassageRow,
}


class GoldRow(Row):
    """The graded scores of a written answer; None stands for a sum that is not finite.

    Rows that were written before this project had graded scores have none of these fields.
    """

    gold_loglikelihoods: Annotated[list[LogLikelihood | None], Field(min_length=1)]
    gold_tokens: Annotated[list[TokenCount], Field(min_length=1)]
    foil_loglikelihood: LogLikelihood | None
    foil_tokens: TokenCount | None
    foil: Name | None
    gold_hash: Name


GOLD_FIELDS = GoldRow.model_fields.keys() - Row.model_fields.keys()


def check_prediction_rows(rows: list, *, kind: str, place: str) -> None:
    """Check that every row is valid for its kind, and that no id occurs twice.

    Args:
        kind: the adapter of the evaluation set, or `PASSAGES`.
        place: the file, for the message.

    Raises:
        StudyError: a row lacks a field or holds an impossible one; names file, line, field.
    """
    line_of_id: dict[str, int] = {}
    for number, row in enumerate(rows, start=1):
        problem = _problem(row, ROW_MODELS[kind])
        if problem is None and row["id"] in line_of_id:
            problem = f"repeats the id of line {line_of_id[row['id']]}"
        if problem:
            raise StudyError(f"{place}: line {number} {problem}; run 03_evaluation again")
        line_of_id[row["id"]] = number


def _problem(row: Any, model: type[Row]) -> str | None:
    """The first invalid field of a row, as the end of a sentence; None if all are valid."""
    problem = _invalid_field(row, model)
    if problem or GOLD_FIELDS.isdisjoint(row):
        return problem
    return _invalid_field(row, GoldRow) or _unpaired_gold(row)


def _invalid_field(row: Any, model: type[Row]) -> str | None:
    try:
        model.model_validate(row)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        if not first["loc"]:
            return "is not an object with named fields"
        field = first["loc"][0]
        if first["type"] == "missing":
            return f"lacks {field!r}"
        return f"has {field} = {_short_repr(row[field])}, which is not valid"
    return None


def _unpaired_gold(row: dict) -> str | None:
    if len(row["gold_loglikelihoods"]) != len(row["gold_tokens"]):
        return "has not as many gold_loglikelihoods as gold_tokens"
    if (row["foil"] is None) != (row["foil_tokens"] is None):
        return "has only one of foil and foil_tokens"
    return None


def _short_repr(value: Any) -> str:
    if isinstance(value, str | int | float | None):
        return repr(value)[:60]
    return f"a {type(value).__name__}"
