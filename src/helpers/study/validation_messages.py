"""What is wrong with a study file's keys and values, one readable line each.

Turns pydantic's errors into lines that name the key as the file has it, the value, the
limit and the remedy.
"""

import difflib
from collections.abc import Iterable
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from helpers.core.plain_text import one_line

UNION_TAGS = {"bundled", "hub", "folder", "random", "finetune", "shipped", "file"}
UNION_TAGS |= {"loglikelihood", "generate"}


def error_lines(error: ValidationError, data: dict, place: str) -> list[str]:
    """Each pydantic error as a line `file: dotted.key = value message`."""
    lines = []
    for problem in error.errors():
        key, value = _locate(problem, data)
        if problem["type"] == "too_short" and value:
            continue  # its members have errors of their own
        if problem["type"] == "missing":
            lines.append(f"{place}: {key} is missing; add it (params/demo.yaml has an example)")
        elif problem["type"].startswith("union_tag"):
            tags = problem.get("ctx", {}).get("expected_tags")
            remedy = f"use one of {tags}" if tags else "give a mapping as in params/demo.yaml"
            lines.append(f"{place}: {key} = {_short(value)} names no known kind; {remedy}")
        else:
            lines.append(f"{place}: {key} = {_short(value)} {_message(problem)}")
    return lines


def unknown_name_line(key: str, value: str, kind: str, known: Iterable[str]) -> str:
    """The error line for a name that the study does not define."""
    matches = difflib.get_close_matches(value, known, n=1)
    hint = f"; did you mean {matches[0]!r}?" if matches else ""
    return f"{key} = {value!r} is not a {kind} of this study ({', '.join(known)}){hint}"


def _locate(problem: ErrorDetails, data: Any) -> tuple[str, Any]:
    """The dotted key and the value in the file, without pydantic's union tags."""
    keys: list[str] = []
    value, tag_seen = data, False
    location = list(problem["loc"])
    if problem["type"] == "unknown_key":
        location.append(problem["ctx"]["key"])
    for part in location:
        if part in UNION_TAGS and _is_union(keys) and not tag_seen:
            tag_seen = True  # the same word may follow as a key
            continue
        tag_seen = False
        is_member = isinstance(value, dict) and part in value
        is_member |= isinstance(value, list) and isinstance(part, int) and part < len(value)
        if is_member:
            keys.append(_short_key(part))
            value = value[part]
    if problem["type"] == "missing":
        keys.append(_short_key(location[-1]))
    return ".".join(keys) or "the file", value


def _short_key(key: object) -> str:
    return one_line(key)[:80]


def _is_union(keys: list[str]) -> bool:
    """Whether pydantic's location has a union tag after these keys."""
    is_model = len(keys) == 2 and keys[0] == "models"
    is_evaluation_set = len(keys) == 3 and keys[:2] == ["evaluation", "datasets"]
    return is_model or (keys[-1:] in (["dataset"], ["source"], ["ask"]) and not is_evaluation_set)


def _message(problem: ErrorDetails) -> str:
    context = problem.get("ctx", {})
    match problem["type"]:
        case "greater_than_equal":
            return f"is below {context['ge']}; give at least {context['ge']}"
        case "less_than_equal":
            return f"is above {context['le']}; give at most {context['le']}"
        case "greater_than":
            return f"is not above {context['gt']}; give a larger number"
        case "less_than":
            return f"is not below {context['lt']}; give a smaller number"
        case "literal_error":
            return f"is not known; use one of {context['expected']}"
        case "string_pattern_mismatch":
            return f"does not match {context['pattern']}; rename it"
        case "bool_type":
            return "is neither true nor false; write one of them, without quotes"
        case "value_error":
            return f"is refused: {one_line(context['error'])}"
        case "too_short" | "string_too_short":
            return "is empty; give at least one"
        case "string_type":
            return "is not text; put it in quotes"
        case "int_type" | "int_parsing" | "int_from_float" | "int_parsing_size":
            return "is not a whole number; give one without quotes or decimals"
        case "float_type" | "float_parsing" | "finite_number":
            return "is not a finite number; give one"
        case "tuple_type":
            return "is not a list; write [a, b], or [] for none"
        case "dict_type" | "model_type" | "model_attributes_type":
            return "is not a mapping of settings; params/demo.yaml has an example"
    return one_line(problem["msg"][0].lower() + problem["msg"][1:])


def _short(value: Any) -> str:
    text = one_line(repr(value))
    return text if len(text) <= 80 else text[:77] + "..."
