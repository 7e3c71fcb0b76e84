"""Launcher of a study: checks it, then runs outdated jobs through Snakemake.

One run at a time writes to a study's outputs. The lock is the operating system's and ends with the
process that holds it, so that nothing has to be unlocked after a crash. All that this starts ends
with it, however it ends.

What people bring is looked at before the first job, in a process of its own. Models, tokenizers
and rows need torch, which this package does without (`helpers.evaluation.preflight`). A study of
what ships with this project is not looked at, and nothing is looked at twice: what was sound stays
so until a file, the study or the code changes.

Jobs may run elsewhere: a profile of the workflow engine per executor, under profiles/, names the
executor, and memory, time and GPUs of each stage. The Snakefile is the same. On Slurm jobs outlive
the engine when that is killed, so that what an earlier run left behind is cancelled before a new
one writes to the same folders.
"""

import argparse
import contextlib
import hashlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from importlib.machinery import PathFinder
from importlib.metadata import version
from pathlib import Path

import yaml

from helpers.core import processes
from helpers.core.errors import DISK_FULL, StudyError
from helpers.core.files import (
    PROJECT,
    StudyPaths,
    acquire_lock,
    cache_root,
    outputs_root,
    relative_to_project,
    remove_leftovers,
)
from helpers.core.processes import begin_child, die_with_parent
from helpers.core.records import sha256_data, sha256_file
from helpers.study import stages
from helpers.study.inputs import dataset_files, hub_sources, resolve_path, study_sources
from helpers.study.loading import load_study, study_file
from helpers.study.schema import (
    BundledModel,
    FileDataset,
    FolderDataset,
    FolderModel,
    GgufModel,
    HubDataset,
    HubModel,
    Study,
)
from helpers.study.stages import HELPERS
from helpers.workflow import display, fork_server
from helpers.workflow import display as estimates
from helpers.workflow.display import may_take_gpu
from helpers.workflow.fork_server import JOB_ENVIRONMENT

PROFILES = PROJECT / "profiles"
PLUGINS = "executors"  # folder of the environment with the packages of a single executor
TIMEOUT_S = 60


def snakemake_options(executor: str, paths: StudyPaths) -> list[str]:
    """Snakemake's options for an executor.

    Raises:
        StudyError: there is no profile of that name, or its plugin is not installed.
    """
    profile = PROFILES / executor
    if not (profile / "config.yaml").is_file():
        names = sorted(path.parent.name for path in PROFILES.glob("*/config.yaml"))
        raise StudyError(
            f"EXECUTOR = {executor!r} has no profiles/{executor}/config.yaml; "
            f"use one of: {', '.join(['local', *names])}"
        )
    executor_name = yaml.safe_load((profile / "config.yaml").read_text(encoding="utf-8"))[
        "executor"
    ]
    plugin = f"snakemake_executor_plugin_{executor_name.replace('-', '_')}"
    if PathFinder.find_spec(plugin, [*_places(executor), *sys.path]) is None:
        raise StudyError(
            f"EXECUTOR = {executor!r} needs {plugin}; make study EXECUTOR={executor} installs it"
        )
    options = ["--profile", str(profile)]
    if executor == "slurm":
        options += ["--slurm-jobname-prefix", job_prefix(paths)]
    return options


def executor_environment(executor: str) -> dict[str, str]:
    """Environment variables with which Snakemake finds the plugin of an executor."""
    if executor == "local":
        return {}
    path = [*_places(executor), os.environ.get("PYTHONPATH", "")]
    return {"PYTHONPATH": os.pathsep.join(filter(None, path))}


def _places(executor: str) -> list[str]:
    return [os.path.join(sys.prefix, PLUGINS, executor)]


def job_prefix(paths: StudyPaths) -> str:
    """The prefix of this study's job names on the cluster; no other study has it."""
    return "study-" + hashlib.sha256(str(paths.root.absolute()).encode()).hexdigest()[:12]


def stop_leftover_jobs(paths: StudyPaths) -> None:
    """Cancel the cluster jobs of a killed run of this study and wait until they end.

    Raises:
        StudyError: the cluster does not answer, or the jobs do not end.
    """
    if shutil.which("squeue") is None:
        return
    deadline = time.monotonic() + TIMEOUT_S
    while job_ids := _jobs_of(job_prefix(paths)):
        if time.monotonic() > deadline:
            raise StudyError(
                f"jobs {' '.join(job_ids)} of an earlier run do not end; stop them with scancel"
            )
        subprocess.run(["scancel", *job_ids], capture_output=True, check=False)
        time.sleep(1)


