"""Results of a study, read once from disk, with their provenance checked.

A report shows only what was proved to be about the thing it names: metrics are made again from the
predictions and must agree, every item of every announced evaluation set must be there, and the
hashes in the records must lead from one stage to the next. Each record names, by hash, the files
it read; they must be those of the stage before. A checkpoint is followed from its making through
its verification to its evaluation, so that none of the three can be of another one. Needs no
weights and no torch, so that a report can be re-made anywhere.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from helpers.core.errors import StudyError
from helpers.core.records import read_json, sha256_file, sha256_folder
from helpers.evaluation.predictions import (
    prediction_digests,
    read_passage_rows,
    read_predictions,
    read_prompts,
)
from helpers.evaluation.scoring import all_metrics, shared_text_metrics
from helpers.report.estimates import (
    QUANTIZATION_STAGE,
    CalibrationResults,
    Cost,
    Estimate,
    VariantResults,
    check_measured_files,
    dataset_estimates,
    read_costs,
    token_estimates,
)
from helpers.statistics.checks.recomputed_verdicts import PublishedAnswers, checked_verdicts
from helpers.statistics.graded_study import GradedStudy, Recipe, graded_study, study_recipes
from helpers.statistics.recipe_parts import (
    CalibrationEffect,
    Decomposition,
    calibration_effects,
    decompositions,
)
from helpers.statistics.verdicts import (
    ControlOutcome,
    DecisionRules,
    Role,
    VariantAnswers,
    Verdict,
    decision_rules,
    is_unsmoothed_twin,
    role_of,
)
from helpers.study.loading import Job
from helpers.study.schema import Comparison, FineTunedModel, RotatedModel, Runtime, Study


def check_provenance(
    job: Job,
    calibrations: Mapping[str, CalibrationResults],
    evaluations: Mapping[tuple[str, str], VariantResults],
    training: Mapping[str, dict],
    rotations: Mapping[str, dict],
) -> None:
    """Follow the hashes from stage to stage.

    Raises:
        StudyError: a record names files of another run; the message names the notebook.
    """
    files = {
        model: calibration.record["inputs"]["model"] for model, calibration in calibrations.items()
    }
    for model, record in rotations.items():
        start = job.study.models[model].start
        if record["inputs"]["source_model"] != files[start]:
            raise StudyError(
                f"{model}: was rotated from other model files than {start} was calibrated with; "
                "run 00_rotation and 01_calibration again"
            )
    for model, record in training.items():
        start = job.study.models[model].start
        if record["inputs"]["source_model"] != files[start]:
            raise StudyError(
                f"{model}: was fine-tuned from other model files than {start} was calibrated with; "
                "run 00_finetuning and 01_calibration again"
            )
        losses = (evaluations[m, job.study.baseline].passage_losses for m in (model, start))
        if next(losses) == next(losses):
            raise StudyError(
                f"{model}: reads every passage exactly as {start} does, so its training changed "
                "nothing; look at its learning rate and run 00_finetuning again"
            )
    for (model, _), evaluated in evaluations.items():
        _check_evaluation(job, evaluated, files[model])
        floats = evaluations[model, job.study.baseline].record["inputs"]["float_states"]
        if evaluated.record["inputs"]["float_states"] != floats:
            raise StudyError(
                f"{model}/{evaluated.variant}: its KL was computed against other states than those "
                f"of {job.study.baseline}; run 03_evaluation again"
            )


def _check_evaluation(job: Job, variant: VariantResults, model_files: str) -> None:
    at, parameters = f"{variant.model}/{variant.variant}", variant.record["parameters"]
    recorded = parameters["model"], parameters["variant"], parameters.get("draw", 1)
    if recorded != (variant.model, variant.variant, job.draw):
        raise StudyError(f"{at}: its record is of another run; run 03_evaluation again")
    if variant.quantization is None:
        model_read, action, stage = (
            variant.record["inputs"]["variant"],
            "was evaluated",
            "03_evaluation",
        )
    else:
        _check_checkpoint(job, variant, at)
        model_read, action, stage = (
            variant.quantization["inputs"]["model"],
            "was quantized",
            QUANTIZATION_STAGE,
        )
    if model_read != model_files:
        raise StudyError(
            f"{at}: {action} from other model files than {variant.model} was calibrated with; "
            f"run 01_calibration and {stage} again"
        )


def _check_checkpoint(job: Job, variant: VariantResults, at: str) -> None:
    verified, evaluated = variant.verification, variant.record["inputs"]["variant"]
    if (verified["model"], verified["variant"]) != (variant.model, variant.variant):
        raise StudyError(
            f"{at}: its verification.json is of another run; run {QUANTIZATION_STAGE} again"
        )
    if verified["checkpoint"] != evaluated:
        raise StudyError(
            f"{at}: the evaluated checkpoint is not the verified one; run {QUANTIZATION_STAGE} "
            "and 03_evaluation again"
        )
    name = job.study.calibration_of(variant.variant)
    folder = replace(job.paths, calibrated=name).calibration(variant.model)
    activations = folder / "activations.safetensors"
    if variant.quantization["inputs"]["calibration"] != sha256_file(activations):
        raise StudyError(
            f"{at}: its checkpoint has another calibration; run {QUANTIZATION_STAGE} again"
        )
    checkpoint = job.paths.checkpoint(variant.model, variant.variant)
    if checkpoint.is_dir() and evaluated != sha256_folder(checkpoint):  # weights may be gone
        raise StudyError(f"{at}: its checkpoint changed since; run 03_evaluation again")


@dataclass(frozen=True)
class Results:
    """A study and all its results."""

    name: str
    study: Study
    calibrations: dict[str, CalibrationResults]
    evaluations: dict[tuple[str, str], VariantResults]  # by (model, variant)
    training: dict[str, dict]  # records of the models the study trained itself
    prompts: dict[tuple[str, str], dict[str, dict]]  # (model, dataset), item id: see read_prompts
    costs: dict[str, Cost | None]  # of the models that have one of their own
    # Further draws of the variants that are repeated, by (model, variant).
    draws: dict[tuple[str, str], list[VariantResults]] = field(default_factory=dict)
    rotations: dict[str, dict] = field(default_factory=dict)  # of the models it rotated itself

    @property
    def models(self) -> list[str]:
        return list(self.study.models)

    @property
    def variants(self) -> list[str]:
        """The baseline first, then the others in the study file's order."""
        return [self.study.baseline, *self.compared]

    @property
    def compared(self) -> list[str]:
        return [name for name in self.study.variants if name != self.study.baseline]

    @property
    def rules(self) -> DecisionRules:
        return decision_rules(self.study)

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
    def graded(self) -> GradedStudy:
        """Graded scores: comparisons, pooled differences, costs of fine-tuning."""
        return graded_study(self.study, self.published.variants, self.verdicts)

    @cached_property
    def recipes(self) -> tuple[Recipe, ...]:
        """The variants of which more than one checkpoint was made, over all of these."""
        published = self.published
        return study_recipes(
            self.study, published.variants, published.draws, self.verdicts, self.graded
        )

    @cached_property
    def token_estimates(self) -> dict[tuple[str, str], dict[str, Estimate]]:
        """Perplexity, KL and top-1 agreement by (model, variant); computed once a report."""
        return {key: token_estimates(e, self.rules) for key, e in self.evaluations.items()}

    @cached_property
    def dataset_estimates(self) -> dict[tuple[str, str, str], dict[str, Estimate]]:
        """The metrics by (model, variant, dataset), the main one first; computed once a report."""
        return {
            (*key, name): dataset_estimates(
                evaluation_set.adapter, e.predictions[name], e.metrics[name], self.rules
            )
            for key, e in self.evaluations.items()
            for name, evaluation_set in self.study.evaluation.datasets.items()
        }

    @cached_property
    def control_outcomes(self) -> dict[tuple[str, str], ControlOutcome]:
        """The outcome of each control by (model, variant)."""
        return self.published.control_outcomes

    @cached_property
    def published(self) -> PublishedAnswers:
        """All answers and checks, as published for recomputing the verdicts."""
        answers = {
            at: VariantAnswers(e.predictions, e.passages, e.gates)
            for at, e in self.evaluations.items()
        }
        draws = {
            at: [VariantAnswers(e.predictions, e.passages, e.gates) for e in further]
            for at, further in self.draws.items()
        }
        return PublishedAnswers(self.study, answers, draws)

    @cached_property
    def calibration_effects(self) -> tuple[CalibrationEffect, ...]:
        """Variants of named calibrations beside the draws of the same recipe."""
        published = self.published
        return calibration_effects(self.study, published.variants, published.draws)

    @cached_property
    def decompositions(self) -> tuple[Decomposition, ...]:
        """What weights and activations alone change, of variants that have both rulers."""
        published, baseline = self.published, self.study.baseline
        able = {
            model: [n for n in self.study.evaluation.datasets if self._sees(model, n, baseline)]
            for model in self.models
        }
        return decompositions(self.study, published.variants, published.draws, able)

    def _sees(self, model: str, dataset: str, baseline: str) -> bool:
        return self.graded.blind.get((model, dataset, baseline)) == ""

    @property
    def runtime(self) -> Runtime:
        """The runtime with the values that the baseline's record states."""
        requested = self.study.runtime
        recorded = self.baseline_of(self.models[0]).record["parameters"].get("runtime", {})
        settled = {key: recorded[key] for key in Runtime.model_fields if key in recorded}
        return requested.model_copy(update=settled)

    def role(self, variant: str) -> Role | None:
        """A variant's role as a control; None if the study asks about it."""
        return role_of(self.study, variant)

    @property
    def studied_variants(self) -> list[str]:
        """The variants with declared comparisons, else all but the controls, else all."""
        declared = dict.fromkeys(c.variant for c in self.study.statistics.primary)
        declared = [v for v in declared if v != self.study.baseline]
        return declared or [v for v in self.compared if not self.role(v)] or self.compared

    @property
    def noise_floor(self) -> str | None:
        """The baseline in another float type, if the study has it."""
        return next((v for v in self.compared if self.role(v) == "noise floor"), None)

    def variants_of(self, model: str) -> list[VariantResults]:
        return [self.evaluations[model, variant] for variant in self.variants]

    def compared_variants_of(self, model: str) -> list[VariantResults]:
        return [self.evaluations[model, variant] for variant in self.compared]

    def baseline_of(self, model: str) -> VariantResults:
        return self.evaluations[model, self.study.baseline]

    def declared_verdicts(self, *kinds: str) -> list[tuple[Comparison, Verdict]]:
        """The declared comparisons, of the named kinds if any are named."""
        declared = [(c, v) for c, v in self.verdicts.items() if v.primary]
        return [(c, v) for c, v in declared if not kinds or v.kind in kinds]

    def frame(self):
        """All answers as a pandas DataFrame: one row a model, variant, evaluation set and item.

        Columns:
            model, variant, dataset, id: what was asked of whom.
            cluster: items of one passage share it; empty where each stands alone.
            question: None if none is on record.
            golds: list of the right answers; empty where the passage has none.
            output, parsed: the answer as written, and as read; None if none could be read.
            status: answered, abstained or unparsed.
            finish_reason: why the answer ended: stop, answer, length, nonfinite or scored.
            score: 0 to 1; f1: of SQuAD v2, NaN elsewhere.
            prompt_tokens, output_tokens: how many were read and written or scored.
            valid: whether the checks on the variant and on this set hold.
        """
        from helpers.report.tables import answers_frame  # pandas takes a second to import

        return answers_frame(self)

    def unsmoothed_twin(self, variant: str) -> str | None:
        """The control that differs from this variant only by the missing smoothing."""
        variants = self.study.variants
        twins = (
            n
            for n, candidate in variants.items()
            if is_unsmoothed_twin(candidate, variants[variant])
        )
        return next(twins, None)


