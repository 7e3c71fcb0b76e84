"""Gates on items and prompts: raw rows, near-duplicates, leaks, draws, and what prompts hold.

Written a second time. Raw rows of a source are read apart from the adapters and hashed: golds that
an adapter took from the row before, or texts that were exchanged on the way, have other hashes. Of
each row only its fields are known here. Near-duplicates are found by code of its own. The draw is
made again from the hashes of the questions, the prompt from its item's own texts and from what the
tokenizer's template puts around a conversation. Imports no torch.
"""

import hashlib
import json
import random
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from helpers.core.records import Gate, none_of, sha256_data
from helpers.evaluation.checks.recomputed_tasks import missing_task_part, task_digests
from helpers.sources.chat import EXAMPLES, PLAIN_EXAMPLES, SYSTEM
from helpers.sources.items import Item, item_key, load_rows, local_rows, normalized_text
from helpers.study.inputs import dataset_files
from helpers.study.schema import (
    FIELDS,
    AnySet,
    DatasetSource,
    EvaluationSet,
    FileDataset,
    FolderDataset,
    ShippedDataset,
    TaskSet,
)


def set_digests(evaluation_set: AnySet) -> dict[str, set[str]] | None:
    """Item id → hashes of the set's rows that have it; None if a task's code makes the items."""
    if isinstance(evaluation_set, TaskSet):
        return task_digests(evaluation_set, list(_rows_of(evaluation_set.source)))
    return raw_digests(evaluation_set.source, adapter=evaluation_set.adapter)


def raw_digests(source: DatasetSource, *, adapter: str) -> dict[str, set[str]]:
    """Item id → hashes of the rows that have it."""
    digests: dict[str, set[str]] = {}
    for row in _rows_of(source):
        try:
            identifier, parts = READERS[adapter](row)
        except (KeyError, TypeError, ValueError, AttributeError):
            continue  # no item either; the adapter reports why
        digests.setdefault(identifier, set()).add(_digest(parts))
    return digests


def _rows_of(source: DatasetSource) -> Iterator[dict]:
    """The rows of a source: JSON lines and CSV are read here, other files by their library."""
    match source:
        case ShippedDataset(shipped=name):
            yield from _lines(Path(__file__).parents[2] / "sources" / "data" / f"{name}.jsonl")
        case FileDataset() | FolderDataset():
            yield from (_hub_row(row, source) for row in _local_rows(source))
        case _:
            yield from load_rows(source)


def _local_rows(source: FileDataset | FolderDataset) -> Iterator[dict]:
    paths = dataset_files(source)
    suffixes = {path.suffix.lower() for path in paths}
    if not suffixes <= {".jsonl", ".csv", ".tsv"}:
        yield from local_rows(source)
        return
    for path in paths:
        yield from _lines(path) if path.suffix.lower() == ".jsonl" else _cells(path)


def _lines(path: Path) -> Iterator[dict]:
    lines = path.read_bytes().decode("utf-8-sig").split("\n")
    yield from (json.loads(line) for line in lines if line.strip())


def _cells(path: Path) -> Iterator[dict]:
    """The rows of a table by pyarrow, all cells as text."""
    import pyarrow
    from pyarrow import csv

    content = path.read_bytes()
    first_line = content.decode("utf-8-sig").lstrip("\r\n").splitlines()[0]
    separator = max("\t;,", key=first_line.count) if path.suffix.lower() == ".csv" else "\t"
    parsing = csv.ParseOptions(delimiter=separator, newlines_in_values=True)
    reading = csv.ReadOptions(block_size=len(content) + 1)
    names = csv.open_csv(path, reading, parsing).schema.names
    texts = csv.ConvertOptions(column_types=dict.fromkeys(names, pyarrow.string()))
    yield from csv.read_csv(path, reading, parsing, texts).to_pylist()


def _hub_row(row: dict, source: FileDataset | FolderDataset) -> dict:
    """A row of a user's file under the Hub's names, its lists as the Hub has them."""
    columns = dict(source.columns or {})
    if source.labels:
        columns.setdefault("choices", "choices")
    if not columns:
        return row
    row = row | {name: _cell(row, column) for name, column in columns.items()}
    if "choices" in columns and isinstance(row["choices"], list):
        labels = source.labels or [chr(ord("A") + place) for place in range(26)]
        pairs = [p for p in zip(labels, row["choices"], strict=False) if p[1] is not None]
        row["choices"] = {"label": [label for label, _ in pairs], "text": [t for _, t in pairs]}
    if "answers" in columns and not isinstance(row["answers"], dict):
        texts = row["answers"] if isinstance(row["answers"], list) else [row["answers"]]
        row["answers"] = {"text": [text for text in texts if text not in (None, "")]}
    if "id" not in row:
        fields = {k: row[k] for k in row if any(k in names for names in FIELDS.values())}
        row["id"] = hashlib.sha256(
            json.dumps(fields, sort_keys=True, default=str).encode()
        ).hexdigest()[:16]
    return row


