"""Records of a run: content hashes, JSON files, checksums of what a stage wrote, and gates.

Every stage ends with a `record.json`: its parameters, package versions, durations and results, and
the hash of every file that it wrote, by the path from the record. Whoever reads such a file first
compares it with the record; a disk that returned other bytes, or an edit by hand, is an error and
never a finding. Folders that are kept between studies (converted models) are sealed and checked in
the same way.

A gate is one check that must hold before a result counts: a name, what was measured, the limit,
and whether it held. A failed gate does not stop a study; it makes what it guards invalid. What
cannot be checked does not hold: an error inside a check is that gate's failure, with its reason.
"""

import hashlib
import json
import math
import os
import platform
import resource
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import cache, wraps
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from helpers.core.errors import StudyError
from helpers.core.files import (
    acquire_lock,
    release_lock,
    remove_leftovers,
    replace_folder,
    short_path,
    wait_for_lock,
    write_atomically,
)

NOT_HASHED = {"record.json", "README.md"}


def canonical_json(data: Any) -> str:
    """JSON with one text for each value: keys sorted, no NaN, no optional spaces.

    Raises:
        ValueError: the data hold NaN or an infinity.
    """
    return json.dumps(
        data, sort_keys=True, ensure_ascii=False, allow_nan=False, separators=(",", ":")
    )


def sha256_text(text: str) -> str:
    """Hex digest of the text in UTF-8."""
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def sha256_data(data: Any) -> str:
    """Hex digest of plain data, whatever the order of its keys."""
    return sha256_text(canonical_json(data))


def sha256_file(path: Path) -> str:
    """Hex digest of a file's bytes."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def cached_digest(path: Path, status: os.stat_result) -> str:
    """The file's `sha256_file`, cached in this process until its size, time or inode changes."""
    return _cached_digest(path, status.st_size, status.st_mtime_ns, status.st_ino)


@cache
def _cached_digest(path: Path, _size: int, _mtime_ns: int, _inode: int) -> str:
    return sha256_file(path)


def file_digests(folder: Path) -> dict[str, str]:
    """Hex digest of every file below a folder, by its path in it.

    Left out are `record.json` and a model card (`README.md`), which describe the content and
    hold times, and hidden files: locks and unfinished files.
    """
    digests = {}
    for path in sorted(p for p in Path(folder).rglob("*") if p.is_file()):
        inside = path.relative_to(folder)
        if path.name not in NOT_HASHED and not any(p.startswith(".") for p in inside.parts):
            digests[inside.as_posix()] = sha256_file(path)
    return digests


def sha256_folder(folder: Path) -> str:
    """Hex digest over the names and contents of all files below a folder, as `file_digests`.

    Raises:
        FileNotFoundError: the folder holds no file.
    """
    digests = file_digests(folder)
    if not digests:
        raise FileNotFoundError(f"{folder} holds no files to hash; run the stage that writes it")
    return sha256_data(digests)


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


WHOLE_VARIANT = "whole variant"  # a data set's name has no space


@dataclass(frozen=True)
class Gate:
    """The result of one check: `measured` against `limit`, in words that can be read alone."""

    name: str
    passed: bool
    measured: str
    limit: str


def largest(values: Iterable[float]) -> float:
    """The largest number, 0 if there is none; NaN if any number is NaN.

    Python's `max` ignores a NaN that is not the first, and a gate on it would hold.
    """
    numbers = list(values)
    return math.nan if any(map(math.isnan, numbers)) else max(numbers, default=0.0)


def none_of(name: str, exceptions: list[str], n: int, description: str) -> Gate:
    """A gate that holds if there are no exceptions; else it counts them and names the first."""
    example = f" ({exceptions[0]})" if exceptions else ""
    return Gate(name, not exceptions, f"{len(exceptions)} of {n} {description}{example}", "none")


def failed_check(gates: list[dict], guarded: list[str]) -> str | None:
    """The first failed gate that guards one of these, in words; None if there is none."""
    for gate in gates:
        if not gate["passed"] and gate.get("invalidates", WHOLE_VARIANT) in guarded:
            return f"{gate['name']} ({gate['measured']}; limit: {gate['limit']})"
    return None


def gates_record(gates: list[tuple[str, Gate]]) -> dict:
    """The gates as plain data, and whether all of them hold.

    Args:
        gates: each with the data set that it invalidates if it fails, or `WHOLE_VARIANT`.
    """
    rows = [asdict(gate) | {"invalidates": what} for what, gate in gates]
    return {"passed": all(gate.passed for _, gate in gates), "gates": rows}


def gate(name: str) -> Callable:
    """Decorate a check, evidence → (passed, measured, limit), so that it returns its Gate."""

    def decorate(check: Callable) -> Callable:
        @wraps(check)
        def held(evidence) -> Gate:
            try:
                passed, measured, limit = check(evidence)
            except Exception as error:  # a broken checkpoint may raise any exception
                reason = " ".join(str(error).split())[:200]
                measured = f"could not be checked: {type(error).__name__}: {reason}"
                return Gate(name, False, measured, "can be checked")
            return Gate(name, bool(passed), measured, limit)

        held.gate_name = name  # type: ignore[attr-defined]
        return held

    return decorate


def examples(names: list[str]) -> str:
    """The first names in parentheses, for a gate's text: ` (a, b, …)`; empty without names."""
    if not names:
        return ""
    return f" ({', '.join(names[:2])}{', …' if len(names) > 2 else ''})"


def checkpoint_gates_record(gates: list[Gate]) -> dict:
    """The gates as plain data, and whether all of them passed."""
    return {
        "passed": bool(gates) and all(g.passed for g in gates),
        "gates": [asdict(g) for g in gates],
    }
