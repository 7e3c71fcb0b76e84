"""Gates on items and prompts: raw rows, near-duplicates, leaks, draws, prompts, and harness tasks.

Written a second time. Raw rows of a source are read apart from the adapters and hashed: golds that
an adapter took from the row before, or texts that were exchanged on the way, have other hashes. Of
each row only its fields are known here. Near-duplicates are found by code of its own. The draw is
made again from the hashes of the questions, the prompt from its item's own texts and from what the
tokenizer's template puts around a conversation.

Tasks of lm-evaluation-harness are read and scored without the harness, from a task file's plain
settings: its templates are rendered on the raw rows, its filters and exact matches applied to the
answers, its choices made from the log-probabilities. What a task leaves to Python code, or to a
metric that is not known here, only the harness can say; `unchecked_parts` names it, and the gates
and the report show that. Imports no torch.
"""

import ast
import hashlib
import json
import math
import random
import re
import string
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import jinja2
from jinja2.sandbox import SandboxedEnvironment

from helpers.core.errors import printable
from helpers.core.records import Gate, none_of, sha256_data
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

CODE = "!function"
TEMPLATES = SandboxedEnvironment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
TEMPLATES.filters["regex_replace"] = lambda text, pattern, value="", count=0: re.sub(
    pattern, value, str(text), count=count
)
LENGTHS = {
    "acc": lambda text: 1,
    "acc_norm": len,
    "acc_bytes": lambda text: len(text.encode("utf-8")),
}
FILTERS = ("regex", "take_first", "lowercase", "uppercase")
MATCH_SETTINGS = {"ignore_case", "ignore_punctuation", "ignore_numbers", "regexes_to_ignore"}
KNOWN_MATCH = MATCH_SETTINGS | {"metric", "aggregation", "higher_is_better"}
ROUNDING = 1e-6  # precision of stored log-probabilities
REVERSED, IN_ORDER = "its words reversed", "the text in its order"
OTHER_WORDS = "other words"


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


def settings_of(task_set: TaskSet) -> dict[str, Any]:
    """The task file's settings, with what it includes."""
    return json.loads(task_set.read.settings)


def unchecked_parts(task_set: TaskSet) -> list[str]:
    """What only the harness can say about the items and scores of a task."""
    settings, parts = settings_of(task_set), []
    if not _has_plain_rows(settings):
        parts.append("prompts and right answers, which its Python code makes")
    if not _has_plain_scores(task_set, settings):
        parts.append(f"scores ({task_set.read.metric or 'perplexities'})")
    if task_set.shots:
        parts.append("the draw of its worked examples")
    if task_set.read.output_type == "loglikelihood" and _has_plain_scores(task_set, settings):
        parts.append("whether its target is what the model would write, beyond one item")
    return parts


def _names_code(value: Any) -> bool:
    return CODE in json.dumps(value)


def _has_plain_rows(settings: Mapping) -> bool:
    fields = ("process_docs", "doc_to_text", "doc_to_target", "doc_to_choice")
    return not any(_names_code(settings.get(name)) for name in fields)


def _has_plain_scores(task_set: TaskSet, settings: Mapping) -> bool:
    if settings.get("process_results") is not None:
        return False
    kind, metric = task_set.read.output_type, task_set.metric_name
    if kind == "multiple_choice":
        return metric in LENGTHS
    if kind != "generate_until":
        return metric in ("", "acc")
    plain = metric == "exact_match" and not _names_code(settings.get("metric_list"))
    steps = [step for f in settings.get("filter_list") or [] for step in f["filter"]]
    return plain and all(s["function"] in FILTERS for s in steps) and _match(settings) is not None


def _match(settings: Mapping) -> dict | None:
    """The settings of exact matching; None if there are unknown ones."""
    listed = settings.get("metric_list") or [{"metric": "exact_match"}]
    own = next((m for m in listed if m.get("metric") == "exact_match"), {})
    return dict(own) if own.keys() <= KNOWN_MATCH else None


def task_digests(task_set: TaskSet, rows: Sequence[dict]) -> dict[str, set[str]] | None:
    """Item id → hashes of question, options and right answers of its rows, as templates give them.

    Returns:
        None if the task's own code makes them.
    """
    settings = settings_of(task_set)
    if not _has_plain_rows(settings):
        return None
    names = list(dict.fromkeys(name for row in rows for name in row))
    digests: dict[str, set[str]] = {}
    for row in rows:
        doc = {name: row.get(name) for name in names}
        parts = _parts(task_set.read.output_type, settings, doc)
        identifier = sha256_data(_content(row))[:16]
        digests.setdefault(identifier, set()).add(text_digest(parts))
    return digests


def item_parts(item: Item, golds: Sequence[str]) -> list[str]:
    """The texts of an item with these right answers; a foil is none of its options."""
    return [item.question, *(item.options if item.labels else ()), *golds]


