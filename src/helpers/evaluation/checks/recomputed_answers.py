"""Answers read and scored a second time, from their text or their log-probabilities, in two ways.

`rescored` is the second opinion on `helpers.evaluation.scoring`. Of its code only the reading of
numbers that are no plain decimals is used: it is a convention, and has no second source.

`misread_part` uses none of the code that did it first, nor that of `rescored`. The last box is
found by counting braces from each that opens, the last one first. Numbers are compared by
`decimal`.

Graded scores: a gate tells which golds and foils were scored after a prompt, as which tokens.
Separate code renders the golds again: it renders the item's whole conversation with the answer in
it, and takes token ids from the source's own tokenizer. `second_opinion` recomputes the
log-likelihoods. Imports no torch.
"""

import json
import math
import re
import string
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from fractions import Fraction
from hashlib import sha256

from helpers.core.records import Gate, largest, none_of
from helpers.evaluation.checks.item_gates import rescored_task, settings_of
from helpers.evaluation.checks.numeric_gates import (
    DRAWS,
    LOGPROB_ROUNDING,
    is_batch_invariant,
    rms_change,
)
from helpers.evaluation.scoring import number_scores
from helpers.sources.chat import conversation, end_of_turn
from helpers.sources.items import Item, gold_number
from helpers.study.schema import EvaluationSet, Study, TaskSet

ROUNDING = 1e-6  # precision of stored log-probabilities; within it, the stored answer wins a tie
BOX = r"\boxed{"
DECIMAL = re.compile(r"[+-]?[0-9]{1,30}(\.[0-9]{1,30})?")
ARTICLE = re.compile(r"(?<!\w)(?:the|an|a)(?!\w)")
PUNCTUATION = set("!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~")


def rescored(evaluation_set: EvaluationSet, item: Item, row: dict) -> dict:
    """The fields of a prediction, derived again from its output or its log-probabilities."""
    if isinstance(evaluation_set, TaskSet):
        return rescored_task(evaluation_set, item, row)
    fields = {"id": item.id, "cluster": item.cluster, "golds": list(item.golds)}
    if evaluation_set.ask.protocol == "loglikelihood":
        return fields | _chosen_option(item, row, in_bytes=evaluation_set.ask.normalize == "bytes")
    text, nonfinite = row["output"], row["finish_reason"] == "nonfinite"
    answer_text = box_of(text) if evaluation_set.ask.answer == "boxed" else text
    parsed, status = (
        (None, "unparsed")
        if nonfinite
        else _parsed_answer(item, evaluation_set.adapter, answer_text)
    )
    fields |= {"parsed": parsed, "status": status}
    return fields | _scores(item, evaluation_set.adapter, parsed, status)


def _chosen_option(item: Item, row: dict, *, in_bytes: bool) -> dict:
    """The option with the largest log-probability, per byte of its text if the study says so."""
    stored = row.get("logprobs", [])
    if len(stored) != len(item.labels) or not all(map(math.isfinite, stored)):
        return {"parsed": None, "status": "unparsed", "finish_reason": "nonfinite", "score": 0.0}
    sizes = [len(o.strip().encode()) if in_bytes else 1 for o in item.options]
    best = max(s / n for s, n in zip(stored, sizes, strict=True))
    tied = [
        label
        for label, s, n in zip(item.labels, stored, sizes, strict=True)
        if (s + ROUNDING) / n >= best
    ]
    parsed = row["parsed"] if row["parsed"] in tied else tied[0]
    fields = {"parsed": parsed, "output": parsed, "status": "answered", "finish_reason": "scored"}
    kept = {"labels": list(item.labels)} | ({"option_bytes": sizes} if in_bytes else {})
    fields |= {key: value for key, value in kept.items() if key in row}  # older rows have none
    return fields | {"score": 1.0 if parsed in item.golds else 0.0}


def box_of(text: str) -> str | None:
    """The content of the last box to open, among those that close."""
    at = text.rfind(BOX)
    while at >= 0:
        depth = 1
        for place in range(at + len(BOX), len(text)):
            depth += {"{": 1, "}": -1}.get(text[place], 0)
            if depth == 0:
                return text[at + len(BOX) : place]
        at = text.rfind(BOX, 0, at)
    return None


