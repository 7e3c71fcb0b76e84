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
from helpers.core.paths import short_path

RECORD = "record.json"


def checksums(folder: Path, elsewhere: Iterable[Path] = ()) -> dict[str, str]:
    """Content hash of every file below a folder, and of files and folders beside it.

    Args:
        folder: where the record will lie; names are relative to it.
        also: what the stage wrote elsewhere.
    """
    digests = file_digests(folder)
    for path in elsewhere:
        content = file_digests(path) if path.is_dir() else {"": sha256_file(path)}
        for name, digest in content.items():
            digests[Path(os.path.relpath(path / name, folder)).as_posix()] = digest
    return digests


def check_checksums(
    folder: Path, *, made_by: str, optional: str | None = None, remedy: str = ""
) -> None:
    """Compare the files of a stage with the checksums in its record.

    Args:
        folder: holds the record.
        made_by: the stage that wrote it, for the message.
        may_miss: prefix of the names of files that may be missing.
        remedy: the advice in the message; by default, to run the stage again.

    Raises:
        StudyError: a file is missing or differs; the message names it and the remedy.
    """
    record = folder / RECORD
    remedy = remedy or f"delete {short_path(record)} and run make study"
    for name, digest in _recorded_checksums(record, made_by, remedy).items():
        path = Path(os.path.normpath(folder / name))
        if not path.is_file():
            if optional is not None and name.startswith(optional):
                continue
            raise StudyError(f"{short_path(path)} is missing, though {made_by} wrote it; {remedy}")
        if cached_digest(path, path.stat()) != digest:
            raise StudyError(
                f"{short_path(path)} is not what {made_by} wrote (its checksum differs); {remedy}"
            )


def _recorded_checksums(record: Path, made_by: str, remedy: str) -> dict[str, str]:
    try:
        return dict(json.loads(record.read_bytes())["files"])
    except FileNotFoundError:
        raise StudyError(f"{short_path(record)} is missing; run {made_by} first") from None
    except (ValueError, KeyError, TypeError):
        raise StudyError(f"{short_path(record)} is damaged or lacks checksums; {remedy}") from None