def load_results(job: Job) -> Results:
    """Read and check a whole study.

    Raises:
        StudyError: a result is missing, damaged, or filed under another name; the message
            names the notebook to run.
    """
    study = job.study
    evaluations = {
        (model, variant): _load_variant(job, model, variant)
        for model in study.models
        for variant in study.variants
    }
    results = Results(
        name=job.name,
        study=study,
        calibrations={model: _load_calibration(job, model) for model in study.models},
        evaluations=evaluations,
        training=_made_models(job, FineTunedModel, made_by="00_finetuning"),
        rotations=_made_models(job, RotatedModel, made_by="00_rotation"),
        prompts={
            (model, dataset): _load_prompts(job, model, dataset)
            for model in study.models
            for dataset in study.evaluation.datasets
        },
        costs=read_costs(job),
        draws=_load_draws(job, evaluations),
    )
    check_provenance(
        job, results.calibrations, results.evaluations, results.training, results.rotations
    )
    hashes = {at: e.record["inputs"]["variant"] for at, e in evaluations.items()}
    check_measured_files(results.costs, hashes)
    return results


def _made_models(job: Job, kind: type, *, made_by: str) -> dict[str, dict]:
    """The records of the models that the study made itself, by one of the two kinds."""
    return {
        model: read_json(job.paths.made_model(model) / "record.json", made_by=made_by)
        for model, source in job.study.models.items()
        if isinstance(source, kind)
    }


