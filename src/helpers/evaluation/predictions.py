"""Predictions and prompts on disk: validated, hashed, and kept while they are made.

One JSON line an item, one file an evaluation set. A file may have been cut, edited or swapped
since it was written; whatever is wrong with it is one line that names the file, the line and the
field.

An evaluation that was cut short goes on. Each prediction is appended to
`evaluation/.partial/<dataset>.jsonl` when it is made. Every line carries its own checksum; the
first says what the others belong to: model files, variant, settings, prompts, code, packages and
device. A run that finds the file of the very same evaluation asks only what is missing, since an
answer is the same in any company; one that finds another's says so and begins anew. A last line
without its end was being written and is dropped; whatever else is wrong is an error, since no one
can say what else is.

Prompts are kept word by word by every model's baseline. All variants of a model are asked the same
(a gate holds them to the baseline's hashes), so one copy is enough. With it a report shows its
questions, and results can be handed on in another format, where neither the items nor the model
are at hand. A line proves itself, since its hash is in every prediction. Imports no torch.
"""

import json
import os
import shutil
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from helpers.core import processes
from helpers.core.errors import StudyError
from helpers.core.files import PROJECT, relative_to_project
from helpers.core.records import (
    canonical_json,
    read_jsonl,
    sha256_data,
    sha256_file,
    sha256_text,
    write_jsonl,
)
from helpers.evaluation.scoring import STATUSES
from helpers.study import stages
from helpers.study.loading import Job
from helpers.study.schema import Study
from helpers.study.stages import imported_modules

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


class TaskRow(AnswerRow):
    """A prediction for a task of lm-evaluation-harness, with its metrics of the item.

    A metric is a number, [sum, count], or None if it is neither.
    """

    metrics: dict[str, float | list[float] | None] = {}


class PassageRow(Row):
    """The figures of one passage of the shared text; None stands for one that is not finite.

    Rows that were written before this project kept the KL of each token have no lists, and the
    baseline's rows no `token_kl`.
    """

    tokens: TokenCount
    nll: float | None
    kl: float | None
    top1_agreements: Count
    token_kl: list[float | None] = []
    token_texts: list[str] = []


BY_TOKEN = ("token_kl", "token_texts")  # lists with one entry a scored token


