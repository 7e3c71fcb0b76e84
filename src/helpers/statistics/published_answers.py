"""Published answers of a study in a few small files, from which verdicts can be recomputed.

One file an evaluation set, one line an item, with every model's and variant's answer side
by side; one file for the shared text; one with every gate. What the answers to an item have
in common stands once. Reading them gives back the rows that verdicts are made from:
nothing of a model, a tokenizer or torch is needed. Imports no torch.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from helpers.core.errors import StudyError
from helpers.core.files import draw_name
from helpers.core.records import (
    WHOLE_VARIANT,
    failed_check,
    read_json,
    read_jsonl,
    sha256_file,
    write_json,
    write_jsonl,
)
from helpers.evaluation.predictions import SHARED_TEXT
from helpers.statistics.verdicts import (
    ControlOutcome,
    VariantAnswers,
    VariantPredictions,
    control_outcome,
)
from helpers.study.schema import Study

GATES = "gates.json"
ITEM_KEYS = ("id", "cluster", "golds", "foil")
MODEL_KEYS = (  # they depend on the chat template and the tokenizer
    "prompt_hash",
    "prompt_tokens",
    "tokens",
    "token_texts",
    "gold_hash",
    "gold_tokens",
    "foil_tokens",
)
VARIANT_KEYS = ("model", "variant")
MADE_BY = "04_analysis"

AnswersByVariant = Mapping[tuple[str, str], VariantAnswers]  # by (model, variant)
Draws = dict[tuple[str, str], list[VariantAnswers]]  # by (model, variant): the second on


@dataclass(frozen=True)
class PublishedAnswers:
    """The published answers and gates of a study: enough for every verdict.

    Attributes:
        variants: by (model, variant); of its first draw.
        draws: all further draws of the variants that are repeated; they have option sets only.
    """

    study: Study
    variants: dict[tuple[str, str], VariantAnswers]
    draws: Draws = field(default_factory=dict)

    @property
    def every_draw(self) -> dict[tuple[str, str], VariantAnswers]:
        """By (model, name): the first draw has its variant's name, the second `<variant>~2`."""
        further = {
            (model, draw_name(variant, number)): of_draw
            for (model, variant), draws in self.draws.items()
            for number, of_draw in enumerate(draws, start=2)
        }
        return self.variants | further

    @property
    def answers(self) -> dict[tuple[str, str, str], VariantPredictions]:
        """Predictions by (model, dataset, variant), in the type that verdicts take."""
        return {
            (model, dataset, variant): VariantPredictions(
                variant, rows, failed_check(variant_answers.gates, [WHOLE_VARIANT, dataset])
            )
            for (model, variant), variant_answers in self.variants.items()
            for dataset, rows in variant_answers.predictions.items()
        }

    @property
    def control_outcomes(self) -> dict[tuple[str, str], ControlOutcome]:
        """The outcome of each control by (model, variant)."""
        return all_control_outcomes(self.study, self.variants)


def all_control_outcomes(
    study: Study, answers: AnswersByVariant
) -> dict[tuple[str, str], ControlOutcome]:
    """The outcome of every control of every model, by (model, variant)."""
    order = [study.baseline, *(variant for variant in study.variants if variant != study.baseline)]
    outcomes = {
        (model, variant): control_outcome(
            study, variant, answers[model, variant], answers[model, study.baseline]
        )
        for model in study.models
        for variant in order
    }
    return {owner: outcome for owner, outcome in outcomes.items() if outcome}


def write_answers(
    folder: Path, study: Study, answers: AnswersByVariant, draws: Draws | None = None
) -> dict[str, str]:
    """Write all files into a folder; return the content hash of each by its name."""
    answers = PublishedAnswers(study, dict(answers), draws or {}).every_draw
    files = {f"{name}.jsonl": _side_by_side(answers, name) for name in study.evaluation.datasets}
    files[f"{SHARED_TEXT}.jsonl"] = _side_by_side(answers, SHARED_TEXT)
    for name, rows in files.items():
        write_jsonl(folder / name, rows)
    gates = {
        _variant_path(owner): list(map(_short_gate, variant_answers.gates))
        for owner, variant_answers in answers.items()
    }
    write_json(folder / GATES, gates)
    return {name: sha256_file(folder / name) for name in [*files, GATES]}


