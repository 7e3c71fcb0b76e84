"""Folders kept between studies: made once, sealed with checksums, checked on every use."""

from collections.abc import Callable
from pathlib import Path

from helpers.core.checksums import RECORD, check_checksums, checksums
from helpers.core.file_locking import wait_for_lock
from helpers.core.file_writing import remove_leftovers, replace_folder
from helpers.core.records import write_json


def cached_folder(folder: Path, fill: Callable[[Path], None]) -> Path:
    """The folder, filled on first use; other processes wait until it is complete.

    Args:
        fill: writes the content into an empty folder.

    Raises:
        StudyError: a file in it differs from the one that was written.
    """
    if not (folder / RECORD).is_file():
        with wait_for_lock(folder.with_name(f".{folder.name}.lock")):
            if not (folder / RECORD).is_file():
                remove_leftovers(folder.parent)
                replace_folder(folder, lambda temporary: _seal(temporary, fill))
    remedy = f"delete {folder} and run again to recreate it"
    check_checksums(folder, made_by="its conversion", remedy=remedy)
    return folder


def _seal(folder: Path, fill: Callable[[Path], None]) -> None:
    fill(folder)
    write_json(folder / RECORD, {"files": checksums(folder)})