def _load_draws(
    job: Job, first: Mapping[tuple[str, str], VariantResults]
) -> dict[tuple[str, str], list[VariantResults]]:
    """All further draws of the variants that are repeated, each followed to its calibration."""
    draws: dict[tuple[str, str], list[VariantResults]] = {}
    for (model, variant), first_draw in first.items():
        checkpoints = {first_draw.record["inputs"]["variant"]}
        for draw in range(2, job.study.variants[variant].repeats + 1):
            paths = replace(job.paths, draw=draw, drawn=variant)
            of_draw = replace(job, paths=paths, draw=draw).of_option_sets
            at, loaded = f"{model}/{variant}~{draw}", _load_variant(of_draw, model, variant)
            _check_evaluation(of_draw, loaded, first_draw.quantization["inputs"]["model"])
            inputs, baseline = loaded.record["inputs"], first[model, job.study.baseline]
            if inputs["float_states"] != baseline.record["inputs"]["float_states"]:
                raise StudyError(
                    f"{at}: its KL was computed against other states than those of "
                    f"{job.study.baseline}; run 03_evaluation again"
                )
            if inputs["variant"] in checkpoints:
                raise StudyError(f"{at}: is the checkpoint of an earlier draw; make study again")
            checkpoints.add(inputs["variant"])
            draws.setdefault((model, variant), []).append(loaded)
    return draws


