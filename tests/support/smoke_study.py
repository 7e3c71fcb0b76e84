"""The smoke study in folders of its own, run through make as a user runs it, and its content.

What is compared between two runs is content: predictions, metrics, checks, calibrations,
weights, summaries. Times, and what follows from them, are not: `cost` measures nothing else.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import yaml

from helpers.core.files import PROJECT

NAME = "smoke"
GUARDS = PROJECT / "tests" / "support" / "guards"
PART = ("noquant", "rtn_w8a8", "smoothquant_w8a8")  # variants of it that show most faults
NOT_CONTENT = ("started", "duration_s", "peak_memory_bytes", "machine")


class Smoke:
    """One copy of the smoke study.

    Args:
        root: holds the study file, the outputs and the cache.

    Attributes:
        others_percent, took_s, said: of `run`: use of all cores before it, its time, what make
            said.
    """

    others_percent = took_s = 0.0
    said = ""

    def __init__(self, root: Path):
        self.root = root
        self.outputs = root / "outputs" / NAME
        self.file = root / f"{NAME}.yaml"
        if not self.file.exists():
            root.mkdir(parents=True, exist_ok=True)
            shutil.copy(PROJECT / "params" / f"{NAME}.yaml", self.file)

    def environment(self, **more) -> dict[str, str]:
        places = {
            "STUDY_OUTPUTS": str(self.root / "outputs"),
            "STUDY_CACHE": str(self.root / "cache"),
        }
        return os.environ | places | more

    def make(self, target: str, *settings: str, **more) -> subprocess.Popen:
        """`make <target>` on this study, in a process group of its own; not waited for."""
        ready = f"{sys.prefix}/.study-ready"  # the environment that runs the tests is set up
        command = ["make", "-s", "-o", ready, target, f"VENV={sys.prefix}", f"STUDY={self.file}"]
        return subprocess.Popen(
            [*command, *settings],
            cwd=PROJECT,
            env=self.environment(**more),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def done(self, target: str = "study", *settings: str, **more) -> str:
        """Let make end well; return what it said."""
        process = self.make(target, *settings, **more)
        _, output = process.communicate()
        assert process.returncode == 0, output
        return output

    def run(self, **more) -> "Smoke":
        """This study after a whole run on two cores, with its estimate."""
        self.others_percent, began = psutil.cpu_percent(interval=1), time.monotonic()
        self.said = self.done("study", "CORES=2", STUDY_ESTIMATE="yes", **more)
        self.took_s = time.monotonic() - began
        return self

    def run_guarded(self, **more) -> "Smoke":
        """The same by the command that make runs, with all but this machine refused.

        What any process of it tried to reach is in the file `attempts`. It is not run by make,
        which hands no PYTHONPATH on.
        """
        self.others_percent, began = psutil.cpu_percent(interval=1), time.monotonic()
        done = self.front("--cores", "2", STUDY_ESTIMATE="yes", **self.guards(), **more)
        assert done.returncode == 0, done.stderr
        self.said, self.took_s = done.stderr, time.monotonic() - began
        return self

    def guards(self) -> dict[str, str]:
        """The environment in which a Python reaches this machine alone."""
        return {"PYTHONPATH": str(GUARDS), "NETWORK_ATTEMPTS": str(self.root / "attempts")}

    def front(self, *options: str, **more) -> subprocess.CompletedProcess:
        """The command that `make study` runs, on this study."""
        command = [sys.executable, "-m", "helpers.workflow.cli", "study", str(self.file)]
        return subprocess.run(
            [*command, *options],
            cwd=PROJECT,
            env=self.environment(**more),
            capture_output=True,
            text=True,
        )

    def keep_variants(self, *names: str) -> "Smoke":
        """This study with fewer variants, and without the results of the others."""
        settings = yaml.safe_load(self.file.read_text("utf-8"))
        dropped = settings["variants"].keys() - set(names)
        settings["variants"] = {name: settings["variants"][name] for name in names}
        self.file.write_text(yaml.safe_dump(settings, sort_keys=False), "utf-8")
        for name in dropped:
            for folder in self.outputs.glob(f"*/{name}"):
                shutil.rmtree(folder)
            for notebook in self.outputs.glob(f"notebooks/*.{name}.ipynb"):
                notebook.unlink()
        return self

    def job(self, stage: str, **parameters: str) -> subprocess.CompletedProcess:
        """One job by itself, as Snakemake starts it."""
        [notebook] = (PROJECT / "notebooks").glob(f"*_{stage}.ipynb")
        name = ".".join([notebook.stem, *parameters.values()])
        command = [sys.executable, "-m", "helpers.workflow.cli", "run"]
        command += ["--notebook", f"notebooks/{notebook.name}"]
        command += ["--output", str(self.outputs / "notebooks" / f"{name}.ipynb")]
        for key, value in {"study": str(self.file), **parameters}.items():
            command += ["-p", key, value]
        return subprocess.run(
            command, cwd=PROJECT, env=self.environment(), capture_output=True, text=True
        )

    def copy(self, root: Path) -> "Smoke":
        shutil.copytree(self.root, root, symlinks=True)
        return Smoke(root)

    def content(self) -> dict[str, str]:
        """Hash of every result, by its path in the study's folder."""
        return content(self.outputs)


def run_once(place: Path, run: Callable[[Path], Smoke]) -> Smoke:
    """A smoke study that whoever comes first runs, and all others wait for.

    Args:
        place: the study's folder; beside it are a lock, and what its run said and how long it took.
    """
    told = place.with_suffix(".json")
    with locked(place.with_suffix(".lock")):
        if not told.exists():
            shutil.rmtree(place, ignore_errors=True)
            study = run(place)
            told.write_text(json.dumps([study.others_percent, study.took_s, study.said]), "utf-8")
    study = Smoke(place)
    study.others_percent, study.took_s, study.said = json.loads(told.read_text("utf-8"))
    return study


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Inside the context no other process is in it with the same file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def content(outputs: Path) -> dict[str, str]:
    """Hash of every result below a study's folder, by its path in it."""
    hashes = {}
    for path in sorted(p for p in outputs.rglob("*") if p.is_file()):
        name = path.relative_to(outputs)
        hidden = any(part.startswith(".") for part in name.parts)
        shows_times = name.parts[0] in ("notebooks", "report_files", "report.md", "report.html")
        shows_times |= name.parts[1:2] == ("cost",)
        if not hidden and not shows_times:
            data = path.read_bytes()
            if name.name == "record.json":
                content_fields = {k: v for k, v in json.loads(data).items() if k not in NOT_CONTENT}
                data = json.dumps(content_fields, sort_keys=True).encode()
            hashes[name.as_posix()] = hashlib.sha256(data).hexdigest()
    return hashes
