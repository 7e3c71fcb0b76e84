"""The items of a study, drawn from its sources with a seed, without leaks.

Which items are asked, calibrated with and trained on is decided here and nowhere else: by seed and
content, never by the order of a file. A question, by its normalised text, is used for one of the
three only, and so are questions in other words: near-duplicates share half of their four-word
sequences. The same measure tells which items of a set are not independent. Sequences are of
normalized words; what is shared is counted against the shorter item, so that a text with something
put before or after it stays the same one.
"""

import random
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import lru_cache

from helpers.core.errors import StudyError
from helpers.core.records import sha256_text
from helpers.sources.items import (
    ADAPTERS,
    EXPECTED_PASSAGE,
    EXPECTED_ROWS,
    Item,
    describe_value,
    gold_number,
    item_key,
    load_rows,
    normalized_text,
    text_of,
)
from helpers.sources.tasks import task_items, with_foils
from helpers.study.schema import AnySet, DatasetSource, FineTunedModel, HubDataset, Study, TaskSet

WORDS = 4  # of a sequence
SHARE = 0.5  # of the sequences of the shorter item

Sequences = frozenset[tuple[str, ...]]


def sequences(item: Item) -> Sequences:
    """All four-word sequences of question, passage and options; of a shorter text, itself."""
    words = normalized_text("\n".join((item.question, item.passage, *item.options))).split()
    if len(words) <= WORDS:
        return frozenset({tuple(words)})
    return frozenset(tuple(words[i : i + WORDS]) for i in range(len(words) - WORDS + 1))


class Index:
    """Items indexed by their sequences, to find near-duplicates of an item among them."""

    def __init__(self, items: Sequence[Item]):
        self._sizes: list[int] = []
        self._places: dict[tuple[str, ...], list[int]] = defaultdict(list)
        for index, item in enumerate(items):
            item_sequences = sequences(item)
            self._sizes.append(len(item_sequences))
            for sequence in item_sequences:
                self._places[sequence].append(index)

    def near(self, item: Item) -> list[int]:
        """Indices of the item's near-duplicates; its own too, if it is indexed."""
        item_sequences = sequences(item)
        shared = Counter(index for s in item_sequences for index in self._places.get(s, ()))
        return [
            p for p, n in shared.items() if n >= SHARE * min(len(item_sequences), self._sizes[p])
        ]


@lru_cache(maxsize=8)
def near_duplicate_keys(pool: tuple[Item, ...], others: tuple[Item, ...]) -> frozenset[str]:
    """Keys of the items of a pool that are near-duplicates of others."""
    index = Index(others)
    return frozenset(item_key(item) for item in pool if index.near(item))


def cluster_near_duplicates(items: Iterable[Item]) -> list[Item]:
    """The items; near-duplicates and items that share a passage with them get one cluster."""
    return list(_clustered(tuple(items)))


@lru_cache(maxsize=16)
def _clustered(items: tuple[Item, ...]) -> tuple[Item, ...]:
    index, parent = Index(items), {}
    names = [item.cluster or item.id for item in items]

    def root(name: str) -> str:
        while (next_name := parent.get(name, name)) != name:
            name = next_name
        return name

    for item, name in zip(items, names, strict=True):
        for near_index in index.near(item):
            one, other = sorted((root(name), root(names[near_index])))
            if one != other:
                parent[other] = one
    roots = (root(name) for name in names)
    return tuple(
        item if cluster == name else replace(item, cluster=cluster)
        for item, name, cluster in zip(items, names, roots, strict=True)
    )


def load_items(source: DatasetSource, *, adapter: str) -> list[Item]:
    """The items of a source in its order, without repeated questions.

    Raises:
        StudyError: a row does not fit the adapter's schema, or there are no rows.
    """
    return list(_items_and_row_count(source, adapter)[0])


