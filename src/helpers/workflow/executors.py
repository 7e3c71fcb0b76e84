"""Jobs that run elsewhere: a profile of the workflow engine per executor, under profiles/.

The Snakefile is the same. A profile names the executor, and memory, time and GPUs of each
stage. On Slurm jobs outlive the engine when that is killed, so that what an earlier run
left behind is cancelled before a new one writes to the same folders.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import time
from importlib.machinery import PathFinder

import yaml

from helpers.core.errors import StudyError
from helpers.core.paths import PROJECT, StudyPaths

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
