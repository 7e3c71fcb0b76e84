"""Terminal display of a running study: current jobs, progress, remaining time.

A display that changes every second where the terminal can draw over itself; where it cannot
(a log file, CI, a cluster), a line every half minute. Names and words only: no text of a model
or of an item comes here, and what does come is made harmless first.
"""

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Protocol

from helpers.core import processes
from helpers.core.errors import one_line, printable
from helpers.core.processes import Activity
from helpers.study.stages import Run
from helpers.workflow.duration_estimate import Estimate, makespan_s, rough_duration

EVERY_S = 25.0  # between two plain lines: a reader waits less than 30 seconds
LEAST_REMAINING = 0.1  # of a running job's estimate


@dataclass(frozen=True)
class RunningJob:
    """A running job: its name, its time so far, and its activity."""

    name: str
    elapsed_s: float
    activity: Activity | None


@dataclass(frozen=True)
class Status:
    """The progress of a run of a study; `left_s` is None if there is no estimate."""

    done: int
    total: str
    elapsed_s: float
    left_s: float | None
    running: list[RunningJob]


@dataclass
class Watch:
    """Follows a run by its progress file and the activity files of its jobs.

    Args:
        shared: the progress file that all jobs share.
        estimate: seconds of each job; None without an estimate.
        clock: a monotonic clock in seconds.
    """

    shared: Path
    estimate: Estimate | None
    clock: Callable[[], float] = time.monotonic
    _begun: dict[str, float] = field(default_factory=dict)
    _took: dict[str, float] = field(default_factory=dict)

    def __post_init__(self):
        self._started = self.clock()

    def status(self) -> Status:
        """The progress now."""
        (total, events), now = processes.read_events(self.shared), self.clock()
        ended = {processes.event_job(e): e["word"] for e in events if e["word"] in processes.ENDS}
        for event in events:
            if event["word"] == processes.START:
                self._begun.setdefault(processes.event_job(event), now)
        for job, word in ended.items():
            if word == processes.DONE and job in self._begun:
                self._took.setdefault(job, now - self._begun[job])
        folder = processes.activity_folder(self.shared)
        running = [
            RunningJob(
                one_line(job), now - started, processes.read_activity(folder / f"{job}.json")
            )
            for job, started in self._begun.items()
            if job not in ended
        ]
        done = sum(word == processes.DONE for word in ended.values())
        left_s = self._left(set(ended), running) if self.estimate else None
        return Status(done, total, now - self._started, left_s, running)

    def _left(self, ended: set[str], running: list[RunningJob]) -> float:
        """Remaining seconds: the estimates, scaled by the jobs' actual times so far."""
        estimates = {job_name(run): (run, s) for run, s in self.estimate.seconds.items()}
        pairs = [
            (actual, estimates[job][1]) for job, actual in self._took.items() if job in estimates
        ]
        overdue = [(d.elapsed_s, estimates[d.name][1]) for d in running if d.name in estimates]
        pairs += [(elapsed, expected) for elapsed, expected in overdue if elapsed > expected]
        expected = sum(expected for _, expected in pairs)
        scale = sum(actual for actual, _ in pairs) / expected if expected else 1.0
        rest = {run: s * scale for job, (run, s) in estimates.items() if job not in ended}
        started = []
        for job in running:
            if job.name in estimates:
                run, whole = estimates[job.name][0], estimates[job.name][1] * scale
                reported = job.activity.left_s if job.activity else None
                rest[run] = max(whole - job.elapsed_s, LEAST_REMAINING * whole, reported or 0.0)
                started.append(run)
        return makespan_s(self.estimate.study, rest, self.estimate.room, started=started)


def job_name(run: Run) -> str:
    """The name of a run's job in messages."""
    return " ".join(filter(None, (run.stage, run.model, run.variant)))


def describe_job(job: RunningJob) -> str:
    """A job's task, its progress and the time left for it."""
    if job.activity is None:
        return "starting" if job.elapsed_s < EVERY_S else "at work"
    left = job.activity.left_s
    return f"{job.activity}" + (f", {rough_duration(left)} left" if left else "")


def describe_status(status: Status) -> str:
    """The progress of the whole study."""
    left = "" if status.left_s is None else f", about {rough_duration(status.left_s)} left"
    return f"{status.done} of {status.total} done after {rough_duration(status.elapsed_s)}{left}"


class Screen(Protocol):
    """An output that shows the progress of a run."""

    def show(self, text: str) -> None:
        """Print lines of jobs, which stay."""

    def update(self, status: Status) -> None:
        """Show the current progress."""


class Lines:
    """Plain lines, for a file or a terminal that cannot overwrite lines."""

    def __init__(self, stream: IO[str], clock: Callable[[], float] = time.monotonic):
        self.stream, self.clock, self.last = stream, clock, clock()

    def show(self, text: str) -> None:
        self.stream.write(text)

    def update(self, status: Status) -> None:
        if self.clock() - self.last < EVERY_S:
            return
        self.last = self.clock()
        jobs = "; ".join(f"{job.name}: {describe_job(job)}" for job in status.running)
        self.stream.write(f"running  {describe_status(status)}{': ' if jobs else ''}{jobs}\n")
        self.stream.flush()


class Table:
    """A table of the running jobs below the lines, redrawn every second."""

    def __init__(self, live):
        self.live = live

    def show(self, text: str) -> None:
        from rich.text import Text

        for line in text.splitlines():
            self.live.console.print(Text(printable(line, keep="\t")), soft_wrap=True)

    def update(self, status: Status) -> None:
        self.live.update(render_status(status), refresh=True)


def render_status(status: Status):
    """The status as a rich renderable; its text is never parsed as markup."""
    from rich.console import Group
    from rich.progress_bar import ProgressBar
    from rich.table import Table as Columns
    from rich.text import Text

    columns = Columns.grid(padding=(0, 2))
    for job in status.running:
        activity = job.activity
        is_counted = activity is not None and activity.of
        bar = (
            ProgressBar(total=activity.of, completed=activity.done, width=20) if is_counted else ""
        )
        columns.add_row(Text(job.name), bar, Text(describe_job(job)))
    return Group(columns, Text(describe_status(status), style="bold"))


@contextmanager
def screen(*, can_draw_over: bool) -> Iterator[Screen]:
    """Inside the context, the output for this run: a table if the terminal can, else lines."""
    if not can_draw_over:
        yield Lines(sys.stderr)
        return
    from rich.console import Console
    from rich.live import Live

    with Live(
        console=Console(stderr=True),
        auto_refresh=False,
        transient=True,
        redirect_stdout=False,
        redirect_stderr=False,
    ) as live:
        yield Table(live)


def can_draw() -> bool:
    """Whether stderr is a terminal that can overwrite lines."""
    if not sys.stderr.isatty():
        return False
    from rich.console import Console

    return not Console(stderr=True).is_dumb_terminal


def forward_lines(stream: IO[str], show: Callable[[str], None]) -> threading.Thread:
    """Start a thread that shows each line of a stream until its end."""

    def copy() -> None:
        for line in stream:
            show(line)

    thread = threading.Thread(target=copy, daemon=True)
    thread.start()
    return thread
