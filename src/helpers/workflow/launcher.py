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

LEAST_BYTES = 2**24  # free space that a run needs to begin
PATIENCE_S = 5  # to wait for the last lines of a finished run
PLAN_WIDTH = 48  # of a job's name in the Snakefile's dry run
LOCAL = "local"
STOPPED = "stopped; finished jobs are kept, so run again to resume"
DRY_RUN_OPTIONS = {"-n", "--dry-run", "--dryrun"}


def check_study(study: str) -> int:
    """Print the errors of a study file to stderr; 0 if there are none, else 2."""
    try:
        loaded = load_study(study)
        for run in [*stages.runs(loaded), stages.Run("analysis")]:
            stages.source_files(loaded, run)
        StudyPaths(study_file(study).stem).check_links()
    except StudyError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def run_study(args: argparse.Namespace) -> int:
    """Run the jobs that are not current, one run at a time per study. Returns the exit code.

    Raises:
        StudyError: the study is running already, or the executor cannot be used.
        OSError: the outputs cannot be written.
    """
    die_with_parent()
    signal.signal(signal.SIGTERM, _stop)
    if code := check_study(args.study):
        return code
    study, paths = load_study(args.study), StudyPaths(study_file(args.study).stem)
    lock = acquire_lock(
        outputs_root() / f".{paths.study}.lock", f"study {paths.study!r} is being run"
    )
    if not _is_dry(args):
        _prepare_outputs(args, paths)
    if args.partial and (runs := fingerprints.completed_runs(study, paths)) != set(
        stages.runs(study)
    ):
        return _report_part(args, partial.largest_complete_part(study, runs), paths)
    if args.only_report and (outdated := _not_current(args, study, paths)):
        print(
            f"the report would show results that are not current ({', '.join(outdated)}); "
            "run make study, or make report PARTIAL=yes for the completed part",
            file=sys.stderr,
        )
        return 2
    if not (args.only_report or _is_dry(args)) and (code := _fetch(args.study)):
        return code
    if not args.only_report and (code := check_study_sources(args.study, dry=_is_dry(args))):
        return code
    with _job_fork_server(args, study):
        return _run_snakemake(args, study, paths, lock, _estimate(args, paths))


def _estimate(args: argparse.Namespace, paths: StudyPaths) -> estimates.Estimate | None:
    """Print how long the run will take on this machine; None if disabled or unknown."""
    is_enabled = os.environ.get("STUDY_ESTIMATE", "yes") != "no"
    if args.only_report or args.executor != LOCAL or not is_enabled:
        return None
    limits = {"cores": args.cores, "job_mb": args.job_mb, "memory_mb": _memory_mb()}
    return estimates.print_estimate(args.study, paths, **limits)


def _fetch(study: str) -> int:
    """Fetch the study's Hub sources before any job; returns 0, or 2 after printing why.

    It runs in a process of its own, because this package imports no torch.
    """
    if not hub_sources(load_study(study)):
        return 0
    command = [sys.executable, "-m", "helpers.sources.fetching", str(study)]
    result = subprocess.run(command, cwd=PROJECT, preexec_fn=die_with_parent, check=False)
    return result.returncode


def check_study_sources(study: str, *, dry: bool) -> int:
    """Print the faults of models and data to stderr; 0 if there are none, else 2.

    The study is loaded again, with the commits that fetching has pinned.
    """
    return check_sources(study, load_study(study), dry=dry)


def _prepare_outputs(args: argparse.Namespace, paths: StudyPaths) -> None:
    """Check free space, remove files of killed runs and correct times in the future.

    Raises:
        StudyError: a disk is full, or jobs of an earlier run do not end.
    """
    for folder in (outputs_root(), PROJECT):
        if (free := shutil.disk_usage(folder).free) < LEAST_BYTES:
            raise StudyError(
                f"{folder}: only {free / 2**20:.1f} MB are free on this disk; {DISK_FULL}"
            )
    for folder in (paths.root, cache_root()):
        remove_leftovers(folder)
    now = time.time()
    for path in paths.root.rglob("*"):
        if (
            path.lstat().st_mtime > now
        ):  # Snakemake rejects results that are older than their inputs
            os.utime(path, (now, now), follow_symlinks=False)
    if args.executor == "slurm":
        executors.stop_leftover_jobs(paths)


