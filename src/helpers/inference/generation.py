"""Greedy generation: prompts read in packed rows, answers written in a full batch of slots.

A slot whose answer has ended is given to the next prompt at once. What all prompts begin
with (the system turn, the worked examples) is read once and held once.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count, groupby

import torch
from torch import Tensor

from helpers.inference.kv_cache import Slots
from helpers.inference.packed_attention import packed
from helpers.inference.packed_rows import Library, Segment, Text, cut, logits_at, read
from helpers.inference.single_sequence import Continued
from helpers.runtime.batching import FEWEST_ROWS, use_sequence_ids
from helpers.runtime.rotary_positions import reads_alone

REFILL = 8  # slots are given away by so many at a time: a row of one prompt is slow to read


@dataclass(frozen=True)
class Generated:
    """What one prompt was answered.

    Attributes:
        tokens: the new tokens, without the one that ended the turn.
        finish_reason: `stop` (end of turn), `answer` (it is complete), `length` (the cap),
            `nonfinite` (broken logits).
    """

    tokens: list[int]
    finish_reason: str


@dataclass(frozen=True)
class Ends:
    """When an answer ends.

    Attributes:
        max_new_tokens: the cap.
        stop_tokens: ids that end a turn.
        complete: whether the tokens so far are a complete answer; None never asks.
    """

    max_new_tokens: int
    stop_tokens: frozenset[int]
    complete: Callable[[list[int]], bool] | None = None


@dataclass
class Answer:
    """An answer being written in a slot."""

    index: int
    tokens: list[int] = field(default_factory=list)

    def take(self, token: int, finite: bool, ends: Ends) -> str | None:
        """Append the token, and return why the answer ends with or before it, if it does."""
        if not finite:
            return "nonfinite"
        if token in ends.stop_tokens:
            return "stop"
        self.tokens.append(token)
        if ends.complete and ends.complete(self.tokens):
            return "answer"
        return "length" if len(self.tokens) == ends.max_new_tokens else None


def generate_greedy(
    model,
    prompts: list[list[int]],
    *,
    max_new_tokens: int,
    stop_tokens: set[int],
    batch_tokens: int,
    batch_rows: int,
    cuts: Sequence[Sequence[int]] = (),
    complete: Callable[[list[int]], bool] | None = None,
) -> Iterator[tuple[int, Generated]]:
    """Yield (prompt index, answer) as answers end.

    Args:
        model: a causal language model of transformers, in evaluation mode.
        prompts: token ids, each at least one.
        max_new_tokens: the cap on new tokens of one answer.
        stop_tokens: ids that end an answer.
        batch_tokens: the most tokens of one row of prompts.
        batch_rows: the most answers written at once.
        cuts: for each prompt, token counts at which it may be shared with others.
        complete: whether the tokens of an answer so far are all that is wanted.
    """
    ends = Ends(max_new_tokens, frozenset(stop_tokens), complete)
    texts = [cut(p, c) for p, c in zip(prompts, cuts or [()] * len(prompts), strict=True)]
    apart = {i for i, p in enumerate(prompts) if reads_alone(model.config, len(p) + max_new_tokens)}
    for index in apart:
        yield index, _alone(model, prompts[index], ends)
    start = lambda i: texts[i].shared[:1]  # noqa: E731 - what its whole batch begins with
    together = [i for i in range(len(texts)) if i not in apart]
    for _, group in groupby(sorted(together, key=start), key=start):
        chosen = list(group)
        decoder = Decoder(model, [texts[i] for i in chosen], ends, batch_tokens, batch_rows)
        with packed(model):
            for index, answer in decoder.answers():
                yield chosen[index], answer


def _alone(model, prompt: list[int], ends: Ends) -> Generated:
    """The answer to a prompt that is read by itself, by the model's own forward pass."""
    answer, text = Answer(0), Continued(model)
    while True:
        logits = logits_at(model, text.last_state(prompt + answer.tokens))[0]
        finite = bool(logits.isfinite().all())
        if reason := answer.take(int(logits.argmax()), finite, ends):
            return Generated(answer.tokens, reason)


