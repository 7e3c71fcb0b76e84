"""Writing so that what has its final name is whole, even after a kill or a power cut.

A file or folder is filled under a temporary name beside its own, handed to the disk, and
renamed; then the rename is handed to the disk. What a killed writer leaves has its
temporary name, which says who it was, so that it can be told from a living writer's.
"""

import os
import shutil
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

ENDING = ".tmp"


def temporary_name(path: Path) -> Path:
    """A hidden neighbour of `path` that names this machine and process."""
    return path.with_name(f".{path.name}.{socket.gethostname()}-{os.getpid()}{ENDING}")


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary neighbour, then give it the name `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_name(path)
    try:
        write(temporary)
        flush_to_disk(temporary)
        _rename(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def replace_folder(folder: Path, fill: Callable[[Path], None]) -> None:
    """Let `fill` write a temporary folder, then give it the name `folder`.

    An old folder of that name is renamed before: for a moment neither exists, but a mixture
    of the two never does. Libraries for atomic writes replace single files only.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_name(folder)
    aside = temporary_name(folder.with_name(f"{folder.name}.old"))
    for path in (temporary, aside):
        shutil.rmtree(path, ignore_errors=True)
    try:
        temporary.mkdir()
        fill(temporary)
        _flush_folder(temporary)
        if folder.exists():
            os.replace(folder, aside)
        _rename(temporary, folder)
    finally:
        for path in (temporary, aside):
            shutil.rmtree(path, ignore_errors=True)


def _flush_folder(folder: Path) -> None:
    for below, _, files in os.walk(folder):
        for name in files:
            flush_to_disk(Path(below, name))
        flush_to_disk(Path(below))


def _rename(temporary: Path, final: Path) -> None:
    os.replace(temporary, final)
    flush_to_disk(final.parent)


def flush_to_disk(path: Path) -> None:
    """Flush a file, or the names in a folder, to the disk, so that a power cut loses nothing."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_leftovers(folder: Path) -> None:
    """Remove the temporary files of writers that were killed on this machine.

    Temporary files of running processes and of other machines stay.
    """
    for path in list(_temporary(folder)):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def _temporary(folder: Path) -> Iterator[Path]:
    here = f".{socket.gethostname()}-"
    for path in folder.rglob(f".*{ENDING}"):
        _, at, process = path.name.removesuffix(ENDING).rpartition(here)
        if at and process.isdigit() and not _is_alive(int(process)):
            yield path


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # it runs as another user
        return True
    return True