def _stop(number: int, _frame) -> None:
    """On SIGTERM, end this process and with it all child processes."""
    print(STOPPED, file=sys.stderr)
    sys.exit(128 + number)


def _not_current(args: argparse.Namespace, study: Study, paths: StudyPaths) -> list[str]:
    """The runs before the analysis that are not current, by Snakemake's dry run."""
    overrides = {"only_report": False, "options": ["-n"], "executor": LOCAL}
    command = _command(argparse.Namespace(**vars(args) | overrides), study, paths)
    # An error here occurs in the run itself too, which reports it.
    result = subprocess.run(
        command, cwd=PROJECT, env=_environment(), capture_output=True, text=True, check=False
    )
    planned = [line[:PLAN_WIDTH].strip() for line in result.stdout.splitlines()]
    return [name for name in planned if name not in ("analysis", "report")]


def _report_part(args: argparse.Namespace, part: partial.Part, paths: StudyPaths) -> int:
    """Run analysis and export for a part of the study, into a folder of its own."""
    folder = partial.report_folder(paths, partial="yes")
    notebook = folder / f"{stages.NOTEBOOKS['analysis']}.ipynb"
    cli = [sys.executable, "-m", "helpers.workflow.cli"]
    analysis = [*cli, "run", "--notebook", f"notebooks/{notebook.name}", "--output", str(notebook)]
    analysis += ["-p", "study", args.study, "-p", "partial", "yes"]
    export = [*cli, "export", "--notebook", str(notebook), "--study", args.study]
    for command in (analysis, [*export, "--to", str(folder)]):
        result = subprocess.run(command, cwd=PROJECT, env=_environment(), check=False)
        if result.returncode:
            return result.returncode
    print(f"partial: {relative_to_project(folder / 'report.html')}", file=sys.stderr)
    print(f"missing: {', '.join(part.missing)}", file=sys.stderr)
    return 0


def _run_snakemake(
    args: argparse.Namespace,
    study: Study,
    paths: StudyPaths,
    lock: int,
    estimate: estimates.Estimate | None,
) -> int:
    can_draw = not _is_dry(args) and display.can_draw()
    with _progress_file(paths) as shared, display.screen(can_draw_over=can_draw) as screen:
        environment = _environment() | {"STUDY_PROGRESS": str(shared)}
        # Lines of other processes would tear the table, so they pass through this process.
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT} if can_draw else {}
        engine = subprocess.Popen(
            _command(args, study, paths),
            cwd=PROJECT,
            env=environment | executors.executor_environment(args.executor),
            pass_fds=[lock],  # Snakemake keeps the lock even if this process dies
            preexec_fn=die_with_parent,
            text=True,
            encoding="utf-8",
            errors="replace",
            **streams,
        )
        forwarder = display.forward_lines(engine.stdout, screen.show) if can_draw else None
        watch = display.Watch(shared, estimate)
        try:
            interrupted = _wait(engine, watch, screen, elsewhere=args.executor != LOCAL)
        except SystemExit:  # local jobs end with this process; cluster jobs must be cancelled
            engine.kill()
            if args.executor == "slurm":
                executors.stop_leftover_jobs(paths)
            raise
        if forwarder:
            forwarder.join(PATIENCE_S)
        events = console.read_events(shared)[1]
    if interrupted or engine.returncode < 0:
        print(STOPPED, file=sys.stderr)
        return 130 if interrupted else 128 - engine.returncode
    if not _is_dry(args):
        _print_outcome(engine.returncode, events, paths)
    return engine.returncode