def _cell(row: dict, column: str | tuple[str, ...]):
    """A row's value in a column, whole numbers as text; of several columns a list, blanks None."""
    if isinstance(column, str):
        value = row.get(column)
        if isinstance(value, dict) and "label" not in value and set(value) == {"text"}:
            value = value["text"]
        many = isinstance(value, list | tuple)
        texts = [str(v) if type(v) is int else v for v in (value if many else [value])]
        return texts if many else texts[0]
    cells = [str("" if row.get(name) is None else row[name]) for name in column]
    return [cell if cell.strip() else None for cell in cells]


def item_digest(item: Item, golds: Iterable[str]) -> str:
    """The hash of an item's texts with these golds, to compare with its row's hashes."""
    return _digest([item.question, item.passage, *item.options, *item.labels, *golds])


def _digest(parts: Iterable) -> str:
    """A hash of the texts that ignores white space."""
    return sha256_data([" ".join(str(part).split()) for part in parts])


def _arc(row: dict) -> tuple[str, list]:
    choices = row["choices"]
    return row["id"], [row["question"], "", *choices["text"], *choices["label"], row["answerKey"]]


def _boolq(row: dict) -> tuple[str, list]:
    words = {"true": "yes", "yes": "yes", "false": "no", "no": "no"}
    label, labels = words[str(row["answer"]).strip().lower()], ("yes", "no")
    identifier = sha256_data([row["question"], row["passage"]])[:16]
    return identifier, [row["question"], row["passage"], *labels, *labels, label]


def _squad_v2(row: dict) -> tuple[str, list]:
    return row["id"], [row["question"], row["context"], *dict.fromkeys(row["answers"]["text"])]


def _openmath(row: dict) -> tuple[str, list]:
    identifier = sha256_data([row["problem"], row["expected_answer"]])[:16]
    return identifier, [row["problem"], "", row["expected_answer"]]


READERS = {"arc": _arc, "boolq": _boolq, "squad_v2": _squad_v2, "openmath": _openmath}


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


FIXED_OPTIONS = {"boolq": [" Yes", " No"]}  # scored continuations of adapters without options

MOST_SPECIAL_TOKENS = 2  # special tokens before a text


@dataclass(frozen=True)
class RenderedPrompt:
    """One item's prompt, rendered again.

    Attributes:
        text: before the answer; continuations: texts that are scored after it.
        opening: the template's text between the prompt and the answer.
        tokens: number of token ids that the model receives.
        whole: number of token ids that the tokenizer returns for the text.
    """

    item: Item
    text: str
    continuations: tuple[str, ...]
    opening: str
    tokens: int
    whole: int


def answer_opening(tokenizer) -> str:
    """The text with which a chat template opens an answer; without one, the cue of plain text."""
    if not tokenizer.chat_template:
        return "\nAnswer:"
    conversation = [{"role": "user", "content": "a question"}]
    with_opening, without_opening = (
        tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=opening)
        for opening in (True, False)
    )
    return with_opening.removeprefix(without_opening)


def draw_gate(drawn: list[Item], pool: list[Item], *, seed: int, name: str = "") -> Gate:
    """The drawn items are the first ones in the seed's order, title by title.

    Args:
        drawn: the items of the set, in its order.
        pool: all items that the set is drawn from.
    """
    ranked = sorted(pool, key=lambda i: hashlib.sha256(_draw_key(seed, i)).hexdigest())
    drawn_by_title, ranks = Counter(), {}
    for place, item in enumerate(ranked):
        ranks[item.id] = (drawn_by_title[item.title] if item.title else 0, place)
        drawn_by_title[item.title] += 1
    expected = sorted(ranks, key=ranks.get)[: len(drawn)]
    drawn_ids = [item.id for item in drawn]
    differing = [a for a, b in zip(drawn_ids, expected, strict=False) if a != b]
    return none_of(name or "items in seed order", differing, len(drawn), "are not drawn by it")


