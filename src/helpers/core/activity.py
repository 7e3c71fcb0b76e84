"""What a job is doing and how far it is: told by the job, shown by who runs the study.

While `make study` runs, a job writes its place in its work to a small file of its own, at
most once a second; its bars write nothing into the notebook. Elsewhere, as in JupyterLab, the
same bars are tqdm's. Nobody's work depends on such a file: it may be missing, torn or old.
"""

import contextlib
import io
import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from helpers.core.plain_text import one_line

ACTIVITY_VARIABLE = "STUDY_ACTIVITY"  # path of the job's activity file; unset outside `make study`
TQDM_VARIABLE = "TQDM_DISABLE"  # disables the bars of libraries inside a job
WRITE_EVERY_S = 1.0
MOST_CHARACTERS = 60  # shown of a name
MOST_BYTES = 2**12  # read of a file


@dataclass(frozen=True)
class Activity:
    """The current task of a job and its progress.

    Attributes:
        doing: the task, in fixed words and names of the study file.
        done, of: in `unit`s; None where they are not counted.
        left_s: estimated seconds to the end at the speed so far; None if unknown.
    """

    doing: str
    done: int | None = None
    of: int | None = None
    unit: str = ""
    left_s: float | None = None

    def __str__(self) -> str:
        progress = "" if self.of is None else f" {self.done}/{self.of} {self.unit}s"
        return f"{self.doing}{progress}"


def activity_folder(shared: Path) -> Path:
    """The folder of the jobs' activity files, beside the progress file they share."""
    return shared.with_suffix(".activity")


@contextlib.contextmanager
def report_activity(name: str, shared: Path) -> Iterator[None]:
    """Inside the context, this process and its children write the activity file of a job."""
    path = activity_folder(shared) / f"{name}.json"
    if not path.parent.is_dir():
        yield
        return
    os.environ |= {ACTIVITY_VARIABLE: str(path), TQDM_VARIABLE: "1"}
    try:
        yield
    finally:
        for name in (ACTIVITY_VARIABLE, TQDM_VARIABLE):
            os.environ.pop(name, None)
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)


def set_activity(activity: str) -> None:
    """Write the name of a task that has no progress bar to the activity file."""
    if path := os.environ.get(ACTIVITY_VARIABLE):
        _write(Path(path), Activity(activity))


def _write(path: Path, activity: Activity) -> None:
    """Replace the file; a full disk does not stop the job."""
    new = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with contextlib.suppress(OSError):
        new.write_text(json.dumps(vars(activity)), encoding="utf-8")
        os.replace(new, path)


class Bar(tqdm):
    """tqdm's bar; inside a job it writes to the activity file and draws nothing."""

    def __init__(self, *args, **kwargs):
        self._path = os.environ.get(ACTIVITY_VARIABLE)
        if self._path:
            kwargs |= {"file": io.StringIO(), "mininterval": 0, "miniters": 1, "disable": False}
        self._written = 0.0
        super().__init__(*args, **kwargs)

    def display(self, *args, **kwargs) -> bool | None:
        if not self._path:
            return super().display(*args, **kwargs)
        if time.monotonic() - self._written >= WRITE_EVERY_S or self.n == self.total:
            self._written = time.monotonic()
            _write(Path(self._path), self._activity())
        return None

    def _activity(self) -> Activity:
        done = self.n - self.initial
        elapsed = self.format_dict["elapsed"]
        left = elapsed / done * (self.total - self.n) if done and self.total else None
        return Activity(self.desc.removesuffix(": "), self.n, self.total, self.unit, left)


def read_activity(path: Path) -> Activity | None:
    """The activity in a file; None if the file is missing or damaged."""
    try:
        with open(path, encoding="utf-8") as stream:
            fields = json.loads(stream.read(MOST_BYTES))
        done, of, left = (_number(fields[key]) for key in ("done", "of", "left_s"))
        doing, unit = (one_line(fields[key])[:MOST_CHARACTERS] for key in ("doing", "unit"))
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    if done is None or of is None:
        return Activity(doing, None, None, unit, left)
    return Activity(doing, int(done), int(of), unit, left)


def _number(value: object) -> float | None:
    """The value, if it is a number that can be shown.

    Raises:
        ValueError: it is negative, not finite or no number.
    """
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1e15:
        raise ValueError(f"{value!r} is no number of items or seconds")
    return value