def _parsed_answer(item: Item, adapter: str, raw: str | None) -> tuple[str | None, str]:
    """(parsed answer, status)."""
    answer = (raw or "").strip()
    if not answer:
        return None, "unparsed"
    if adapter == "squad_v2" and " ".join(words_of(answer, or_itself=False)) == "unanswerable":
        return None, "abstained"
    if adapter in ("squad_v2", "openmath"):
        return answer, "answered"
    matching = [label for label in item.labels if _label(label) == _label(answer)]
    return (matching[0], "answered") if matching else (None, "unparsed")


def _label(text: str) -> str:
    text = text.strip()
    while text.endswith("."):
        text = text[:-1]
    return text.casefold()


def _scores(item: Item, adapter: str, parsed: str | None, status: str) -> dict:
    if adapter == "openmath":
        score, difference = _number(parsed, item.golds[0])
        return {"score": score, "absolute_difference": difference}
    if adapter != "squad_v2":
        return {"score": 1.0 if parsed is not None and parsed in item.golds else 0.0}
    if not item.golds:
        abstention_score = 1.0 if status == "abstained" else 0.0
        return {"score": abstention_score, "f1": abstention_score}
    if parsed is None:
        return {"score": 0.0, "f1": 0.0}
    words, gold_words = words_of(parsed), [words_of(gold) for gold in item.golds]
    return {
        "score": 1.0 if words in gold_words else 0.0,
        "f1": max(_f1(words, gold) for gold in gold_words),
    }


def words_of(text: str, *, or_itself: bool = True) -> list[str]:
    """SQuAD's normalized words; if there are none, the text itself."""
    letters = "".join(c for c in text.lower() if c not in PUNCTUATION)
    words = ARTICLE.sub(" ", letters).split()
    return words or ([text.strip().casefold()] if or_itself else [])


def _f1(words: list[str], gold: list[str]) -> float:
    unmatched, hits = list(gold), 0
    for word in words:
        if word in unmatched:
            unmatched.remove(word)
            hits += 1
    return 2 * hits / (len(words) + len(gold))


def _number(parsed: str | None, gold: str) -> tuple[float, float | None]:
    """(1 if right, absolute difference): integers must be equal, others within a millionth."""
    if parsed is None:
        return 0.0, None
    matches = [DECIMAL.fullmatch(text.strip()) for text in (parsed, gold)]
    if None in matches:
        return number_scores(parsed, gold)
    value, expected = (Fraction(match[0]) for match in matches)
    tolerance = (
        0 if value % 1 == expected % 1 == 0 else max(abs(expected), Fraction(1, 10**6)) / 10**6
    )
    return 1.0 if abs(value - expected) <= tolerance else 0.0, float(abs(value - expected))


SECOND_BOX = r"\boxed{"
UNANSWERABLE = re.compile(r"\W*unanswerable\W*", re.IGNORECASE)
SECOND_ARTICLE = re.compile(r"\b(?:an?|the)\b")
PLAIN = re.compile(r"[+-]?\d+(?:\.\d+)?")
TOLERANCE = Decimal("1e-6")


def second_reading_gate(evaluation_set: EvaluationSet, rows: list[dict]) -> Gate:
    """Status, score and finish reason of every generated answer agree with a second scorer."""
    differing = [
        f"{row['id']}: {difference}"
        for row in rows
        if (difference := misread_part(evaluation_set, row))
    ]
    return none_of("answers scored a second time", differing, len(rows), "say otherwise")


