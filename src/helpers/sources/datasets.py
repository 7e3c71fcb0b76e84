"""Items in one shape each, from rows in the Hub's schemas; drawn with a seed, without leaks.

Rows come from the shipped files, a local JSONL or parquet file, or the Hub. What an
item is asked lies in `helpers.evaluation.prompts`; here only its content.
"""

import json
import random
import re
import unicodedata
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

from helpers.study.errors import StudyError
from helpers.study.hashing import sha256_data, sha256_text
from helpers.study.loading import resolve
from helpers.study.plain_text import one_line, whole_characters
from helpers.study.schema import (
    DatasetSource,
    FileDataset,
    HubDataset,
    ShippedDataset,
    Study,
)


@dataclass(frozen=True)
class Item:
    """One question.

    Attributes:
        id: the row's own id, or a hash of its content.
        question: the question or problem.
        passage: the text it is about, empty if none.
        options: option texts of a multiple-choice item; yes/no for BoolQ.
        labels: the options' labels in the source ("A"…, "1"…).
        golds: right answers: one label, or any of several texts; empty if unanswerable.
        cluster: items with the same value share a passage and are not independent.
        solution: a worked solution to train on, empty if none.
    """

    id: str
    question: str
    golds: tuple[str, ...]
    passage: str = ""
    options: tuple[str, ...] = ()
    labels: tuple[str, ...] = ()
    cluster: str = ""
    title: str = ""
    solution: str = ""


def normalized_text(text: str) -> str:
    """Lower-case words and operators without punctuation or accents.

    Two texts that differ in less are one; `2 + 3` and `2 - 3` stay two.
    """
    kept = text.casefold() if text.isascii() else "".join(map(_bare, text))
    return " ".join(re.findall(r"\w+|[+*/=<>^%]|-(?=\s*\d)", kept))


@cache
def _bare(character: str) -> str:
    """A character decomposed, folded and without accents.

    One by one: normalising a whole text sorts its accents, in quadratic time.
    """
    folded = unicodedata.normalize("NFKD", character).casefold()
    return "".join(c for c in folded if not unicodedata.combining(c))


def item_key(item: Item) -> str:
    """What makes two items the same question, whatever their ids and the options' order."""
    parts = (item.question, item.passage, *sorted(item.options))
    return sha256_text("\n".join(map(normalized_text, parts)))


def _text(value) -> str:
    """The value, if it is a text that says something; a number or a list is a broken row."""
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{value!r} stands where a text belongs")
    return _whole(value)


def _whole(value) -> str:
    """The value, if it is a text or nothing; half a surrogate pair cannot be written."""
    text = "" if value is None else value
    if not isinstance(text, str):
        raise ValueError(f"{value!r} stands where a text belongs")
    if text != whole_characters(text):
        raise ValueError(f"{value!r} holds half a character")
    return text


def _texts(values) -> tuple[str, ...]:
    if not isinstance(values, list | tuple):
        raise ValueError(f"{values!r} stands where a list of texts belongs")
    return tuple(_text(value) for value in values)


def label_key(label: str) -> str:
    """What two labels that are read alike have in common: `A`, `a` and ` A.`."""
    return label.strip().rstrip(".").casefold()


def adapt_arc(row: dict) -> Item:
    """`allenai/ai2_arc`: three to five options, labelled by letters or digits."""
    labels, options = _texts(row["choices"]["label"]), _texts(row["choices"]["text"])
    if len(labels) != len(options) or len(set(map(label_key, labels))) != len(labels):
        raise ValueError(f"labels {labels} do not name {len(options)} options")
    if row["answerKey"] not in labels:
        raise ValueError(f"answerKey {row['answerKey']!r} is none of the labels {labels}")
    return Item(
        id=_text(row["id"]),
        question=_text(row["question"]),
        options=options,
        labels=labels,
        golds=(row["answerKey"],),
        cluster=row["id"],
    )


