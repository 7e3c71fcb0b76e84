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
from helpers.core.paths import short_path

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
    """Write readable JSON with the keys in the given order.

    Raises:
        ValueError: the data hold NaN or an infinity.
    """
    text = json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    write_atomically(path, lambda p: p.write_text(text, encoding="utf-8"))


def write_jsonl(path: Path, rows: Iterable[dict]) -> None:
    """Write one canonical JSON object per line."""
    text = "".join(canonical_json(row) + "\n" for row in rows)
    write_atomically(path, lambda p: p.write_text(text, encoding="utf-8"))


def read_json(path: Path, *, made_by: str) -> Any:
    """The JSON that an earlier stage wrote.

    Raises:
        StudyError: the file is missing or damaged; the message names the notebook to run.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise StudyError(f"{short_path(path)} is missing; run {made_by} first") from None
    except (ValueError, RecursionError) as error:
        raise StudyError(f"{short_path(path)} is damaged ({error}); run {made_by} again") from None


def read_jsonl(path: Path, *, made_by: str) -> list[dict]:
    """The rows of a JSONL file that an earlier stage wrote.

    Raises:
        StudyError: the file is missing, or a line is not JSON.
    """
    if not path.is_file():
        raise StudyError(f"{short_path(path)} is missing; run {made_by} first")
    rows = []
    # Only \n ends a line: answers may hold other separators that splitlines() would cut at.
    lines = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines[:-1] if lines[-1] == b"" else lines, start=1):
        try:
            rows.append(json.loads(line))
        except (ValueError, RecursionError):
            raise StudyError(
                f"{short_path(path)}: line {number} is not JSON; run {made_by} again"
            ) from None
    return rows


def package_versions() -> dict[str, str]:
    """Versions of Python and of the packages that influence results."""
    versions = {"python": platform.python_version()}
    for name in RECORDED_PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "not installed"
    return versions


def peak_memory_bytes() -> int:
    """The peak resident memory of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


class Record:
    """The record of one job: opened in a notebook's first cells, written by its last.

    Opening removes the record of an earlier run, so that a stage that fails halfway does not
    count as finished. Until the record is written, no other process can open one for the
    same folder.

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
        acquire_lock(self._lock, f"{short_path(self.folder)} is being written")
        (self.folder / RECORD).unlink(missing_ok=True)

    def add_input(self, name: str, digest: str) -> None:
        """Record an input of the job by its content hash."""
        self.inputs[name] = digest

    def add_outputs(self, *paths: Path) -> None:
        """Record files or folders that the job wrote outside the record's folder."""
        self._elsewhere += paths

    def add_operations(self, operations: dict[str, int]) -> None:
        """Record the multiplications and additions of the job, by kind of arithmetic."""
        self._operations |= operations

    def add_packages(self, versions: dict[str, str]) -> None:
        """Record package versions of another environment that computed for the job."""
        self.packages |= versions

    def add_machine(self, description: dict) -> None:
        """Record how and where this machine computes; this may differ between equal runs."""
        self._machine |= description

    def write(self, results: dict) -> Path:
        """Write `record.json`, the last thing a job does, and return its path.

        It holds a checksum of every file the job wrote.
        """
        path = self.folder / RECORD
        operations = {"operations": self._operations} if self._operations else {}
        machine = {"cpu_count": os.cpu_count(), "architecture": platform.machine()}
        machine |= self._machine
        write_json(
            path,
            {
                "stage": self.stage,
                "parameters": self.parameters,
                "inputs": self.inputs,
                "results": results,
                **operations,
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