ROW_MODELS: dict[str, type[Row]] = {
    "arc": AnswerRow,
    "boolq": AnswerRow,
    "squad_v2": SquadRow,
    "openmath": NumberRow,
    "task": TaskRow,
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
    gold_form_tokens: Annotated[int, Field(ge=0)] = 0  # read before, not scored


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
    if problem is None and model is PassageRow:
        return _miscounted_tokens(row)
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


def _miscounted_tokens(row: dict) -> str | None:
    for key in BY_TOKEN:
        if key in row and len(row[key]) != row["tokens"]:
            return f"has {len(row[key])} {key} for {row['tokens']} tokens"
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


SHARED_TEXT = "shared_text"


def write_predictions(
    folder: Path,
    predictions: dict[str, list[dict]],
    passages: list[dict],
    *,
    model: str,
    variant: str,
):
    """Write `predictions/<dataset>.jsonl` and the rows of the shared text beside them.

    Every row names its model and its variant.
    """
    owner = {"model": model, "variant": variant}
    for name, rows in {**predictions, SHARED_TEXT: passages}.items():
        write_jsonl(folder / "predictions" / f"{name}.jsonl", [row | owner for row in rows])


def read_predictions(folder: Path, study: Study) -> dict[str, list[dict]]:
    """The predictions of every evaluation set of the study, in their items' order.

    Raises:
        StudyError: a file is missing or damaged, or a row is not a valid prediction.
    """
    sets = study.evaluation.datasets
    return {name: _read_rows(folder, name, sets[name].adapter) for name in sets}


def read_passage_rows(folder: Path) -> list[dict]:
    """The rows of the shared text, one per passage.

    Raises:
        StudyError: the file is missing or damaged, or a row is not valid.
    """
    return _read_rows(folder, SHARED_TEXT, PASSAGES)


def _read_rows(folder: Path, name: str, kind: str) -> list[dict]:
    path = folder / "predictions" / f"{name}.jsonl"
    rows = read_jsonl(path, made_by="03_evaluation")
    check_prediction_rows(rows, kind=kind, place="/".join(path.parts[-5:]))
    return rows


def prediction_digests(folder: Path, datasets: Iterable[str]) -> dict[str, str]:
    """Content hash of every prediction file, which ties a report to the checked files."""
    names = [*datasets, SHARED_TEXT]
    return {name: sha256_file(folder / "predictions" / f"{name}.jsonl") for name in names}


FOLDER = "prompts"


def prompt_digest(
    text: str,
    continuations: Sequence[str],
    tokens: Sequence[int] | None = None,
    options: Sequence[Sequence[int]] = (),
) -> str:
    """Digest of a prompt, equal for two variants if and only if their prompts are equal.

    Args:
        text, continuations: the words.
        tokens, options: their token ids, as the model receives them; without them the digest
            covers the words alone, as in older records.
    """
    words = [text, list(continuations)]
    if tokens is None:
        return sha256_data(words)[:16]
    return sha256_data([*words, list(tokens), [list(option) for option in options]])[:16]


def read_prompts(folder: Path, dataset: str) -> dict[str, dict]:
    """The recorded prompts by item id; empty if the evaluation has no record of them.

    Args:
        folder: the baseline's evaluation.

    Raises:
        StudyError: a line is damaged or does not match its digest.
    """
    path = folder / FOLDER / f"{dataset}.jsonl"
    if not path.is_file():
        return {}
    rows = {}
    for number, row in enumerate(read_jsonl(path, made_by="03_evaluation"), start=1):
        try:
            ids = row.get("tokens"), row.get("continuation_tokens", ())
            digest = prompt_digest(row["prompt"], row["continuations"], *ids)
            is_valid = digest == row["prompt_hash"]
            rows[row["id"]] = row
        except (KeyError, TypeError, ValueError):
            is_valid = False
        if not is_valid or not isinstance(row.get("question"), str):
            raise StudyError(
                f"{'/'.join(path.parts[-5:])}: line {number} is damaged (its hash differs); "
                "run 03_evaluation again"
            )
    return rows


CHECK = 16  # characters of a line's checksum
SYNC_S = 1.0  # the most work that a power failure can lose; a killed process loses nothing


class Progress:
    """The saved predictions of an unfinished evaluation, set by set.

    Args:
        job: names the model and the variant.
        files: content hash of the files they are loaded from.
        packages: versions of the packages that compute the answers, as in `Record.packages`.

    Attributes:
        resumed: ids of the items that an interrupted run had answered, by set.
    """

    def __init__(self, job: Job, *, files: str, packages: dict[str, str]):
        self._job, self._files, self._packages = job, files, packages
        self.resumed: dict[str, set[str]] = {}
        self._folder = job.paths.evaluation(job.model, job.variant) / ".partial"

    def open_set(self, dataset: str, prompts: dict[str, str]) -> "SavedPredictions":
        """Open the saved predictions of one evaluation set.

        Args:
            prompts: digest of every item's prompt, by the item's id.

        Raises:
            StudyError: the file belongs to this evaluation and is damaged.
        """
        job, path = self._job, self._folder / f"{dataset}.jsonl"
        owner = _owner(job, dataset, prompts) | {"packages": sha256_data(self._packages)}
        owner |= {"files": self._files}
        rows, valid_bytes, differing = read_saved(path, owner, prompts)
        self.resumed[dataset] = set(rows)
        label = f"evaluation {job.model} {job.variant}"
        if differing:
            note = f"{dataset}: discarded answers of another run ({', '.join(differing)} differ)"
            processes.report_event(processes.NOTE, label, note)
        if rows:
            note = f"{dataset}: goes on after {len(rows)} of {len(prompts)} answers"
            processes.report_event(processes.NOTE, label, note)
        return SavedPredictions(path, owner, rows, valid_bytes)

    def discard(self) -> None:
        """Remove the saved predictions, after the evaluation has written its files."""
        shutil.rmtree(self._folder, ignore_errors=True)


class SavedPredictions:
    """The saved predictions of one evaluation set, and the file that takes new ones.

    Attributes:
        rows: the predictions by item id.
    """

    def __init__(self, path: Path, owner: dict, rows: dict[str, dict], valid_bytes: int):
        self._path, self.rows = path, rows
        path.parent.mkdir(parents=True, exist_ok=True)
        self._stream = open(path, "ab", buffering=0)  # noqa: SIM115 - open while answers come
        self._stream.truncate(valid_bytes)
        self._synced = time.monotonic()
        if not valid_bytes:
            self._append(owner)

    def appending(self, predictions: Iterable[dict]) -> Iterator[dict]:
        """Yield each prediction after it has been saved."""
        for row in predictions:
            yield self._append(row)

    def _append(self, row: dict) -> dict:
        """Write a line; return the row as it will be read back."""
        text = canonical_json(row)
        line = memoryview(f"{sha256_text(text)[:CHECK]} {text}\n".encode())
        try:
            while line:  # after a partial write, writing the rest raises the reason
                line = line[self._stream.write(line) :]
            if time.monotonic() - self._synced > SYNC_S:
                os.fsync(self._stream.fileno())
                self._synced = time.monotonic()
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self._path)) from None
        return json.loads(text)


