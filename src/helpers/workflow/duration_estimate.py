"""How long a study will take here, said before it runs: operations counted, speeds measured.

Other processes count (`quantization_operations`, `evaluation_operations`) and measure
(`helpers.cost.linear_speed`), since that needs torch; here it becomes seconds a job, and a plan of
which jobs run side by side. An estimate that cannot be made stops nothing.
"""

import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from helpers.core.errors import StudyError
from helpers.core.parent_process import die_with_parent
from helpers.core.paths import PROJECT, StudyPaths
from helpers.core.plain_text import one_line
from helpers.study import fingerprints, stages
from helpers.study.loading import load_study
from helpers.study.schema import Study
from helpers.study.stages import Run
from helpers.workflow import fork_client
from helpers.workflow.schedule import Capacity, concurrent_jobs, machine_capacity, makespan_s

ANALYSIS = Run("analysis")
COUNTERS = ("helpers.cost.quantization_operations", "helpers.evaluation.evaluation_operations")
TIMEOUT_S = 300  # for counting or measuring
LONG_S = 3600  # from here on it is said what would shorten a study
# Attention, norms and activations, by the time of the same Linears in float32; answers being
# written look back at all they continue, one token at a time.
OVERHEADS = {"reading": 0.7, "writing": 0.9}
# What a job takes besides, in start-ups of a process that imports torch: the runner, the kernel,
# loading and checking a model, tables and pictures.
STARTS = {"quantization": 2.8, "analysis": 2.8}
STARTS_OF_OTHERS = 2.3
MEASUREMENT = 0.4  # of a start-up: a process forked off one that has imported all
# Where jobs are forks of a process that has imported the packages, what is measured is the import
# of a few modules of this project; so many times that is what stands for a start-up.
FORKED_START = 10


@dataclass(frozen=True)
class Machine:
    """What one job has of this machine while others run beside it.

    Attributes:
        speeds: operations (or weights touched) per second by kind of work.
        start_s: processor seconds that importing takes what jobs import.
    """

    speeds: Mapping[str, float]
    start_s: float


@dataclass(frozen=True)
class Estimate:
    """Seconds of every job that would run, by run.

    Attributes:
        seconds: of the analysis too.
        about: words on what could not be counted; empty if all was.
    """

    study: Study
    room: Capacity
    seconds: Mapping[Run, float]
    about: tuple[str, ...] = ()

    @property
    def whole_s(self) -> float:
        """Seconds of all jobs, side by side as they will run."""
        return makespan_s(self.study, self.seconds, self.room)


def runs_to_execute(study: Study, paths: StudyPaths) -> list[Run]:
    """The jobs that are not current, the analysis last; none if all is current."""
    current = fingerprints.completed_runs(study, paths)
    runs = [run for run in stages.runs(study) if run not in current]
    return [*runs, ANALYSIS] if runs or not fingerprints.is_current(study, paths, ANALYSIS) else []


def print_estimate(study_name: str, paths: StudyPaths, **limits: int) -> Estimate | None:
    """The estimate, told on stderr; None where nothing would run, or none can be made.

    Args:
        limits: of this run, as `schedule.machine_capacity` takes them.
    """
    try:
        study = load_study(study_name)  # again: what was fetched is pinned now
        found = estimate(study_name, study, paths, machine_capacity(study, **limits), say=_say)
        for line in estimate_lines(found) if found else ():
            _say(line)
    except Exception as error:  # whatever it is, the study can be run without
        _say(f"none: {one_line(error)}")
        return None
    return found


def _say(line: str) -> None:
    print(f"estimate {line}", file=sys.stderr, flush=True)


def estimate(
    study_name: str, study: Study, paths: StudyPaths, room: Capacity, *, say: Callable[[str], None]
) -> Estimate | None:
    """Count and measure; None if nothing would run.

    Args:
        say: is told what begins, since both take seconds.

    Raises:
        StudyError: it cannot be counted or measured.
    """
    if not (runs := runs_to_execute(study, paths)):
        return None
    say("counting the operations of the study")
    counted = _json_outputs([[name, study_name] for name in COUNTERS])
    jobs: dict[str, dict] = {}
    about: dict[str, str] = {}
    for found in counted:
        jobs |= found["jobs"]
        about |= found["uncounted"]
    shapes = json.dumps(counted[0]["shapes"])
    beside = max(1, min(len(runs), concurrent_jobs(study, room)))
    say(f"measuring this machine with {_count(beside, 'job')} side by side")
    measured = _json_outputs([["helpers.cost.linear_speed", study_name, shapes]] * beside)
    machine = _mean_machine(measured)
    seconds = {run: job_seconds(study, run, jobs.get(run.name, {}), machine, room) for run in runs}
    words = tuple(one_line(f"{name}: {why}") for name, why in about.items())
    return Estimate(study, room, seconds, words)


