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
        study: with the models and variants that are in it.
        runs: its runs that are complete: all but measurements of cost that are missing.
        missing: names of the others, and of complete ones that are left out.
    """

    study: Study
    runs: tuple[Run, ...]
    missing: tuple[str, ...] = ()

    def of(self, job: Job) -> Job:
        """The job with this part for its study."""
        return replace(job, study=self.study)


def report_folder(paths: StudyPaths, *, partial: str) -> Path:
    """Where a report is written: a partial one never where a whole one lies."""
    return paths.root / "partial" if partial == "yes" else paths.root


def part_to_report(job: Job, *, partial: str) -> Part:
    """What is to be reported of a job's study.

    Args:
        partial: `yes` for what is complete, `no` for everything.

    Raises:
        StudyError: nothing can be reported yet.
    """
    if partial not in ("yes", "no"):
        raise StudyError(f"partial = {partial!r} is neither yes nor no; give one of them")
    if partial == "no":
        return Part(job.study, tuple(stages.runs(job.study)))
    return largest_complete_part(job.study, fingerprints.completed_runs(job.study, job.paths))


def largest_complete_part(study: Study, complete: Collection[Run]) -> Part:
    """The part of the study all of whose runs are among the complete ones.

    Raises:
        StudyError: no model has its calibration and its baseline.
    """
    models, variants = list(study.models), list(study.variants)
    while gaps := _gaps(study, models, variants, complete):
        _leave_out(gaps, models, variants, study.baseline)
    if not models:
        raise StudyError("no model's calibration and baseline are complete; run make study")
    kept = {
        "models": {name: study.models[name] for name in models},
        "variants": {name: study.variants[name] for name in variants},
    }
    part = study.model_copy(update=kept)
    shown = tuple(run for run in stages.runs(part) if run in complete)
    left_out = [run for run in stages.runs(study) if run not in shown]
    return Part(part, shown, tuple(_run_label(run, run in complete) for run in left_out))


def _run_label(run: Run, done: bool) -> str:
    name = " ".join(filter(None, (run.stage, run.model, run.variant)))
    return f"{name} (complete, but not what it is compared with)" if done else name


def _gaps(study: Study, models, variants, complete) -> list[tuple[str, str]]:
    """(model, variant) of every run that is missing; no variant where it is the model's own."""
    gaps = []
    for run in stages.runs(study):
        needed = run.stage != "cost" and run.model in models and run.variant in ("", *variants)
        if needed and run not in complete:
            gaps.append((run.model, "" if run.variant == study.baseline else run.variant))
    for model in models:
        source = study.models[model]
        if isinstance(source, FineTunedModel) and source.finetune.start not in models:
            gaps.append((model, ""))  # it is compared with what it was trained from
    return gaps


def _leave_out(gaps: list[tuple[str, str]], models: list, variants: list, baseline: str) -> None:
    """Drop a model that cannot stay, else the model or variant with the largest share of gaps."""
    for model, variant in gaps:
        if not variant:
            models.remove(model)
            return
    others = [name for name in variants if name != baseline]
    by_model = {m: len({v for x, v in gaps if x == m}) / len(others) for m in models}
    by_variant = {v: len({m for m, x in gaps if x == v}) / len(models) for v in others}
    model, variant = (
        max(by_model, key=by_model.__getitem__),
        max(others, key=by_variant.__getitem__),
    )
    if by_variant[variant] >= by_model[model]:
        variants.remove(variant)
    else:
        models.remove(model)