def _job_fork_server(args: argparse.Namespace, study: Study) -> AbstractContextManager:
    """A fork server if the jobs can be forks; a null context for a report alone."""
    runs_here = args.executor == LOCAL and not args.only_report
    supported = runs_here and fork_client.is_supported(gpu=may_take_gpu(study.runtime.device))
    return fork_client.fork_server() if supported else nullcontext()


def _wait(
    engine: subprocess.Popen, watch: display.Watch, screen: display.Screen, *, elsewhere: bool
) -> bool:
    """Wait for Snakemake and show progress, notes, and the lines of jobs without a terminal.

    Ctrl-C reaches Snakemake too, which stops its jobs. Returns whether it was pressed.
    """
    interrupted, shown_count = False, 0
    while engine.returncode is None:
        try:
            engine.wait(timeout=1)
        except subprocess.TimeoutExpired:
            pass
        except KeyboardInterrupt:
            interrupted = True
        events = console.read_events(watch.shared)[1]
        unseen = [e["text"] for e in events[shown_count:] if elsewhere or e["word"] == console.NOTE]
        screen.show("".join(unseen))
        shown_count = len(events)
        screen.update(watch.status())
    return interrupted


@contextmanager
def _progress_file(paths: StudyPaths) -> Iterator[Path]:
    """Inside the context, the progress file that all jobs of this run share."""
    shared = outputs_root() / f".{paths.study}.progress"
    shared.write_text("", encoding="utf-8")
    activity_folder = activity.activity_folder(shared)
    shutil.rmtree(activity_folder, ignore_errors=True)
    activity_folder.mkdir()
    try:
        yield shared
    finally:
        shutil.rmtree(activity_folder, ignore_errors=True)
        shared.unlink(missing_ok=True)


def _environment() -> dict[str, str]:
    return os.environ | JOB_ENVIRONMENT


def _command(args: argparse.Namespace, study: Study, paths: StudyPaths) -> list[str]:
    command = [sys.executable, "-m", "helpers.workflow.cli", "engine", "--snakefile", "Snakefile"]
    command += ["--nolock", "--keep-going", "--rerun-incomplete", "--scheduler", "greedy"]
    if args.executor == LOCAL or _is_dry(args):  # a dry run is the same for every executor
        command += ["--cores", str(max(1, args.cores))]
        command += ["--default-resources", f"mem_mb={args.job_mb}"]
        command += ["--resources", f"mem_mb={max(args.job_mb, _memory_mb())}", "gpu=1"]
    else:
        command += executors.snakemake_options(args.executor, paths)
    command += ["--config", f"study={args.study}"]
    command += ["show=plan" if _is_dry(args) else "show=run"]
    if args.only_report:
        command += ["--allowed-rules", "analysis", "export", "--forcerun", "analysis"]
        return [*command, *args.options]
    if outdated := fingerprints.outdated_runs(study, paths):
        command += ["--forcerun", *(relative_to_project(run.record(paths)) for run in outdated)]
    baselines = [stages.Run("evaluation", model, study.baseline) for model in study.models]
    command += [
        "--prioritize",
        *(relative_to_project(run.record(paths)) for run in baselines),
    ]  # other evaluations wait for it
    return [*command, *args.options]


def _is_dry(args: argparse.Namespace) -> bool:
    return bool(DRY_RUN_OPTIONS & set(args.options))


def _memory_mb() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2**20


def _print_outcome(code: int, events: list[dict], paths: StudyPaths) -> None:
    """Print the outcome, and the remedies if jobs failed."""
    if code == 0:
        print(f"current: {relative_to_project(paths.root / 'report.html')}", file=sys.stderr)
        return
    failed = sum(event["word"] == console.FAILED for event in events)
    if killed := console.jobs_without_result(events):
        print(
            f"exited without reporting a result: {', '.join(killed)}; such a job was killed, most "
            "often for lack of memory or, on a cluster, of time",
            file=sys.stderr,
        )
    if failed or killed:
        print(
            f"{failed + len(killed)} failed; finished jobs are kept, so correct the cause and run "
            "again (make report PARTIAL=yes reports the completed part)",
            file=sys.stderr,
        )
