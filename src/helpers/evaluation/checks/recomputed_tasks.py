"""Tasks of lm-evaluation-harness, read and scored a second time without the harness.

From a task file's plain settings: its templates are rendered on the raw rows, its filters and
exact matches applied to the answers, its choices made from the log-probabilities. What a task
leaves to Python code, or to a metric that is not known here, only the harness can say;
`unchecked_parts` names it, and the gates and the report show that. Imports no torch.
"""

import ast
import json
import math
import re
import string
from collections.abc import Mapping, Sequence
from hashlib import sha256
from typing import Any

import jinja2
from jinja2.sandbox import SandboxedEnvironment

from helpers.core.errors import printable
from helpers.core.records import Gate, sha256_data
from helpers.sources.items import Item
from helpers.study.schema import TaskSet

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
    return sha256("\x1f".join(parts).encode("utf-8", "replace")).hexdigest()


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
