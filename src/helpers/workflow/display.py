"""Duration estimate of a study before it runs, and its terminal display while it runs.

Other processes count (`helpers.cost.operations`, `helpers.evaluation.stage`) and measure, since
that needs torch; here it becomes seconds a job, and a plan of which jobs run side by side. The
plan plays the engine's own order through: a job begins when all it reads is there, and cores and
memory are free. Whether a job may take a GPU is decided here too: the engine has to know before
any job runs. An estimate that cannot be made stops nothing.

The display changes every second where the terminal can draw over itself; where it cannot (a log
file, CI, a cluster), it prints a line every half minute. It shows names and words only, no text of
a model or of an item, and makes what it shows harmless first.
"""

import json
import platform
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Protocol

from helpers.core import processes
from helpers.core.errors import StudyError, one_line, printable
from helpers.core.files import PROJECT, StudyPaths
from helpers.core.processes import Activity, begin_child
from helpers.study import stages
from helpers.study.loading import load_study
from helpers.study.schema import Study
from helpers.study.stages import Run
from helpers.workflow import fork_server

DRIVERS = ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")  # NVIDIA, AMD, and either under WSL


def may_take_gpu(device: str) -> bool:
    """Whether jobs with this `runtime.device` may take a GPU of this machine.

    Looks for a driver instead of importing a library, which takes seconds. If torch cannot use
    the driver, jobs run one by one although they could run side by side.
    """
    if device != "auto":
        return device != "cpu"
    apple = platform.system() == "Darwin" and platform.machine() == "arm64"
    return apple or any(Path(driver).exists() for driver in DRIVERS)


@dataclass(frozen=True)
class Capacity:
    """The shared resources: cores, and places for jobs by memory or a single GPU."""

    cores: int
    places: int