def misread_part(evaluation_set: EvaluationSet, row: dict) -> str:
    """The first field of a row that does not follow from its text; empty if all do."""
    if evaluation_set.ask.protocol != "generate":
        return ""
    output_tokens, max_new_tokens, finish_reason = (
        row["output_tokens"],
        evaluation_set.ask.max_new_tokens,
        row["finish_reason"],
    )
    if output_tokens > max_new_tokens or (finish_reason == "length") != (
        finish_reason not in ENDED and output_tokens == max_new_tokens
    ):
        return f"{output_tokens} tokens, ended by {finish_reason}"
    if finish_reason == "nonfinite" or isinstance(evaluation_set, TaskSet):
        return ""
    answer = (
        last_closed_box(row["output"]) if evaluation_set.ask.answer == "boxed" else row["output"]
    )
    answer = (answer or "").strip()
    abstained = evaluation_set.adapter == "squad_v2" and UNANSWERABLE.fullmatch(answer) is not None
    status = "unparsed" if not answer else "abstained" if abstained else "answered"
    labelled = evaluation_set.adapter in ("arc", "boolq")
    if row["status"] != status and not (labelled and row["status"] == "unparsed"):
        return f"status {row['status']}"
    score, f1 = _second_scores(evaluation_set.adapter, answer, status, row["golds"])
    if score is not None and row["score"] != score:
        return f"score {row['score']:g}"
    if f1 is not None and abs(row["f1"] - f1) > 1e-9:
        return f"F1 {row['f1']:g}"
    return ""


ENDED = ("stop", "answer", "nonfinite")


def last_closed_box(text: str) -> str | None:
    """The content of the last box whose braces close; None if there is none."""
    at = len(text)
    while (at := text.rfind(SECOND_BOX, 0, at)) >= 0:
        depth = 1
        for place in range(at + len(SECOND_BOX), len(text)):
            depth += {"{": 1, "}": -1}.get(text[place], 0)
            if not depth:
                return text[at + len(SECOND_BOX) : place]
    return None


def _normalized_words(text: str) -> list[str]:
    """Words without ASCII punctuation and articles, as in SQuAD's official script."""
    letters = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(SECOND_ARTICLE.split(letters)).split()


def _second_f1(words: list[str], gold: list[str]) -> float:
    shared = sum(min(words.count(word), gold.count(word)) for word in set(words))
    return 2 * shared / (len(words) + len(gold))


def _second_scores(
    adapter: str, answer: str, status: str, golds
) -> tuple[float | None, float | None]:
    """(score, F1); None for one that is not computed here."""
    if adapter == "squad_v2":
        if not golds:
            return (float(status == "abstained"),) * 2
        if status != "answered":
            return 0.0, 0.0
        words, gold_words = _normalized_words(answer), [_normalized_words(gold) for gold in golds]
        if not all((words, *gold_words)):
            return None, None  # only articles: the official script treats such texts as equal
        return float(words in gold_words), max(_second_f1(words, gold) for gold in gold_words)
    if status == "unparsed":
        return 0.0, None
    if adapter != "openmath":
        return None, None
    return _number_score(answer, golds[0]), None


def _number_score(answer: str, gold: str) -> float | None:
    """1 or 0 for two plain numbers or equal texts; None if a plain comparison cannot decide."""
    if answer == gold:
        return 1.0
    if not (PLAIN.fullmatch(answer) and PLAIN.fullmatch(gold)):
        return None
    try:
        value, expected = Decimal(answer), Decimal(gold)
    except InvalidOperation:
        return None
    if value == expected:
        return 1.0
    whole = value == value.to_integral() and expected == expected.to_integral()
    near = abs(value - expected) <= TOLERANCE * max(abs(expected), TOLERANCE)
    return float(near and not whole)


MAX_GOLDS = 3  # per item


@dataclass(frozen=True)
class ExpectedGolds:
    """The golds and the foil that must have been scored after one item's prompt.

    Attributes:
        hash: digest of the texts and their token ids.
        tokens: ids of each gold, then of the foil if there is one.
        form: ids of the form with which all of them begin; it is read and not scored.
    """

    hash: str
    tokens: tuple[list[int], ...]
    form: list[int]

    @property
    def sizes(self) -> list[int]:
        """The number of scored tokens of each."""
        return [len(answer) - len(self.form) for answer in self.tokens]


