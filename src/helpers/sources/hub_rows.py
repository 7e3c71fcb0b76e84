"""Rows fetched from a Hub, kept in the project's cache by commit, with their number and hash.

A commit does not change, so a file that is there is right as long as its hash is.
"""

import json
import re
from pathlib import Path

from helpers.core.errors import StudyError
from helpers.core.hashing import sha256_data, sha256_file
from helpers.core.paths import cache_root
from helpers.core.records import read_jsonl, write_json, write_jsonl
from helpers.study.pins import FETCH, is_commit
from helpers.study.schema_sources import HubDataset


def rows_file(source: HubDataset) -> Path:
    """The cache file for the rows of a source that is pinned to a commit."""
    label = "-".join((source.hub, source.config or "default", source.split))
    name = f"{re.sub(r'[^A-Za-z0-9._-]+', '-', label)}-{sha256_data(source.model_dump())[:12]}"
    return cache_root() / "datasets" / f"{name}.jsonl"


def cache_rows(source: HubDataset, rows: list[dict], **details) -> dict:
    """Write the rows of a source to the cache; return their number, hash and `details`.

    Raises:
        StudyError: JSON cannot hold a value of a row, such as a picture.
    """
    path = rows_file(source)
    try:
        write_jsonl(path, rows)
    except (TypeError, ValueError) as error:
        raise StudyError(
            f"its rows hold values that are no text ({error}); name another dataset"
        ) from None
    info = {"rows": len(rows), **details, "sha256": sha256_file(path)}
    write_json(path.with_suffix(".json"), {"source": source.model_dump(), **info})
    return info


def cached_rows_info(source: HubDataset) -> dict | None:
    """Number and hash of the cached rows of a source; None if they are missing or damaged."""
    path = rows_file(source)
    if not is_commit(source.revision) or not path.is_file():
        return None
    try:
        info = json.loads(path.with_suffix(".json").read_text("utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(info, dict) or info.get("sha256") != sha256_file(path):
        return None
    return {key: value for key, value in info.items() if key != "source"}


def cached_rows(source: HubDataset) -> list[dict]:
    """The rows of a source, from the cache.

    Raises:
        StudyError: the rows were not fetched, or differ from the fetched ones.
    """
    label, remedy = f"{source.hub} ({source.split})", f"run {FETCH} STUDY=… with this study"
    if not is_commit(source.revision):
        raise StudyError(f"{label} at {source.revision!r} is not pinned to a commit; {remedy}")
    if cached_rows_info(source) is None:
        raise StudyError(f"{label}: its rows are not on this machine; {remedy}")
    return read_jsonl(rows_file(source), made_by=FETCH)
