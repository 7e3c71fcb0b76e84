"""Greedy generation: prompts read in packed rows, answers written in a full batch of slots.

A slot whose answer has ended is given to the next prompt at once. What all prompts begin
with (the system turn, the worked examples) is read once and held once. Options, texts whose
log-likelihood after a prompt is read too, follow it in its own row as branches.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count, groupby

import torch
from torch import Tensor

from helpers.inference.kv_cache import KVCache
from helpers.inference.loglikelihood import (
    OptionTokens,
    loglikelihood_alone,
    option_segment,
    packed_option_sums,
    segment_starts,
)
from helpers.inference.packed_attention import use_packed_attention
from helpers.inference.packed_rows import PrefixCache, Segment, SplitText, logits_at, read, split_at
from helpers.inference.single_sequence import CachedSequence
from helpers.runtime.batching import FEWEST_ROWS, use_sequence_ids
from helpers.runtime.rotary_positions import reads_alone

REFILL = 8  # refill at least so many slots at a time: a row with a single prompt is slow to read


@dataclass(frozen=True)
class GeneratedAnswer:
    """The answer to one prompt.

    Attributes:
        tokens: the new tokens, without the one that ended the turn.
        finish_reason: `stop` (end of turn), `answer` (it is complete), `length` (the cap),
            `nonfinite` (broken logits).
        loglikelihoods: of each option that was read after the prompt, in nats.
    """

    tokens: list[int]
    finish_reason: str
    loglikelihoods: tuple[float, ...] = ()


@dataclass(frozen=True)
class StopRules:
    """The conditions that end an answer.

    Attributes:
        max_new_tokens: the cap.
        stop_tokens: ids that end a turn.
        complete: whether the tokens so far are a complete answer; None if nothing tests that.
    """

    max_new_tokens: int
    stop_tokens: frozenset[int]
    complete: Callable[[list[int]], bool] | None = None


@dataclass
class AnswerInProgress:
    """An unfinished answer: the index of its prompt, and its tokens so far."""

    index: int
    loglikelihoods: tuple[float, ...] = ()
    tokens: list[int] = field(default_factory=list)

    def append_token(self, token: int, finite: bool, stop_rules: StopRules) -> str | None:
        """Append the token; return the finish reason if the answer ends here, else None."""
        if not finite:
            return "nonfinite"
        if token in stop_rules.stop_tokens:
            return "stop"
        self.tokens.append(token)
        if stop_rules.complete and stop_rules.complete(self.tokens):
            return "answer"
        return "length" if len(self.tokens) == stop_rules.max_new_tokens else None


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
) -> Iterator[tuple[int, GeneratedAnswer]]:
    """Yield (prompt index, answer) as answers end.

    Args:
        model: a causal language model of transformers, in evaluation mode.
        prompts: token ids, each at least one.
        max_new_tokens: the cap on new tokens of one answer.
        stop_tokens: ids that end an answer.
        batch_tokens: the most tokens of one row of prompts.
        batch_rows: the most answers written at once.
        cuts: for each prompt, token counts at which it may be shared with others.
        complete: whether the tokens so far are a complete answer.
        options: for each prompt, non-empty continuations whose log-likelihood is read too; they
            do not change what the model generates.
    """
    stop_rules = StopRules(max_new_tokens, frozenset(stop_tokens), complete)
    texts = [split_at(p, c) for p, c in zip(prompts, cuts or [()] * len(prompts), strict=True)]
    items = [
        OptionTokens(prompt, list(own)) if own else None
        for prompt, own in zip(prompts, options or [()] * len(prompts), strict=True)
    ]
    lengths = [
        max(len(prompt) + max_new_tokens, len(item) if item else 0)
        for prompt, item in zip(prompts, items, strict=True)
    ]
    alone = {i for i, length in enumerate(lengths) if reads_alone(model.config, length)}
    for index in alone:
        yield index, _generate_alone(model, prompts[index], items[index], stop_rules)
    shared_prefix = lambda i: texts[i].shared[:1]  # noqa: E731 - common to its batch
    batched = [i for i in range(len(texts)) if i not in alone]
    for _, group in groupby(sorted(batched, key=shared_prefix), key=shared_prefix):
        chosen = list(group)
        inputs = [texts[i] for i in chosen], [items[i] for i in chosen]
        decoder = Decoder(model, *inputs, stop_rules, batch_tokens, batch_rows)
        with use_packed_attention(model):
            for index, answer in decoder.answers():
                yield chosen[index], answer


def _generate_alone(
    model, prompt: list[int], item: OptionTokens | None, stop_rules: StopRules
) -> GeneratedAnswer:
    """The answer to one prompt by the model's own forward pass, without packing."""
    options = item.options if item else []
    loglikelihoods = tuple(loglikelihood_alone(model, prompt, option) for option in options)
    answer, sequence = AnswerInProgress(0, loglikelihoods), CachedSequence(model)
    while True:
        logits = logits_at(model, sequence.last_state(prompt + answer.tokens))[0]
        finite = bool(logits.isfinite().all())
        if reason := answer.append_token(int(logits.argmax()), finite, stop_rules):
            return GeneratedAnswer(answer.tokens, reason, answer.loglikelihoods)