def concurrent_jobs(study: Study, room: Capacity) -> int:
    """The number of jobs of a study that run at once."""
    return max(1, min(room.places, room.cores // min(study.runtime.threads, room.cores)))


def makespan_s(
    study: Study, seconds: Mapping[Run, float], room: Capacity, *, started: Collection[Run] = ()
) -> float:
    """Seconds until the last job ends, with jobs started in Snakemake's order.

    Args:
        seconds: duration of each run, or its remaining time.
        started: the runs that are running already.
    """
    ended: set[Run] = set()
    waiting = sorted(_by_priority(study, seconds), key=lambda run: run not in started)
    running: dict[Run, float] = {}
    now = 0.0
    while waiting or running:
        for run in list(waiting):
            if _may_begin(study, run, ended, seconds) and _fits(study, [*running, run], room):
                waiting.remove(run)
                running[run] = now + seconds[run]
        run = min(running, key=running.__getitem__)
        now = running.pop(run)
        ended.add(run)
    return now


def _by_priority(study: Study, runs: Iterable[Run]) -> list[Run]:
    """The runs in Snakemake's order: first those that others wait for."""

    def rank(run: Run) -> int:
        if run.stage in ("finetuning", "rotation", "calibration", "quantization"):
            return 0
        return 1 if run.stage == "evaluation" and run.variant == study.baseline else 2

    return sorted(runs, key=rank)


def _may_begin(study: Study, run: Run, ended: set[Run], scheduled: Collection[Run]) -> bool:
    return all(
        upstream in ended or upstream not in scheduled
        for upstream in stages.upstream_runs(study, run)
    )


def _fits(study: Study, runs: list[Run], room: Capacity) -> bool:
    """Whether the runs fit at once; a single run always does."""
    threads = min(study.runtime.threads, room.cores)
    cores = sum({"cost": room.cores, "analysis": 1}.get(run.stage, threads) for run in runs)
    return len(runs) == 1 or (cores <= room.cores and len(runs) <= room.places)


def machine_capacity(study: Study, *, cores: int, job_mb: int, memory_mb: int) -> Capacity:
    """The capacity of this machine for the jobs of a study."""
    places = max(1, memory_mb // max(1, job_mb))
    return Capacity(max(1, cores), 1 if may_take_gpu(study.runtime.device) else places)


ANALYSIS = Run("analysis")
COUNTERS = ("helpers.cost.operations", "helpers.evaluation.stage")
TIMEOUT_S = 300  # of one counting or measuring process
LONG_S = 3600  # longer estimates come with advice on shortening the study
# Time of attention, norms and activations, relative to the same Linears in float32. Generation
# attends to the whole prefix, one token at a time.
OVERHEADS = {"reading": 0.7, "writing": 0.9}
# The other costs of a job (runner, kernel, loading and checking a model, tables, pictures), in
# multiples of the start-up of a process that imports torch.
STARTS = {"quantization": 2.8, "analysis": 2.8}
STARTS_OF_OTHERS = 2.3
MEASUREMENT = 0.4  # of a start-up: a fork of a process that has imported all packages
# If jobs are forks of a process that has imported the packages, only the import of this project's
# modules is measured; a start-up counts as this many times that.
FORKED_START = 10


@dataclass(frozen=True)
class Machine:
    """The speed of this machine for one job while others run beside it.

    Attributes:
        speeds: operations (or weights touched) per second by kind of work.
        start_s: processor seconds for the imports of a job.
    """

    speeds: Mapping[str, float]
    start_s: float


@dataclass(frozen=True)
class Estimate:
    """The estimated seconds of every job that would run.

    Attributes:
        seconds: by run, the analysis included.
        about: notes on operations that could not be counted.
    """

    study: Study
    room: Capacity
    seconds: Mapping[Run, float]
    about: tuple[str, ...] = ()

    @property
    def whole_s(self) -> float:
        """Seconds until the last job ends, with jobs side by side."""
        return makespan_s(self.study, self.seconds, self.room)


def runs_to_execute(study: Study, paths: StudyPaths) -> list[Run]:
    """The runs that are not current, the analysis last; empty if all are current."""
    current = stages.completed_runs(study, paths)
    runs = [run for run in stages.runs(study) if run not in current]
    return [*runs, ANALYSIS] if runs or not stages.is_current(study, paths, ANALYSIS) else []


def print_estimate(study_name: str, paths: StudyPaths, **limits: int) -> Estimate | None:
    """Print the estimate to stderr; None if nothing would run or the estimate fails.

    Args:
        limits: cores and memory of this run, as `schedule.machine_capacity` takes them.
    """
    try:
        study = load_study(study_name)  # again: fetching has pinned its sources
        result = estimate(study_name, study, paths, machine_capacity(study, **limits), say=_say)
        for line in estimate_lines(result) if result else ():
            _say(line)
    except Exception as error:  # of any kind: the study runs without an estimate
        _say(f"none: {one_line(error)}")
        return None
    return result


def _say(line: str) -> None:
    print(f"estimate {line}", file=sys.stderr, flush=True)


def estimate(
    study_name: str, study: Study, paths: StudyPaths, room: Capacity, *, say: Callable[[str], None]
) -> Estimate | None:
    """Count operations and measure speeds; None if nothing would run.

    Args:
        say: prints a line before each step, since both take seconds.

    Raises:
        StudyError: counting or measuring fails.
    """
    if not (runs := runs_to_execute(study, paths)):
        return None
    say("counting the operations of the study")
    counters_output = _json_outputs([[name, study_name] for name in COUNTERS])
    jobs: dict[str, dict] = {}
    uncounted: dict[str, str] = {}
    for counts in counters_output:
        jobs |= counts["jobs"]
        uncounted |= counts["uncounted"]
    shapes = json.dumps(counters_output[0]["shapes"])
    concurrent = max(1, min(len(runs), concurrent_jobs(study, room)))
    say(f"measuring this machine with {_count(concurrent, 'job')} side by side")
    measured = _json_outputs([["helpers.cost.operations", study_name, shapes]] * concurrent)
    machine = _mean_machine(measured)
    seconds = {run: job_seconds(study, run, jobs.get(run.name, {}), machine, room) for run in runs}
    notes = tuple(one_line(f"{name}: {why}") for name, why in uncounted.items())
    return Estimate(study, room, seconds, notes)


def _json_outputs(commands: list[list[str]]) -> list[dict]:
    """The JSON that each command prints; the commands run side by side."""
    command_prefix = [sys.executable, "-m", "helpers.workflow.cli", "answer"]
    processes = [
        subprocess.Popen(
            [*command_prefix, *command],
            cwd=PROJECT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            encoding="utf-8",
            preexec_fn=begin_child,
        )
        for command in commands
    ]
    try:
        outputs = [process.communicate(timeout=TIMEOUT_S) for process in processes]
        return [json.loads(out.splitlines()[-1]) for out, _ in outputs]
    except subprocess.TimeoutExpired:
        raise StudyError(f"counting takes more than {TIMEOUT_S} s") from None
    except (IndexError, ValueError):
        error_lines = [line for _, err in outputs for line in err.splitlines()[-1:]]
        raise StudyError(one_line(error_lines[0] if error_lines else "no reason given")) from None
    finally:
        for process in processes:
            process.kill()


def _mean_machine(measured: list[dict]) -> Machine:
    kinds = set.intersection(*(set(run["speeds"]) for run in measured))
    count = len(measured)
    speeds = {kind: sum(run["speeds"][kind] for run in measured) / count for kind in kinds}
    start_s = sum(run["import_s"] for run in measured) / count
    return Machine(speeds, start_s * (FORKED_START if fork_server.is_running() else 1))


def job_seconds(
    study: Study, run: Run, counted: Mapping[str, int], machine: Machine, room: Capacity
) -> float:
    """Seconds of one job: its start, and its operations at the speeds measured.

    The cost stage measures on all cores, in a process of its own for each measurement.
    """
    starts = STARTS.get(run.stage, STARTS_OF_OTHERS)
    computing = sum(_seconds(kind, number, machine) for kind, number in counted.items())
    if run.stage == "cost":
        quantized = sum(recipe.quantized for recipe in study.variants.values())
        starts += MEASUREMENT * 3 * (quantized + 3)
        computing /= concurrent_jobs(study, room)
    return machine.start_s * starts + computing


def _seconds(kind: str, number: int, machine: Machine) -> float:
    arithmetic, _, phase = kind.partition(" ")
    float_speed = machine.speeds.get(f"float32 {phase}", 0)
    speed = machine.speeds.get(kind) or float_speed
    if arithmetic == "bfloat16":  # without bfloat16 units the operands are multiplied in float32
        speed = max(speed, float_speed)
    if not speed:
        return 0.0
    return number / speed + (
        number * OVERHEADS[phase] / float_speed if phase in OVERHEADS and float_speed else 0.0
    )


def estimate_lines(estimate: Estimate) -> list[str]:
    """One line per stage, one for the whole study, and advice on shortening a long one."""
    shown_stages = [
        stage for stage in stages.NOTEBOOKS if any(r.stage == stage for r in estimate.seconds)
    ]
    lines = [_stage_line(estimate, stage) for stage in shown_stages]
    lines.append(
        f"about {rough_duration(estimate.whole_s)} in all on {_count(estimate.room.cores, 'core')}"
    )
    lines += [f"not counted: {note}" for note in estimate.about]
    if estimate.whole_s > LONG_S:
        lines.append(f"to shorten it: {'; '.join(shortening_advice(estimate))}")
    return lines


def _stage_line(estimate: Estimate, stage: str) -> str:
    seconds = [s for run, s in estimate.seconds.items() if run.stage == stage]
    longest = f", {rough_duration(max(seconds))} the longest" if len(seconds) > 1 else ""
    jobs = _count(len(seconds), "job")
    return f"{stage:<12}  {jobs:<8}  about {rough_duration(sum(seconds))}{longest}"


def shortening_advice(estimate: Estimate) -> list[str]:
    """The stages that take most of the time, largest first, each with a way to shorten it."""
    remedies: dict[str, Callable[[], str]] = {
        "evaluation": lambda: "fewer items, shorter max_new_tokens or fewer variants",
        "finetuning": lambda: "fewer training items, or a model that is trained already",
        "rotation": lambda: "a model without rotations",
        "quantization": lambda: "fewer variants, or one α in place of a list",
        "calibration": lambda: "fewer calibration items",
        "cost": lambda: "fewer quantized variants",
        "analysis": lambda: "fewer resamples",
    }
    by_stage = {s: sum(t for r, t in estimate.seconds.items() if r.stage == s) for s in remedies}
    largest = sorted(by_stage, key=lambda stage: -by_stage[stage])[:2]
    total = sum(by_stage.values())
    advice = [
        f"{stage} is {100 * by_stage[stage] / total:.0f} % of the work ({remedies[stage]()})"
        for stage in largest
        if by_stage[stage] > total / 10
    ]
    return [*advice, "a machine with more cores, a GPU or int8 units (docs/scaling.md)"]


def rough_duration(seconds: float) -> str:
    """`2 h 10 min`, `12 min` or `40 s`: an estimate has no more digits."""
    if seconds >= 3600:
        minutes = round(seconds / 60)
        return f"{minutes // 60} h {minutes % 60:02d} min"
    if seconds >= 90:
        return f"{round(seconds / 60)} min"
    return f"{max(1, round(seconds))} s"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


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
    return run.label


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
