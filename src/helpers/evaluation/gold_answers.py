"""Gold answers as a prompt asks for them, read after it by teacher forcing.

A written answer is right or wrong, which says little of an item. Its graded score is the
log-likelihood of a gold answer as the continuation of the very prompt that the item was asked
with, in nats a token, the best of several golds. Beside it stands a *foil*: the gold of
another item of the set, in the same form after the same prompt. A model with a trace of
ability prefers the gold.

An answer is as short as the protocol allows: in a box and nothing else where the study reads
boxes, with "unanswerable" where there is no answer. It ends where the protocol ends it: with
the box that closes, or with the token that ends the turn (`stop: turn`).
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from helpers.core.hashing import sha256_data
from helpers.evaluation.answer_parsing import ABSTENTION, normalize_answer
from helpers.evaluation.prompts import Prompt, PromptTokens
from helpers.inference.loglikelihood import OptionTokens
from helpers.sources.chat_conversations import tokenize
from helpers.sources.chat_template import answer_lead, end_of_turn
from helpers.sources.exact_numbers import gold_number
from helpers.sources.items import Item, label_key
from helpers.study.schema import EvaluationSet, Generate

MOST_GOLDS = 3  # of one item; SQuAD 2.0's annotators gave up to six, of which few differ
DECIMALS = 6  # of a stored log-likelihood


@dataclass(frozen=True)
class GoldAnswers:
    """What is read after one item's prompt, as the answer is written there.

    Attributes:
        golds: right answers, one at least and MOST_GOLDS at most.
        foil: another item's gold, wrong here; None where no other item has one.
    """

    golds: tuple[str, ...]
    foil: str | None

    @property
    def texts(self) -> tuple[str, ...]:
        """The golds, then the foil if there is one."""
        return self.golds if self.foil is None else (*self.golds, self.foil)


def gold_answers(items: Sequence[Item], wanted: EvaluationSet) -> dict[str, GoldAnswers]:
    """By item id; empty where options are scored.

    Args:
        items: all of the set, in its order: foils are other items' golds.
    """
    if wanted.ask.protocol != "generate":
        return {}
    said = [_distinct(item, wanted.adapter) for item in items]
    foils = _foils([list(golds) for golds in said], [item.labels for item in items])
    return {
        item.id: GoldAnswers(
            tuple(written(gold, wanted.ask) for gold in list(golds.values())[:MOST_GOLDS]),
            None if foil is None else written(next(iter(said[foil].values())), wanted.ask),
        )
        for item, golds, foil in zip(items, said, foils, strict=True)
    }


def written(answer: str, ask: Generate) -> str:
    """An answer as the prompt asks for it."""
    return rf"\boxed{{{answer}}}" if ask.answer == "boxed" else answer


def _distinct(item: Item, adapter: str) -> dict[str, str]:
    """The item's golds by what they are compared by; the abstention where there are none."""
    found: dict[str, str] = {}
    for gold in item.golds or (ABSTENTION,):
        found.setdefault(compared_by(gold, adapter), gold.strip())
    return found


def compared_by(answer: str, adapter: str) -> str:
    """What two answers have in common that are one: words, a number, or a label."""
    if adapter == "squad_v2":
        return normalize_answer(answer) or answer.strip().casefold()
    if adapter == "openmath":
        value = gold_number(answer)
        return "".join(answer.split()) if value is None else str(value)
    return label_key(answer)


def _foils(keys: Sequence[Sequence[str]], labels: Sequence[Sequence[str]]) -> list[int | None]:
    """For each item the index of another one, whose first gold is none of the item's own.

    Items are lined up by their first gold, the commonest gold first and in their order within
    one, and each takes the gold as many places on as the commonest gold has items. Where no
    gold is right for more than half of them, each is so taken once: a model that prefers one
    answer whatever it is asked gains by it as often as it loses.

    Args:
        keys: what each item's golds are compared by, the first gold first.
        labels: of each item's options; a foil is one of them. Empty where answers are free.
    """
    size = len(keys)
    common = Counter(own[0] for own in keys)
    first = {own[0]: i for i, own in reversed(list(enumerate(keys)))}
    order = sorted(range(size), key=lambda i: (-common[keys[i][0]], first[keys[i][0]], i))
    allowed = [{label_key(label) for label in each} for each in labels]

    def fits(index: int, other: int) -> bool:
        key = keys[other][0]
        return key not in keys[index] and (not allowed[index] or key in allowed[index])

    found: list[int | None] = [None] * size
    shift = max(common.values(), default=0)
    for place, index in enumerate(order):
        other = order[(place + shift) % size]
        if not fits(index, other):
            fitting = [i for i in order if fits(index, i)]
            other = fitting[place % len(fitting)] if fitting else None
        found[index] = other
    return found


def answer_tokens(
    tokenizer, asked: Prompt, tokens: PromptTokens, texts: Sequence[str], ask: Generate
) -> OptionTokens:
    """The prompt as the item is asked with it, and each answer as token ids after it.

    The prompt's ids stay as they are in generation. Those of an answer are the rest of the
    whole text's, answers being placed as the chat template places them; where the tokenizer
    would merge the two at their border, they are those of the answer alone.
    """
    lead, context = answer_lead(tokenizer), tokens.context
    end = [end_of_turn(tokenizer)] if ask.stop == "turn" else []
    options = []
    for text in texts:
        whole = tokenize(tokenizer, asked.text + lead + text)
        merged = whole[: len(context)] != context
        own = tokenize(tokenizer, lead + text) if merged else whole[len(context) :]
        options.append(own + end)
    return OptionTokens(context, options, tokens.cuts)


def gold_hash(golds: GoldAnswers, options: Sequence[Sequence[int]]) -> str:
    """Equal for two variants if and only if the same token ids were read as golds and foil."""
    return sha256_data([list(golds.golds), golds.foil, [list(o) for o in options]])[:16]


def gold_fields(
    golds: GoldAnswers, options: Sequence[Sequence[int]], loglikelihoods: Sequence[float]
) -> dict:
    """What a prediction holds of its golds and its foil.

    Args:
        options: token ids of each text of `golds.texts`.
        loglikelihoods: summed log-probability of each, in nats; one that is not finite is
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
        "gold_hash": gold_hash(golds, options),
    }
