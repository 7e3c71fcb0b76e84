"""Predictions on disk: one JSON line an item, one file an evaluation set. Imports no torch."""

from collections.abc import Iterable
from pathlib import Path

from helpers.core.hashing import sha256_file
from helpers.core.records import read_jsonl, write_jsonl
from helpers.evaluation.prediction_rows import PASSAGES, check_prediction_rows
from helpers.study.schema import Study

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
