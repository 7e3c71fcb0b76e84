"""Greedy generation: prompts read in packed rows, answers written in a full batch of slots.

A slot whose answer has ended is given to the next prompt at once. What all prompts begin
with (the system turn, the worked examples) is read once and held once. Texts whose
log-likelihood after a prompt is wanted are read in the prompt's own row, as branches of it.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count, groupby

import torch
from torch import Tensor

from helpers.inference.kv_cache import Slots
from helpers.inference.loglikelihood import (
    OptionTokens,
    alone_loglikelihood,
    branched,
    option_sums,
    starts,
)
from helpers.inference.packed_attention import packed
from helpers.inference.packed_rows import Library, Segment, Text, cut, logits_at, read
from helpers.inference.single_sequence import Continued
from helpers.runtime.batching import FEWEST_ROWS, owned_by
from helpers.runtime.rotary_positions import reads_alone

REFILL = 8  # slots are given away by so many at a time: a row of one prompt is slow to read


@dataclass(frozen=True)
class Generated:
    """What one prompt was answered.

    Attributes:
        tokens: the new tokens, without the one that ended the turn.
        finish_reason: `stop` (end of turn), `answer` (it is complete), `length` (the cap),
            `nonfinite` (broken logits).
        loglikelihoods: of each text that was read after the prompt, in nats.
    """

    tokens: list[int]
    finish_reason: str
    loglikelihoods: tuple[float, ...] = ()


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
    loglikelihoods: tuple[float, ...] = ()
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
    options: Sequence[Sequence[list[int]]] = (),
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
        options: for each prompt, texts of one token at least whose log-likelihood after it is
            read beside what the model writes.
    """
    ends = Ends(max_new_tokens, frozenset(stop_tokens), complete)
    texts = [cut(p, c) for p, c in zip(prompts, cuts or [()] * len(prompts), strict=True)]
    items = [
        OptionTokens(p, list(o)) if o else None
        for p, o in zip(prompts, options or [()] * len(prompts), strict=True)
    ]
    longest = [max(max_new_tokens, len(i) - len(i.context) if i else 0) for i in items]
    lengths = [len(p) + n for p, n in zip(prompts, longest, strict=True)]
    apart = {i for i, length in enumerate(lengths) if reads_alone(model.config, length)}
    for index in apart:
        yield index, _alone(model, prompts[index], items[index], ends)
    start = lambda i: texts[i].shared[:1]  # noqa: E731 - what its whole batch begins with
    together = [i for i in range(len(texts)) if i not in apart]
    for _, group in groupby(sorted(together, key=start), key=start):
        chosen = list(group)
        own = [texts[i] for i in chosen], [items[i] for i in chosen]
        decoder = Decoder(model, *own, ends, batch_tokens, batch_rows)
        with packed(model):
            for index, answer in decoder.answers():
                yield chosen[index], answer


def _alone(model, prompt: list[int], item: OptionTokens | None, ends: Ends) -> Generated:
    """The answer to a prompt that is read by itself, by the model's own forward pass."""
    options = item.options if item else []
    read = tuple(alone_loglikelihood(model, prompt, option) for option in options)
    answer, text = Answer(0, read), Continued(model)
    while True:
        logits = logits_at(model, text.last_state(prompt + answer.tokens))[0]
        finite = bool(logits.isfinite().all())
        if reason := answer.take(int(logits.argmax()), finite, ends):
            return Generated(answer.tokens, reason, answer.loglikelihoods)


class Decoder:
    """Prompts that begin alike, and the slots their answers are written in.

    Args:
        texts: the prompts in pieces.
        items: each prompt with the texts that are read after it; None where there are none.
    """

    def __init__(
        self,
        model,
        texts: list[Text],
        items: list[OptionTokens | None],
        ends: Ends,
        batch_tokens: int,
        batch_rows: int,
    ):
        self.model, self.texts, self.items, self.ends = model, texts, items, ends
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
            size += len(self.texts[waiting[0]]) + self._after(waiting[0])
            if chosen and size > self.batch_tokens:
                break
            chosen.append(waiting.popleft())
        return chosen

    def _after(self, index: int) -> int:
        """How many tokens are read after a prompt: of each text all but the last."""
        item = self.items[index]
        return sum(len(option) - 1 for option in item.options) if item else 0

    def _begin(self, indices: list[int]) -> Iterator[tuple[int, Generated]]:
        """Read prompts and what follows them, give each a slot, and take their first tokens."""
        segments, leaves, after = [], [], []
        for index in indices:
            before, new = self.library.before(self.texts[index])
            leaves.append(Segment(list(self.texts[index].rest), before, kept=True))
            segments += [*new, leaves[-1]]
            if item := self.items[index]:
                after.append((leaves[-1], item, branched(item, (*before, leaves[-1]))))
                segments += [after[-1][2]] if after[-1][2].tokens else []
        hidden = read(self.model, segments)
        begins = starts(segments)
        ends = {leaf: begins[leaf] + len(leaf.tokens) for leaf in leaves}
        pieces = [(ends[leaf], item, options.branches) for leaf, item, options in after]
        sums = iter(option_sums(self.model, hidden, pieces) if pieces else ())
        first = len(self.alive)
        for index, leaf in zip(indices, leaves, strict=True):
            own = [*leaf.before[len(self.shared) :], leaf]
            self.slots.fill(len(self.alive), own)
            read_after = tuple(next(sums)) if self.items[index] else ()
            self.alive.append(Answer(index, read_after))
        self.held = leaves  # what they continue may serve the next prompts
        last = [ends[leaf] - 1 for leaf in leaves]
        yield from self._take(first, logits_at(self.model, hidden[last]))

    def _step(self) -> Iterator[tuple[int, Generated]]:
        """One token for every answer."""
        device, alive = self.model.device, len(self.alive)
        blank = max(0, min(FEWEST_ROWS, self.rows) - alive)
        tokens = [answer.tokens[-1] for answer in self.alive] + [0] * blank
        positions = self.slots.step(alive, blank, device)
        with owned_by(torch.arange(alive + blank, device=device)):
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
                yield answer.index, Generated(answer.tokens, reason, answer.loglikelihoods)
        for slot in reversed(ended):
            last = len(self.alive) - 1
            if slot != last:
                self.slots.move(last, slot)
                self.alive[slot] = self.alive[last]
            self.alive.pop()