def _jobs_of(prefix: str) -> list[str]:
    command = ["squeue", "--me", "--noheader", "--format", "%i %j"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        reason = result.stderr.strip().splitlines()[:1] or ["no reason given"]
        raise StudyError(f"the cluster does not answer squeue ({reason[0]}); is it up?")
    pairs = [line.split(maxsplit=1) for line in result.stdout.splitlines()]
    return [number for number, name in pairs if name.startswith(prefix)]


USER_SOURCES = FileDataset | FolderDataset | FolderModel | GgufModel | HubDataset | HubModel
DOWNLOADED_SOURCES = (
    HubDataset | HubModel | BundledModel | GgufModel
)  # may still have to be downloaded or converted


def check_sources(study_name: str, study: Study, *, dry: bool) -> int:
    """Print the faults of models and data to stderr; 0 if there are none, else 2.

    Args:
        study_name: the study's name or file, as the user gave it.
        dry: check only the sources that are on this machine.
    """
    sources = [source for _, source in study_sources(study)]
    drawn_once = study.repeats == 1 and not study.calibrations
    if drawn_once and not any(isinstance(source, USER_SOURCES) for source in sources):
        return 0  # shipped items are enough for one calibration
    is_partial = dry and any(isinstance(source, DOWNLOADED_SOURCES) for source in sources)
    stamp = cache_root() / "checked" / _state(study, sources)
    if not is_partial and stamp.is_file():
        return 0
    command = [sys.executable, "-m", "helpers.evaluation.preflight", str(study_name)]
    command += ["--dry"] if dry else []
    result = subprocess.run(command, cwd=PROJECT, preexec_fn=begin_child, check=False)
    if result.returncode == 0 and not is_partial:
        with contextlib.suppress(OSError):  # without the stamp the sources are checked again
            stamp.parent.mkdir(parents=True, exist_ok=True)
            stamp.touch()
    return result.returncode and 2


def _state(study: Study, sources: list) -> str:
    """Hash of the study, of its local files' sizes and times, and of the checking code."""
    files = [path for source in sources for path in _local_files(source)]
    stats = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    code = [sha256_file(path) for path in sorted(HELPERS.rglob("*.py"))]
    libraries = [version(name) for name in ("transformers", "tokenizers")]
    return sha256_data([study.model_dump(mode="json"), stats, code, libraries])


def _local_files(source) -> list[Path]:
    match source:
        case FileDataset() | FolderDataset():
            return dataset_files(source)
        case FolderModel(folder=folder):
            return sorted(path for path in resolve_path(folder).iterdir() if path.is_file())
        case GgufModel(gguf=path):
            return [resolve_path(path)]
    return []


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
    if args.partial and (runs := stages.completed_runs(study, paths)) != set(stages.runs(study)):
        return _report_part(args, stages.largest_complete_part(study, runs), paths)
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
    result = subprocess.run(command, cwd=PROJECT, preexec_fn=begin_child, check=False)
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
        stop_leftover_jobs(paths)


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
        command,
        cwd=PROJECT,
        env=_environment(),
        capture_output=True,
        text=True,
        preexec_fn=begin_child,
        check=False,
    )
    planned = [line[:PLAN_WIDTH].strip() for line in result.stdout.splitlines()]
    return [name for name in planned if name not in ("analysis", "report")]


def _report_part(args: argparse.Namespace, part: stages.Part, paths: StudyPaths) -> int:
    """Run analysis and export for a part of the study, into a folder of its own."""
    folder = stages.report_folder(paths, partial="yes")
    notebook = folder / f"{stages.NOTEBOOKS['analysis']}.ipynb"
    cli = [sys.executable, "-m", "helpers.workflow.cli"]
    analysis = [*cli, "run", "--notebook", f"notebooks/{notebook.name}", "--output", str(notebook)]
    analysis += ["-p", "study", args.study, "-p", "partial", "yes"]
    export = [*cli, "export", "--notebook", str(notebook), "--study", args.study]
    for command in (analysis, [*export, "--to", str(folder)]):
        result = subprocess.run(
            command, cwd=PROJECT, env=_environment(), preexec_fn=begin_child, check=False
        )
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
            env=environment | executor_environment(args.executor),
            pass_fds=[lock],  # Snakemake keeps the lock even if this process dies
            preexec_fn=begin_child,
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
                stop_leftover_jobs(paths)
            raise
        if forwarder:
            forwarder.join(PATIENCE_S)
        events = processes.read_events(shared)[1]
    if interrupted or engine.returncode < 0:
        print(STOPPED, file=sys.stderr)
        return 130 if interrupted else 128 - engine.returncode
    if not _is_dry(args):
        _print_outcome(engine.returncode, events, paths)
    return engine.returncode


def _job_fork_server(args: argparse.Namespace, study: Study) -> AbstractContextManager:
    """A fork server if the jobs can be forks; a null context for a report alone."""
    runs_here = args.executor == LOCAL and not args.only_report
    supported = runs_here and fork_server.is_supported(gpu=may_take_gpu(study.runtime.device))
    return fork_server.fork_server() if supported else nullcontext()


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
        events = processes.read_events(watch.shared)[1]
        unseen = [
            e["text"] for e in events[shown_count:] if elsewhere or e["word"] == processes.NOTE
        ]
        screen.show("".join(unseen))
        shown_count = len(events)
        screen.update(watch.status())
    return interrupted


@contextmanager
def _progress_file(paths: StudyPaths) -> Iterator[Path]:
    """Inside the context, the progress file that all jobs of this run share."""
    shared = outputs_root() / f".{paths.study}.progress"
    shared.write_text("", encoding="utf-8")
    activity_folder = processes.activity_folder(shared)
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
        command += snakemake_options(args.executor, paths)
    command += ["--config", f"study={args.study}"]
    command += ["show=plan" if _is_dry(args) else "show=run"]
    if args.only_report:
        command += ["--allowed-rules", "analysis", "export", "--forcerun", "analysis"]
        return [*command, *args.options]
    if outdated := stages.outdated_runs(study, paths):
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
    failed = sum(event["word"] == processes.FAILED for event in events)
    if killed := processes.jobs_without_result(events):
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