def text_digest(parts: Sequence[str]) -> str:
    """A hash of texts as they are."""
    return hashlib.sha256("\x1f".join(parts).encode("utf-8", "replace")).hexdigest()


def _parts(kind: str, settings: Mapping, doc: dict) -> list[str]:
    target = _field(settings.get("doc_to_target"), doc)
    if kind == "loglikelihood_rolling":
        return [str(target), IN_ORDER]
    question = _field(settings.get("doc_to_text"), doc)
    if settings.get("doc_to_choice") is None:
        if isinstance(target, str) and target[:1] == "[" and target[-1:] == "]":
            target = _literal(target)
        golds = target if isinstance(target, list) else [target]
        return [question, *dict.fromkeys(str(gold) for gold in golds if str(gold).strip())]
    choices = settings["doc_to_choice"]
    if isinstance(choices, str):
        choices = _field(choices, doc)
        choices = ast.literal_eval(choices) if isinstance(choices, str) else choices
    choices = list(choices.values()) if isinstance(choices, dict) else [str(c) for c in choices]
    if isinstance(target, str) and target[:1] == "[" and target[-1:] == "]":
        target = _literal(target)
    golds = []
    for gold in target if isinstance(target, list) else [target]:
        gold = int(gold) if isinstance(gold, str) and gold.isdigit() else gold
        place = choices.index(gold) if isinstance(gold, str) else int(gold)
        golds.append(choices[place] if kind == "generate_until" else str(place))
    return [question, *golds] if kind == "generate_until" else [question, *choices, *golds]


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (SyntaxError, ValueError):
        return text


def _field(template: Any, doc: dict) -> Any:
    """A field of a row, by its name or by a template over the row."""
    if not isinstance(template, str):
        return template
    return doc[template] if template in doc else TEMPLATES.from_string(template).render(**doc)


def _content(value: Any) -> Any:
    """A row's values, alike for 1 and 1.0 and for a field that is null or missing."""
    if isinstance(value, dict):
        return {str(k): _content(v) for k, v in value.items() if v is not None}
    if isinstance(value, list | tuple):
        return [_content(v) for v in value]
    if isinstance(value, int | float) and not isinstance(value, bool):
        return f"{float(value):.17g}"
    return value if isinstance(value, str | bool | None) else str(value)


def rows_gate(
    rows: Sequence[dict], items: Sequence[Item], digests: dict[str, set[str]] | None
) -> Gate:
    """Questions, options and right answers are those that the task's templates give its rows."""
    name = "golds and texts match raw rows"
    if digests is None:
        return Gate(name, True, "not checked: the task's own code makes them", "none for code")
    golds = {row["id"]: row["golds"] for row in rows}
    differing = [
        item.id
        for item in items
        if text_digest(item_parts(item, golds.get(item.id, item.golds)))
        not in digests.get(item.id, ())
    ]
    measured = f"{len(differing)} of {len(items)} are others"
    return Gate(name, not differing, measured + (f" ({differing[0]})" if differing else ""), "none")


def missing_task_part(task_set: TaskSet, item: Item, text: str, continuations) -> str:
    """The name of a missing part of a prompt; empty if it is complete."""
    kind = task_set.read.output_type
    if kind == "loglikelihood_rolling":
        return "" if not text and continuations[:1] == (item.question,) else "its text"
    if " ".join(item.question.split()) not in " ".join(text.split()):
        return "its question"
    if kind == "generate_until":
        return "" if not continuations else "an end"
    expected = item.options if item.labels else (item.golds[0], *item.options[1:])
    if [c.strip() for c in continuations] != [option.strip() for option in expected]:
        return "its options, in their order"
    return ""


def foils_gate(task_set: TaskSet, items: Sequence[Item]) -> Gate:
    """Each foil is another item's target, or the last 64 words of its own text reversed."""
    rolling = task_set.read.output_type == "loglikelihood_rolling"
    targets = {item.golds[0] for item in items}
    wrong = []
    for item in items:
        own, *foils = item.options
        if rolling:
            fits = len(foils) == 1 and foils[0].split() == own.split()[:-65:-1]
        else:
            others = targets - {item.golds[0]}
            fits = set(foils) <= others and (bool(foils) or not _distinct(others, own))
        wrong += [] if fits else [item.id]
    measured = f"{len(wrong)} of {len(items)} are none" + (f" ({wrong[0]})" if wrong else "")
    return Gate("foils are other targets", not wrong, measured, "none")


def _distinct(others: set[str], own: str) -> bool:
    return any(other.strip().casefold() != own.strip().casefold() for other in others)