def set_items(evaluation_set: AnySet) -> tuple[tuple[Item, ...], int]:
    """(items that an evaluation set is drawn from, number of rows read).

    Raises:
        StudyError: as `load_items`, or the harness cannot read the rows of a task.
    """
    if isinstance(evaluation_set, TaskSet):
        return task_items(evaluation_set)
    return _items_and_row_count(evaluation_set.source, evaluation_set.adapter)


def _items_and_row_count(source: DatasetSource, adapter: str) -> tuple[tuple[Item, ...], int]:
    """(items, number of rows read)."""
    # A commit does not change, and every job draws from the same rows several times.
    return (
        _adapt_cached(source, adapter)
        if isinstance(source, HubDataset)
        else _adapt(source, adapter)
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
                f"{_source_name(source)}: row {number} is no {adapter} item ({_reason(error)}): "
                f"found {describe_value(row)}, expected {EXPECTED_ROWS[adapter]}; give the Hub's "
                "schema, columns or another adapter"
            ) from None
        first_item = items.setdefault(item_key(item), item)
        if first_item is item and item.id in ids:
            raise StudyError(
                f"{_source_name(source)}: row {number} repeats the id {item.id!r} of another "
                "question; give each its own"
            )
        ids.add(item.id)
    if not items:
        raise StudyError(f"{_source_name(source)}: holds no rows; give a source with items")
    return tuple(items.values()), len(rows)


def _reason(error: Exception) -> str:
    match error:
        case KeyError():
            return f"it has no {error}"
        case TypeError():  # a list or a text where a mapping belongs
            return "a part of it has another shape"
    return str(error)


_adapt_cached = lru_cache(maxsize=8)(_adapt)


def _source_name(source: DatasetSource) -> str:
    return next(iter(source.model_dump().values()))


def draw_items(items: list[Item], count: int, *, seed: int, excluding: Iterable[str], label: str):
    """Draw `count` items in seeded order, none with a key in `excluding`.

    The draw alternates between titles, since a source lists items of one title together.

    Raises:
        StudyError: there are fewer than `count` items to draw from.
    """
    excluded_keys = set(excluding)
    candidates = [item for item in items if item_key(item) not in excluded_keys]
    if len(candidates) < count:
        raise StudyError(
            f"{label}: {count} items asked for but {len(candidates)} to draw from "
            f"({len(items) - len(candidates)} left out: used elsewhere, or near-duplicates); ask "
            f"for at most {len(candidates)}"
        )
    candidates.sort(key=lambda item: sha256_text(f"{seed}:{item_key(item)}"))
    rounds: dict[str, int] = {}
    round_of = {}
    for item in candidates:
        round_of[item.id] = rounds.get(item.title, 0) if item.title else 0
        rounds[item.title] = round_of[item.id] + 1
    candidates.sort(key=lambda item: round_of[item.id])
    return candidates[:count]


def evaluation_items(study: Study, dataset: str) -> list[Item]:
    """The items of one evaluation set, the same for every model and variant.

    Near-duplicates get one cluster, since they are no independent questions.
    """
    settings = study.evaluation.datasets[dataset]
    items = list(set_items(settings)[0])
    if settings.keep == "numeric_answers":
        items = [item for item in items if is_numeric(item)]
    label = f"evaluation.datasets.{dataset}"
    drawn = cluster_near_duplicates(
        draw_items(items, settings.items, seed=study.seed, excluding=(), label=label)
    )
    return with_foils(drawn, settings) if isinstance(settings, TaskSet) else drawn


def item_ids(items: Iterable[Item]) -> list[str]:
    """The items' ids in their order, for the record."""
    return [item.id for item in items]


def is_numeric(item: Item) -> bool:
    """Whether the gold answer is a single number, of which any spelling is right."""
    return gold_number(item.golds[0]) is not None


