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

_open_locks: dict[Path, int] = {}  # of this process, which may acquire a lock twice


def acquire_lock(path: Path, description: str) -> int:
    """Hold the lock until this process ends or releases it; return the file descriptor.

    The library filelock neither names the holder nor hands its descriptor to a child process,
    with which Snakemake keeps the lock of a killed `make study`.

    Raises:
        StudyError: another process holds it; the message names the process.
    """
    if path not in _open_locks:
        descriptor = _open(path)
        if not _flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB):
            holder = _holder(descriptor)
            os.close(descriptor)
            raise StudyError(f"{description} by {holder}; wait for it or stop it")
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()} {socket.gethostname()}".encode(), 0)
        _open_locks[path] = descriptor
    return _open_locks[path]


def _holder(descriptor: int) -> str:
    """The process whose id stands in the lock file."""
    process, _, machine = os.pread(descriptor, 300, 0).decode("utf-8", "replace").partition(" ")
    if not process.isdigit():
        return "another process"
    return f"process {process}" + (f" on {machine}" if machine != socket.gethostname() else "")


def release_lock(path: Path) -> None:
    """Release a lock that `acquire_lock` took; do nothing if this process does not hold it."""
    if path in _open_locks:
        os.close(_open_locks.pop(path))


@contextmanager
def wait_for_lock(path: Path) -> Iterator[None]:
    """Inside the context, hold the lock; wait while another process holds it."""
    descriptor = _open(path)
    try:
        _flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _open(path: Path) -> int:
    path.parent.mkdir(parents=True, exist_ok=True)
    return os.open(path, os.O_RDWR | os.O_CREAT, 0o666)


def _flock(descriptor: int, operation: int) -> bool:
    try:
        fcntl.flock(descriptor, operation)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
    return True