class Decoder:
    """Decodes prompts that share their beginning, each in one slot of the KV cache.

    Args:
        texts: the prompts, split at their shared prefixes.
        items: each prompt with its options; None for a prompt without options.
    """

    def __init__(
        self,
        model,
        texts: list[SplitText],
        items: list[OptionTokens | None],
        stop_rules: StopRules,
        batch_tokens: int,
        batch_rows: int,
    ):
        self.model, self.texts, self.items, self.ends = model, texts, items, stop_rules
        self.batch_tokens, self.rows = batch_tokens, batch_rows
        self.prefixes, self.recent_segments = PrefixCache(), []
        self.active: list[AnswerInProgress] = []  # the answer in slot 0, 1, …

    @torch.inference_mode()
    def answers(self) -> Iterator[tuple[int, GeneratedAnswer]]:
        """Yield (index of the text, answer) as answers end."""
        self.shared, new = self.prefixes.before(SplitText(self.texts[0].shared[:1], ()))
        if new:
            read(self.model, new)
        offset = sum(len(s.tokens) for s in self.shared)
        longest = max(map(len, self.texts)) - offset + self.ends.max_new_tokens
        self.slots = KVCache(self.rows, longest, self.shared)
        by_beginning = lambda i: (self.texts[i].shared, -len(self.texts[i]), i)  # noqa: E731
        waiting = deque(sorted(range(len(self.texts)), key=by_beginning))
        while waiting or self.active:
            free = self.rows - len(self.active)
            if waiting and (not self.active or free >= min(REFILL, self.rows)):
                yield from self._read_prompts(self._next_prompts(waiting, free))
            else:
                yield from self._decode_step()

    def _next_prompts(self, waiting: deque[int], free: int) -> list[int]:
        """The next prompts to read: as many as there are free slots and as fit one row."""
        chosen, row_tokens = [], 0
        while waiting and len(chosen) < free:
            row_tokens += len(self.texts[waiting[0]]) + self._option_tokens(waiting[0])
            if chosen and row_tokens > self.batch_tokens:
                break
            chosen.append(waiting.popleft())
        return chosen

    def _option_tokens(self, index: int) -> int:
        """How many tokens of a prompt's options are read: all but the last of each."""
        item = self.items[index]
        return sum(len(option) - 1 for option in item.options) if item else 0

    def _read_prompts(self, indices: list[int]) -> Iterator[tuple[int, GeneratedAnswer]]:
        """Read prompts with their options, give each a slot, and take their first tokens."""
        segments, suffixes, branched = [], [], []
        for index in indices:
            prefix, new = self.prefixes.before(self.texts[index])
            suffix = Segment(list(self.texts[index].rest), prefix, kept=True)
            suffixes.append(suffix)
            segments += [*new, suffix]
            if item := self.items[index]:
                options = option_segment(item, (*prefix, suffix))
                branched.append((suffix, item, options.branches))
                segments += [options] if options.tokens else []
        hidden = read(self.model, segments)
        starts = segment_starts(segments)
        ends = {suffix: starts[suffix] + len(suffix.tokens) for suffix in suffixes}
        placed = [(ends[suffix], item, branches) for suffix, item, branches in branched]
        sums = iter(packed_option_sums(self.model, hidden, placed) if placed else ())
        first_slot = len(self.active)
        for index, suffix in zip(indices, suffixes, strict=True):
            own_segments = [*suffix.before[len(self.shared) :], suffix]
            self.slots.fill(len(self.active), own_segments)
            loglikelihoods = tuple(next(sums)) if self.items[index] else ()
            self.active.append(AnswerInProgress(index, loglikelihoods))
        self.recent_segments = suffixes  # keeps their prefixes alive for the next prompts
        answer_rows = [ends[suffix] - 1 for suffix in suffixes]
        yield from self._append_tokens(first_slot, logits_at(self.model, hidden[answer_rows]))

    def _decode_step(self) -> Iterator[tuple[int, GeneratedAnswer]]:
        """Decode one token of every unfinished answer."""
        device, alive = self.model.device, len(self.active)
        padding = max(0, min(FEWEST_ROWS, self.rows) - alive)
        tokens = [answer.tokens[-1] for answer in self.active] + [0] * padding
        positions = self.slots.step(alive, padding, device)
        with use_sequence_ids(torch.arange(alive + padding, device=device)):
            output = self.model.base_model(
                input_ids=torch.tensor([tokens], device=device),
                position_ids=positions,
                use_cache=False,
                packed=self.slots,
            )
        hidden = output.last_hidden_state[0, :alive]
        yield from self._append_tokens(0, logits_at(self.model, hidden))

    def _append_tokens(
        self, first_slot: int, logits: Tensor
    ) -> Iterator[tuple[int, GeneratedAnswer]]:
        """Append the likeliest token to each answer; yield those that end and free their slots.

        The last slots move into the freed ones.

        Args:
            logits: (answers, vocabulary) of the answers in slot `first` and after.
        """
        largest, largest_ids = logits.max(-1)  # five times as fast as argmax on a CPU
        tokens = largest_ids.tolist()
        finite = (largest.isfinite() & logits.amin(-1).isfinite()).tolist()
        ended_slots = []
        for slot, token, is_finite in zip(count(first_slot), tokens, finite, strict=False):
            answer = self.active[slot]
            if reason := answer.append_token(token, is_finite, self.ends):
                ended_slots.append(slot)
                generated = GeneratedAnswer(answer.tokens, reason, answer.loglikelihoods)
                yield answer.index, generated
        for slot in reversed(ended_slots):
            last = len(self.active) - 1
            if slot != last:
                self.slots.move(last, slot)
                self.active[slot] = self.active[last]
            self.active.pop()
