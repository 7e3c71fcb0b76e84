"""Items in one shape each, from rows in the Hub's schemas.

What an item is asked lies in `helpers.sources.conversations` and
`helpers.evaluation.prompts`; here only its content, and what makes two of them the same.
"""

import re
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

from helpers.study.hashing import sha256_data, sha256_text


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
    decomposed = unicodedata.normalize("NFKD", text).casefold()
    kept = "".join(c for c in decomposed if not unicodedata.combining(c))
    return " ".join(re.findall(r"\w+|[+*/=<>^%]|-(?=\s*\d)", kept))


@lru_cache(maxsize=2**17)  # every draw asks it of every item
def item_key(item: Item) -> str:
    """What makes two items the same question, whatever their ids and the options' order."""
    parts = (item.question, item.passage, *sorted(item.options))
    return sha256_text("\n".join(map(normalized_text, parts)))


def _text(value) -> str:
    """The value, if it is a text that says something; a number or a list is a broken row."""
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{value!r} stands where a text belongs")
    return value


def _texts(values) -> tuple[str, ...]:
    if not isinstance(values, list | tuple):
        raise ValueError(f"{values!r} stands where a list of texts belongs")
    return tuple(_text(value) for value in values)


def adapt_arc(row: dict) -> Item:
    """`allenai/ai2_arc`: three to five options, labelled by letters or digits."""
    labels, options = _texts(row["choices"]["label"]), _texts(row["choices"]["text"])
    if len(labels) != len(options) or len(set(labels)) != len(labels):
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
        title=row["title"],
    )


def adapt_openmath(row: dict) -> Item:
    """`nvidia/OpenMathInstruct-2`: the expected answer is a string, not always a number."""
    identifier = sha256_data([_text(row["problem"]), _text(row["expected_answer"])])[:16]
    return Item(
        id=identifier,
        question=row["problem"],
        golds=(row["expected_answer"],),
        cluster=identifier,
        solution=row["generated_solution"],
    )


ADAPTERS: dict[str, Callable[[dict], Item]] = {
    "arc": adapt_arc,
    "boolq": adapt_boolq,
    "squad_v2": adapt_squad_v2,
    "openmath": adapt_openmath,
}
