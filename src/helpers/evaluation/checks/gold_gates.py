r"""Gates on graded scores: whose answers were read after a prompt, as which tokens, beside what.

Written a second time: golds from the item's own, placed by rendering the item's whole
conversation with the answer in it, as token ids of the source's own tokenizer. How likely they
are is read again in `second_opinion`. Imports no torch.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256

from helpers.core.gates import Gate, largest, none_of
from helpers.evaluation.checks.batch_invariance import DRAWS, ROUNDING, exact, rms_change
from helpers.evaluation.checks.recomputed_answers import words_of
from helpers.sources.chat_conversations import conversation
from helpers.sources.chat_template import end_of_turn
from helpers.sources.exact_numbers import gold_number
from helpers.sources.items import Item
from helpers.study.schema import EvaluationSet, Study

FEW = 3  # golds of an item that are read


@dataclass(frozen=True)
class DueGolds:
    """What has to be read after one item's prompt.

    Attributes:
        hash: of the texts and their token ids.
        tokens: ids of each gold, then of the foil if there is one.
    """

    hash: str
    tokens: tuple[list[int], ...]

    @property
    def sizes(self) -> list[int]:
        """How many tokens each has."""
        return [len(each) for each in self.tokens]


def due_golds(tokenizer, own, item: Item, wanted: EvaluationSet, text: str, foil) -> DueGolds:
    """Made again from the item, with the foil that its row names.

    Args:
        tokenizer: renders conversations.
        own: the source's tokenizer as transformers loads it, which makes tokens of them.
        text: the prompt.
        foil: as it was written, or None.
    """
    golds = [_as_asked(gold, wanted) for gold in distinct(item, wanted.adapter)[:FEW]]
    messages = conversation(item, wanted.adapter, shots=wanted.ask.shots)
    context = own(text, add_special_tokens=False).input_ids
    end = [end_of_turn(tokenizer)] if wanted.ask.stop == "turn" else []
    tokens = []
    for answer in [*golds, *([] if foil is None else [foil])]:
        placed = _placed(tokenizer, messages, text, answer)
        whole = own(text + placed, add_special_tokens=False).input_ids
        split = whole[: len(context)] == context
        after = whole[len(context) :] if split else own(placed, add_special_tokens=False).input_ids
        tokens.append(after + end)
    told = json.dumps([golds, foil, tokens], ensure_ascii=False, separators=(",", ":"))
    return DueGolds(sha256(told.encode()).hexdigest()[:16], tuple(tokens))


def _placed(tokenizer, messages: list[dict], text: str, answer: str) -> str:
    """What the template writes after the prompt, up to the end of the answer."""
    turn = {"role": "assistant", "content": answer}
    whole = tokenizer.apply_chat_template([*messages, turn], tokenize=False)
    behind = whole[len(text) :] if whole.startswith(text) else ""
    return behind[: behind.rindex(answer) + len(answer)] if answer in behind else answer


def _as_asked(answer: str, wanted: EvaluationSet) -> str:
    return "\\boxed{" + answer + "}" if wanted.ask.answer == "boxed" else answer


def distinct(item: Item, adapter: str) -> list[str]:
    """The item's golds, each in its first wording; what says that there is none, where none is."""
    kept: dict[object, str] = {}
    for gold in item.golds or ["unanswerable"]:
        kept.setdefault(key_of(gold, adapter), gold.strip())
    return list(kept.values())


def key_of(answer: str, adapter: str) -> object:
    """Equal for two answers that are one: the same words, number, or label."""
    if adapter == "squad_v2":
        return tuple(words_of(answer))
    if adapter == "openmath":
        number = gold_number(answer)
        return "".join(answer.split()) if number is None else number
    return answer.strip().rstrip(".").casefold()


def golds_gate(rows: list[dict], due: dict[str, DueGolds]) -> Gate:
    """The texts read after each prompt are its item's golds and the foil, token by token.

    Args:
        due: by item id.
    """
    odd = [row["id"] for row in rows if not _as_due(row, due.get(row["id"]))]
    return none_of("golds read are the item's own", odd, len(rows), "read others, or none")


