"""Which jobs of a study run side by side, and when the last of them ends.

The engine's own order, played through: a job begins when all it reads is there, and cores and
memory are free.
"""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from helpers.study import stages
from helpers.study.schema import Study
from helpers.study.stages import Run
from helpers.workflow.gpus import may_take_gpu


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
        if run.stage in ("finetuning", "calibration", "quantization"):
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
