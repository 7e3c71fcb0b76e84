"""Predictions on disk: one JSON line an item, one file an evaluation set. Imports no torch."""

from collections.abc import Iterable
from pathlib import Path

from helpers.study.hashing import sha256_file
from helpers.study.records import read_jsonl, write_jsonl

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

    Every row names the model and the variant it is of.
    """
    owner = {"model": model, "variant": variant}
    for name, rows in {**predictions, SHARED_TEXT: passages}.items():
        write_jsonl(folder / "predictions" / f"{name}.jsonl", [row | owner for row in rows])


def read_predictions(folder: Path, dataset: str) -> list[dict]:
    """The predictions of one evaluation set, in its items' order.

    Raises:
        StudyError: they are missing or damaged.
    """
    return read_jsonl(folder / "predictions" / f"{dataset}.jsonl", made_by="03_evaluation")


def prediction_digests(folder: Path, datasets: Iterable[str]) -> dict[str, str]:
    """Content hash of every prediction file, so that what was checked is what is shown."""
    names = [*datasets, SHARED_TEXT]
    return {name: sha256_file(folder / "predictions" / f"{name}.jsonl") for name in names}