def _load_calibration(job: Job, model: str) -> CalibrationResults:
    folder, stage = job.paths.calibration(model), "01_calibration"
    tensors = _load_tensors(folder / "activations.safetensors", made_by=stage)
    (name, surface), *_ = _load_tensors(folder / "surface.safetensors", made_by=stage).items()
    record = read_json(folder / "record.json", made_by=stage)
    layers = [row["name"] for row in record["results"]["maxima"]]  # the file sorts by name
    absmax = {layer: tensors[f"{layer}.absmax"] for layer in layers}
    return CalibrationResults(absmax, surface, name, record)


def _load_tensors(path: Path, *, made_by: str) -> dict[str, np.ndarray]:
    if not path.is_file():
        raise StudyError(f"{'/'.join(path.parts[-4:])} is missing; run {made_by} first")
    from safetensors.numpy import load_file  # only here: verdicts are made again without it

    return load_file(path)


def _load_variant(job: Job, model: str, variant: str) -> VariantResults:
    folder, stage = job.paths.evaluation(model, variant), "03_evaluation"
    at = f"{model}/{variant}"
    record = read_json(folder / "record.json", made_by=stage)
    stored = read_json(folder / "metrics.json", made_by=stage)
    datasets = job.study.evaluation.datasets
    predictions = read_predictions(folder, job.study)
    for name, dataset_predictions in predictions.items():
        if len(dataset_predictions) != datasets[name].items:
            raise StudyError(
                f"{at}: {name} has {len(dataset_predictions)} predictions but the study has "
                f"{datasets[name].items} items; run {stage} again"
            )
    passages = read_passage_rows(folder)
    metrics = {
        "datasets": all_metrics(job.study, predictions),
        "shared_text": shared_text_metrics(passages),
    }
    if metrics != stored:
        raise StudyError(
            f"{at}: metrics.json does not follow from its predictions; run {stage} again"
        )
    verification = quantization = None
    if job.study.variants[variant].needs_checkpoint:
        path = job.paths.variant(model, variant) / "verification.json"
        verification = read_json(path, made_by=QUANTIZATION_STAGE)
        path = job.paths.quantization(model, variant) / "record.json"
        quantization = read_json(path, made_by=QUANTIZATION_STAGE)
    return VariantResults(
        model,
        variant,
        predictions,
        passages,
        *metrics.values(),
        record,
        verification,
        quantization,
        _load_gates(job, model, variant),
    )


def _load_gates(job: Job, model: str, variant: str) -> dict:
    """The gates on an evaluation; refused if its predictions changed after the checks."""
    folder, stage = job.paths.evaluation(model, variant), "03_evaluation"
    record = read_json(folder / "gates.json", made_by=stage)
    if (record["model"], record["variant"]) != (model, variant):
        raise StudyError(f"{model}/{variant}: its gates.json is of another run; run {stage} again")
    for name, digest in prediction_digests(folder, job.study.evaluation.datasets).items():
        if record["predictions"].get(name) != digest:
            raise StudyError(f"{model}/{variant}: {name} changed since its checks; run {stage}")
    return record


def _load_prompts(job: Job, model: str, dataset: str) -> dict[str, dict]:
    """A model's prompts from its records, without token ids; reads no data set."""
    prompts = read_prompts(job.paths.evaluation(model, job.study.baseline), dataset)
    ids = ("tokens", "continuation_tokens")
    return {
        item: {key: value for key, value in row.items() if key not in ids}
        for item, row in prompts.items()
    }