class UnsavedPredictions:
    """Replaces `SavedPredictions` if nothing is saved."""

    def __init__(self):
        self.rows: dict[str, dict] = {}

    def appending(self, predictions: Iterable[dict]) -> Iterator[dict]:
        yield from predictions


def read_saved(
    path: Path, owner: dict, prompts: dict[str, str]
) -> tuple[dict[str, dict], int, list[str]]:
    """(rows by item id, bytes of the valid lines, keys in which another owner differs).

    Raises:
        StudyError: a line is damaged, or does not answer one of the prompts.
    """
    if not path.is_file():
        return {}, 0, []
    *lines, _torn = path.read_bytes().split(b"\n")
    lines_read = [_line(path, number, line) for number, line in enumerate(lines, start=1)]
    if not lines_read or lines_read[0] != owner:
        other_owner = lines_read[0] if lines_read else {}
        differing = [key for key in owner if lines_read and other_owner.get(key) != owner[key]]
        return {}, 0, differing
    rows: dict[str, dict] = {}
    for number, row in enumerate(lines_read[1:], start=2):
        if row["id"] in rows or prompts.get(row["id"]) != row["prompt_hash"]:
            raise _damaged_line(path, number, "answers no prompt of this set, or repeats an answer")
        rows[row["id"]] = row
    return rows, sum(len(line) + 1 for line in lines), []


def _line(path: Path, number: int, line: bytes) -> dict:
    check, _, text = line.partition(b" ")
    try:
        if sha256_text(text.decode("utf-8"))[:CHECK].encode() == check:
            return json.loads(text)
    except ValueError:
        pass
    raise _damaged_line(path, number, "is damaged (its checksum differs)")


def _damaged_line(path: Path, number: int, problem: str) -> StudyError:
    place = "/".join(path.parts[-5:])
    return StudyError(
        f"{place}: line {number} {problem}; delete the file to evaluate that set again"
    )


def _owner(job: Job, dataset: str, prompts: dict[str, str]) -> dict:
    """Everything that the predictions depend on; they are valid only for equal values."""
    run = stages.Run("evaluation", job.model, job.variant, job.draw)
    notebook = PROJECT / "notebooks" / f"{stages.NOTEBOOKS['evaluation']}.ipynb"
    modules = sorted(imported_modules(notebook, with_report=False))
    return {
        "model": job.model,
        "variant": job.variant,
        "dataset": dataset,
        "settings": sha256_text(stages.settings_text(job.study, run)),
        "prompts": sha256_data(prompts),
        "code": sha256_data({relative_to_project(path): sha256_file(path) for path in modules}),
        "device": sha256_data(job.runtime),  # another device may round differently
    }
