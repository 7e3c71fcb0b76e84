"""Gates on what is asked: the items the seed draws, and prompts that hold what they announce.

Written a second time: the draw from the hashes of the questions, the prompt from its item's
own texts and from what the tokenizer's template puts around a conversation. Imports no torch.
"""

import hashlib
import random
from collections import Counter
from dataclasses import dataclass

from helpers.core.gates import Gate, none_of
from helpers.sources.chat_conversations import EXAMPLES, SYSTEM
from helpers.sources.items import Item, item_key
from helpers.study.schema import EvaluationSet

SAID = {"boolq": [" Yes", " No"]}  # what is scored where it is not the options

MOST_BEFORE = 2  # tokens that a tokenizer puts before a text


@dataclass(frozen=True)
class Shown:
    """One item's prompt as it is rendered now.

    Attributes:
        text: before the answer; continuations: texts that are scored after it.
        opening: what the template ends a prompt with, where the answer begins.
        tokens: as many as the model is handed; whole: as many as the tokenizer makes of the text.
    """

    item: Item
    text: str
    continuations: tuple[str, ...]
    opening: str
    tokens: int
    whole: int


def answer_opening(tokenizer) -> str:
    """What a chat template adds for an answer; empty without a template."""
    if not tokenizer.chat_template:
        return ""
    turn = [{"role": "user", "content": "a question"}]
    asked, bare = (
        tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=room)
        for room in (True, False)
    )
    return asked.removeprefix(bare)


def draw_gate(drawn: list[Item], pool: list[Item], *, seed: int, name: str = "") -> Gate:
    """The items are those that the seed puts first, title by title.

    Args:
        drawn: as they are asked.
        pool: all that could have been.
    """
    ranked = sorted(pool, key=lambda i: hashlib.sha256(_lot(seed, i)).hexdigest())
    taken, turns = Counter(), {}
    for place, item in enumerate(ranked):
        turns[item.id] = (taken[item.title] if item.title else 0, place)
        taken[item.title] += 1
    due = sorted(turns, key=turns.get)[: len(drawn)]
    found = [item.id for item in drawn]
    odd = [a for a, b in zip(found, due, strict=False) if a != b]
    return none_of(name or "items as the seed draws them", odd, len(drawn), "are not drawn by it")


def order_gate(name: str, drawn: list[Item], *, seed: int) -> Gate:
    """Items without titles, whatever was left out of their draw, lie in the seed's order."""
    lots = [hashlib.sha256(_lot(seed, item)).hexdigest() for item in drawn if not item.title]
    odd = [item.id for item, a, b in zip(drawn, lots, lots[1:], strict=False) if a > b]
    return none_of(name, odd, len(drawn), "lie before one that the seed draws first")


def passages_gate(rows: list[dict], texts: set[str], *, seed: int) -> Gate:
    """The passages of the shared text are those that the seed shuffles to the front."""
    pool = sorted(texts)
    random.Random(seed).shuffle(pool)
    due = [hashlib.sha256(text.encode()).hexdigest()[:16] for text in pool[: len(rows)]]
    odd = [r["id"] for r, d in zip(rows, due, strict=False) if r["id"] != d]
    return none_of("passages as the seed draws them", odd, len(rows), "are not drawn by it")


def _lot(seed: int, item: Item) -> bytes:
    return f"{seed}:{item_key(item)}".encode()


def contents_gate(wanted: EvaluationSet, shown: list[Shown]) -> Gate:
    """Every prompt holds its item's texts, the worked examples, and room for the answer."""
    odd = [f"{s.item.id}: {told}" for s in shown if (told := lacking(wanted, s))]
    return none_of("prompts hold what they announce", odd, len(shown), "prompts lack a part")


def lacking(wanted: EvaluationSet, shown: Shown) -> str:
    """What a prompt lacks, in words; empty if nothing."""
    item, text = shown.item, _words(shown.text)
    if not shown.whole <= shown.tokens <= shown.whole + MOST_BEFORE:
        return f"{shown.whole - shown.tokens} of its tokens"
    own = text.rfind(_words(item.question))
    if own < 0:
        return "its question"
    if wanted.ask.protocol == "loglikelihood":
        due = SAID.get(wanted.adapter, [f" {option}" for option in item.options])
        if list(shown.continuations) != due:
            return "its options, in their order"
        needs_passage = wanted.adapter != "arc"
        return "its passage" if needs_passage and not _holds(text[:own], item.passage) else ""
    if not _holds(text[:own], item.passage):
        return "its passage before the question"
    if not _holds(text[:own], SYSTEM[wanted.adapter]):
        return "its set's instruction"
    if wanted.adapter == "arc":
        listed = [f"{la}. {o}" for la, o in zip(item.labels, item.options, strict=True)]
        if not _holds(text[own:], " ".join(listed)):
            return "its options with their labels"
    place = 0
    for number, (example, answer) in enumerate(EXAMPLES[wanted.adapter], start=1):
        parts = (example.passage, example.question, *example.options, answer)
        found = [text.find(_words(part), place) for part in parts if part]
        there = min(found) >= 0 and found == sorted(found) and found[-1] < own
        if there != (number <= wanted.ask.shots):
            return f"just {wanted.ask.shots} worked examples"
        place = found[-1] if there else place
    return "" if shown.text.endswith(shown.opening) else "the opening of an answer"


def _words(text: str) -> str:
    return " ".join(text.split())


def _holds(text: str, part: str) -> bool:
    return _words(part) in text
