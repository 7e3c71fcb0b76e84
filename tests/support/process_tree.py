"""All processes of one run of a study, found by a mark in their environment, and their roles."""

import contextlib
import os
import signal
import time
import uuid
from collections.abc import Callable
from pathlib import Path

MARK = "STUDY_TEST_MARK"
ROLES = {
    "kernel": ["helpers.workflow.cli", "kernel"],
    "runner": ["helpers.workflow.cli", "run"],
    "export": ["helpers.workflow.cli", "export"],
    "front": ["helpers.workflow.cli", "study"],
    "engine": ["helpers.workflow.cli", "engine"],
    "make": ["make"],
}


def new_mark() -> dict[str, str]:
    """An environment variable that only the processes of one run have."""
    return {MARK: uuid.uuid4().hex}


def processes(mark: dict[str, str]) -> dict[int, str]:
    """Role of every living process with the mark, by its id."""
    roles, marker = {}, f"{MARK}={mark[MARK]}".encode()
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit() or int(folder.name) == os.getpid():
            continue
        with contextlib.suppress(OSError):
            if marker in (folder / "environ").read_bytes().split(b"\0"):
                words = (folder / "cmdline").read_bytes().decode().split("\0")
                state = (folder / "stat").read_text().rpartition(")")[2].split()[0]
                if state not in "ZX":
                    roles[int(folder.name)] = _role(words)
    return roles


def _role(words: list[str]) -> str:
    if Path(words[0]).name == "make":
        return "make"
    for role, signs in ROLES.items():
        if any(words[i : i + len(signs)] == signs for i in range(len(words))):
            return role
    return "other"


def of_role(mark: dict[str, str], role: str) -> list[int]:
    return [process for process, process_role in processes(mark).items() if process_role == role]


def kill(process: int, number: int = signal.SIGKILL) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(process, number)


def wait_for(condition: Callable, *, seconds: float):
    """The first true value of the condition; an AssertionError if there is none in time."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if value := condition():
            return value
        time.sleep(0.05)
    raise AssertionError(f"not within {seconds} s")


def wait_until_gone(mark: dict[str, str], *, seconds: float) -> None:
    """No process with the mark is left."""
    try:
        wait_for(lambda: not processes(mark), seconds=seconds)
    except AssertionError:
        raise AssertionError(f"still there after {seconds} s: {processes(mark)}") from None
