"""The front door: checks a study, then lets Snakemake run what is not current.

One run at a time writes to a study's outputs. The lock is the operating system's and
ends with the process that holds it, so that nothing has to be unlocked after a crash.
"""

import argparse
import fcntl
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from helpers.study import grid
from helpers.study.errors import StudyError
from helpers.study.execution import die_with_parent
from helpers.study.loading import load_study, study_file
from helpers.study.paths import PROJECT, StudyPaths, outputs_root
from helpers.study.pins import hub_sources

PLAN_WIDTH = 48  # of a job's name in the Snakefile's dry run
ACCOUNT = ".snakemake/metadata"  # how each output was made; Snakemake's own


def check(study: str) -> int:
    """Say on stderr what is wrong with a study file; 0 if nothing is, else 2."""
    try:
        loaded = load_study(study)
        for run in [*grid.runs(loaded), grid.Run("analysis")]:
            grid.source_files(loaded, run)
        StudyPaths(study_file(study).stem).refuse_links_out()
    except StudyError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def run_study(given: argparse.Namespace) -> int:
    """Run what is not current, one run at a time per study. Returns the exit code."""
    if wrong := check(given.study):
        return wrong
    paths = StudyPaths(study_file(given.study).stem)
    outputs_root().mkdir(parents=True, exist_ok=True)
    with open(outputs_root() / f".{paths.study}.lock", "w", encoding="utf-8") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(
                f"study {paths.study!r} is being run by another process; wait for it or stop it",
                file=sys.stderr,
            )
            return 2
        if given.only_report and (stale := _not_current(given, paths)):
            print(
                f"the report would show results that are not current ({', '.join(stale)}); "
                "run make study",
                file=sys.stderr,
            )
            return 2
        if not (given.only_report or _is_dry(given)) and (wrong := _fetch(given.study)):
            return wrong
        return _run_snakemake(given, paths, lock.fileno())


def _fetch(study: str) -> int:
    """Bring what the study names on a Hub to this machine, before any job; 0, or 2 with why.

    In a process of its own: the rooms above this one do the work.
    """
    if not hub_sources(load_study(study)):
        return 0
    command = [sys.executable, "-m", "helpers.sources.fetching", str(study)]
    return subprocess.run(command, cwd=PROJECT, check=False).returncode


def _not_current(given: argparse.Namespace, paths: StudyPaths) -> list[str]:
    """Runs before the analysis that would have to be repeated, as a dry run tells them."""
    whole = argparse.Namespace(**vars(given) | {"only_report": False, "options": ["-n"]})
    # Whatever goes wrong here goes wrong, and is told, in the run itself too.
    done = subprocess.run(
        _command(whole, paths), cwd=PROJECT, capture_output=True, text=True, check=False
    )
    planned = [line[:PLAN_WIDTH].strip() for line in done.stdout.splitlines()]
    return [name for name in planned if name not in ("analysis", "report")]


def _run_snakemake(given: argparse.Namespace, paths: StudyPaths, lock: int) -> int:
    with tempfile.NamedTemporaryFile("w+", suffix=".progress") as progress:
        engine = subprocess.Popen(
            _command(given, paths),
            cwd=PROJECT,
            env=os.environ | {"STUDY_PROGRESS": progress.name},
            pass_fds=[lock],  # held as long as the engine lives, whatever happens here
            preexec_fn=die_with_parent,
        )
        while True:
            try:
                code = engine.wait()
                break
            except KeyboardInterrupt:  # Ctrl-C reaches the engine too; let it stop its jobs
                continue
        words = progress.read().split()
    return _conclude(code, words, paths, dry=_is_dry(given))


def _command(given: argparse.Namespace, paths: StudyPaths) -> list[str]:
    command = [sys.executable, "-m", "snakemake", "--snakefile", "Snakefile"]
    command += ["--cores", str(max(1, given.cores)), "--nolock", "--keep-going"]
    command += ["--rerun-incomplete", "--scheduler", "greedy"]
    command += ["--default-resources", f"mem_mb={given.job_mb}"]
    command += ["--resources", f"mem_mb={max(given.job_mb, _memory_mb())}", "gpu=1"]
    command += ["--config", f"study={given.study}"]
    command += ["show=plan" if _is_dry(given) else "show=run"]
    if given.only_report:
        command += ["--allowed-rules", "analysis", "export", "--forcerun", "analysis"]
    elif _account_is_lost(paths):
        print("how the outputs were made is not on record; all is run anew", file=sys.stderr)
        command += ["--forceall"]
    return [*command, *given.options]


def _is_dry(given: argparse.Namespace) -> bool:
    return bool({"-n", "--dry-run", "--dryrun"} & set(given.options))


def _account_is_lost(paths: StudyPaths) -> bool:
    """Whether there are results, but no account by which a change would be noticed."""
    has_results = any(paths.root.glob("**/record.json"))
    return has_results and not (PROJECT / ACCOUNT).is_dir()


def _memory_mb() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2**20


def _conclude(code: int, words: list[str], paths: StudyPaths, *, dry: bool) -> int:
    if code < 0:
        print("stopped; what is finished is kept, so run again to go on", file=sys.stderr)
        return 128 - code
    if code == 0 and not dry:
        report = paths.root / "report.html"
        shown = report.relative_to(PROJECT) if report.is_relative_to(PROJECT) else Path(report)
        print(f"current: {shown}", file=sys.stderr)
    failed = words.count("failed")
    if failed:
        print(f"{failed} failed; what is finished is kept, so mend and run again", file=sys.stderr)
    return code
