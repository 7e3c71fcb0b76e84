"""Content hashes: of files, of folders of files, and of plain data."""

import hashlib
import json
import os
from functools import cache
from pathlib import Path
from typing import Any

NOT_HASHED = {"record.json", "README.md"}


def canonical_json(data: Any) -> str:
    """One text for one value: sorted keys, no NaN, no spaces to vary.

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


def cached_digest(path: Path, found: os.stat_result) -> str:
    """The file's `sha256_file`, computed once a process while the file stays as it was found."""
    return _cached_digest(path, found.st_size, found.st_mtime_ns, found.st_ino)


@cache
def _cached_digest(path: Path, _size: int, _mtime_ns: int, _inode: int) -> str:
    return sha256_file(path)


def file_digests(folder: Path) -> dict[str, str]:
    """Hex digest of every file below a folder, by its path in it.

    `record.json` and a card (`README.md`) are left out: they tell of the content, and of a
    run with its times. So is what is hidden: locks and unfinished files.
    """
    found = {}
    for path in sorted(p for p in Path(folder).rglob("*") if p.is_file()):
        inside = path.relative_to(folder)
        if path.name not in NOT_HASHED and not any(p.startswith(".") for p in inside.parts):
            found[inside.as_posix()] = sha256_file(path)
    return found


def sha256_folder(folder: Path) -> str:
    """Hex digest over the names and contents of all files below a folder, as `file_digests`.

    Raises:
        FileNotFoundError: the folder holds no file.
    """
    digests = file_digests(folder)
    if not digests:
        raise FileNotFoundError(f"{folder} holds no files to hash; run the stage that writes it")
    return sha256_data(digests)
