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
from safetensors.numpy import load_file

from helpers.evaluation.comparison import Answers, Rules, rules_of
from helpers.evaluation.metrics import all_metrics, shared_text_metrics
from helpers.evaluation.predictions import (
    prediction_digests,
    read_passage_rows,
    read_predictions,
)
from helpers.evaluation.prompt_records import read_prompts
from helpers.evaluation.verdicts import Verdict, study_verdicts
from helpers.report.cost import Cost, read_costs, refuse_other_files
from helpers.study.errors import StudyError
from helpers.study.gates import WHOLE_VARIANT
from helpers.study.hashing import sha256_file, sha256_folder
from helpers.study.opening import Job
from helpers.study.records import read_json
from helpers.study.schema import Comparison, FineTunedModel, Study, Variant


@dataclass(frozen=True)
class Calibrated:
    """Activations of one model: abs-max by Linear, and |x| of the worst one, token by token."""

    absmax: dict[str, np.ndarray]  # (in_features,)
    surface: np.ndarray  # (tokens, in_features)
    surface_of: str
    record: dict


@dataclass(frozen=True)
class Evaluated:
    """One variant of one model: what it answered, and what is known of its checkpoint.

    Attributes:
        passages: rows of the shared text.
        verification, quantization: None for a variant that leaves the model as it is.
        checked: the gates on the evaluation itself.
    """

    model: str
    variant: str
    predictions: dict[str, list[dict]]
    passages: list[dict]
    metrics: dict[str, dict]
    shared_text: dict
    record: dict
    verification: dict | None
    quantization: dict | None
    checked: dict

    @property
    def gates(self) -> list[dict]:
        """All gates: on the checkpoint, if there is one, then on the evaluation."""
        return [*(self.verification["gates"] if self.verification else []), *self.checked["gates"]]

    @property
    def failed_gates(self) -> list[dict]:
        return [gate for gate in self.gates if not gate["passed"]]

    @property
    def passed(self) -> bool:
        return all(found["passed"] for found in (self.verification, self.checked) if found)

    @property
    def problem(self) -> str | None:
        """The first failed check that invalidates all of it, in words; None if none does."""
        return self._failed([WHOLE_VARIANT])

    def problem_of(self, dataset: str) -> str | None:
        """The same for one evaluation set: a check on the variant, or on this set."""
        return self._failed([WHOLE_VARIANT, dataset])

    def _failed(self, guarded: list[str]) -> str | None:
        for gate in self.failed_gates:
            if gate.get("invalidates", WHOLE_VARIANT) in guarded:
                return f"{gate['name']} ({gate['measured']}; limit: {gate['limit']})"
        if self.passed or self.failed_gates:
            return None
        return "its record of checks says it did not pass"


@dataclass(frozen=True)
class Results:
    """A study and everything it found."""

    name: str
    study: Study
    calibrations: dict[str, Calibrated]
    evaluations: dict[tuple[str, str], Evaluated]  # by (model, variant)
    training: dict[str, dict]  # records of the models the study trained itself
    questions: dict[str, dict[str, str]]  # dataset, item id: empty if none are on record
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
    def verdicts(self) -> dict[Comparison, Verdict]:
        """Primary comparisons first, then every other variant against the baseline."""
        answers = {
            (e.model, dataset, e.variant): Answers(e.variant, found, e.problem_of(dataset))
            for e in self.evaluations.values()
            for dataset, found in e.predictions.items()
        }
        return study_verdicts(self.study, answers)

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
        wanted = self.study.variants[variant]
        for name, other in self.study.variants.items():
            if wanted.smooth and wanted.quantized and _twins(wanted, other):
                return name
        return None


def _twins(smoothed: Variant, other: Variant) -> bool:
    same = (other.scheme, other.ignore) == (smoothed.scheme, smoothed.ignore)
    return same and other.smooth is None


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
        questions={name: _questions(job, name) for name in study.evaluation.datasets},
        costs=read_costs(job),
    )
    _refuse_broken_chain(job, found)
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
        made_by = "02_quantization"
        path = job.paths.variant(model, variant) / "verification.json"
        verification = read_json(path, made_by=made_by)
        path = job.paths.quantization(model, variant) / "record.json"
        quantization = read_json(path, made_by=made_by)
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


def _questions(job: Job, dataset: str) -> dict[str, str]:
    """Question by item id, as the first model was asked it; no data set is read for that."""
    folder = job.paths.evaluation(next(iter(job.study.models)), job.study.baseline)
    return {key: row["question"] for key, row in read_prompts(folder, dataset).items()}


def _refuse_broken_chain(job: Job, found: Results) -> None:
    """Every record names the files it read by hash: they must be those of the stage before."""
    for model, record in found.training.items():
        start = job.study.models[model].finetune.start
        if record["inputs"]["source_model"] != found.calibrations[start].record["inputs"]["model"]:
            raise StudyError(
                f"{model}: was fine-tuned from other model files than {start} was calibrated with; "
                "run 00_finetuning and 01_calibration again"
            )
    for (model, variant), evaluated in found.evaluations.items():
        at, calibrated = f"{model}/{variant}", found.calibrations[model]
        named = evaluated.record["parameters"]
        if (named["model"], named["variant"]) != (model, variant):
            raise StudyError(f"{at}: its record is of another run; run 03_evaluation again")
        if evaluated.quantization is None:
            links = [(evaluated.record["inputs"]["variant"], "was evaluated", "03_evaluation")]
        else:
            inputs = evaluated.quantization["inputs"]
            links = [(inputs["model"], "was quantized", "02_quantization")]
            activations = job.paths.calibration(model) / "activations.safetensors"
            if inputs["calibration"] != sha256_file(activations):
                raise StudyError(f"{at}: was made from another calibration; run 02_quantization")
            checkpoint = job.paths.checkpoint(model, variant)
            asked = evaluated.record["inputs"]["variant"]
            if checkpoint.is_dir() and asked != sha256_folder(checkpoint):  # weights may be gone
                raise StudyError(f"{at}: its checkpoint changed since; run 03_evaluation again")
        for digest, what, stage in links:
            if digest != calibrated.record["inputs"]["model"]:
                raise StudyError(
                    f"{at}: {what} from other model files than {model} was calibrated with; "
                    f"run 01_calibration and {stage} again"
                )
