"""Gates on graded scores: which golds and foils were scored after a prompt, as which tokens.

Separate code renders the golds again: it renders the item's whole conversation with the answer
in it, and takes token ids from the source's own tokenizer. `second_opinion` recomputes the
log-likelihoods. Imports no torch.
"""

import json
import math
from dataclasses import dataclass
from hashlib import sha256

from helpers.core.gates import Gate, largest, none_of
from helpers.evaluation.checks.batch_invariance import (
    DRAWS,
    ROUNDING,
    is_batch_invariant,
    rms_change,
)
from helpers.evaluation.checks.recomputed_answers import words_of
from helpers.sources.chat_conversations import conversation
from helpers.sources.chat_template import end_of_turn
from helpers.sources.exact_numbers import gold_number
from helpers.sources.items import Item
from helpers.study.schema import EvaluationSet, Study

MAX_GOLDS = 3  # per item


@dataclass(frozen=True)
class ExpectedGolds:
    """The golds and the foil that must have been scored after one item's prompt.

    Attributes:
        hash: digest of the texts and their token ids.
        tokens: ids of each gold, then of the foil if there is one.
    """

    hash: str
    tokens: tuple[list[int], ...]

    @property
    def sizes(self) -> list[int]:
        """The number of tokens of each."""
        return [len(answer) for answer in self.tokens]


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
    messages = conversation(item, evaluation_set.adapter, shots=evaluation_set.ask.shots)
    context = own(text, add_special_tokens=False).input_ids
    end = [end_of_turn(tokenizer)] if evaluation_set.ask.stop == "turn" else []
    tokens = []
    for answer in [*golds, *([] if foil is None else [foil])]:
        rest = _rendered_answer(tokenizer, messages, text, answer)
        full_text = own(text + rest, add_special_tokens=False).input_ids
        splits = full_text[: len(context)] == context
        apart = own(rest, add_special_tokens=False).input_ids
        tokens.append((full_text[len(context) :] if splits else apart) + end)
    content = json.dumps([golds, foil, tokens], ensure_ascii=False, separators=(",", ":"))
    return ExpectedGolds(sha256(content.encode()).hexdigest()[:16], tuple(tokens))


def _rendered_answer(tokenizer, messages: list[dict], text: str, answer: str) -> str:
    """What the chat template writes after the prompt, up to the end of the answer."""
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
    return sizes == expected.sizes


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
    their distance from the baseline's; the baseline's own stay nearer to their values in the
    batch than to other items' values.
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
        return Gate(name, largest_change <= ROUNDING, changes, f"at most {ROUNDING:g}")
    if variant == study.baseline:
        limit = _distance_to_others(pairs, batched)
        limit_text = f"at most {limit:.2g}, their distance from other items'"
        return Gate(name, largest_change <= limit, changes, limit_text)
    distances = [
        rms_change([(baseline_rows[pair[side]["id"]], pair[side]) for pair in pairs])
        for side in (0, 1)
    ]
    difference = rms_change(pairs)
    if difference is None or None in distances:
        return Gate(name, False, changes, "log-likelihoods are there to compare")
    limit = DRAWS * min(distances) + ROUNDING
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
