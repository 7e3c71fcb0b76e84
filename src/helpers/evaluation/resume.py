"""Predictions kept as they are made, so that an evaluation that was cut short goes on.

Each is appended to `evaluation/.partial/<dataset>.jsonl` when it is made. Every line
carries its own checksum; the first says what the others belong to: model files, variant,
settings, prompts, code, packages and device. A run that finds the file of the very same
evaluation asks only what is missing, since an answer is the same in any company; one that
finds another's says so and begins anew. A last line without its end was being written and
is dropped; whatever else is wrong is an error, since no one can say what else is.
"""

import json
import os
import shutil
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from helpers.core import console
from helpers.core.errors import StudyError
from helpers.core.hashing import canonical_json, sha256_data, sha256_file, sha256_text
from helpers.core.paths import PROJECT, relative_to_project
from helpers.study import stages
from helpers.study.fingerprinted_code import imported_modules
from helpers.study.study_run import Job

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
            console.report_event(console.NOTE, label, note)
        if rows:
            note = f"{dataset}: goes on after {len(rows)} of {len(prompts)} answers"
            console.report_event(console.NOTE, label, note)
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
    run = stages.Run("evaluation", job.model, job.variant)
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
