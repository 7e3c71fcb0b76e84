"""Whether finished runs are current, told by what they were made from and not by any clock.

The workflow engine compares times of files and keeps a memory of its own; a clock that
jumps or a lost memory can make it call stale results current. So every job that ends
well leaves an account, `outputs/<study>/.accounts/<run>.json`: hashes of the settings,
modules and data it used, of the results of the runs before it, and of its own. A finished
run whose account is not what would be written now is stale, and is run again.
"""

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from helpers.core.checksums import check_checksums
from helpers.core.hashing import (
    cached_digest,
    canonical_json,
    sha256_data,
    sha256_file,
    sha256_text,
)
from helpers.core.paths import StudyPaths, relative_to_project
from helpers.core.records import write_json
from helpers.study import stages
from helpers.study.schema import Study
from helpers.study.stages import Run

_inside = cache(relative_to_project)  # called thousands of times with a few paths
MOST_BYTES = 2**25  # larger files (weights of local models) are identified by size and time


def fingerprint_file(paths: StudyPaths, run: Run) -> Path:
    return paths.root / ".accounts" / f"{run.name}.json"


def dependency_text(study: Study, run: Run) -> str:
    """The settings and file hashes that the run depends on, as one text.

    Results of upstream runs are not in it.
    """
    files = {_inside(path): _file_fingerprint(path) for path in stages.source_files(study, run)}
    return canonical_json(
        {"settings": stages.settings_text(study, run), "files": sha256_data(files)}
    )


def run_fingerprint(study: Study, paths: StudyPaths, run: Run) -> dict:
    """Hashes of everything that the run's results depend on, as it is now."""
    return {
        "depends": sha256_text(dependency_text(study, run)),
        "before": {
            r.name: _results_hash(r.record(paths)) for r in stages.upstream_runs(study, run)
        },
    }


@contextmanager
def record_fingerprint(study: Study, paths: StudyPaths, run: Run) -> Iterator[None]:
    """Inside the context the run has no fingerprint on disk; on success it is written.

    It is taken at the beginning, so a file that is edited during the run counts as changed.
    """
    path = fingerprint_file(paths, run)
    path.unlink(missing_ok=True)
    fingerprint = run_fingerprint(study, paths, run)
    yield
    write_json(path, fingerprint | {"results": _results_hash(run.record(paths))})


def is_current(study: Study, paths: StudyPaths, run: Run) -> bool:
    """Whether the run finished, and settings, code, data and results are unchanged since."""
    fingerprint = run_fingerprint(study, paths, run) | {"results": _results_hash(run.record(paths))}
    finished = run.record(paths).is_file() and run.executed(paths).is_file()
    return finished and _read(fingerprint_file(paths, run)) == fingerprint


def outdated_runs(study: Study, paths: StudyPaths) -> list[Run]:
    """The finished runs that are not current; unfinished runs are not listed."""
    runs = [*stages.runs(study), Run("analysis")]
    finished = [run for run in runs if run.record(paths).is_file()]
    return [run for run in finished if not is_current(study, paths, run)]


def completed_runs(study: Study, paths: StudyPaths) -> set[Run]:
    """The runs before the analysis that are current and whose upstream runs all are, too."""
    current = {run for run in stages.runs(study) if is_current(study, paths, run)}

    def is_complete(run: Run) -> bool:
        return run in current and all(map(is_complete, stages.upstream_runs(study, run)))

    return {run for run in current if is_complete(run)}


def check_result_checksums(paths: StudyPaths, runs: Iterable[Run]) -> None:
    """Compare all files of some runs with the checksums in their records.

    Weights may be missing, because a report does not need them, and so may a measurement of
    costs, on which no other run depends.

    Raises:
        StudyError: a file is missing or differs; the message names it and the remedy.
    """
    weights = {"finetuning": "", "quantization": "../checkpoint/"}
    for run in runs:
        if run.stage != "cost" or run.record(paths).is_file():
            made_by, optional = stages.NOTEBOOKS[run.stage], weights.get(run.stage)
            check_checksums(run.record(paths).parent, made_by=made_by, optional=optional)


def _read(path: Path) -> dict | None:
    try:
        return json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError):
        return None


def _results_hash(record: Path) -> str:
    """Hash of the files that a run wrote, without its times; empty if it has not finished."""
    content = _read(record)
    if not isinstance(content, dict):
        return ""
    return sha256_data(content["files"]) if "files" in content else sha256_file(record)


def _file_fingerprint(path: Path) -> str:
    status = path.stat()
    if status.st_size > MOST_BYTES:
        return f"{status.st_size} bytes of {status.st_mtime_ns}"
    return cached_digest(path, status)
