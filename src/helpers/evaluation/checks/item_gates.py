"""Gates on the items of a set: their raw rows, what depends on one another, what was seen.

Near-duplicates are found here by code of its own, as the items are drawn by the other.
Imports no torch.
"""

from collections import Counter, defaultdict
from collections.abc import Iterator
from itertools import pairwise

from helpers.core.gates import Gate, none_of
from helpers.sources.items import Item, item_key, normalized_text
from helpers.sources.raw_rows import item_digest

RUN = 4  # words; two items that share half of their runs are one question
EXACT_ONLY = ("worked-example",)  # a few words long


def raw_rows_gate(rows: list[dict], items: list[Item], digests: dict[str, set[str]]) -> Gate:
    """Texts and golds are those of the raw row with the item's id.

    Args:
        rows: predictions.
        items: as drawn now.
        digests: by item id, hashes of the raw rows, taken before any adapter.
    """
    golds = {row["id"]: row["golds"] for row in rows}
    odd = [
        item.id
        for item in items
        for said in (item.golds, golds.get(item.id, item.golds))
        if item_digest(item, said) not in digests.get(item.id, ())
    ]
    return none_of(
        "golds and texts of the raw rows", list(dict.fromkeys(odd)), len(items), "are others"
    )


def clusters_gate(rows: list[dict], items: list[Item]) -> Gate:
    """Items on one passage, and items in nearly the same words, count as one cluster."""
    clusters = {row["id"]: row["cluster"] or row["id"] for row in rows}
    odd = [
        f"{one.id} and {other.id}"
        for one, other in [*near_pairs(items, items), *_same_passage(items)]
        if one.id in clusters and other.id in clusters and clusters[one.id] != clusters[other.id]
    ]
    return Gate(
        "near-duplicates in one cluster",
        not odd,
        f"{len(set(clusters.values()))} clusters of {len(items)} items; {len(odd)} pairs "
        f"apart{f' ({odd[0]})' if odd else ''}",
        "none apart that share a passage or half of their four-word runs",
    )


def leakage_gate(items: list[Item], seen: dict[str, list[Item]]) -> Gate:
    """No question, word for word or nearly so, was used to make the variant."""
    keys = {item_key(i): i.id for i in items}
    same = [
        f"{keys[item_key(other)]} in {use}"
        for use, others in seen.items()
        for other in others
        if item_key(other) in keys
    ]
    near = [
        f"{one.id} in other words in {use}"
        for use, others in seen.items()
        if use not in EXACT_ONLY
        for one, other in near_pairs(items, others)
        if item_key(one) != item_key(other)
    ]
    used = " and ".join(f"{len(others)} {use} items" for use, others in seen.items())
    odd = same + near
    return Gate(
        "no leakage",
        not odd,
        f"{len(same)} of {len(items)} items among {used or 'no other items'}, {len(near)} in "
        f"other words" + (f" ({odd[0]})" if odd else ""),
        "none",
    )


def near_pairs(items: list[Item], others: list[Item]) -> Iterator[tuple[Item, Item]]:
    """Pairs of two items that share half of the runs of the one that has fewer."""
    runs = {id(item): _runs(item) for item in [*items, *others]}
    having = defaultdict(list)
    for other in others:
        for run in runs[id(other)]:
            having[run].append(other)
    for item in items:
        mine = runs[id(item)]
        together = Counter(id(other) for run in mine for other in having.get(run, ()))
        by_id = {id(other): other for run in mine for other in having.get(run, ())}
        for key, shared in together.items():
            if by_id[key] is not item and 2 * shared >= min(len(mine), len(runs[key])):
                yield item, by_id[key]


def _runs(item: Item) -> set[str]:
    words = normalized_text(" ".join((item.question, item.passage, *item.options))).split()
    return {" ".join(words[i : i + RUN]) for i in range(max(1, len(words) - RUN + 1))}


def _same_passage(items: list[Item]) -> Iterator[tuple[Item, Item]]:
    """Neighbours among the items that have one passage."""
    by_passage = defaultdict(list)
    for item in items:
        if item.passage:
            by_passage[item.passage].append(item)
    for found in by_passage.values():
        yield from pairwise(found)
