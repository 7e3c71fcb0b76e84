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

ACTIVITY_VARIABLE = "STUDY_ACTIVITY"  # where the job at hand tells it; not set where nobody looks
TQDM_VARIABLE = "TQDM_DISABLE"  # libraries draw theirs for nobody there
WRITE_EVERY_S = 1.0
MOST_CHARACTERS = 60  # characters of what is shown of a name
MOST_BYTES = 2**12  # bytes of a file that is read


@dataclass(frozen=True)
class Activity:
    """Where a job is.

    Attributes:
        doing: in fixed words and names of the study file.
        done, of: in `unit`s; None where they are not counted.
        left_s: seconds that the rest takes at the speed so far; None if that is not known.
    """

    doing: str
    done: int | None = None
    of: int | None = None
    unit: str = ""
    left_s: float | None = None

    def __str__(self) -> str:
        counted = "" if self.of is None else f" {self.done}/{self.of} {self.unit}s"
        return f"{self.doing}{counted}"


def activity_folder(shared: Path) -> Path:
    """Where the jobs of a run write, beside the file they share."""
    return shared.with_suffix(".activity")


@contextlib.contextmanager
def report_activity(name: str, shared: Path) -> Iterator[None]:
    """Inside, this process and those it starts tell what the job of that name does."""
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


def set_activity(what: str) -> None:
    """Tell what begins now, where nothing is counted."""
    if path := os.environ.get(ACTIVITY_VARIABLE):
        _write(Path(path), Activity(what))


def _write(path: Path, activity: Activity) -> None:
    """Replace the file; a disk that is full stops no job here."""
    new = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with contextlib.suppress(OSError):
        new.write_text(json.dumps(vars(activity)), encoding="utf-8")
        os.replace(new, path)


class Bar(tqdm):
    """tqdm's bar, told to the file where there is one, in place of being drawn."""

    def __init__(self, *given, **settings):
        self._path = os.environ.get(ACTIVITY_VARIABLE)
        if self._path:
            settings |= {"file": io.StringIO(), "mininterval": 0, "miniters": 1, "disable": False}
        self._written = 0.0
        super().__init__(*given, **settings)

    def display(self, *given, **settings) -> bool | None:
        if not self._path:
            return super().display(*given, **settings)
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
    """What a job tells; None if it tells nothing, or nothing that can be read."""
    try:
        with open(path, encoding="utf-8") as stream:
            told = json.loads(stream.read(MOST_BYTES))
        done, of, left = (_number(told[key]) for key in ("done", "of", "left_s"))
        doing, unit = (one_line(told[key])[:MOST_CHARACTERS] for key in ("doing", "unit"))
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    if done is None or of is None:
        return Activity(doing, None, None, unit, left)
    return Activity(doing, int(done), int(of), unit, left)


def _number(value: object) -> float | None:
    """A number that can be shown."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1e15:
        raise ValueError(f"{value!r} is no number of items or seconds")
    return value