def _json_outputs(commands: list[list[str]]) -> list[dict]:
    """What some modules print as JSON, run side by side."""
    answer = [sys.executable, "-m", "helpers.workflow.cli", "answer"]
    processes = [
        subprocess.Popen(
            [*answer, *command],
            cwd=PROJECT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            encoding="utf-8",
            preexec_fn=die_with_parent,
        )
        for command in commands
    ]
    try:
        said = [process.communicate(timeout=TIMEOUT_S) for process in processes]
        return [json.loads(out.splitlines()[-1]) for out, _ in said]
    except subprocess.TimeoutExpired:
        raise StudyError(f"counting takes more than {TIMEOUT_S} s") from None
    except (IndexError, ValueError):
        last = [line for _, err in said for line in err.splitlines()[-1:]]
        raise StudyError(one_line(last[0] if last else "no reason given")) from None
    finally:
        for process in processes:
            process.kill()


def _mean_machine(measured: list[dict]) -> Machine:
    kinds = set.intersection(*(set(found["speeds"]) for found in measured))
    count = len(measured)
    speeds = {kind: sum(found["speeds"][kind] for found in measured) / count for kind in kinds}
    start_s = sum(found["import_s"] for found in measured) / count
    return Machine(speeds, start_s * (FORKED_START if fork_client.is_running() else 1))


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
    arithmetic, _, how = kind.partition(" ")
    plain = machine.speeds.get(f"float32 {how}", 0)
    speed = machine.speeds.get(kind) or plain
    if arithmetic == "bfloat16":  # where there are no units for it, float32 takes its place
        speed = max(speed, plain)
    if not speed:
        return 0.0
    return number / speed + (number * OVERHEADS[how] / plain if how in OVERHEADS and plain else 0.0)


def estimate_lines(found: Estimate) -> list[str]:
    """A line a stage, one on the whole, and what would shorten a long study."""
    shown = [stage for stage in stages.NOTEBOOKS if any(r.stage == stage for r in found.seconds)]
    told = [_stage_line(found, stage) for stage in shown]
    told.append(
        f"about {rough_duration(found.whole_s)} in all on {_count(found.room.cores, 'core')}"
    )
    told += [f"not counted: {words}" for words in found.about]
    if found.whole_s > LONG_S:
        told.append(f"to shorten it: {'; '.join(shortening_advice(found))}")
    return told


def _stage_line(found: Estimate, stage: str) -> str:
    seconds = [s for run, s in found.seconds.items() if run.stage == stage]
    each = f", {rough_duration(max(seconds))} the longest" if len(seconds) > 1 else ""
    return (
        f"{stage:<12}  {_count(len(seconds), 'job'):<8}  about {rough_duration(sum(seconds))}{each}"
    )


def shortening_advice(found: Estimate) -> list[str]:
    """What takes most of the time, and what makes it less, the largest first."""
    remedies: dict[str, Callable[[], str]] = {
        "evaluation": lambda: "fewer items, shorter max_new_tokens or fewer variants",
        "finetuning": lambda: "fewer training items, or a model that is trained already",
        "quantization": lambda: "fewer variants, or one α in place of a list",
        "calibration": lambda: "fewer calibration items",
        "cost": lambda: "fewer quantized variants",
        "analysis": lambda: "fewer resamples",
    }
    by_stage = {s: sum(t for r, t in found.seconds.items() if r.stage == s) for s in remedies}
    largest = sorted(by_stage, key=lambda stage: -by_stage[stage])[:2]
    total = sum(by_stage.values())
    words = [
        f"{stage} is {100 * by_stage[stage] / total:.0f} % of the work ({remedies[stage]()})"
        for stage in largest
        if by_stage[stage] > total / 10
    ]
    return [*words, "a machine with more cores, a GPU or int8 units (docs/scaling.md)"]


def rough_duration(seconds: float) -> str:
    """`2 h 10 min`, `12 min` or `40 s`: no more digits than an estimate has."""
    if seconds >= 3600:
        minutes = round(seconds / 60)
        return f"{minutes // 60} h {minutes % 60:02d} min"
    if seconds >= 90:
        return f"{round(seconds / 60)} min"
    return f"{max(1, round(seconds))} s"


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"
