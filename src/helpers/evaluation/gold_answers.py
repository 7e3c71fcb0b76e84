"""Gold answers in the form the prompt asks for, scored after it by teacher forcing.

A generated answer is right or wrong, which says little about an item. Its graded score is the
log-likelihood of a gold answer as the continuation of the item's own prompt, in nats per token;
of several golds the best counts. It is compared with a *foil*: the gold of another item of the
set, in the same form after the same prompt. A model that knows anything of the item prefers
the gold.

An answer is as short as the protocol allows: a box and nothing else if the study reads boxes,
"unanswerable" if there is no answer. It ends where the protocol ends it: with the closing
brace of the box, or with the token that ends the turn (`stop: turn`).
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from helpers.core.hashing import sha256_data
from helpers.evaluation.answer_parsing import ABSTENTION, normalize_answer
from helpers.evaluation.prompts import TokenizedPrompt
from helpers.sources.chat_conversations import tokenize
from helpers.sources.chat_template import answer_lead, end_of_turn
from helpers.sources.exact_numbers import gold_number
from helpers.sources.items import Item, label_key
from helpers.study.schema import EvaluationSet, Generate

MAX_GOLDS = 3  # per item; SQuAD 2.0's annotators gave up to six, few of them different
DECIMALS = 6  # of a stored log-likelihood


@dataclass(frozen=True)
class GoldAnswers:
    """The golds and the foil of one item, in the form its prompt asks for.

    Attributes:
        golds: right answers, at least one and at most MAX_GOLDS.
        foil: another item's gold, wrong for this item; None if no other item has one.
    """

    golds: tuple[str, ...]
    foil: str | None

    @property
    def texts(self) -> tuple[str, ...]:
        """The golds, then the foil if there is one."""
        return self.golds if self.foil is None else (*self.golds, self.foil)


def gold_answers(items: Sequence[Item], evaluation_set: EvaluationSet) -> dict[str, GoldAnswers]:
    """Golds and foil by item id; empty for a set whose options are scored.

    Args:
        items: all items of the set, in its order: foils are other items' golds.
    """
    if evaluation_set.ask.protocol != "generate":
        return {}
    ask = evaluation_set.ask
    golds = [_distinct_golds(item, evaluation_set.adapter) for item in items]
    foils = choose_foils([list(own) for own in golds], [item.labels for item in items])
    return {
        item.id: GoldAnswers(
            tuple(answer_text(gold, ask) for gold in list(own.values())[:MAX_GOLDS]),
            None if foil is None else answer_text(next(iter(golds[foil].values())), ask),
        )
        for item, own, foil in zip(items, golds, foils, strict=True)
    }


def answer_text(answer: str, ask: Generate) -> str:
    """An answer in the form the prompt asks for."""
    return rf"\boxed{{{answer}}}" if ask.answer == "boxed" else answer


def _distinct_golds(item: Item, adapter: str) -> dict[str, str]:
    """The item's golds by their comparison key; the abstention if it has none."""
    golds: dict[str, str] = {}
    for gold in item.golds or (ABSTENTION,):
        golds.setdefault(comparison_key(gold, adapter), gold.strip())
    return golds


def comparison_key(answer: str, adapter: str) -> str:
    """Equal for two wordings of one answer: its words, its number, or its label."""
    if adapter == "squad_v2":
        return normalize_answer(answer) or answer.strip().casefold()
    if adapter == "openmath":
        value = gold_number(answer)
        return "".join(answer.split()) if value is None else str(value)
    return label_key(answer)


def choose_foils(
    keys: Sequence[Sequence[str]], labels: Sequence[Sequence[str]]
) -> list[int | None]:
    """For each item the index of another one, whose first gold is wrong for this item.

    Items are sorted by their first gold, the most frequent gold first and in their own order
    within one gold. Each item takes the gold of the item that follows after as many places as
    the most frequent gold has items. If no gold is right for more than half of the items, each
    item's gold is taken exactly once: a model that prefers one answer to every question gains
    by it as often as it loses.

    Args:
        keys: comparison keys of each item's golds, the first gold first.
        labels: labels of each item's options, one of which a foil must be; empty if answers
            are free.
    """
    size = len(keys)
    counts = Counter(own[0] for own in keys)
    first_index = {own[0]: i for i, own in reversed(list(enumerate(keys)))}
    order = sorted(range(size), key=lambda i: (-counts[keys[i][0]], first_index[keys[i][0]], i))
    allowed = [{label_key(label) for label in own} for own in labels]

    def is_wrong(index: int, other: int) -> bool:
        key = keys[other][0]
        return key not in keys[index] and (not allowed[index] or key in allowed[index])

    foils: list[int | None] = [None] * size
    shift = max(counts.values(), default=0)
    for place, index in enumerate(order):
        foil = order[(place + shift) % size]
        if not is_wrong(index, foil):
            candidates = [i for i in order if is_wrong(index, i)]
            foil = candidates[place % len(candidates)] if candidates else None
        foils[index] = foil
    return foils


def answer_tokens(
    tokenizer, prompt: TokenizedPrompt, texts: Sequence[str], ask: Generate
) -> list[list[int]]:
    """Token ids of each answer, as the continuation of the prompt's own token ids.

    Answers stand where the chat template puts them. Their ids are the rest of the full text's
    ids; if the tokenizer would merge prompt and answer at their border, they are the ids of
    the answer alone.
    """
    lead, context = answer_lead(tokenizer), prompt.tokens.context
    end = [end_of_turn(tokenizer)] if ask.stop == "turn" else []
    options = []
    for text in texts:
        full_text = tokenize(tokenizer, prompt.prompt.text + lead + text)
        merged = full_text[: len(context)] != context
        own = tokenize(tokenizer, lead + text) if merged else full_text[len(context) :]
        options.append(own + end)
    return options


def gold_digest(golds: GoldAnswers, options: Sequence[Sequence[int]]) -> str:
    """Equal for two variants if and only if they read the same token ids as golds and foil."""
    return sha256_data([list(golds.golds), golds.foil, [list(o) for o in options]])[:16]


def gold_fields(
    golds: GoldAnswers, options: Sequence[Sequence[int]], loglikelihoods: Sequence[float]
) -> dict:
    """The fields of a prediction with the log-likelihoods of its golds and its foil.

    Args:
        options: token ids of each text of `golds.texts`.
        loglikelihoods: summed log-probability of each, in nats; a sum that is not finite is
            stored as None.
    """
    sums = [round(s, DECIMALS) if math.isfinite(s) else None for s in loglikelihoods]
    sizes, count = [len(option) for option in options], len(golds.golds)
    foil = (None, None) if golds.foil is None else (sums[count], sizes[count])
    return {
        "gold_loglikelihoods": sums[:count],
        "gold_tokens": sizes[:count],
        "foil_loglikelihood": foil[0],
        "foil_tokens": foil[1],
        "foil": golds.foil,
        "gold_hash": gold_digest(golds, options),
    }