def order_gate(name: str, drawn: list[Item], *, seed: int) -> Gate:
    """Items without titles lie in the seed's order, whichever items the draw left out."""
    draw_keys = [
        hashlib.sha256(_draw_key(seed, item)).hexdigest() for item in drawn if not item.title
    ]
    misplaced = [
        item.id for item, a, b in zip(drawn, draw_keys, draw_keys[1:], strict=False) if a > b
    ]
    return none_of(name, misplaced, len(drawn), "lie before one that the seed draws first")


def passages_gate(rows: list[dict], texts: set[str], *, seed: int) -> Gate:
    """The passages of the shared text are the first ones in the seed's order."""
    pool = sorted(texts)
    random.Random(seed).shuffle(pool)
    expected = [hashlib.sha256(text.encode()).hexdigest()[:16] for text in pool[: len(rows)]]
    differing = [r["id"] for r, d in zip(rows, expected, strict=False) if r["id"] != d]
    return none_of("passages in seed order", differing, len(rows), "are not drawn by it")


def _draw_key(seed: int, item: Item) -> bytes:
    return f"{seed}:{item_key(item)}".encode()


def contents_gate(evaluation_set: EvaluationSet, prompts: list[RenderedPrompt]) -> Gate:
    """Every prompt contains its item's texts, the worked examples, and the answer's opening."""
    incomplete = [
        f"{s.item.id}: {part}" for s in prompts if (part := missing_part(evaluation_set, s))
    ]
    return none_of("prompts complete", incomplete, len(prompts), "prompts lack a part")


def missing_part(evaluation_set: EvaluationSet, shown: RenderedPrompt) -> str:
    """The name of a missing part of a prompt; empty if it is complete."""
    item, text = shown.item, _words(shown.text)
    if not shown.whole <= shown.tokens <= shown.whole + MOST_SPECIAL_TOKENS:
        return f"{shown.whole - shown.tokens} of its tokens"
    if isinstance(evaluation_set, TaskSet):
        return missing_task_part(evaluation_set, item, shown.text, shown.continuations)
    question_start = text.rfind(_words(item.question))
    if question_start < 0:
        return "its question"
    if evaluation_set.ask.protocol == "loglikelihood":
        expected = FIXED_OPTIONS.get(
            evaluation_set.adapter, [f" {option}" for option in item.options]
        )
        if list(shown.continuations) != expected:
            return "its options, in their order"
        needs_passage = evaluation_set.adapter != "arc"
        if needs_passage and not _holds(text[:question_start], item.passage):
            return "its passage"
        return _missing_plain_examples(evaluation_set, item, text)
    if not _holds(text[:question_start], item.passage):
        return "its passage before the question"
    if not _holds(text[:question_start], SYSTEM[evaluation_set.adapter]):
        return "its set's instruction"
    if evaluation_set.adapter == "arc":
        labelled_options = [
            f"{label}. {o}" for label, o in zip(item.labels, item.options, strict=True)
        ]
        if not _holds(text[question_start:], " ".join(labelled_options)):
            return "its options with their labels"
    place = 0
    for number, (example, answer) in enumerate(EXAMPLES[evaluation_set.adapter], start=1):
        parts = (example.passage, example.question, *example.options, answer)
        positions = [text.find(_words(part), place) for part in parts if part]
        is_present = (
            min(positions) >= 0
            and positions == sorted(positions)
            and positions[-1] < question_start
        )
        if is_present != (number <= evaluation_set.ask.shots):
            return f"just {evaluation_set.ask.shots} worked examples"
        place = positions[-1] if is_present else place
    return "" if shown.text.endswith(shown.opening) else "the opening of an answer"


def _missing_plain_examples(evaluation_set: EvaluationSet, item: Item, text: str) -> str:
    """Says so unless a text begins with just the set's worked examples, and then the passage."""
    place = shown = 0
    for example, option in PLAIN_EXAMPLES.get(evaluation_set.adapter, ()):
        whole = _words(f"{example.passage} Question: {example.question}? Answer: {option}")
        if not text.startswith(whole, place):
            break
        place, shown = place + len(whole) + 1, shown + 1
    is_complete = shown == evaluation_set.ask.shots and text.startswith(_words(item.passage), place)
    return "" if is_complete else f"just {evaluation_set.ask.shots} worked examples"


def _words(text: str) -> str:
    return " ".join(text.split())


def _holds(text: str, part: str) -> bool:
    return _words(part) in text
