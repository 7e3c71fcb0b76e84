"""What the raw rows of a source say, read apart from the adapters and hashed.

A gate holds every item to it: golds that an adapter took from the row before, or texts that
were exchanged on the way, have other hashes. Of each row only its fields are known here.
"""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

from helpers.core.hashing import sha256_data
from helpers.sources.items import Item
from helpers.sources.rows import load_rows
from helpers.study.local_files import dataset_files
from helpers.study.schema_sources import DatasetSource, FileDataset, ShippedDataset


def raw_digests(source: DatasetSource, *, adapter: str) -> dict[str, set[str]]:
    """Item id → hashes of the rows that have it."""
    digests: dict[str, set[str]] = {}
    for row in _rows_of(source):
        try:
            identifier, parts = READERS[adapter](row)
        except (KeyError, TypeError, ValueError, AttributeError):
            continue  # no item either; the adapter reports why
        digests.setdefault(identifier, set()).add(_digest(parts))
    return digests


def _rows_of(source: DatasetSource) -> Iterator[dict]:
    """The rows of a source: JSON lines are read here, other files by `load_rows`."""
    paths = []
    if isinstance(source, ShippedDataset):
        paths = [Path(__file__).parent / "data" / f"{source.shipped}.jsonl"]
    elif isinstance(source, FileDataset):
        paths = dataset_files(source)
    if not paths or any(path.suffix == ".parquet" for path in paths):
        yield from load_rows(source)
        return
    for path in paths:
        lines = path.read_bytes().decode("utf-8-sig").split("\n")
        yield from (json.loads(line) for line in lines if line.strip())


def item_digest(item: Item, golds: Iterable[str]) -> str:
    """The hash of an item's texts with these golds, to compare with its row's hashes."""
    return _digest([item.question, item.passage, *item.options, *item.labels, *golds])


def _digest(parts: Iterable) -> str:
    """A hash of the texts that ignores white space."""
    return sha256_data([" ".join(str(part).split()) for part in parts])


def _arc(row: dict) -> tuple[str, list]:
    choices = row["choices"]
    return row["id"], [row["question"], "", *choices["text"], *choices["label"], row["answerKey"]]


def _boolq(row: dict) -> tuple[str, list]:
    label, labels = {True: "yes", False: "no"}[row["answer"]], ("yes", "no")
    identifier = sha256_data([row["question"], row["passage"]])[:16]
    return identifier, [row["question"], row["passage"], *labels, *labels, label]


def _squad_v2(row: dict) -> tuple[str, list]:
    return row["id"], [row["question"], row["context"], *dict.fromkeys(row["answers"]["text"])]


def _openmath(row: dict) -> tuple[str, list]:
    identifier = sha256_data([row["problem"], row["expected_answer"]])[:16]
    return identifier, [row["problem"], "", row["expected_answer"]]


READERS = {"arc": _arc, "boolq": _boolq, "squad_v2": _squad_v2, "openmath": _openmath}
