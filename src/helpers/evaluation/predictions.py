"""Predictions on disk: one JSON line an item, one file an evaluation set. Imports no torch."""

from pathlib import Path

from helpers.study.records import read_jsonl, write_jsonl

SHARED_TEXT = "shared_text"


def write_predictions(folder: Path, predictions: dict[str, list[dict]], passages: list[dict]):
    """Write `predictions/<dataset>.jsonl` and the rows of the shared text beside them."""
    for name, rows in {**predictions, SHARED_TEXT: passages}.items():
        write_jsonl(folder / "predictions" / f"{name}.jsonl", rows)


def read_predictions(folder: Path, dataset: str) -> list[dict]:
    """The predictions of one evaluation set, in its items' order.

    Raises:
        StudyError: they are missing or damaged.
    """
    return read_jsonl(folder / "predictions" / f"{dataset}.jsonl", made_by="03_evaluation")
