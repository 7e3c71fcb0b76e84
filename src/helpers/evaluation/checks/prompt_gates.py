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

FIXED_OPTIONS = {"boolq": [" Yes", " No"]}  # scored continuations of adapters without options

MOST_SPECIAL_TOKENS = 2  # special tokens before a text


@dataclass(frozen=True)
class RenderedPrompt:
    """One item's prompt, rendered again.

    Attributes:
        text: before the answer; continuations: texts that are scored after it.
        opening: the template's text between the prompt and the answer.
        tokens: number of token ids that the model receives.
        whole: number of token ids that the tokenizer returns for the text.
    """

    item: Item
    text: str
    continuations: tuple[str, ...]
    opening: str
    tokens: int
    whole: int


def answer_opening(tokenizer) -> str:
    """The text with which a chat template opens an answer; empty without a template."""
    if not tokenizer.chat_template:
        return ""
    conversation = [{"role": "user", "content": "a question"}]
    with_opening, without_opening = (
        tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=opening)
        for opening in (True, False)
    )
    return with_opening.removeprefix(without_opening)


def draw_gate(drawn: list[Item], pool: list[Item], *, seed: int, name: str = "") -> Gate:
    """The drawn items are the first ones in the seed's order, title by title.

    Args:
        drawn: the items of the set, in its order.
        pool: all items that the set is drawn from.
    """
    ranked = sorted(pool, key=lambda i: hashlib.sha256(_draw_key(seed, i)).hexdigest())
    drawn_by_title, ranks = Counter(), {}
    for place, item in enumerate(ranked):
        ranks[item.id] = (drawn_by_title[item.title] if item.title else 0, place)
        drawn_by_title[item.title] += 1
    expected = sorted(ranks, key=ranks.get)[: len(drawn)]
    drawn_ids = [item.id for item in drawn]
    differing = [a for a, b in zip(drawn_ids, expected, strict=False) if a != b]
    return none_of(name or "items in seed order", differing, len(drawn), "are not drawn by it")


def order_gate(name: str, drawn: list[Item], *, seed: int) -> Gate:
    """Items without titles lie in the seed's order, whichever items the draw left out."""
    draw_keys = [
        hashlib.sha256(_draw_key(seed, item)).hexdigest() for item in drawn if not item.title
    ]
    misplaced = [
        item.id for item, a, b in zip(drawn, draw_keys, draw_keys[1:], strict=False) if a > b
    ]
    return none_of(name, misplaced, len(drawn), "lie before one that the seed draws first")


def passages_gate(rows: list[dict], texts: set[str], *, seed: int) -> Gate:
    """The passages of the shared text are the first ones in the seed's order."""
    pool = sorted(texts)
    random.Random(seed).shuffle(pool)
    expected = [hashlib.sha256(text.encode()).hexdigest()[:16] for text in pool[: len(rows)]]
    differing = [r["id"] for r, d in zip(rows, expected, strict=False) if r["id"] != d]
    return none_of("passages in seed order", differing, len(rows), "are not drawn by it")


def _draw_key(seed: int, item: Item) -> bytes:
    return f"{seed}:{item_key(item)}".encode()


def contents_gate(evaluation_set: EvaluationSet, prompts: list[RenderedPrompt]) -> Gate:
    """Every prompt contains its item's texts, the worked examples, and the answer's opening."""
    incomplete = [
        f"{s.item.id}: {part}" for s in prompts if (part := missing_part(evaluation_set, s))
    ]
    return none_of("prompts complete", incomplete, len(prompts), "prompts lack a part")


def missing_part(evaluation_set: EvaluationSet, shown: RenderedPrompt) -> str:
    """The name of a missing part of a prompt; empty if it is complete."""
    item, text = shown.item, _words(shown.text)
    if not shown.whole <= shown.tokens <= shown.whole + MOST_SPECIAL_TOKENS:
        return f"{shown.whole - shown.tokens} of its tokens"
    question_start = text.rfind(_words(item.question))
    if question_start < 0:
        return "its question"
    if evaluation_set.ask.protocol == "loglikelihood":
        expected = FIXED_OPTIONS.get(
            evaluation_set.adapter, [f" {option}" for option in item.options]
        )
        if list(shown.continuations) != expected:
            return "its options, in their order"
        needs_passage = evaluation_set.adapter != "arc"
        return (
            "its passage"
            if needs_passage and not _holds(text[:question_start], item.passage)
            else ""
        )
    if not _holds(text[:question_start], item.passage):
        return "its passage before the question"
    if not _holds(text[:question_start], SYSTEM[evaluation_set.adapter]):
        return "its set's instruction"
    if evaluation_set.adapter == "arc":
        labelled_options = [
            f"{label}. {o}" for label, o in zip(item.labels, item.options, strict=True)
        ]
        if not _holds(text[question_start:], " ".join(labelled_options)):
            return "its options with their labels"
    place = 0
    for number, (example, answer) in enumerate(EXAMPLES[evaluation_set.adapter], start=1):
        parts = (example.passage, example.question, *example.options, answer)
        positions = [text.find(_words(part), place) for part in parts if part]
        is_present = (
            min(positions) >= 0
            and positions == sorted(positions)
            and positions[-1] < question_start
        )
        if is_present != (number <= evaluation_set.ask.shots):
            return f"just {evaluation_set.ask.shots} worked examples"
        place = positions[-1] if is_present else place
    return "" if shown.text.endswith(shown.opening) else "the opening of an answer"


def _words(text: str) -> str:
    return " ".join(text.split())


def _holds(text: str, part: str) -> bool:
    return _words(part) in text
