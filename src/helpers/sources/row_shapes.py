"""What a row looks like and what an adapter wants, in a few words each, for messages."""

from typing import Any

from helpers.core.plain_text import one_line

EXPECTED_ROWS = {
    "arc": "{id: text, question: text, choices: {label: [text], text: [text]}, answerKey: text}",
    "boolq": "{question: text, passage: text, answer: true or false}",
    "squad_v2": "{id: text, question: text, context: text, answers: {text: [text]}}",
    "openmath": "{problem: text, expected_answer: text}",
}
EXPECTED_PASSAGE = "{context: text}"
MOST_KEYS, MOST_CHARACTERS = 8, 24


def describe_value(value: Any, *, depth: int = 2) -> str:
    """The type of a value in words; of a mapping by its keys, of a list by its first value."""
    match value:
        case None:
            return "null"
        case bool():
            return "true or false"
        case int() | float():
            return "number"
        case str():
            return "text" if value.strip() else "empty text"
        case dict() if depth:
            return _mapping(value, depth)
        case dict():
            return "{…}"
        case list() | tuple() if depth and value:
            return f"[{describe_value(value[0], depth=depth - 1)}]"
        case list() | tuple():
            return "[…]" if value else "[]"
    return type(value).__name__


def _mapping(value: dict, depth: int) -> str:
    keys = [f"{_short(key)}: {describe_value(value[key], depth=depth - 1)}" for key in list(value)]
    more = [f"{len(keys) - MOST_KEYS} more"] if len(keys) > MOST_KEYS else []
    return "{" + ", ".join(keys[:MOST_KEYS] + more) + "}"


def _short(key: Any) -> str:
    text = one_line(key)
    return text if len(text) <= MOST_CHARACTERS else f"{text[:MOST_CHARACTERS]}…"