class Decoder:
    """Prompts that begin alike, and the slots their answers are written in."""

    def __init__(self, model, texts: list[Text], ends: Ends, batch_tokens: int, batch_rows: int):
        self.model, self.texts, self.ends = model, texts, ends
        self.batch_tokens, self.rows = batch_tokens, batch_rows
        self.library, self.held = Library(), []
        self.alive: list[Answer] = []  # the answer in slot 0, 1, …

    @torch.inference_mode()
    def answers(self) -> Iterator[tuple[int, Generated]]:
        """Yield (index of the text, answer) as answers end."""
        self.shared, new = self.library.before(Text(self.texts[0].shared[:1], ()))
        if new:
            read(self.model, new)
        offset = sum(len(s.tokens) for s in self.shared)
        longest = max(map(len, self.texts)) - offset + self.ends.max_new_tokens
        self.slots = Slots(self.rows, longest, self.shared)
        by_beginning = lambda i: (self.texts[i].shared, -len(self.texts[i]), i)  # noqa: E731
        waiting = deque(sorted(range(len(self.texts)), key=by_beginning))
        while waiting or self.alive:
            free = self.rows - len(self.alive)
            if waiting and (not self.alive or free >= min(REFILL, self.rows)):
                yield from self._begin(self._next(waiting, free))
            else:
                yield from self._step()

    def _next(self, waiting: deque[int], free: int) -> list[int]:
        """The prompts to read now: as many as have a slot and fit one row."""
        chosen, size = [], 0
        while waiting and len(chosen) < free:
            size += len(self.texts[waiting[0]])
            if chosen and size > self.batch_tokens:
                break
            chosen.append(waiting.popleft())
        return chosen

    def _begin(self, indices: list[int]) -> Iterator[tuple[int, Generated]]:
        """Read prompts, give each a slot, and take their first tokens."""
        segments, leaves = [], []
        for index in indices:
            before, new = self.library.before(self.texts[index])
            leaves.append(Segment(list(self.texts[index].rest), before, kept=True))
            segments += [*new, leaves[-1]]
        hidden = read(self.model, segments)
        ends = torch.tensor([len(s.tokens) for s in segments]).cumsum(0) - 1
        last = [int(end) for end, s in zip(ends, segments, strict=True) if s in set(leaves)]
        first = len(self.alive)
        for index, leaf in zip(indices, leaves, strict=True):
            own = [*leaf.before[len(self.shared) :], leaf]
            self.slots.fill(len(self.alive), own)
            self.alive.append(Answer(index))
        self.held = leaves  # what they continue may serve the next prompts
        yield from self._take(first, logits_at(self.model, hidden[last]))

    def _step(self) -> Iterator[tuple[int, Generated]]:
        """One token for every answer."""
        device, alive = self.model.device, len(self.alive)
        blank = max(0, min(FEWEST_ROWS, self.rows) - alive)
        tokens = [answer.tokens[-1] for answer in self.alive] + [0] * blank
        positions = self.slots.step(alive, blank, device)
        with use_sequence_ids(torch.arange(alive + blank, device=device)):
            found = self.model.base_model(
                input_ids=torch.tensor([tokens], device=device),
                position_ids=positions,
                use_cache=False,
                packed=self.slots,
            )
        hidden = found.last_hidden_state[0, :alive]
        yield from self._take(0, logits_at(self.model, hidden))

    def _take(self, first: int, logits: Tensor) -> Iterator[tuple[int, Generated]]:
        """Give each answer from a slot on its token; ended ones leave, the last take their slots.

        Args:
            logits: (answers, vocabulary) of the answers in slot `first` and after.
        """
        most, first_of_most = logits.max(-1)  # five times as fast as argmax on a CPU
        tokens = first_of_most.tolist()
        finite = (most.isfinite() & logits.amin(-1).isfinite()).tolist()
        ended = []
        for slot, token, is_finite in zip(count(first), tokens, finite, strict=False):
            answer = self.alive[slot]
            if reason := answer.take(token, is_finite, self.ends):
                ended.append(slot)
                yield answer.index, Generated(answer.tokens, reason)
        for slot in reversed(ended):
            last = len(self.alive) - 1
            if slot != last:
                self.slots.move(last, slot)
                self.alive[slot] = self.alive[last]
            self.alive.pop()
