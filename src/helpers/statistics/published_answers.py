"""All answers of a study in a few small files, so that its verdicts can be made again.

One file an evaluation set, one line an item, with every model's and variant's answer side
by side; one file for the shared text; one with every gate. What the answers to an item have
in common stands once. Reading them gives back the rows that verdicts are made from:
nothing of a model, a tokenizer or torch is needed. Imports no torch.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from helpers.core.errors import StudyError
from helpers.core.gates import WHOLE_VARIANT, failed_check
from helpers.core.hashing import sha256_file
from helpers.core.records import read_json, read_jsonl, write_json, write_jsonl
from helpers.evaluation.predictions import SHARED_TEXT
from helpers.statistics.comparison import Answers
from helpers.statistics.controls import Asked, Duty, duty
from helpers.study.schema import Study

GATES = "gates.json"
OF_ITEM = ("id", "cluster", "golds", "foil")
OF_MODEL = (  # a chat template and a tokenizer decide
    "prompt_hash",
    "prompt_tokens",
    "tokens",
    "gold_hash",
    "gold_tokens",
    "foil_tokens",
)
OWNER = ("model", "variant")
MADE_BY = "04_analysis"

By = Mapping[tuple[str, str], Asked]  # by (model, variant)


@dataclass(frozen=True)
class Published:
    """What a published study keeps of its answers: enough for every verdict."""

    study: Study
    asked: dict[tuple[str, str], Asked]

    @property
    def answers(self) -> dict[tuple[str, str, str], Answers]:
        """By (model, dataset, variant), as verdicts take them."""
        return {
            (model, dataset, variant): Answers(
                variant, rows, failed_check(found.gates, [WHOLE_VARIANT, dataset])
            )
            for (model, variant), found in self.asked.items()
            for dataset, rows in found.predictions.items()
        }

    @property
    def duties(self) -> dict[tuple[str, str], Duty]:
        """By (model, variant): whether each control did what it is there for."""
        return all_duties(self.study, self.asked)


def all_duties(study: Study, asked: By) -> dict[tuple[str, str], Duty]:
    """The duty of every control of every model, by (model, variant)."""
    order = [study.baseline, *(v for v in study.variants if v != study.baseline)]
    found = {
        (m, v): duty(study, v, asked[m, v], asked[m, study.baseline])
        for m in study.models
        for v in order
    }
    return {at: told for at, told in found.items() if told}


def write_answers(folder: Path, study: Study, asked: By) -> dict[str, str]:
    """Write all files into a folder; return the content hash of each by its name."""
    files = {f"{name}.jsonl": _side_by_side(asked, name) for name in study.evaluation.datasets}
    files[f"{SHARED_TEXT}.jsonl"] = _side_by_side(asked, SHARED_TEXT)
    for name, rows in files.items():
        write_jsonl(folder / name, rows)
    gates = {_owner(at): list(map(_brief, found.gates)) for at, found in asked.items()}
    write_json(folder / GATES, gates)
    return {name: sha256_file(folder / name) for name in [*files, GATES]}


def read_answers(folder: Path, study: Study) -> Published:
    """What `write_answers` wrote, every item of every set and every variant there.

    Raises:
        StudyError: a file is missing or damaged, or lacks a variant or an item.
    """
    gates = read_json(folder / GATES, made_by=MADE_BY)
    owners = [(m, v) for m in study.models for v in study.variants]
    names = [*study.evaluation.datasets, SHARED_TEXT]
    rows = {name: read_jsonl(folder / f"{name}.jsonl", made_by=MADE_BY) for name in names}
    for name, wanted in study.evaluation.datasets.items():
        if len(rows[name]) != wanted.items:
            raise StudyError(
                f"{folder.name}/{name}.jsonl has {len(rows[name])} items but the study asks "
                f"{wanted.items}; run {MADE_BY} again"
            )
    asked = {}
    for at in owners:
        if _owner(at) not in gates:
            raise StudyError(f"{folder.name}/{GATES} has no {_owner(at)}; run {MADE_BY} again")
        by_name = {name: _of_owner(folder, name, rows[name], at) for name in names}
        passages = by_name.pop(SHARED_TEXT)
        asked[at] = Asked(by_name, passages, gates[_owner(at)])
    return Published(study, asked)


def _brief(gate: dict) -> dict:
    """A gate that holds by its name alone; what one that fails measured, in full."""
    kept = ("name", "passed", "invalidates") if gate["passed"] else gate
    return {key: gate[key] for key in kept if key in gate}


def _owner(at: tuple[str, str]) -> str:
    return "/".join(at)


def _side_by_side(asked: By, name: str) -> list[dict]:
    """One row an item, in the first variant's order: its own keys, then by model, by variant.

    What a variant was asked otherwise than the first one stands beside its own answer.
    """
    rows: dict[str, dict] = {}
    for (model, variant), found in asked.items():
        for row in found.passages if name == SHARED_TEXT else found.predictions[name]:
            item = rows.setdefault(row["id"], _only(row, OF_ITEM) | {"models": {}})
            of_model = item["models"].setdefault(model, _only(row, OF_MODEL) | {"answers": {}})
            common = {k: v for k, v in (item | of_model).items() if row.get(k) == v}
            own = {k: v for k, v in row.items() if k not in common and k not in OWNER}
            of_model["answers"][variant] = own
    return list(rows.values())


def _only(row: dict, keys: tuple[str, ...]) -> dict:
    return {key: row[key] for key in keys if key in row}


def _of_owner(folder: Path, name: str, rows: list[dict], at: tuple[str, str]) -> list[dict]:
    """The rows of one variant of one model, as the evaluation had them."""
    model, variant = at
    found = []
    for row in rows:
        try:
            of_model = row["models"][model]
            own = of_model["answers"][variant]
        except KeyError:
            raise StudyError(
                f"{folder.name}/{name}.jsonl: item {row['id']} has no answer of {_owner(at)}; "
                f"run {MADE_BY} again"
            ) from None
        found.append(_only(row, OF_ITEM) | _only(of_model, OF_MODEL) | own)
    return found
