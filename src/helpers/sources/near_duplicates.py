"""Items that are one question in other words: they share half of their four-word sequences.

The same measure tells which items of a set are not independent, and which items of another
use must not be drawn. Sequences are of normalized words; what is shared is counted against
the shorter item, so that a text with something put before or after it stays the same one.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import lru_cache

from helpers.sources.items import Item, item_key, normalized_text

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
