"""The largest part of a study that is whole, for a report when not all of it is complete.

A report compares every variant with the baseline on every model, so the part is a
rectangle: some models, some variants, the baseline among them, and all of their runs
complete. What is left out is named. Declared comparisons that lack a side get no verdict
and stay counted, so that a missing result never eases the test of another.
"""

from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path

from helpers.core.errors import StudyError
from helpers.core.paths import StudyPaths
from helpers.study import fingerprints, stages
from helpers.study.schema import Study
from helpers.study.schema_sources import FineTunedModel
from helpers.study.stages import Run
from helpers.study.study_run import Job


@dataclass(frozen=True)
class Part:
    """A part of a study, or all of it.

    Attributes:
        study: the study with the models and variants of this part.
        runs: the part's completed runs; only measurements of cost may be missing.
        missing: names of the runs that are incomplete or left out.
    """

    study: Study
    runs: tuple[Run, ...]
    missing: tuple[str, ...] = ()

    def of(self, job: Job) -> Job:
        """The job with this part as its study."""
        return replace(job, study=self.study)


def report_folder(paths: StudyPaths, *, partial: str) -> Path:
    """The folder of the report; a partial report never replaces a whole one."""
    return paths.root / "partial" if partial == "yes" else paths.root


def part_to_report(job: Job, *, partial: str) -> Part:
    """The part of a job's study that the report shows.

    Args:
        partial: `yes` for the completed part, `no` for the whole study.

    Raises:
        StudyError: no part is complete yet.
    """
    if partial not in ("yes", "no"):
        raise StudyError(f"partial = {partial!r} is neither yes nor no; give one of them")
    if partial == "no":
        return Part(job.study, tuple(stages.runs(job.study)))
    return largest_complete_part(job.study, fingerprints.completed_runs(job.study, job.paths))


def largest_complete_part(study: Study, completed: Collection[Run]) -> Part:
    """The largest part of the study whose runs are all completed.

    Raises:
        StudyError: no model has its calibration and its baseline.
    """
    models, variants = list(study.models), list(study.variants)
    while missing := _missing_parts(study, models, variants, completed):
        _leave_out(missing, models, variants, study.baseline)
    if not models:
        raise StudyError("no model's calibration and baseline are complete; run make study")
    selected = {
        "models": {name: study.models[name] for name in models},
        "variants": {name: study.variants[name] for name in variants},
    }
    part = study.model_copy(update=selected)
    included = tuple(run for run in stages.runs(part) if run in completed)
    left_out = [run for run in stages.runs(study) if run not in included]
    return Part(part, included, tuple(_run_label(run, run in completed) for run in left_out))


def _run_label(run: Run, completed: bool) -> str:
    name = " ".join(filter(None, (run.stage, run.model, run.variant)))
    return f"{name} (complete, but not what it is compared with)" if completed else name


def _missing_parts(study: Study, models, variants, completed) -> list[tuple[str, str]]:
    """(model, variant) of every missing run; the variant is empty if the whole model needs it."""
    missing = []
    for run in stages.runs(study):
        required = run.stage != "cost" and run.model in models and run.variant in ("", *variants)
        if required and run not in completed:
            missing.append((run.model, "" if run.variant == study.baseline else run.variant))
    for model in models:
        source = study.models[model]
        if isinstance(source, FineTunedModel) and source.finetune.start not in models:
            missing.append((model, ""))  # the report compares it with the model it was trained from
    return missing


def _leave_out(missing: list[tuple[str, str]], models: list, variants: list, baseline: str) -> None:
    """Drop an unusable model, else the model or variant with the largest share of missing runs."""
    for model, variant in missing:
        if not variant:
            models.remove(model)
            return
    others = [name for name in variants if name != baseline]
    by_model = {m: len({v for x, v in missing if x == m}) / len(others) for m in models}
    by_variant = {v: len({m for m, x in missing if x == v}) / len(models) for v in others}
    model, variant = (
        max(by_model, key=by_model.__getitem__),
        max(others, key=by_variant.__getitem__),
    )
    if by_variant[variant] >= by_model[model]:
        variants.remove(variant)
    else:
        models.remove(model)
