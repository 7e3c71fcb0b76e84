"""The front door: checks a study, then lets Snakemake run what is not current.

One run at a time writes to a study's outputs. The lock is the operating system's and
ends with the process that holds it, so that nothing has to be unlocked after a crash.
All that this starts ends with it, however it ends.
"""

import argparse
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

from helpers.core import activity, console
from helpers.core.errors import DISK_FULL, StudyError
from helpers.core.file_locking import acquire_lock
from helpers.core.file_writing import remove_leftovers
from helpers.core.parent_process import die_with_parent
from helpers.core.paths import PROJECT, StudyPaths, cache_root, outputs_root, relative_to_project
from helpers.study import fingerprints, partial, stages
from helpers.study.loading import load_study, study_file
from helpers.study.pins import hub_sources
from helpers.study.schema import Study
from helpers.workflow import display, executors, fork_client
from helpers.workflow import duration_estimate as estimates
from helpers.workflow.gpus import may_take_gpu
from helpers.workflow.notebook_execution import JOB_ENVIRONMENT
from helpers.workflow.preflight_process import check_sources

LEAST_BYTES = 2**24  # free on a disk, for a run to begin at all
PATIENCE_S = 5  # for the last lines of a run that has ended
PLAN_WIDTH = 48  # of a job's name in the Snakefile's dry run
LOCAL = "local"
DRY_RUN_OPTIONS = {"-n", "--dry-run", "--dryrun"}


def check_study(study: str) -> int:
    """Say on stderr what is wrong with a study file; 0 if nothing is, else 2."""
    try:
        loaded = load_study(study)
        for run in [*stages.runs(loaded), stages.Run("analysis")]:
            stages.source_files(loaded, run)
        StudyPaths(study_file(study).stem).check_links()
    except StudyError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def run_study(given: argparse.Namespace) -> int:
    """Run what is not current, one run at a time per study. Returns the exit code.

    Raises:
        StudyError: the study is being run already, or cannot be run as it was asked for.
        OSError: the outputs cannot be written.
    """
    die_with_parent()
    signal.signal(signal.SIGTERM, _stop)
    if wrong := check_study(given.study):
        return wrong
    study, paths = load_study(given.study), StudyPaths(study_file(given.study).stem)
    lock = acquire_lock(
        outputs_root() / f".{paths.study}.lock", f"study {paths.study!r} is being run"
    )
    if not _is_dry(given):
        _prepare_outputs(given, paths)
    if given.partial and (runs := fingerprints.completed_runs(study, paths)) != set(
        stages.runs(study)
    ):
        return _report_part(given, partial.largest_complete_part(study, runs), paths)
    if given.only_report and (waiting := _not_current(given, study, paths)):
        print(
            f"the report would show results that are not current ({', '.join(waiting)}); "
            "run make study, or make report PARTIAL=yes for what is complete",
            file=sys.stderr,
        )
        return 2
    if not (given.only_report or _is_dry(given)) and (wrong := _fetch(given.study)):
        return wrong
    if not given.only_report and (wrong := check_study_sources(given.study, dry=_is_dry(given))):
        return wrong
    with _job_fork_server(given, study):
        return _run_snakemake(given, study, paths, lock, _estimate(given, paths))


def _estimate(given: argparse.Namespace, paths: StudyPaths) -> estimates.Estimate | None:
    """Say how long the run will take on this machine; None if that is not known, or not asked."""
    asked = os.environ.get("STUDY_ESTIMATE", "yes") != "no"
    if given.only_report or given.executor != LOCAL or not asked:
        return None
    limits = {"cores": given.cores, "job_mb": given.job_mb, "memory_mb": _memory_mb()}
    return estimates.print_estimate(given.study, paths, **limits)


def _fetch(study: str) -> int:
    """Bring what the study names on a Hub to this machine, before any job; 0, or 2 with why.

    In a process of its own, since this package does without torch.
    """
    if not hub_sources(load_study(study)):
        return 0
    command = [sys.executable, "-m", "helpers.sources.fetching", str(study)]
    done = subprocess.run(command, cwd=PROJECT, preexec_fn=die_with_parent, check=False)
    return done.returncode


def check_study_sources(study: str, *, dry: bool) -> int:
    """Say on stderr what jobs would fail on; 0 if nothing is found, else 2.

    The study is loaded again, at the commits that fetching has pinned.
    """
    return check_sources(study, load_study(study), dry=dry)


