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

_inside = cache(relative_to_project)  # asked thousands of times of a few files
MOST_BYTES = 2**25  # a larger file is known by its size and time: weights of local models


def fingerprint_file(paths: StudyPaths, run: Run) -> Path:
    return paths.root / ".accounts" / f"{run.name}.json"


def dependency_text(study: Study, run: Run) -> str:
    """What the run depends on besides the runs before it, as one text: settings and files."""
    files = {_inside(path): _file_fingerprint(path) for path in stages.source_files(study, run)}
    return canonical_json(
        {"settings": stages.settings_text(study, run), "files": sha256_data(files)}
    )


def run_fingerprint(study: Study, paths: StudyPaths, run: Run) -> dict:
    """What the run's results depend on, as it is now."""
    return {
        "depends": sha256_text(dependency_text(study, run)),
        "before": {
            r.name: _results_hash(r.record(paths)) for r in stages.upstream_runs(study, run)
        },
    }


@contextmanager
def record_fingerprint(study: Study, paths: StudyPaths, run: Run) -> Iterator[None]:
    """While a run works there is no account of it; if it ends well, there is one.

    It says what the run was made from as it was at the beginning: a file that was edited
    meanwhile is a change.
    """
    path = fingerprint_file(paths, run)
    path.unlink(missing_ok=True)
    made_of = run_fingerprint(study, paths, run)
    yield
    write_json(path, made_of | {"results": _results_hash(run.record(paths))})


def is_current(study: Study, paths: StudyPaths, run: Run) -> bool:
    """Whether the run ended well, from what is there now."""
    account = run_fingerprint(study, paths, run) | {"results": _results_hash(run.record(paths))}
    finished = run.record(paths).is_file() and run.executed(paths).is_file()
    return finished and _read(fingerprint_file(paths, run)) == account


def outdated_runs(study: Study, paths: StudyPaths) -> list[Run]:
    """The finished runs that are not current; those that wait for them are not listed."""
    runs = [*stages.runs(study), Run("analysis")]
    finished = [run for run in runs if run.record(paths).is_file()]
    return [run for run in finished if not is_current(study, paths, run)]


def completed_runs(study: Study, paths: StudyPaths) -> set[Run]:
    """The runs before the analysis that are current, as is all that they rest on."""
    current = {run for run in stages.runs(study) if is_current(study, paths, run)}

    def rests_on_current(run: Run) -> bool:
        return run in current and all(map(rests_on_current, stages.upstream_runs(study, run)))

    return {run for run in current if rests_on_current(run)}


def check_result_checksums(paths: StudyPaths, runs: Iterable[Run]) -> None:
    """Hold all files of some runs against the checksums in their records.

    Weights may be missing, since a report can be made where they are not, and so may a
    measurement of costs, on which nothing rests.

    Raises:
        StudyError: a file is missing or not what was written; names it and the remedy.
    """
    weights = {"finetuning": "", "quantization": "../checkpoint/"}
    for run in runs:
        if run.stage != "cost" or run.record(paths).is_file():
            made_by, may_miss = stages.NOTEBOOKS[run.stage], weights.get(run.stage)
            check_checksums(run.record(paths).parent, made_by=made_by, may_miss=may_miss)


def _read(path: Path) -> dict | None:
    try:
        return json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError):
        return None


def _results_hash(record: Path) -> str:
    """Hash of what a run wrote, without the times it took; empty if it has not ended."""
    found = _read(record)
    if not isinstance(found, dict):
        return ""
    return sha256_data(found["files"]) if "files" in found else sha256_file(record)


def _file_fingerprint(path: Path) -> str:
    found = path.stat()
    if found.st_size > MOST_BYTES:
        return f"{found.st_size} bytes of {found.st_mtime_ns}"
    return cached_digest(path, found)
