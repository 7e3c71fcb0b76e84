"""All a study has on disk, read once and checked for belonging together.

A report shows only what was proved to be about the thing it names: metrics are made
again from the predictions and must agree, every item of every announced evaluation set
must be there, and the hashes in the records must lead from one stage to the next.
Needs no weights and no torch, so that a report can be re-made anywhere.
"""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from helpers.core.errors import StudyError
from helpers.core.records import read_json
from helpers.cost.results import Cost, read_costs, refuse_other_files
from helpers.evaluation.metrics import all_metrics, shared_text_metrics
from helpers.evaluation.predictions import prediction_digests, read_passage_rows, read_predictions
from helpers.evaluation.prompt_records import read_prompts
from helpers.report.results_data import MAKER, Calibrated, Evaluated
from helpers.report.results_provenance import refuse_broken_chain
from helpers.statistics.checks.recomputed_comparisons import checked_verdicts
from helpers.statistics.comparison import Rules, rules_of
from helpers.statistics.controls import Asked, Duty, Role, is_unsmoothed_twin, role_of
from helpers.statistics.published_answers import Published
from helpers.statistics.verdicts import Verdict
from helpers.study.schema import Comparison, Runtime, Study
from helpers.study.schema_sources import FineTunedModel
from helpers.study.study_run import Job


@dataclass(frozen=True)
class Results:
    """A study and everything it found."""

    name: str
    study: Study
    calibrations: dict[str, Calibrated]
    evaluations: dict[tuple[str, str], Evaluated]  # by (model, variant)
    training: dict[str, dict]  # records of the models the study trained itself
    prompts: dict[tuple[str, str], dict[str, dict]]  # (model, dataset), item id: see read_prompts
    costs: dict[str, Cost | None]  # of the models that have one of their own

    @property
    def models(self) -> list[str]:
        return list(self.study.models)

    @property
    def variants(self) -> list[str]:
        """The baseline first, then the others as the study file has them."""
        return [self.study.baseline, *self.compared]

    @property
    def compared(self) -> list[str]:
        return [name for name in self.study.variants if name != self.study.baseline]

    @property
    def rules(self) -> Rules:
        return rules_of(self.study)

    @cached_property
    def questions(self) -> dict[str, dict[str, str]]:
        """Question by dataset and item id, as the first model was asked it."""
        model = self.models[0]
        return {
            dataset: {key: row["question"] for key, row in self.prompts[model, dataset].items()}
            for dataset in self.study.evaluation.datasets
        }

    @cached_property
    def verdicts(self) -> dict[Comparison, Verdict]:
        """Primary comparisons first, then every other variant against the baseline."""
        return checked_verdicts(self.study, self.published.answers)

    @cached_property
    def duties(self) -> dict[tuple[str, str], Duty]:
        """By (model, variant): whether each control did what it is there for."""
        return self.published.duties

    @cached_property
    def published(self) -> Published:
        """All answers and checks, as they are published for making the verdicts again."""
        found = {
            at: Asked(e.predictions, e.passages, e.gates) for at, e in self.evaluations.items()
        }
        return Published(self.study, found)

    @property
    def runtime(self) -> Runtime:
        """The runtime as the machine settled it, by the baseline's record."""
        asked = self.study.runtime
        made = self.baseline_of(self.models[0]).record["parameters"].get("runtime", {})
        settled = {key: made[key] for key in Runtime.model_fields if key in made}
        return asked.model_copy(update=settled)

    def role(self, variant: str) -> Role | None:
        """What a variant is a control of; None for one that the study asks about."""
        return role_of(self.study, variant)

    @property
    def subjects(self) -> list[str]:
        """What the study is about: the variants it declared comparisons of, else all but
        the controls; a control alone is a subject too."""
        declared = dict.fromkeys(c.variant for c in self.study.statistics.primary)
        declared = [v for v in declared if v != self.study.baseline]
        return declared or [v for v in self.compared if not self.role(v)] or self.compared

    @property
    def noise_floor(self) -> str | None:
        """The baseline in another float type, if the study has it."""
        return next((v for v in self.compared if self.role(v) == "noise floor"), None)

    def of_model(self, model: str) -> list[Evaluated]:
        return [self.evaluations[model, variant] for variant in self.variants]

    def compared_in(self, model: str) -> list[Evaluated]:
        return [self.evaluations[model, variant] for variant in self.compared]

    def baseline_of(self, model: str) -> Evaluated:
        return self.evaluations[model, self.study.baseline]

    def primary(self, *kinds: str) -> list[tuple[Comparison, Verdict]]:
        """The declared comparisons, of the named kinds if any are named."""
        found = [(c, v) for c, v in self.verdicts.items() if v.primary]
        return [(c, v) for c, v in found if not kinds or v.kind in kinds]

    def unsmoothed(self, variant: str) -> str | None:
        """The variant that differs from this one by the smoothing alone: its control."""
        variants = self.study.variants
        found = (n for n, other in variants.items() if is_unsmoothed_twin(other, variants[variant]))
        return next(found, None)


