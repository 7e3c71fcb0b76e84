"""Whether files are still the ones that were written: the checksums in a folder's record.

Every `record.json` holds the content hash of every file its stage wrote, by its path from
the record. Whoever reads such a file first holds it against the record; a disk that
returned other bytes, or a hand that edited them, is then an error and no finding.
"""

import json
import os
from collections.abc import Iterable
from pathlib import Path

from helpers.core.errors import StudyError
from helpers.core.hashing import cached_digest, file_digests, sha256_file

RECORD = "record.json"


def checksums(folder: Path, also: Iterable[Path] = ()) -> dict[str, str]:
    """Content hash of every file below a folder, and of files and folders beside it.

    Args:
        folder: where the record will lie; names are relative to it.
        also: what the stage wrote elsewhere.
    """
    found = file_digests(folder)
    for path in also:
        inside = file_digests(path) if path.is_dir() else {"": sha256_file(path)}
        for name, digest in inside.items():
            found[Path(os.path.relpath(path / name, folder)).as_posix()] = digest
    return found


def check_checksums(
    folder: Path, *, made_by: str, may_miss: str | None = None, remedy: str = ""
) -> None:
    """Hold the files of a stage against the checksums in its record.

    Args:
        folder: holds the record.
        made_by: what wrote it, for the message.
        may_miss: how the names begin of files that may be missing.
        remedy: what to do about it, if not to have the stage run again.

    Raises:
        StudyError: a file is missing or not what was written; names it and the remedy.
    """
    record = folder / RECORD
    remedy = remedy or f"delete {_shown(record)} and run make study"
    for name, digest in _recorded_checksums(record, made_by, remedy).items():
        path = Path(os.path.normpath(folder / name))
        if not path.is_file():
            if may_miss is not None and name.startswith(may_miss):
                continue
            raise StudyError(f"{_shown(path)} is missing, though {made_by} wrote it; {remedy}")
        if cached_digest(path, path.stat()) != digest:
            raise StudyError(
                f"{_shown(path)} is not what {made_by} wrote (its checksum differs); {remedy}"
            )


def _recorded_checksums(record: Path, made_by: str, remedy: str) -> dict[str, str]:
    try:
        return dict(json.loads(record.read_bytes())["files"])
    except FileNotFoundError:
        raise StudyError(f"{_shown(record)} is missing; run {made_by} first") from None
    except (ValueError, KeyError, TypeError):
        raise StudyError(f"{_shown(record)} is damaged or holds no checksums; {remedy}") from None


def _shown(path: Path) -> str:
    return "/".join(path.parts[-5:])