def _prepare_outputs(given: argparse.Namespace, paths: StudyPaths) -> None:
    """Room to write, and nothing left of a run that was killed or of a clock that was ahead.

    Raises:
        StudyError: a disk is full, or jobs of an earlier run do not end.
    """
    for place in (outputs_root(), PROJECT):
        if (free := shutil.disk_usage(place).free) < LEAST_BYTES:
            raise StudyError(
                f"{place}: only {free / 2**20:.1f} MB are free on this disk; {DISK_FULL}"
            )
    for place in (paths.root, cache_root()):
        remove_leftovers(place)
    now = time.time()
    for path in paths.root.rglob("*"):
        if path.lstat().st_mtime > now:  # the engine refuses results older than what they read
            os.utime(path, (now, now), follow_symlinks=False)
    if given.executor == "slurm":
        executors.stop_leftover_jobs(paths)


def _stop(number: int, _frame) -> None:
    """On SIGTERM: end at once, and everything that was started with it."""
    print("stopped; what is finished is kept, so run again to go on", file=sys.stderr)
    sys.exit(128 + number)


def _not_current(given: argparse.Namespace, study: Study, paths: StudyPaths) -> list[str]:
    """Runs before the analysis that would have to be repeated, as a dry run tells them."""
    changed = {"only_report": False, "options": ["-n"], "executor": LOCAL}
    command = _command(argparse.Namespace(**vars(given) | changed), study, paths)
    # Whatever goes wrong here goes wrong, and is told, in the run itself too.
    done = subprocess.run(
        command, cwd=PROJECT, env=_environment(), capture_output=True, text=True, check=False
    )
    planned = [line[:PLAN_WIDTH].strip() for line in done.stdout.splitlines()]
    return [name for name in planned if name not in ("analysis", "report")]


def _report_part(given: argparse.Namespace, part: partial.Part, paths: StudyPaths) -> int:
    """Analysis and export of a part of the study, into a folder of their own."""
    folder = partial.report_folder(paths, partial="yes")
    notebook = folder / f"{stages.NOTEBOOKS['analysis']}.ipynb"
    jobs = [sys.executable, "-m", "helpers.workflow.cli"]
    analysis = [*jobs, "run", "--notebook", f"notebooks/{notebook.name}", "--output", str(notebook)]
    analysis += ["-p", "study", given.study, "-p", "partial", "yes"]
    export = [*jobs, "export", "--notebook", str(notebook), "--study", given.study]
    for command in (analysis, [*export, "--to", str(folder)]):
        done = subprocess.run(command, cwd=PROJECT, env=_environment(), check=False)
        if done.returncode:
            return done.returncode
    print(f"partial: {relative_to_project(folder / 'report.html')}", file=sys.stderr)
    print(f"missing: {', '.join(part.missing)}", file=sys.stderr)
    return 0


def _run_snakemake(
    given: argparse.Namespace,
    study: Study,
    paths: StudyPaths,
    lock: int,
    estimate: estimates.Estimate | None,
) -> int:
    draws = not _is_dry(given) and display.can_draw()
    with _progress_file(paths) as shared, display.screen(draws=draws) as screen:
        environment = _environment() | {"STUDY_PROGRESS": str(shared)}
        # What is drawn would be torn by others' lines: they come through here.
        through = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT} if draws else {}
        engine = subprocess.Popen(
            _command(given, study, paths),
            cwd=PROJECT,
            env=environment | executors.executor_environment(given.executor),
            pass_fds=[lock],  # held as long as the engine lives, whatever happens here
            preexec_fn=die_with_parent,
            text=True,
            encoding="utf-8",
            errors="replace",
            **through,
        )
        copying = display.forward_lines(engine.stdout, screen.show) if draws else None
        watch = display.Watch(shared, estimate)
        try:
            interrupted = _wait(engine, watch, screen, elsewhere=given.executor != LOCAL)
        except SystemExit:  # what was started here ends by itself; a cluster has to be told
            engine.kill()
            if given.executor == "slurm":
                executors.stop_leftover_jobs(paths)
            raise
        if copying:
            copying.join(PATIENCE_S)
        events = console.read_events(shared)[1]
    if interrupted or engine.returncode < 0:
        print("stopped; what is finished is kept, so run again to go on", file=sys.stderr)
        return 130 if interrupted else 128 - engine.returncode
    if not _is_dry(given):
        _print_outcome(engine.returncode, events, paths)
    return engine.returncode


