"""The stage that measures what every variant of a model costs, from its opening to its record."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from helpers.core.interleaved_processes import interleaved_rounds
from helpers.cost import configurations, gemm_peak, throughput
from helpers.runtime.devices import prepare
from helpers.sources.models import load_tokenizer, model_folder
from helpers.sources.stage import Stage, begin_record
from helpers.study.study_run import Job, open_job


@dataclass(frozen=True, kw_only=True)
class CostStage(Stage):
    """The cost of one model in all the ways it can run.

    Attributes:
        ways: by name, the baseline in both floats and the quantized variants.
        work: what every way reads and writes.
    """

    ways: dict[str, configurations.Configuration]
    work: throughput.Workload

    def measure(self) -> dict:
        """Every way in turns, each in processes of its own, beside the bare matrix product.

        Returns:
            The account of `helpers.cost.configurations`.

        Raises:
            StudyError: a process died.
        """
        rounds = interleaved_rounds(
            self._tasks(),
            rounds=throughput.ROUNDS,
            preload=configurations.modules_to_preload(self.job),
        )
        return configurations.cost_report(
            self.job, self.ways, rounds, throughput.workload_sizes(self.work)
        )

    def _tasks(self) -> dict[str, Callable[[], dict]]:
        """One round of each way by its name, and of the matrix product."""
        threads = self.study.runtime.threads
        measure = partial(throughput.measure, work=self.work, threads=threads)
        peaks = partial(
            gemm_peak.gemm_peaks,
            configurations.linear_shapes(self.job),
            threads=threads,
            rows=self.work.row_tokens,
            device=self.study.runtime.device,
        )
        tasks = {name: partial(measure, way.load) for name, way in self.ways.items()}
        return tasks | {configurations.PEAKS: peaks}


def open_cost(
    study: str | Path, *, model: str, count: Callable[[Job], dict[str, int]]
) -> CostStage:
    """Open the stage on all cores; its record names the files of every variant.

    Args:
        study: a study's name in params/, or the path of its YAML file.
        count: the operations of the stage, by arithmetic.

    Raises:
        StudyError: the study file is wrong, a checkpoint is missing or damaged, or another
            process runs the stage.
    """
    job = prepare(configurations.all_cores(open_job(study, model=model)))
    record = begin_record("cost", job)
    record.inputs.update(configurations.variant_digests(job))
    folder = model_folder(job.study, model, job.paths)
    tokenizer = load_tokenizer(folder, enable_thinking=job.study.enable_thinking)
    record.add_operations(count(job))
    return CostStage(
        job=job,
        record=record,
        tokenizer=tokenizer,
        ways=configurations.measured_configurations(job),
        work=throughput.workload(job.study, tokenizer),
    )