def render_golds(
    tokenizer, own, item: Item, evaluation_set: EvaluationSet, text: str, foil: str | None
) -> ExpectedGolds:
    """The item's golds rendered again, with the foil that its row names.

    Args:
        tokenizer: renders conversations.
        own: the source's tokenizer as transformers loads it, for the token ids.
        text: the prompt.
        foil: as it was scored, or None.
    """
    golds = distinct_golds(item, evaluation_set.adapter)[:MAX_GOLDS]
    golds = [_answer_text(gold, evaluation_set) for gold in golds]
    task = isinstance(evaluation_set, TaskSet)
    ask, adapter = evaluation_set.ask, evaluation_set.adapter
    messages = [] if task else conversation(item, adapter, shots=ask.shots)
    context = own(text, add_special_tokens=False).input_ids
    chat = bool(tokenizer.chat_template) and not task
    end = [end_of_turn(tokenizer)] if ask.stop == "turn" and chat else []
    tokens = []
    for answer in ["\\boxed{", *golds, *([] if foil is None else [foil])]:
        rest = (
            settings_of(evaluation_set).get("target_delimiter", " ") + answer
            if task
            else _rendered_answer(tokenizer, messages, text, answer)
        )
        full_text = own(text + rest, add_special_tokens=False).input_ids
        splits = full_text[: len(context)] == context
        apart = own(rest, add_special_tokens=False).input_ids
        tokens.append((full_text[len(context) :] if splits else apart) + end)
    bare, *tokens = tokens
    form = bare[: min(map(len, tokens)) - 1] if evaluation_set.ask.answer == "boxed" else []
    while any(answer[: len(form)] != form for answer in tokens):
        form = form[:-1]
    content = json.dumps([golds, foil, tokens, form], ensure_ascii=False, separators=(",", ":"))
    return ExpectedGolds(sha256(content.encode()).hexdigest()[:16], tuple(tokens), form)


def _rendered_answer(tokenizer, messages: list[dict], text: str, answer: str) -> str:
    """What the chat template writes after the prompt, up to the end of the answer.

    In plain text an answer follows after a space.
    """
    if not tokenizer.chat_template:
        return f" {answer}"
    turn = {"role": "assistant", "content": answer}
    full_text = tokenizer.apply_chat_template([*messages, turn], tokenize=False)
    rest = full_text[len(text) :] if full_text.startswith(text) else ""
    return rest[: rest.rindex(answer) + len(answer)] if answer in rest else answer


def _answer_text(answer: str, evaluation_set: EvaluationSet) -> str:
    return "\\boxed{" + answer + "}" if evaluation_set.ask.answer == "boxed" else answer


def distinct_golds(item: Item, adapter: str) -> list[str]:
    """The item's golds, each in its first wording; "unanswerable" if it has none."""
    golds: dict[object, str] = {}
    for gold in item.golds or ["unanswerable"]:
        golds.setdefault(comparison_key(gold, adapter), gold.strip())
    return list(golds.values())


def comparison_key(answer: str, adapter: str) -> object:
    """Equal for two wordings of one answer: its words, its number, or its label."""
    if adapter == "squad_v2":
        return tuple(words_of(answer))
    if adapter == "openmath":
        number = gold_number(answer)
        return "".join(answer.split()) if number is None else number
    return answer.strip().rstrip(".").casefold()


def golds_gate(rows: list[dict], expected: dict[str, ExpectedGolds]) -> Gate:
    """The texts scored after each prompt are its item's golds and the foil, token by token.

    Args:
        expected: by item id.
    """
    differing = [row["id"] for row in rows if not _matches(row, expected.get(row["id"]))]
    return none_of("golds belong to the item", differing, len(rows), "have others, or none")


def _matches(row: dict, expected: ExpectedGolds | None) -> bool:
    if expected is None or row.get("gold_hash") != expected.hash:
        return False
    sizes = list(row.get("gold_tokens", []))
    sizes += [] if row.get("foil") is None else [row.get("foil_tokens")]
    return sizes == expected.sizes and row.get("gold_form_tokens") == len(expected.form)


