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
    """Where the rows of a source, pinned to a commit, lie or will lie."""
    told = "-".join((source.hub, source.config or "default", source.split))
    name = f"{re.sub(r'[^A-Za-z0-9._-]+', '-', told)}-{sha256_data(source.model_dump())[:12]}"
    return cache_root() / "datasets" / f"{name}.jsonl"


def cache_rows(source: HubDataset, rows: list[dict], **told) -> dict:
    """Write the rows of a source to the cache; return their account, with what else is told.

    Raises:
        StudyError: a row holds what JSON cannot, such as a picture.
    """
    path = rows_file(source)
    try:
        write_jsonl(path, rows)
    except (TypeError, ValueError) as error:
        raise StudyError(f"its rows hold what is no text ({error}); name another dataset") from None
    found = {"rows": len(rows), **told, "sha256": sha256_file(path)}
    write_json(path.with_suffix(".json"), {"source": source.model_dump(), **found})
    return found


def cached_rows_info(source: HubDataset) -> dict | None:
    """Number and hash of the rows that are kept of a source; None if they are not here, whole."""
    path = rows_file(source)
    if not is_commit(source.revision) or not path.is_file():
        return None
    try:
        found = json.loads(path.with_suffix(".json").read_text("utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(found, dict) or found.get("sha256") != sha256_file(path):
        return None
    return {key: value for key, value in found.items() if key != "source"}


def cached_rows(source: HubDataset) -> list[dict]:
    """The rows of a source, from the cache.

    Raises:
        StudyError: the study was not fetched, or the rows are no longer what was fetched.
    """
    what, remedy = f"{source.hub} ({source.split})", f"run {FETCH} STUDY=… with this study"
    if not is_commit(source.revision):
        raise StudyError(f"{what} at {source.revision!r} is not pinned to a commit; {remedy}")
    if cached_rows_info(source) is None:
        raise StudyError(f"{what}: its rows are not on this machine; {remedy}")
    return read_jsonl(rows_file(source), made_by=FETCH)
