"""Content hashes: of files, of folders of files, and of plain data."""

import hashlib
import json
import os
from functools import cache
from pathlib import Path
from typing import Any

NOT_HASHED = {"record.json", "README.md"}


def canonical_json(data: Any) -> str:
    """JSON with one text for each value: keys sorted, no NaN, no optional spaces.

    Raises:
        ValueError: the data hold NaN or an infinity.
    """
    return json.dumps(
        data, sort_keys=True, ensure_ascii=False, allow_nan=False, separators=(",", ":")
    )


def sha256_text(text: str) -> str:
    """Hex digest of the text in UTF-8."""
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def sha256_data(data: Any) -> str:
    """Hex digest of plain data, whatever the order of its keys."""
    return sha256_text(canonical_json(data))


def sha256_file(path: Path) -> str:
    """Hex digest of a file's bytes."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def cached_digest(path: Path, status: os.stat_result) -> str:
    """The file's `sha256_file`, cached in this process until its size, time or inode changes."""
    return _cached_digest(path, status.st_size, status.st_mtime_ns, status.st_ino)


@cache
def _cached_digest(path: Path, _size: int, _mtime_ns: int, _inode: int) -> str:
    return sha256_file(path)


def file_digests(folder: Path) -> dict[str, str]:
    """Hex digest of every file below a folder, by its path in it.

    Left out are `record.json` and a model card (`README.md`), which describe the content and
    hold times, and hidden files: locks and unfinished files.
    """
    digests = {}
    for path in sorted(p for p in Path(folder).rglob("*") if p.is_file()):
        inside = path.relative_to(folder)
        if path.name not in NOT_HASHED and not any(p.startswith(".") for p in inside.parts):
            digests[inside.as_posix()] = sha256_file(path)
    return digests


def sha256_folder(folder: Path) -> str:
    """Hex digest over the names and contents of all files below a folder, as `file_digests`.

    Raises:
        FileNotFoundError: the folder holds no file.
    """
    digests = file_digests(folder)
    if not digests:
        raise FileNotFoundError(f"{folder} holds no files to hash; run the stage that writes it")
    return sha256_data(digests)
