"""A stage of a study while its notebook runs: its job, its source model and its record.

A notebook opens its stage in its first cell and finishes it in its last. Opening removes the record
of an earlier run, and only `finish` writes one: a stage that fails in between leaves none.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from helpers.core.records import Record, sha256_folder, write_json
from helpers.runtime.devices import prepare
from helpers.sources.models import load_model, load_tokenizer, model_folder
from helpers.study import stages
from helpers.study.loading import Job, open_job
from helpers.study.schema import Runtime, Study, Variant

Count = Callable[..., dict[str, int]]  # (job, tokenizer, stage=…) to operations by arithmetic


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One stage of one model, and of one variant where the stage has one.

    Attributes:
        job: the study, its paths, model and variant, the runtime settled on this machine.
        record: what the stage reads and computes with, until `finish` writes it.
        tokenizer: the model's.
    """

    job: Job
    record: Record
    tokenizer: Any

    @property
    def study(self) -> Study:
        return self.job.study

    @property
    def recipe(self) -> Variant:
        """What the study file says of the variant."""
        return self.job.recipe

    @property
    def folder(self) -> Path:
        """Where the stage writes what the next stages read."""
        return self.record.folder

    @property
    def checkpoint(self) -> Path:
        """Folder of the variant's checkpoint."""
        return self.job.paths.checkpoint(self.job.model, self.job.variant)

    def write_json(self, name: str, data: Any) -> None:
        """Write a JSON file of that name into the stage's folder."""
        write_json(self.folder / name, data)

    def finish(self, **results: Any) -> None:
        """Write the record with these results: the stage has succeeded."""
        self.record.write(results)
        print(f"written: {self.folder.relative_to(self.job.paths.root)}/")


@dataclass(frozen=True, kw_only=True)
class FloatStage(Stage):
    """A stage that works on a float model: fine-tuning, calibration or quantization.

    Attributes:
        source: folder of the model that the stage starts from.
    """

    source: Path

    def load_model(self, runtime: Runtime | None = None):
        """The model that the stage starts from, on the study's runtime or another."""
        return load_model(self.source, runtime or self.study.runtime)


def begin_record(stage: str, job: Job) -> Record:
    """The record of a stage that begins; that of an earlier run is removed.

    Raises:
        StudyError: another process runs the stage.
    """
    path = stages.run_of(job, stage).record(job.paths)
    return Record(path.parent, stage=stage, parameters=job.parameters)


def open_stage(
    stage: str,
    study: str | Path,
    *,
    model: str,
    variant: str = "",
    draw: int | str = 1,
    calibration: str = "",
    count: Count,
    starts_from: Callable[[Study, str], str] | None = None,
) -> FloatStage:
    """Open a stage that works on a float model: fine-tuning, calibration or quantization.

    Its record names the model's files and the operations that the stage will compute.

    Args:
        stage: a key of `helpers.study.stages.NOTEBOOKS`.
        study: a study's name in params/, or the path of its YAML file.
        draw: of the variant's checkpoint, or of the calibration.
        calibration: one of the study's `calibrations`, where there is no variant.
        count: the operations of the stage, by arithmetic.
        starts_from: which model of the study is loaded; without it, `model` itself.

    Raises:
        StudyError: the study file is wrong, the model is not on this machine, or another
            process runs the stage.
    """
    job = open_job(study, model=model, variant=variant, draw=draw, calibration=calibration)
    job = prepare(job)
    record = begin_record(stage, job)
    start = starts_from(job.study, model) if starts_from else model
    source = model_folder(job.study, start, job.paths)
    record.add_input("source_model" if starts_from else "model", sha256_folder(source))
    tokenizer = load_tokenizer(source, enable_thinking=job.study.enable_thinking)
    record.add_operations(count(job, tokenizer, stage=stage))
    return FloatStage(job=job, record=record, tokenizer=tokenizer, source=source)