def foil_gate(evaluation_set: EvaluationSet, rows: list[dict], items: list[Item]) -> Gate:
    """Each foil is the first gold of another item, and wrong for its own item."""
    adapter = evaluation_set.adapter
    own_keys = {
        item.id: {comparison_key(gold, adapter) for gold in distinct_golds(item, adapter)}
        for item in items
    }
    first_golds = [distinct_golds(item, adapter)[0] for item in items]
    keys = {
        _answer_text(gold, evaluation_set): comparison_key(gold, adapter) for gold in first_golds
    }
    labels = {item.id: {comparison_key(label, adapter) for label in item.labels} for item in items}
    invalid = []
    for row in (row for row in rows if row["id"] in own_keys):
        candidates = set(keys.values()) - own_keys[row["id"]]
        if labels[row["id"]]:
            candidates &= labels[row["id"]]
        foil = row.get("foil")
        if keys.get(foil) not in candidates if foil is not None else candidates:
            invalid.append(row["id"])
    return none_of("foils are other items' golds", invalid, len(rows), "have other foils, or none")


def gold_invariance_gate(
    study: Study, variant: str, rows: list[dict], baseline: list[dict], alone: list[dict]
) -> Gate:
    """The sampled items' golds and foils have the same log-likelihoods alone as in their batch.

    On a batch-invariant runtime they are equal. On other runtimes they change by no more than
    their distance from the baseline's, alone or in the batch, whichever is smaller: a batch that
    was mixed up must not widen its own limit. The baseline's own stay nearer to their values in
    the batch than to other items' values.
    """
    name = "gold log-likelihoods independent of the batch"
    batched, baseline_rows = (
        {row["id"]: _as_options(row) for row in side} for side in (rows, baseline)
    )
    pairs = [(batched[a["id"]], _as_options(a)) for a in alone if a["id"] in batched]
    comparable = [len(b["logprobs"]) == len(a["logprobs"]) > 0 for b, a in pairs]
    largest_change = largest(
        abs(x - y) for b, a in pairs for x, y in zip(b["logprobs"], a["logprobs"], strict=False)
    )
    changes = f"they change by {largest_change:.2g} at most"
    if not pairs or not all(comparable):
        return Gate(name, False, changes, "golds are scored alone and in the batch")
    if is_batch_invariant(study, variant):
        return Gate(
            name, largest_change <= LOGPROB_ROUNDING, changes, f"at most {LOGPROB_ROUNDING:g}"
        )
    if variant == study.baseline:
        limit = _distance_to_others(pairs, batched)
        limit_text = f"at most {limit:.2g}, their distance from other items'"
        return Gate(name, largest_change <= limit, changes, limit_text)
    difference = rms_change(pairs)
    distances = [
        rms_change([(baseline_rows[pair[side]["id"]], pair[side]) for pair in pairs])
        for side in (0, 1)
    ]
    if difference is None or None in distances:
        return Gate(name, False, changes, "log-likelihoods are there to compare")
    limit = DRAWS * min(distances) + LOGPROB_ROUNDING
    return Gate(
        name,
        difference <= limit,
        f"{changes}, by {difference:.2g} on average (root mean square)",
        f"at most {limit:.2g}, {DRAWS:g} times what separates them from the baseline",
    )


def log_likelihoods(row: dict) -> list[float]:
    """Of the row's golds, then of its foil if it has one; NaN for a value that is not finite."""
    sums = list(row.get("gold_loglikelihoods", []))
    sums += [] if row.get("foil") is None else [row.get("foil_loglikelihood")]
    return [math.nan if s is None else s for s in sums]


def _as_options(row: dict) -> dict:
    """The row's log-likelihoods in the field in which scored options are stored."""
    return {"id": row["id"], "logprobs": log_likelihoods(row)}


def _distance_to_others(pairs: list[tuple[dict, dict]], batched: dict[str, dict]) -> float:
    """The mean distance of the first golds alone from those of other items in the batch."""
    distances = [
        abs(a["logprobs"][0] - other["logprobs"][0])
        for _, a in pairs
        for key, other in batched.items()
        if key != a["id"] and other["logprobs"]
    ]
    return math.fsum(distances) / len(distances) if distances else math.inf


def has_nonfinite_golds(row: dict) -> bool:
    """Whether a log-likelihood of a gold or a foil is missing because it was not finite."""
    has_foil = row.get("foil_tokens") is not None
    return None in row.get("gold_loglikelihoods", ()) or (
        has_foil and row.get("foil_loglikelihood") is None
    )
