"""Who may write: locks of the operating system, which end with the process that holds them.

Nothing has to be unlocked after a crash. A lock is a file beside what it guards; the file
stays and means nothing by itself. On a file system without locks (some of clusters are)
nothing is held, and two runs at once are not noticed.
"""

import errno
import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from helpers.core.errors import StudyError

NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)

_open_locks: dict[Path, int] = {}  # of this process: it never stands in its own way


def acquire_lock(path: Path, what: str) -> int:
    """Take the lock for as long as this process lives; return the open file's number.

    Raises:
        StudyError: another process holds it; says which, and what of.
    """
    if path not in _open_locks:
        number = _open(path)
        if not _flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB):
            holder = _holder(number)
            os.close(number)
            raise StudyError(f"{what} by {holder}; wait for it or stop it")
        os.ftruncate(number, 0)
        os.pwrite(number, f"{os.getpid()} {socket.gethostname()}".encode(), 0)
        _open_locks[path] = number
    return _open_locks[path]


def _holder(number: int) -> str:
    """Who wrote their name into the lock's file."""
    process, _, machine = os.pread(number, 300, 0).decode("utf-8", "replace").partition(" ")
    if not process.isdigit():
        return "another process"
    return f"process {process}" + (f" on {machine}" if machine != socket.gethostname() else "")


def release_lock(path: Path) -> None:
    """Give up a lock that `acquire_lock` took; nothing happens if it was not taken."""
    if path in _open_locks:
        os.close(_open_locks.pop(path))


@contextmanager
def wait_for_lock(path: Path) -> Iterator[None]:
    """Hold the lock for a while; wait for whoever has it."""
    number = _open(path)
    try:
        _flock(number, fcntl.LOCK_EX)
        yield
    finally:
        os.close(number)


def _open(path: Path) -> int:
    path.parent.mkdir(parents=True, exist_ok=True)
    return os.open(path, os.O_RDWR | os.O_CREAT, 0o666)


def _flock(number: int, how: int) -> bool:
    try:
        fcntl.flock(number, how)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
    return True
