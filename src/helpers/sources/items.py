"""Items in one shape each, from rows in the Hub's schemas.

What an item is asked lies in `helpers.sources.chat_conversations` and
`helpers.evaluation.prompts`; here only its content, and what makes two of them the same.
"""

import re
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, lru_cache

from helpers.core.hashing import sha256_data, sha256_text
from helpers.core.plain_text import valid_unicode


@dataclass(frozen=True)
class Item:
    """One question.

    Attributes:
        id: the row's own id, or a hash of its content.
        question: the question or problem.
        passage: the text that the question is about, empty if none.
        options: option texts of a multiple-choice item; yes/no for BoolQ.
        labels: the options' labels in the source ("A"…, "1"…).
        golds: gold answers: one label, or several texts of which any is right; empty if
            unanswerable.
        cluster: items with the same value share a passage and are not independent.
        title: the title of the passage's source, empty if none.
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
    """Case-folded words and operators without punctuation or accents.

    Texts with the same result count as equal; `2 + 3` and `2 - 3` stay different.
    """
    folded = text.casefold() if text.isascii() else "".join(map(_bare, text))
    return " ".join(re.findall(r"\w+|[+*/=<>^%]|-(?=\s*\d)", folded))


@cache
def _bare(character: str) -> str:
    """A character decomposed, case-folded and without accents.

    Characters are normalized one by one: NFKD sorts the accents of a text in quadratic time.
    """
    folded = unicodedata.normalize("NFKD", character).casefold()
    return "".join(c for c in folded if not unicodedata.combining(c))


@lru_cache(maxsize=2**17)  # every draw needs the key of every item
def item_key(item: Item) -> str:
    """A key that is equal for equal questions, regardless of ids and order of options."""
    parts = (item.question, item.passage, *sorted(item.options))
    return sha256_text("\n".join(map(normalized_text, parts)))


def text_of(value) -> str:
    """The value, if it is a non-blank text.

    Raises:
        ValueError: it is no text, blank, or holds an unpaired surrogate.
    """
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{value!r} stands where a text belongs")
    return _whole(value)


def _whole(value) -> str:
    """The value, if it is a text; empty for None.

    Raises:
        ValueError: it is no text, or holds an unpaired surrogate.
    """
    text = "" if value is None else value
    if not isinstance(text, str):
        raise ValueError(f"{value!r} stands where a text belongs")
    if text != valid_unicode(text):
        raise ValueError(f"{value!r} holds half a character")
    return text


def _texts(values) -> tuple[str, ...]:
    if not isinstance(values, list | tuple):
        raise ValueError(f"{values!r} stands where a list of texts belongs")
    return tuple(text_of(value) for value in values)


def label_key(label: str) -> str:
    """A key that is equal for labels that read alike: `A`, `a` and ` A.`."""
    return label.strip().rstrip(".").casefold()


def adapt_arc(row: dict) -> Item:
    """`allenai/ai2_arc`: three to five options, labelled by letters or digits."""
    labels, options = _texts(row["choices"]["label"]), _texts(row["choices"]["text"])
    if len(labels) != len(options) or len(set(map(label_key, labels))) != len(labels):
        raise ValueError(f"labels {labels} do not name {len(options)} options")
    if row["answerKey"] not in labels:
        raise ValueError(f"answerKey {row['answerKey']!r} is none of the labels {labels}")
    return Item(
        id=text_of(row["id"]),
        question=text_of(row["question"]),
        options=options,
        labels=labels,
        golds=(row["answerKey"],),
        cluster=row["id"],
    )


def adapt_boolq(row: dict) -> Item:
    """`google/boolq`: rows have no ids, so the id is a hash of the content."""
    if not isinstance(row["answer"], bool):
        raise ValueError(f"answer {row['answer']!r} is not true or false")
    return Item(
        id=sha256_data([text_of(row["question"]), text_of(row["passage"])])[:16],
        question=row["question"],
        passage=row["passage"],
        options=("yes", "no"),
        labels=("yes", "no"),
        golds=("yes" if row["answer"] else "no",),
        cluster=sha256_text(row["passage"])[:16],
    )


def adapt_squad_v2(row: dict) -> Item:
    """`rajpurkar/squad_v2`: keeps every gold answer; without any the item is unanswerable."""
    return Item(
        id=text_of(row["id"]),
        question=text_of(row["question"]),
        passage=text_of(row["context"]),
        golds=tuple(dict.fromkeys(_texts(row["answers"]["text"]))),
        cluster=sha256_text(row["context"])[:16],
        title=_whole(row.get("title")),
    )


def adapt_openmath(row: dict) -> Item:
    """`nvidia/OpenMathInstruct-2`: the expected answer is a string, not always a number."""
    identifier = sha256_data([text_of(row["problem"]), text_of(row["expected_answer"])])[:16]
    return Item(
        id=identifier,
        question=row["problem"],
        golds=(row["expected_answer"],),
        cluster=identifier,
        solution=_whole(row.get("generated_solution")),
    )


ADAPTERS: dict[str, Callable[[dict], Item]] = {
    "arc": adapt_arc,
    "boolq": adapt_boolq,
    "squad_v2": adapt_squad_v2,
    "openmath": adapt_openmath,
}
