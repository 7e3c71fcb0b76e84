"""The items of a study, drawn from its sources with a seed, without leaks.

Which items are asked, calibrated with and trained on is decided here and nowhere else:
by seed and content, never by the order of a file. A question, by its normalised text, is
used for one of the three only.
"""

import random
from collections.abc import Iterable
from functools import lru_cache

from helpers.core.errors import StudyError
from helpers.core.hashing import sha256_text
from helpers.sources.exact_numbers import gold_number
from helpers.sources.items import ADAPTERS, Item, item_key, text_of
from helpers.sources.near_duplicates import cluster_near_duplicates, near_duplicate_keys
from helpers.sources.row_shapes import EXPECTED_PASSAGE, EXPECTED_ROWS, describe_value
from helpers.sources.rows import load_rows
from helpers.study.schema import Study
from helpers.study.schema_sources import DatasetSource, HubDataset


def load_items(source: DatasetSource, *, adapter: str) -> list[Item]:
    """The items of a source, repeated questions left out, in the source's order.

    Raises:
        StudyError: a row does not fit the adapter's schema, or there are no rows.
    """
    return list(_read(source, adapter)[0])


def _read(source: DatasetSource, adapter: str) -> tuple[tuple[Item, ...], int]:
    """(items, number of the rows they are from)."""
    # At a commit nothing changes, and every job draws from the same rows several times.
    return (
        _read_once(source, adapter) if isinstance(source, HubDataset) else _adapt(source, adapter)
    )


def _adapt(source: DatasetSource, adapter: str) -> tuple[tuple[Item, ...], int]:
    items: dict[str, Item] = {}
    ids: set[str] = set()
    rows = load_rows(source)
    for number, row in enumerate(rows, start=1):
        try:
            item = ADAPTERS[adapter](row)
        except (KeyError, TypeError, ValueError) as error:
            raise StudyError(
                f"{_shown(source)}: row {number} is no {adapter} item ({_reason(error)}): it is "
                f"{describe_value(row)}, wanted is {EXPECTED_ROWS[adapter]}; give the Hub's "
                "schema or another adapter"
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
    return tuple(items.values()), len(rows)


def _reason(error: Exception) -> str:
    match error:
        case KeyError():
            return f"it has no {error}"
        case TypeError():  # a list or a text where a mapping belongs
            return "a part of it has another shape"
    return str(error)


_read_once = lru_cache(maxsize=8)(_adapt)


def _shown(source: DatasetSource) -> str:
    return next(iter(source.model_dump().values()))


def draw_items(items: list[Item], count: int, *, seed: int, excluding: Iterable[str], what: str):
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
            f"({len(items) - len(free)} left out as used elsewhere, or nearly so); ask for at "
            f"most {len(free)}"
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
    """The items of one evaluation set, the same for every model and variant.

    Near-duplicates among them have one cluster: they are no independent questions.
    """
    wanted = study.evaluation.datasets[dataset]
    items = load_items(wanted.source, adapter=wanted.adapter)
    if wanted.keep == "numeric_answers":
        items = [item for item in items if is_numeric(item)]
    what = f"evaluation.datasets.{dataset}"
    return cluster_near_duplicates(
        draw_items(items, wanted.items, seed=study.seed, excluding=(), what=what)
    )


def item_ids(items: Iterable[Item]) -> list[str]:
    """The items' ids in their order, for the record."""
    return [item.id for item in items]


def is_numeric(item: Item) -> bool:
    """Whether the gold answer is a single number, so that other spellings of it are right too."""
    return gold_number(item.golds[0]) is not None


def pool_sizes(study: Study) -> dict[str, dict[str, int]]:
    """What each evaluation set was drawn from: rows read, questions in them, how many numeric.

    For the record: the share of answers that are no numbers is known whether they were
    kept or left out.
    """
    found = {}
    for name, wanted in study.evaluation.datasets.items():
        items, rows = _read(wanted.source, wanted.adapter)
        found[name] = {"rows": rows, "questions": len(items)}
        if wanted.adapter == "openmath":
            found[name]["answers_not_numeric"] = sum(not is_numeric(item) for item in items)
            found[name]["left_out"] = found[name]["answers_not_numeric"] * bool(wanted.keep)
    return found


def calibration_items(study: Study) -> list[Item]:
    """The calibration items; no question among them is an evaluation item, or nearly one."""
    wanted = study.calibration
    items = load_items(wanted.dataset, adapter=wanted.adapter)
    barred = _evaluation_keys(study, items)
    return draw_items(items, wanted.items, seed=study.seed, excluding=barred, what="calibration")


def training_items(study: Study, model: str) -> tuple[list[Item], list[Item]]:
    """(training, held-out) items of a fine-tuning.

    No question is shared with calibration or evaluation, or between the two; none is an
    evaluation item in other words.
    """
    wanted = study.models[model].finetune
    items = load_items(wanted.dataset, adapter="openmath")
    barred = _evaluation_keys(study, items) | {item_key(item) for item in calibration_items(study)}
    count = wanted.items + wanted.heldout_items
    what = f"models.{model}.finetune"
    drawn = draw_items(items, count, seed=study.seed, excluding=barred, what=what)
    return drawn[: wanted.items], drawn[wanted.items :]


def _evaluation_keys(study: Study, pool: list[Item]) -> set[str]:
    """Keys of the evaluation items, and of the items of a pool that are nearly one of them."""
    asked = tuple(
        item for dataset in study.evaluation.datasets for item in evaluation_items(study, dataset)
    )
    return {item_key(item) for item in asked} | near_duplicate_keys(tuple(pool), asked)


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
        return text_of(row["context"])
    except (KeyError, TypeError, ValueError):
        raise StudyError(
            f"{_shown(source)}: row {number} has no 'context' to read: it is "
            f"{describe_value(row)}, wanted is {EXPECTED_PASSAGE}; give a source in SQuAD's schema"
        ) from None