def _job_fork_server(given: argparse.Namespace, study: Study) -> AbstractContextManager:
    """A fork server for the jobs if they can be forks; none for a report alone."""
    here = given.executor == LOCAL and not given.only_report
    supported = here and fork_client.is_supported(gpu=may_take_gpu(study.runtime.device))
    return fork_client.fork_server() if supported else nullcontext()


def _wait(
    engine: subprocess.Popen, watch: display.Watch, screen: display.Screen, *, elsewhere: bool
) -> bool:
    """Wait for the engine; show how far it is, and what jobs say that have no terminal or note.

    Ctrl-C reaches the engine too, and it is left to stop its jobs. Returns whether it was
    pressed.
    """
    interrupted, shown = False, 0
    while engine.returncode is None:
        try:
            engine.wait(timeout=1)
        except subprocess.TimeoutExpired:
            pass
        except KeyboardInterrupt:
            interrupted = True
        events = console.read_events(watch.shared)[1]
        unseen = [e["text"] for e in events[shown:] if elsewhere or e["word"] == console.NOTE]
        screen.show("".join(unseen))
        shown = len(events)
        screen.update(watch.status())
    return interrupted


@contextmanager
def _progress_file(paths: StudyPaths) -> Iterator[Path]:
    """The file in which all jobs of this run, wherever they are, say what they do."""
    shared = outputs_root() / f".{paths.study}.progress"
    shared.write_text("", encoding="utf-8")
    told = activity.activity_folder(shared)
    shutil.rmtree(told, ignore_errors=True)
    told.mkdir()
    try:
        yield shared
    finally:
        shutil.rmtree(told, ignore_errors=True)
        shared.unlink(missing_ok=True)


def _environment() -> dict[str, str]:
    return os.environ | JOB_ENVIRONMENT


def _command(given: argparse.Namespace, study: Study, paths: StudyPaths) -> list[str]:
    command = [sys.executable, "-m", "helpers.workflow.cli", "engine", "--snakefile", "Snakefile"]
    command += ["--nolock", "--keep-going", "--rerun-incomplete", "--scheduler", "greedy"]
    if given.executor == LOCAL or _is_dry(given):  # a plan is the same wherever jobs run
        command += ["--cores", str(max(1, given.cores))]
        command += ["--default-resources", f"mem_mb={given.job_mb}"]
        command += ["--resources", f"mem_mb={max(given.job_mb, _memory_mb())}", "gpu=1"]
    else:
        command += executors.snakemake_options(given.executor, paths)
    command += ["--config", f"study={given.study}"]
    command += ["show=plan" if _is_dry(given) else "show=run"]
    if given.only_report:
        command += ["--allowed-rules", "analysis", "export", "--forcerun", "analysis"]
        return [*command, *given.options]
    if stale := fingerprints.outdated_runs(study, paths):
        command += ["--forcerun", *(relative_to_project(run.record(paths)) for run in stale)]
    first = [stages.Run("evaluation", model, study.baseline) for model in study.models]
    command += [
        "--prioritize",
        *(relative_to_project(run.record(paths)) for run in first),
    ]  # all wait for it
    return [*command, *given.options]


def _is_dry(given: argparse.Namespace) -> bool:
    return bool(DRY_RUN_OPTIONS & set(given.options))


def _memory_mb() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2**20


def _print_outcome(code: int, events: list[dict], paths: StudyPaths) -> None:
    """Say how it ended, and what can be done if it did not end well."""
    if code == 0:
        print(f"current: {relative_to_project(paths.root / 'report.html')}", file=sys.stderr)
        return
    failed = sum(event["word"] == console.FAILED for event in events)
    if killed := console.jobs_without_result(events):
        print(
            f"ended without a word: {', '.join(killed)}; a job that is killed was most often "
            "short of memory, or of time on a cluster",
            file=sys.stderr,
        )
    if failed or killed:
        print(
            f"{failed + len(killed)} failed; what is finished is kept, so mend and run again "
            "(make report PARTIAL=yes reports what is complete)",
            file=sys.stderr,
        )
