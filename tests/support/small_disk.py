"""A file system of a few megabytes, to run out of."""

import contextlib
import os
import shutil
import subprocess

import pytest


@contextlib.contextmanager
def small_disk(folder, *, size: str, options: str = ""):
    """A file system of its own at the folder; skips the test where none can be mounted."""
    folder.mkdir(parents=True, exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}{options}", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("a file system can be mounted by root only")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill_up(folder, *, leave: int) -> None:
    """Take all room of the disk but some bytes."""
    statistics = os.statvfs(folder)
    with open(folder / "filler", "wb") as stream:
        stream.write(b"\0" * (statistics.f_bavail * statistics.f_frsize - leave))
