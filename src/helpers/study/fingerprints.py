"""Fingerprints of finished runs: which results are current, and the largest complete part.

The workflow engine compares times of files and keeps a memory of its own; a clock that jumps or a
lost memory can make it call stale results current. So every job that ends well leaves an account,
`outputs/<study>/.accounts/<run>.json`: hashes of the settings, modules and data it used, of the
results of the runs before it, and of its own. A finished run whose account is not what would be
written now is stale, and is run again.

When not all runs are complete a report shows the largest complete part. A report compares every
variant with the baseline on every model, so the part is a rectangle: some models, some variants,
the baseline among them, and all of their runs complete. What is left out is named. Declared
comparisons that lack a side get no verdict and stay counted, so that a missing result never eases
the test of another.
"""

import json
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from helpers.core.errors import StudyError
from helpers.core.files import StudyPaths, relative_to_project
from helpers.core.records import (
    cached_digest,
    canonical_json,
    check_checksums,
    sha256_data,
    sha256_file,
    sha256_text,
    write_json,
)
from helpers.study import stages
from helpers.study.loading import Job
from helpers.study.schema import FineTunedModel, Study
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


@dataclass(frozen=True)
class Part:
    """A part of a study, or all of it.

    Attributes:
        study: the study with the models and variants of this part.
        runs: the part's completed runs; only measurements of cost may be missing.
        missing: names of the runs that are incomplete or left out.
    """

    study: Study
    runs: tuple[Run, ...]
    missing: tuple[str, ...] = ()

    def of(self, job: Job) -> Job:
        """The job with this part as its study."""
        return replace(job, study=self.study)


def report_folder(paths: StudyPaths, *, partial: str) -> Path:
    """The folder of the report; a partial report never replaces a whole one."""
    return paths.root / "partial" if partial == "yes" else paths.root


def part_to_report(job: Job, *, partial: str) -> Part:
    """The part of a job's study that the report shows.

    Args:
        partial: `yes` for the completed part, `no` for the whole study.

    Raises:
        StudyError: no part is complete yet.
    """
    if partial not in ("yes", "no"):
        raise StudyError(f"partial = {partial!r} is neither yes nor no; give one of them")
    if partial == "no":
        return Part(job.study, tuple(stages.runs(job.study)))
    return largest_complete_part(job.study, completed_runs(job.study, job.paths))


def largest_complete_part(study: Study, completed: Collection[Run]) -> Part:
    """The largest part of the study whose runs are all completed.

    Raises:
        StudyError: no model has its calibration and its baseline.
    """
    models, variants = list(study.models), list(study.variants)
    while missing := _missing_parts(study, models, variants, completed):
        _leave_out(missing, models, variants, study.baseline)
    if not models:
        raise StudyError("no model's calibration and baseline are complete; run make study")
    selected = {
        "models": {name: study.models[name] for name in models},
        "variants": {name: study.variants[name] for name in variants},
    }
    part = study.model_copy(update=selected)
    included = tuple(run for run in stages.runs(part) if run in completed)
    left_out = [run for run in stages.runs(study) if run not in included]
    return Part(part, included, tuple(_run_label(run, run in completed) for run in left_out))


def _run_label(run: Run, completed: bool) -> str:
    name = " ".join(filter(None, (run.stage, run.model, run.variant)))
    return f"{name} (complete, but not what it is compared with)" if completed else name


def _missing_parts(study: Study, models, variants, completed) -> list[tuple[str, str]]:
    """(model, variant) of every missing run; the variant is empty if the whole model needs it."""
    missing = []
    for run in stages.runs(study):
        required = run.stage != "cost" and run.model in models and run.variant in ("", *variants)
        if required and run not in completed:
            missing.append((run.model, "" if run.variant == study.baseline else run.variant))
    for model in models:
        source = study.models[model]
        if isinstance(source, FineTunedModel) and source.finetune.start not in models:
            missing.append((model, ""))  # the report compares it with the model it was trained from
    return missing


def _leave_out(missing: list[tuple[str, str]], models: list, variants: list, baseline: str) -> None:
    """Drop an unusable model, else the model or variant with the largest share of missing runs."""
    for model, variant in missing:
        if not variant:
            models.remove(model)
            return
    others = [name for name in variants if name != baseline]
    by_model = {m: len({v for x, v in missing if x == m}) / len(others) for m in models}
    by_variant = {v: len({m for m, x in missing if x == v}) / len(models) for v in others}
    model, variant = (
        max(by_model, key=by_model.__getitem__),
        max(others, key=by_variant.__getitem__),
    )
    if by_variant[variant] >= by_model[model]:
        variants.remove(variant)
    else:
        models.remove(model)