def pool_sizes(study: Study) -> dict[str, dict[str, int]]:
    """The pool of each evaluation set: rows read, distinct questions, non-numeric answers.

    For the record, which shows the share of non-numeric answers whether `keep` excluded them
    or not.
    """
    sizes = {}
    for name, settings in study.evaluation.datasets.items():
        items, rows = set_items(settings)
        sizes[name] = {"rows": rows, "questions": len(items)}
        if settings.adapter == "openmath":
            sizes[name]["answers_not_numeric"] = sum(not is_numeric(item) for item in items)
            sizes[name]["left_out"] = sizes[name]["answers_not_numeric"] * bool(settings.keep)
    return sizes


def calibration_items(study: Study, name: str = "", *, draw: int = 1) -> list[Item]:
    """The calibration items; none is an evaluation item or a near-duplicate of one.

    Those of a further draw are none of an earlier draw's, and no training items of any model.
    The first draw of the study's own calibration is made before training items are drawn, and is
    the same with and without further draws. A named calibration has no training items. Of two
    calibrations from one source the smaller one's items are among the larger one's.

    Args:
        name: one of the study's `calibrations`; empty for its own.
    """
    settings = study.calibration_called(name)
    items = load_items(settings.dataset, adapter=settings.adapter)
    excluded, label = _evaluation_keys(study, items), f"calibrations.{name}"
    if name:
        excluded |= _training_keys(study)
    drawn = draw_items(
        items,
        settings.items,
        seed=study.seed,
        excluding=excluded,
        label=label if name else "calibration",
    )
    if draw > 1:
        excluded |= _training_keys(study)
    for number in range(2, draw + 1):
        excluded |= {item_key(item) for item in drawn}
        label = f"{label if name else 'calibration'}, draw {number} of the variants with repeats"
        drawn = draw_items(items, settings.items, seed=study.seed, excluding=excluded, label=label)
    return drawn


def _training_keys(study: Study) -> set[str]:
    """Keys of the training and held-out items of all models."""
    return {
        item_key(item)
        for model, source in study.models.items()
        if isinstance(source, FineTunedModel)
        for part in training_items(study, model)
        for item in part
    }


def training_items(study: Study, model: str) -> tuple[list[Item], list[Item]]:
    """(training, held-out) items of a fine-tuning.

    The two share no question with each other, calibration or evaluation; none is a
    near-duplicate of an evaluation item.
    """
    settings = study.models[model].finetune
    items = load_items(settings.dataset, adapter="openmath")
    excluded = _evaluation_keys(study, items) | {
        item_key(item) for item in calibration_items(study)
    }
    count = settings.items + settings.heldout_items
    label = f"models.{model}.finetune"
    drawn = draw_items(items, count, seed=study.seed, excluding=excluded, label=label)
    return drawn[: settings.items], drawn[settings.items :]


def _evaluation_keys(study: Study, pool: list[Item]) -> set[str]:
    """Keys of the evaluation items, and of their near-duplicates in a pool."""
    evaluated = tuple(
        item for dataset in study.evaluation.datasets for item in evaluation_items(study, dataset)
    )
    return {item_key(item) for item in evaluated} | near_duplicate_keys(tuple(pool), evaluated)


def shared_passages(study: Study) -> list[str]:
    """Distinct passages in seeded order, read by every variant.

    Raises:
        StudyError: the source has fewer passages than the study needs.
    """
    settings = study.evaluation.shared_text
    rows = enumerate(load_rows(settings.dataset), start=1)
    passages = sorted({_passage(settings.dataset, number, row) for number, row in rows})
    if len(passages) < settings.passages:
        raise StudyError(
            f"evaluation.shared_text.passages = {settings.passages} but "
            f"{_source_name(settings.dataset)} has {len(passages)}; ask for at most that"
        )
    random.Random(study.seed).shuffle(passages)
    return passages[: settings.passages]


def _passage(source: DatasetSource, number: int, row: dict) -> str:
    try:
        return text_of(row["context"])
    except (KeyError, TypeError, ValueError):
        raise StudyError(
            f"{_source_name(source)}: row {number} has no 'context': found {describe_value(row)}, "
            f"expected {EXPECTED_PASSAGE}; give a source in SQuAD's schema"
        ) from None