def load_results(job: Job) -> Results:
    """Read and check a whole study.

    Raises:
        StudyError: something is missing, torn, or not about what it is filed under; the
            message names the notebook to run.
    """
    study = job.study
    trained = [m for m, source in study.models.items() if isinstance(source, FineTunedModel)]
    evaluations = {
        (model, variant): _evaluated(job, model, variant)
        for model in study.models
        for variant in study.variants
    }
    found = Results(
        name=job.name,
        study=study,
        calibrations={model: _calibrated(job, model) for model in study.models},
        evaluations=evaluations,
        training={
            model: read_json(
                job.paths.finetuned_model(model) / "record.json", made_by="00_finetuning"
            )
            for model in trained
        },
        prompts={
            (model, dataset): _prompts(job, model, dataset)
            for model in study.models
            for dataset in study.evaluation.datasets
        },
        costs=read_costs(job),
    )
    refuse_broken_chain(job, found.calibrations, found.evaluations, found.training)
    hashes = {at: e.record["inputs"]["variant"] for at, e in evaluations.items()}
    refuse_other_files(found.costs, hashes)
    return found


def _calibrated(job: Job, model: str) -> Calibrated:
    folder, stage = job.paths.calibration(model), "01_calibration"
    tensors = _tensors(folder / "activations.safetensors", made_by=stage)
    (name, surface), *_ = _tensors(folder / "surface.safetensors", made_by=stage).items()
    record = read_json(folder / "record.json", made_by=stage)
    layers = [row["name"] for row in record["results"]["maxima"]]  # the file sorts by name
    absmax = {layer: tensors[f"{layer}.absmax"] for layer in layers}
    return Calibrated(absmax, surface, name, record)


def _tensors(path: Path, *, made_by: str) -> dict[str, np.ndarray]:
    if not path.is_file():
        raise StudyError(f"{'/'.join(path.parts[-4:])} is missing; run {made_by} first")
    from safetensors.numpy import load_file  # only here: verdicts are made again without it

    return load_file(path)


def _evaluated(job: Job, model: str, variant: str) -> Evaluated:
    folder, stage = job.paths.evaluation(model, variant), "03_evaluation"
    at = f"{model}/{variant}"
    record = read_json(folder / "record.json", made_by=stage)
    stored = read_json(folder / "metrics.json", made_by=stage)
    wanted = job.study.evaluation.datasets
    predictions = read_predictions(folder, job.study)
    for name, found in predictions.items():
        if len(found) != wanted[name].items:
            raise StudyError(
                f"{at}: {name} has {len(found)} predictions but the study asks "
                f"{wanted[name].items} items; run {stage} again"
            )
    passages = read_passage_rows(folder)
    metrics = {
        "datasets": all_metrics(job.study, predictions),
        "shared_text": shared_text_metrics(passages),
    }
    if metrics != stored:
        raise StudyError(f"{at}: metrics.json is not what its predictions give; run {stage} again")
    verification = quantization = None
    if job.study.variants[variant].changes_model:
        path = job.paths.variant(model, variant) / "verification.json"
        verification = read_json(path, made_by=MAKER)
        path = job.paths.quantization(model, variant) / "record.json"
        quantization = read_json(path, made_by=MAKER)
    return Evaluated(
        model,
        variant,
        predictions,
        passages,
        *metrics.values(),
        record,
        verification,
        quantization,
        _checked(job, model, variant),
    )


def _checked(job: Job, model: str, variant: str) -> dict:
    """The gates on an evaluation, which were held against the very files that are there."""
    folder, stage = job.paths.evaluation(model, variant), "03_evaluation"
    found = read_json(folder / "gates.json", made_by=stage)
    if (found["model"], found["variant"]) != (model, variant):
        raise StudyError(f"{model}/{variant}: its gates.json is of another run; run {stage} again")
    for name, digest in prediction_digests(folder, job.study.evaluation.datasets).items():
        if found["predictions"].get(name) != digest:
            raise StudyError(f"{model}/{variant}: {name} changed since its checks; run {stage}")
    return found


def _prompts(job: Job, model: str, dataset: str) -> dict[str, dict]:
    """The prompts that a model was given, without token ids; no data set is read for that."""
    prompts = read_prompts(job.paths.evaluation(model, job.study.baseline), dataset)
    ids = ("tokens", "continuation_tokens")
    return {
        item: {key: value for key, value in row.items() if key not in ids}
        for item, row in prompts.items()
    }
