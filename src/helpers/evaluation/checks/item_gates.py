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

RUN = 4  # words per run; items that share half of their runs are near-duplicates
EXACT_ONLY = ("worked-example",)  # too short for near-duplicate search


def raw_rows_gate(rows: list[dict], items: list[Item], digests: dict[str, set[str]]) -> Gate:
    """Texts and golds equal those of the raw row with the item's id.

    Args:
        rows: predictions.
        items: the set's items, drawn again.
        digests: by item id, hashes of the raw rows, taken before any adapter.
    """
    golds = {row["id"]: row["golds"] for row in rows}
    differing = [
        item.id
        for item in items
        for golds_shown in (item.golds, golds.get(item.id, item.golds))
        if item_digest(item, golds_shown) not in digests.get(item.id, ())
    ]
    return none_of(
        "golds and texts match raw rows", list(dict.fromkeys(differing)), len(items), "are others"
    )


def clusters_gate(rows: list[dict], items: list[Item]) -> Gate:
    """Items on one passage, and near-duplicates, belong to one cluster."""
    clusters = {row["id"]: row["cluster"] or row["id"] for row in rows}
    split_pairs = [
        f"{first.id} and {second.id}"
        for first, second in [*near_pairs(items, items), *_same_passage(items)]
        if first.id in clusters
        and second.id in clusters
        and clusters[first.id] != clusters[second.id]
    ]
    return Gate(
        "near-duplicates in one cluster",
        not split_pairs,
        f"{len(set(clusters.values()))} clusters of {len(items)} items; {len(split_pairs)} pairs "
        f"apart{f' ({split_pairs[0]})' if split_pairs else ''}",
        "none apart that share a passage or half of their four-word runs",
    )


def leakage_gate(items: list[Item], used_items: dict[str, list[Item]]) -> Gate:
    """No question, nor a near-duplicate of one, was used to make the variant."""
    keys = {item_key(i): i.id for i in items}
    repeated = [
        f"{keys[item_key(second)]} in {use}"
        for use, others in used_items.items()
        for second in others
        if item_key(second) in keys
    ]
    reworded = [
        f"{first.id} in other words in {use}"
        for use, others in used_items.items()
        if use not in EXACT_ONLY
        for first, second in near_pairs(items, others)
        if item_key(first) != item_key(second)
    ]
    counts = " and ".join(f"{len(others)} {use} items" for use, others in used_items.items())
    leaked = repeated + reworded
    return Gate(
        "no leakage",
        not leaked,
        f"{len(repeated)} of {len(items)} items among {counts or 'no other items'}, "
        f"{len(reworded)} in other words" + (f" ({leaked[0]})" if leaked else ""),
        "none",
    )


def near_pairs(items: list[Item], others: list[Item]) -> Iterator[tuple[Item, Item]]:
    """Pairs of items that share at least half the word runs of the one with fewer runs."""
    runs = {id(item): _runs(item) for item in [*items, *others]}
    items_with_run = defaultdict(list)
    for other in others:
        for run in runs[id(other)]:
            items_with_run[run].append(other)
    for item in items:
        own_runs = runs[id(item)]
        shared_runs = Counter(
            id(other) for run in own_runs for other in items_with_run.get(run, ())
        )
        by_id = {id(other): other for run in own_runs for other in items_with_run.get(run, ())}
        for key, shared in shared_runs.items():
            if by_id[key] is not item and 2 * shared >= min(len(own_runs), len(runs[key])):
                yield item, by_id[key]


def _runs(item: Item) -> set[str]:
    words = normalized_text(" ".join((item.question, item.passage, *item.options))).split()
    return {" ".join(words[i : i + RUN]) for i in range(max(1, len(words) - RUN + 1))}


def _same_passage(items: list[Item]) -> Iterator[tuple[Item, Item]]:
    """Consecutive pairs of the items on each passage."""
    by_passage = defaultdict(list)
    for item in items:
        if item.passage:
            by_passage[item.passage].append(item)
    for neighbours in by_passage.values():
        yield from pairwise(neighbours)
