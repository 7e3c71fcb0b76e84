"""Processes of a run: they end with their parent, report progress, and alternate measurements.

A process that calls `die_with_parent` ends with the one that started it, however that ended.
Ctrl-C reaches a process from its first line on, not while its interpreter starts.

A job says one line when it starts and one when it ends. The lines go to the terminal and, while
`make study` runs, to a file in the outputs folder that all its jobs share, wherever they run:
`STUDY_PROGRESS`. Its first line is the number of jobs, each other one is JSON. From it a job knows
how many are done, `make study` shows what jobs on other machines say, and at the end it is known
which jobs exited without reporting a result.

While a job runs it writes its place in its work to a small file of its own, at most once a second;
its bars write nothing into the notebook. Elsewhere, as in JupyterLab, the same bars are tqdm's. No
work depends on such a file: it may be missing, torn or old.

Measurements are interleaved, each in a process of its own that does nothing else. A machine's
speed drifts over minutes, by heat and by neighbours. So what is compared is measured in rounds,
one thing after the other, and every round begins one place further on: a drift then falls on all
alike. A process that is given to one measurement holds only what that measurement needs, so that
its peak of memory says something.
"""

import contextlib
import ctypes
import io
import json
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from helpers.core.errors import StudyError, one_line
from helpers.core.files import wait_for_lock

PR_SET_PDEATHSIG = 1


def die_with_parent(parent: int | None = None) -> None:
    """Kill this process as soon as the process that started it ends.

    Args:
        parent: id of that process; None for the current parent.
    """
    parent = parent or os.getppid()
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # the parent ended before prctl took effect
            os._exit(1)
        return

    def poll() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=poll, daemon=True).start()


def begin_child() -> None:
    """Between fork and exec: the new process ends with its parent, and Ctrl-C waits for it.

    An interpreter that Ctrl-C meets while it starts prints a traceback of its own. So the signal
    is blocked, and stays pending, until the program calls `allow_interrupts`.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    die_with_parent()


def allow_interrupts() -> None:
    """Let Ctrl-C through, also one that came while this process started (`begin_child`)."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


def block_interrupts_in_threads() -> None:
    """Threads started from here on leave Ctrl-C to the main thread, and so do their children.

    A child begins with the mask of the thread that starts it, as `begin_child` would set it.
    """
    start = threading.Thread.start

    def start_blocked(thread: threading.Thread) -> None:
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            start(thread)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    threading.Thread.start = start_blocked  # type: ignore[assignment,method-assign]


START, DONE, FAILED, STOPPED, NOTE = "start", "done", "failed", "stopped", "note"
LOST = "lost"  # written by Snakemake for every job that failed
ENDS = (DONE, FAILED, STOPPED, LOST)


def report_event(word: str, label: str, details: str = "") -> None:
    """Print and record an event of a job; `[ 3/18]` replaces `done` where jobs are counted."""
    shared = progress_file()
    if not shared.is_file():
        sys.stderr.write(_lines(word, label, details))  # one write: jobs share the terminal
        return
    with wait_for_lock(shared):
        total, events = read_events(shared)
        status = word
        if word == DONE:
            done = 1 + sum(event["word"] == DONE for event in events)
            status = f"[{done:>{len(total)}}/{total}]"
        text = _lines(status, label, details)
        _append(shared, word, label, text)
        sys.stderr.write(text)


def report_lost_job(label: str) -> None:
    """Record that a job failed, in case the job itself reported nothing."""
    shared = progress_file()
    if shared.is_file():
        with wait_for_lock(shared):
            _append(shared, LOST, label, "")


def progress_file() -> Path:
    """The file that all jobs of a run share; os.devnull outside of `make study`."""
    return Path(os.environ.get("STUDY_PROGRESS") or os.devnull)


def _append(shared: Path, word: str, label: str, text: str) -> None:
    with open(shared, "a", encoding="utf-8") as stream:
        stream.write(json.dumps({"word": word, "label": label, "text": text}) + "\n")


def _lines(status: str, label: str, details: str) -> str:
    first_line, *further_lines = details.split("\n")
    lines = [
        f"{status:<8} {label}  {first_line}".rstrip(),
        *(f"         {line}" for line in further_lines),
    ]
    return "\n".join(lines) + "\n"


def format_duration(seconds: float) -> str:
    """`3 min 07 s`, or `12 s`."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def read_events(shared: Path) -> tuple[str, list[dict]]:
    """(number of jobs, their events so far), without a line that is still being written."""
    total, *lines = shared.read_text(encoding="utf-8").split("\n")
    return total or "0", [json.loads(line) for line in lines[:-1]]


def jobs_without_result(events: list[dict]) -> list[str]:
    """Names of the jobs that started or were lost and reported no result: they were killed."""
    ended = {event_job(event) for event in events if event["word"] in (DONE, FAILED, STOPPED)}
    started = dict.fromkeys(event_job(event) for event in events if event["word"] in (START, LOST))
    return [job for job in started if job not in ended]


def event_job(event: dict) -> str:
    """The name of the job of an event, such as `evaluation base noquant`."""
    return " ".join(event["label"].split())


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


def interleaved_order(names: Sequence[str], rounds: int) -> list[str]:
    """The order of measurements: every name once a round, each round starting one name later."""
    order = list(names)
    starts = [r % len(order) for r in range(rounds)]
    return [name for start in starts for name in order[start:] + order[:start]]


def interleaved_rounds(
    tasks: dict[str, Callable[[], dict]], *, rounds: int, preload: Sequence[str] = ()
) -> dict[str, list[dict]]:
    """The results of each task, round by round.

    Args:
        tasks: by name; each task and its result can be pickled.
        rounds: how often each is run.
        preload: modules that are imported once, before the processes are forked.

    Raises:
        StudyError: a process died.
    """
    results: dict[str, list[dict]] = {name: [] for name in tasks}
    order = Bar(interleaved_order(list(tasks), rounds), desc="measuring", unit="measurement")
    for name in order:
        results[name].append(_run_in_own_process(name, tasks[name], preload))
    return results


def _run_in_own_process(name: str, task: Callable[[], dict], preload: Sequence[str]) -> dict:
    try:
        options = {"mp_context": _context(preload), "initializer": _end_with_all}
        with ProcessPoolExecutor(1, **options) as process:
            return process.submit(task).result()
    except BrokenProcessPool:
        raise StudyError(
            f"{name}: the process that measured it died; most often memory ran out"
        ) from None


def _end_with_all() -> None:
    """End this process with the fork server, which ends with the process that started it."""
    die_with_parent()
    asking = multiprocessing.parent_process()
    if (
        asking is not None and not asking.is_alive()
    ):  # the parent ended before die_with_parent took effect
        os._exit(1)


def _context(preload: Sequence[str]):
    """Processes forked from a server that has imported the modules; spawned without fork."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    os.environ["STUDY_MEASURING_PARENT"] = str(os.getpid())
    context.set_forkserver_preload(["helpers.core.parent_process_preload", *preload])
    return context