def _as_due(row: dict, due: DueGolds | None) -> bool:
    sizes = list(row.get("gold_tokens", []))
    sizes += [] if row.get("foil") is None else [row.get("foil_tokens")]
    return due is not None and row.get("gold_hash") == due.hash and sizes == due.sizes


def foil_gate(wanted: EvaluationSet, rows: list[dict], items: list[Item]) -> Gate:
    """Each foil is the first gold of another item, and none of its own item's golds."""
    adapter = wanted.adapter
    own = {i.id: {key_of(gold, adapter) for gold in distinct(i, adapter)} for i in items}
    firsts = [distinct(item, adapter)[0] for item in items]
    keys = {_as_asked(gold, wanted): key_of(gold, adapter) for gold in firsts}
    labels = {i.id: {key_of(label, adapter) for label in i.labels} for i in items}
    odd = []
    for row in (row for row in rows if row["id"] in own):
        possible = set(keys.values()) - own[row["id"]]
        if labels[row["id"]]:
            possible &= labels[row["id"]]
        foil = row.get("foil")
        if keys.get(foil) not in possible if foil is not None else possible:
            odd.append(row["id"])
    return none_of("foils are other items' golds", odd, len(rows), "foils are not")


def company_gate(
    study: Study, variant: str, rows: list[dict], baseline: list[dict], alone: list[dict]
) -> Gate:
    """Golds and foils of the items asked alone are as likely as they were among others.

    Equal where the runtime computes a text the same in any company. Elsewhere they may move by
    no more than they are away from the baseline's; the baseline's own have to be nearer to what
    they were in the batch than to other items'.
    """
    name = "golds as likely alone"
    batched, floats = ({row["id"]: _scored(row) for row in side} for side in (rows, baseline))
    pairs = [(batched[a["id"]], _scored(a)) for a in alone if a["id"] in batched]
    alike = [len(b["logprobs"]) == len(a["logprobs"]) > 0 for b, a in pairs]
    moved = largest(abs(x - y) for b, a in pairs for x, y in _both(b, a))
    told = f"log-likelihoods of golds by {moved:.2g} at most"
    if not pairs or not all(alike):
        return Gate(name, False, told, "golds are read in both")
    if exact(study, variant):
        return Gate(name, moved <= ROUNDING, told, f"{ROUNDING:g}")
    if variant == study.baseline:
        others = _distance_to_others(pairs, batched)
        return Gate(name, moved <= others, told, f"{others:.2g}, what separates other items' ones")
    distances = [rms_change([(floats[p[side]["id"]], p[side]) for p in pairs]) for side in (0, 1)]
    size = rms_change(pairs)
    if size is None or None in distances:
        return Gate(name, False, told, "log-likelihoods are there to compare")
    limit = DRAWS * min(distances) + ROUNDING
    return Gate(name, size <= limit, f"{told}, {size:.2g} on average", f"at most {limit:.2g}")


def log_likelihoods(row: dict) -> list[float]:
    """Of the row's golds, then of its foil if it has one; NaN for one that is not finite."""
    sums = list(row.get("gold_loglikelihoods", []))
    sums += [] if row.get("foil") is None else [row.get("foil_loglikelihood")]
    return [math.nan if s is None else s for s in sums]


def _scored(row: dict) -> dict:
    """The row's sums as those of options are stored."""
    return {"id": row["id"], "logprobs": log_likelihoods(row)}


def _both(one: dict, other: dict) -> Sequence[tuple[float, float]]:
    return list(zip(one["logprobs"], other["logprobs"], strict=False))


def _distance_to_others(pairs: list[tuple[dict, dict]], batched: dict[str, dict]) -> float:
    """The mean distance of the first golds alone to those of other items in the batch."""
    found = [
        abs(a["logprobs"][0] - other["logprobs"][0])
        for _, a in pairs
        for key, other in batched.items()
        if key != a["id"] and other["logprobs"]
    ]
    return math.fsum(found) / len(found) if found else math.inf


def not_finite(row: dict) -> bool:
    """Whether a log-likelihood of a gold or a foil is missing, since it was not finite."""
    read = row.get("foil_tokens") is not None
    return None in row.get("gold_loglikelihoods", ()) or (
        read and row.get("foil_loglikelihood") is None
    )
