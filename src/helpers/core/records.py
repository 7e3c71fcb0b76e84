"""What was run, from what, with what: `record.json`, and writing without half-written files."""

import json
import os
import platform
import resource
import sys
import time
from collections.abc import Iterable
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from helpers.core.checksums import RECORD, checksums
from helpers.core.errors import StudyError
from helpers.core.file_locking import acquire_lock, release_lock
from helpers.core.file_writing import write_atomically
from helpers.core.hashing import canonical_json

RECORDED_PACKAGES = (
    "torch",
    "transformers",
    "llmcompressor",
    "compressed-tensors",
    "datasets",
    "numpy",
    "papermill",
)


def write_json(path: Path, data: Any) -> None:
    """Readable JSON, keys in the order given; NaN is refused."""
    text = json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    write_atomically(path, lambda p: p.write_text(text, encoding="utf-8"))


def write_jsonl(path: Path, rows: Iterable[dict]) -> None:
    """One canonical JSON object a line."""
    text = "".join(canonical_json(row) + "\n" for row in rows)
    write_atomically(path, lambda p: p.write_text(text, encoding="utf-8"))


def read_json(path: Path, *, made_by: str) -> Any:
    """The JSON of a stage before this one.

    Raises:
        StudyError: the file is missing or torn; names the notebook that makes it.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise StudyError(f"{_shown(path)} is missing; run {made_by} first") from None
    except (ValueError, RecursionError) as error:
        raise StudyError(f"{_shown(path)} is damaged ({error}); run {made_by} again") from None


def read_jsonl(path: Path, *, made_by: str) -> list[dict]:
    """The rows of a JSONL file of a stage before this one.

    Raises:
        StudyError: the file is missing, or a line is not JSON.
    """
    if not path.is_file():
        raise StudyError(f"{_shown(path)} is missing; run {made_by} first")
    rows = []
    # Only \n ends a line: answers may hold other separators that splitlines() would cut at.
    lines = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines[:-1] if lines[-1] == b"" else lines, start=1):
        try:
            rows.append(json.loads(line))
        except (ValueError, RecursionError):
            raise StudyError(
                f"{_shown(path)}: line {number} is not JSON; run {made_by} again"
            ) from None
    return rows


def _shown(path: Path) -> str:
    return "/".join(Path(path).parts[-5:])


def package_versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide results."""
    found = {"python": platform.python_version()}
    for name in RECORDED_PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def peak_memory_bytes() -> int:
    """The most memory this process has held so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


class Record:
    """The account of one job: begun in a notebook's first cells, written by its last.

    The record of an earlier run is removed at the beginning, so that a stage which fails
    halfway is not taken for finished. From then until it is written, no other process can
    begin a record of the same folder.

    Raises:
        StudyError: another process is writing to the folder.
    """

    def __init__(self, folder: Path, *, stage: str, parameters: dict):
        self.folder, self.stage, self.parameters = Path(folder), stage, parameters
        self.inputs: dict[str, str] = {}
        self._elsewhere: list[Path] = []
        self._operations: dict[str, int] = {}
        self._machine: dict = {}
        self.packages = package_versions()
        self._started, self._clock = datetime.now(UTC), time.monotonic()
        self._lock = self.folder.with_name(f".{self.folder.name}.lock")
        acquire_lock(self._lock, f"{_shown(self.folder)} is being written")
        (self.folder / RECORD).unlink(missing_ok=True)

    def add_input(self, name: str, digest: str) -> None:
        """Note what the job read, by content hash."""
        self.inputs[name] = digest

    def add_outputs(self, *paths: Path) -> None:
        """Note files or folders the job wrote elsewhere than in the record's folder."""
        self._elsewhere += paths

    def add_operations(self, counted: dict[str, int]) -> None:
        """Note what the job computes: multiplications and additions, by arithmetic."""
        self._operations |= counted

    def add_packages(self, versions: dict[str, str]) -> None:
        """Note versions of packages of another environment that computed for the job."""
        self.packages |= versions

    def add_machine(self, arithmetic: dict) -> None:
        """Note how and where this machine computes; no result, it may differ from run to run."""
        self._machine |= arithmetic

    def write(self, results: dict) -> Path:
        """Write `record.json`, the last thing a job does, and return its path.

        It holds a checksum of every file the job wrote.
        """
        path = self.folder / RECORD
        counted = {"operations": self._operations} if self._operations else {}
        machine = {"cpu_count": os.cpu_count(), "architecture": platform.machine()}
        machine |= self._machine
        write_json(
            path,
            {
                "stage": self.stage,
                "parameters": self.parameters,
                "inputs": self.inputs,
                "results": results,
                **counted,
                "files": checksums(self.folder, self._elsewhere),
                "started": self._started.isoformat(timespec="seconds"),
                "duration_s": round(time.monotonic() - self._clock, 3),
                "peak_memory_bytes": peak_memory_bytes(),
                "machine": machine,
                "packages": self.packages,
            },
        )
        release_lock(self._lock)
        return path