def rescored_task(task_set: TaskSet, item: Item, row: dict) -> dict:
    """The fields of a prediction that follow from its output or its log-probabilities."""
    fields = {"id": item.id, "cluster": item.cluster, "golds": list(item.golds)}
    if row["finish_reason"] == "nonfinite":
        return fields | {"parsed": None, "status": "unparsed", "score": 0.0}
    settings, kind = settings_of(task_set), task_set.read.output_type
    if kind == "loglikelihood_rolling":
        return fields | _read_whole_text(item, row, settings)
    if not _has_plain_scores(task_set, settings):
        return fields
    if kind == "multiple_choice":
        return fields | _chosen(task_set, item, row)
    if kind == "loglikelihood":
        likely = row["gold_loglikelihoods"][0] > math.log(0.5) + ROUNDING
        target = item.golds[0].strip()
        written = likely or row["parsed"] == target
        return fields | {"parsed": target if written else OTHER_WORDS, "score": float(written)}
    return fields | _matched(task_set, item, row, settings)


def _read_whole_text(item: Item, row: dict, settings: Mapping) -> dict:
    own = row["gold_loglikelihoods"][0] / row["gold_tokens"][0]
    foil = row["foil_loglikelihood"] / row["foil_tokens"]
    near = abs(own - foil) <= 2 * ROUNDING
    parsed = row["parsed"] if near else IN_ORDER if own > foil else REVERSED
    fields: dict[str, Any] = {"parsed": parsed, "score": float(parsed == IN_ORDER)}
    if settings.get("process_results") is not None:
        return fields
    counts = {
        "word_perplexity": len(re.split(r"\s+", item.question)),
        "byte_perplexity": len(item.question.encode("utf-8")),
    }
    counts["bits_per_byte"] = counts["byte_perplexity"]
    for name, value in row.get("metrics", {}).items():
        known = isinstance(value, list) and name.partition(",")[0] in counts
        if known and (
            value[1] != counts[name.partition(",")[0]]
            or abs(value[0] - row["gold_loglikelihoods"][0]) > ROUNDING
        ):
            fields["metrics"] = {}
    return fields


def _chosen(task_set: TaskSet, item: Item, row: dict) -> dict:
    """The choice by the sums, over the lengths that the metric divides by; near ties are left."""
    length, sums = LENGTHS[task_set.metric_name], row["logprobs"]
    each = [s / length(option) for s, option in zip(sums, item.options, strict=True)]
    best = max(each)
    tied = [item.labels[i] for i, e in enumerate(each) if e + ROUNDING >= best]
    parsed = row["parsed"] if row["parsed"] in tied else tied[0]
    return {"parsed": parsed, "output": parsed, "score": float(parsed in item.golds)}


def _matched(task_set: TaskSet, item: Item, row: dict, settings: Mapping) -> dict:
    """The answer through the task's filters, compared with the right answers."""
    _, _, filter_name = (task_set.read.metric or "").partition(",")
    pipelines = {f["name"]: f["filter"] for f in settings.get("filter_list") or []}
    answer = row["output"]
    for step in pipelines.get(filter_name, []):
        answer = _filtered(answer, step)
    rules = _match(settings) or {}
    right = any(_normal(answer, rules) == _normal(gold, rules) for gold in item.golds)
    readable = answer.strip() not in ("", "[invalid]")
    return {
        "parsed": answer.strip() if readable else None,
        "status": "answered" if readable else "unparsed",
        "score": float(right),
    }


def _filtered(answer: str, step: Mapping) -> str:
    if step["function"] == "lowercase":
        return answer.lower()
    if step["function"] == "uppercase":
        return answer.upper()
    if step["function"] != "regex":
        return answer
    pattern = re.compile(step.get("regex_pattern", r"#### (\-?[0-9\.\,]+)"))
    missing = step.get("fallback", "[invalid]")
    groups = [m.groups("") or (m[0],) for m in pattern.finditer(answer)]
    if not groups:
        return missing
    chosen = groups[step.get("group_select", 0)]
    if len(chosen) == 1:
        return chosen[0].strip()
    return next((part.strip() for part in chosen if part), missing)


def _normal(text: str, rules: Mapping) -> str:
    for pattern in rules.get("regexes_to_ignore") or []:
        text = re.sub(pattern, "", text)
    text = text.lower() if rules.get("ignore_case") else text
    dropped = string.punctuation if rules.get("ignore_punctuation") else ""
    dropped += string.digits if rules.get("ignore_numbers") else ""
    return "".join(c for c in text if c not in dropped)


def says_target_is_written(row: dict) -> bool | None:
    """Whether a row says that the model would write its target; None if it says no such thing."""
    target = row["golds"][0]
    if "gold_loglikelihoods" not in row or row["finish_reason"] != "scored" or target == IN_ORDER:
        return None
    return row["parsed"] == target.strip()


def unchecked_note(task_set: TaskSet) -> str:
    """A sentence on what is not checked apart from the harness; empty if everything is."""
    parts = unchecked_parts(task_set)
    return printable(f"not checked apart from the harness: {'; '.join(parts)}") if parts else ""