def adapt_boolq(row: dict) -> Item:
    """`google/boolq`: has no ids, so the content's hash is the id."""
    if not isinstance(row["answer"], bool):
        raise ValueError(f"answer {row['answer']!r} is not true or false")
    return Item(
        id=sha256_data([_text(row["question"]), _text(row["passage"])])[:16],
        question=row["question"],
        passage=row["passage"],
        options=("yes", "no"),
        labels=("yes", "no"),
        golds=("yes" if row["answer"] else "no",),
        cluster=sha256_text(row["passage"])[:16],
    )


def adapt_squad_v2(row: dict) -> Item:
    """`rajpurkar/squad_v2`: every gold answer is kept; none means unanswerable."""
    return Item(
        id=_text(row["id"]),
        question=_text(row["question"]),
        passage=_text(row["context"]),
        golds=tuple(dict.fromkeys(_texts(row["answers"]["text"]))),
        cluster=sha256_text(row["context"])[:16],
        title=_whole(row["title"]),
    )


def adapt_openmath(row: dict) -> Item:
    """`nvidia/OpenMathInstruct-2`: the expected answer is a string, not always a number."""
    identifier = sha256_data([_text(row["problem"]), _text(row["expected_answer"])])[:16]
    return Item(
        id=identifier,
        question=row["problem"],
        golds=(row["expected_answer"],),
        cluster=identifier,
        solution=_whole(row["generated_solution"]),
    )


ADAPTERS: dict[str, Callable[[dict], Item]] = {
    "arc": adapt_arc,
    "boolq": adapt_boolq,
    "squad_v2": adapt_squad_v2,
    "openmath": adapt_openmath,
}


def load_rows(source: DatasetSource) -> list[dict]:
    """All rows of a source, in its own order.

    Raises:
        StudyError: the source cannot be read; says what to do.
    """
    match source:
        case ShippedDataset(shipped=name):
            text = files("helpers.sources").joinpath(f"data/{name}.jsonl").read_text("utf-8")
            return [json.loads(line) for line in text.rstrip("\n").split("\n")]
        case FileDataset(file=name):
            return _file_rows(name)
        case HubDataset():
            return _hub_rows(source)
    raise StudyError(f"{source!r} is not a kind of dataset source")


def _file_rows(name: str) -> list[dict]:
    path = resolve(name)
    if path.suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        try:
            return pyarrow.parquet.read_table(path).to_pylist()
        except (pyarrow.ArrowException, OSError, ValueError) as error:
            raise StudyError(f"{name}: is not parquet ({one_line(error)}); mend it") from None
    rows = []
    # Only \n ends a line: texts may hold other separators that splitlines() would cut at.
    for number, line in enumerate(path.read_bytes().rstrip().split(b"\n"), start=1):
        try:
            rows.append(json.loads(line))
        except (ValueError, RecursionError) as error:
            raise StudyError(f"{name}: line {number} is not JSON ({error}); mend it") from None
    return rows


def _hub_rows(source: HubDataset) -> list[dict]:
    from datasets import load_dataset

    try:
        return load_dataset(
            source.hub, source.config, split=source.split, revision=source.revision
        ).to_list()
    except Exception as error:  # the client raises many kinds; each means the rows are not here
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise StudyError(
            f"dataset {source.hub!r} ({source.split}) could not be fetched ({reason}); check the "
            "name, the network and your access, or name a local file instead"
        ) from None


def load_items(source: DatasetSource, *, adapter: str) -> list[Item]:
    """The items of a source, repeated questions left out, in the source's order.

    Raises:
        StudyError: a row does not fit the adapter's schema, or there are no rows.
    """
    items: dict[str, Item] = {}
    ids: set[str] = set()
    for number, row in enumerate(load_rows(source), start=1):
        try:
            item = ADAPTERS[adapter](row)
        except (KeyError, TypeError, ValueError) as error:
            reason = f"it has no {error}" if isinstance(error, KeyError) else str(error)
            raise StudyError(
                f"{_shown(source)}: row {number} is no {adapter} item ({reason}); "
                "give the Hub's schema or another adapter"
            ) from None
        known = items.setdefault(item_key(item), item)
        if known is item and item.id in ids:
            raise StudyError(
                f"{_shown(source)}: row {number} repeats the id {item.id!r} of another question; "
                "give each its own"
            )
        ids.add(item.id)
    if not items:
        raise StudyError(f"{_shown(source)}: holds no rows; give a source with items")
    return list(items.values())