def read_answers(folder: Path, study: Study) -> PublishedAnswers:
    """Read the files of `write_answers`; every set, item and variant must be there.

    Raises:
        StudyError: a file is missing or damaged, or lacks a variant or an item.
    """
    gates = read_json(folder / GATES, made_by=MADE_BY)
    owners = [(m, v) for m in study.models for v in study.variants]
    repeated = [
        (model, variant, draw)
        for model, variant in owners
        for draw in range(2, study.variants[variant].repeats + 1)
    ]
    names = [*study.evaluation.datasets, SHARED_TEXT]
    option_sets = [*study.with_option_sets_only.evaluation.datasets, SHARED_TEXT]
    rows = {name: read_jsonl(folder / f"{name}.jsonl", made_by=MADE_BY) for name in names}
    for name, evaluation_set in study.evaluation.datasets.items():
        if len(rows[name]) != evaluation_set.items:
            raise StudyError(
                f"{folder.name}/{name}.jsonl has {len(rows[name])} items but the study has "
                f"{evaluation_set.items}; run {MADE_BY} again"
            )

    def answers_of(owner: tuple[str, str], names: list[str]) -> VariantAnswers:
        if _variant_path(owner) not in gates:
            raise StudyError(
                f"{folder.name}/{GATES} has no {_variant_path(owner)}; run {MADE_BY} again"
            )
        by_name = {name: _rows_of_variant(folder, name, rows[name], owner) for name in names}
        passages = by_name.pop(SHARED_TEXT)
        return VariantAnswers(by_name, passages, gates[_variant_path(owner)])

    draws: Draws = {}
    for model, variant, draw in repeated:
        of_draw = answers_of((model, draw_name(variant, draw)), option_sets)
        draws.setdefault((model, variant), []).append(of_draw)
    return PublishedAnswers(study, {owner: answers_of(owner, names) for owner in owners}, draws)


def _short_gate(gate: dict) -> dict:
    """A passed gate's name only; a failed gate with its measured value."""
    keys = ("name", "passed", "invalidates") if gate["passed"] else gate
    return {key: gate[key] for key in keys if key in gate}


def _variant_path(owner: tuple[str, str]) -> str:
    return "/".join(owner)


def _side_by_side(answers: AnswersByVariant, name: str) -> list[dict]:
    """One row per item, in the first variant's order: its own keys, then by model, by variant.

    Prompt fields that differ from the first variant's are kept with the variant's answer.
    """
    rows: dict[str, dict] = {}
    for (model, variant), variant_answers in answers.items():
        for row in (
            variant_answers.passages
            if name == SHARED_TEXT
            else variant_answers.predictions.get(name, ())  # a further draw lacks some sets
        ):
            item = rows.setdefault(row["id"], _subset(row, ITEM_KEYS) | {"models": {}})
            of_model = item["models"].setdefault(model, _subset(row, MODEL_KEYS) | {"answers": {}})
            shared_fields = {k: v for k, v in (item | of_model).items() if row.get(k) == v}
            variant_fields = {
                k: v for k, v in row.items() if k not in shared_fields and k not in VARIANT_KEYS
            }
            of_model["answers"][variant] = variant_fields
    return list(rows.values())


def _subset(row: dict, keys: tuple[str, ...]) -> dict:
    return {key: row[key] for key in keys if key in row}


def _rows_of_variant(
    folder: Path, name: str, rows: list[dict], owner: tuple[str, str]
) -> list[dict]:
    """The evaluation's rows of one variant of one model."""
    model, variant = owner
    variant_rows = []
    for row in rows:
        try:
            of_model = row["models"][model]
            variant_fields = of_model["answers"][variant]
        except KeyError:
            raise StudyError(
                f"{folder.name}/{name}.jsonl: item {row['id']} has no answer of "
                f"{_variant_path(owner)}; run {MADE_BY} again"
            ) from None
        variant_rows.append(
            _subset(row, ITEM_KEYS) | _subset(of_model, MODEL_KEYS) | variant_fields
        )
    return variant_rows