def _shown(source: DatasetSource) -> str:
    return next(iter(source.model_dump().values()))


def draw(items: list[Item], count: int, *, seed: int, excluding: Iterable[str], what: str):
    """`count` items in seeded order, none of them with a key in `excluding`.

    Items with titles are drawn title by title, since their raw order is clustered.

    Raises:
        StudyError: there are fewer than `count` items to draw from.
    """
    barred = set(excluding)
    free = [item for item in items if item_key(item) not in barred]
    if len(free) < count:
        raise StudyError(
            f"{what}: {count} items asked for but {len(free)} to draw from "
            f"({len(items) - len(free)} left out as used elsewhere); ask for at most {len(free)}"
        )
    free.sort(key=lambda item: sha256_text(f"{seed}:{item_key(item)}"))
    rounds: dict[str, int] = {}
    turn = {}
    for item in free:
        turn[item.id] = rounds.get(item.title, 0) if item.title else 0
        rounds[item.title] = turn[item.id] + 1
    free.sort(key=lambda item: turn[item.id])
    return free[:count]


def evaluation_items(study: Study, dataset: str) -> list[Item]:
    """The items of one evaluation set, the same for every model and variant."""
    wanted = study.evaluation.datasets[dataset]
    items = load_items(wanted.source, adapter=wanted.adapter)
    what = f"evaluation.datasets.{dataset}"
    return draw(items, wanted.items, seed=study.seed, excluding=(), what=what)


def calibration_items(study: Study) -> list[Item]:
    """The calibration items; no question among them is an evaluation item."""
    wanted = study.calibration
    items = load_items(wanted.dataset, adapter=wanted.adapter)
    barred = _evaluation_keys(study)
    return draw(items, wanted.items, seed=study.seed, excluding=barred, what="calibration")


def training_items(study: Study, model: str) -> tuple[list[Item], list[Item]]:
    """(training, held-out) items of a fine-tuning.

    No question is shared with calibration or evaluation, or between the two.
    """
    wanted = study.models[model].finetune
    items = load_items(wanted.dataset, adapter="openmath")
    barred = _evaluation_keys(study) | {item_key(item) for item in calibration_items(study)}
    count = wanted.items + wanted.heldout_items
    what = f"models.{model}.finetune"
    drawn = draw(items, count, seed=study.seed, excluding=barred, what=what)
    return drawn[: wanted.items], drawn[wanted.items :]


def _evaluation_keys(study: Study) -> set[str]:
    return {
        item_key(item)
        for dataset in study.evaluation.datasets
        for item in evaluation_items(study, dataset)
    }


def shared_passages(study: Study) -> list[str]:
    """Distinct passages in seeded order, read by every variant.

    Raises:
        StudyError: the source has fewer passages than asked for.
    """
    wanted = study.evaluation.shared_text
    rows = enumerate(load_rows(wanted.dataset), start=1)
    passages = sorted({_passage(wanted.dataset, number, row) for number, row in rows})
    if len(passages) < wanted.passages:
        raise StudyError(
            f"evaluation.shared_text.passages = {wanted.passages} but {_shown(wanted.dataset)} "
            f"has {len(passages)}; ask for at most that"
        )
    random.Random(study.seed).shuffle(passages)
    return passages[: wanted.passages]


def _passage(source: DatasetSource, number: int, row: dict) -> str:
    try:
        return _text(row["context"])
    except (KeyError, TypeError, ValueError):
        raise StudyError(
            f"{_shown(source)}: row {number} has no 'context' to read; "
            "give a source in SQuAD's schema"
        ) from None
