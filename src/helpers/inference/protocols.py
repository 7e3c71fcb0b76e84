"""The two protocols by which a model answers: log-likelihood of options, and greedy generation.

Log-likelihood: an item's context is computed once. Its options follow it as branches that do not
see each other, at the positions they would have alone. What several contexts begin with is
computed once for all of them. The head runs only where a scored token is predicted.

Generation: prompts are read in packed rows, answers written in a full batch of slots. A slot whose
answer has ended is given to the next prompt at once. What all prompts begin with (the system turn,
the worked examples) is read once and held once.

Models of which a packed row cannot compute what they compute alone read one text at a time, by
their own forward pass and attention: slower, and the same operations. Such are texts so long that
positions depend on the length (`reads_alone` in `helpers.sources.model_files`), and models for
which `prove_engine` finds that packed rows give other states (ALiBi, recurrent blocks, attention
of their own).
"""

from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import count, groupby

import torch
from torch import Tensor
from transformers import DynamicCache

from helpers.core.errors import StudyError, one_line
from helpers.inference.packed_attention import (
    TRUNK,
    KVCache,
    PrefixCache,
    Segment,
    SplitText,
    kv_of,
    logits_at,
    packed_batches,
    read,
    split_at,
    use_packed_attention,
)
from helpers.runtime import twins
from helpers.runtime.devices import FEWEST_ROWS, use_sequence_ids
from helpers.runtime.discovery import ConfigKey, linear_experts
from helpers.sources.model_files import changes_at, reads_alone, reset_dynamic_rope_

PROBE_LENGTHS = (37, 26)  # of two texts with the same beginning; a block of keys and a part
SHARED_TOKENS = 14  # of their beginning
PERTURBATION = 1e-6  # relative, of embeddings; in the model's type at least one rounding
# Two correct programs may differ by so many changes by the perturbation: by many while they are
# small, by few where roundings to int8 flip and one flip is as large as another.
MANY, FEW, SMALL = 50.0, 5.0, 0.02
LEAST_EPS = 8.0  # of the model's type
SHARP = 0.01  # of a state's size: what rounding may explain in a proof that decides alone


@torch.inference_mode()
def prove_engine(model) -> None:
    """Set how a loaded model is read, by comparing this engine with its own forward pass.

    Two texts are read in one row, apart and with a shared beginning, and continued in slots; then
    the cache of the model's own forward pass is tried. `model.packing_problem` says why packed
    rows are not used, `model.cache_problem` why texts are read anew for each token; both are
    empty for a model that does as it would alone.

    What int8 or bfloat16 rounds may hide a state that crosses from text to text. There the twin
    of the model's configuration is asked too, in float32.
    """
    model.packing_problem = model.cache_problem = ""
    if getattr(model, "scale_scope", "token") == "pass":
        return  # each pass reads one text
    *problems, limit = _engine_problems(model)
    if limit > SHARP:
        twins_problems = _twins_problems(ConfigKey(model.config))
        problems = [own or of_twin for own, of_twin in zip(problems, twins_problems, strict=True)]
    model.packing_problem, model.cache_problem = problems


def _engine_problems(model) -> tuple[str, str, float]:
    """Why packed rows and why the cache are not used, and the difference that rounding explains."""
    texts = _probe_texts(model.config)
    expected = [hidden_states(model, text) for text in texts]
    with _perturbed_embeddings(model):
        perturbed = [hidden_states(model, text) for text in texts]
    change = max(map(_relative_difference, perturbed, expected))
    limit = min(MANY * change, max(FEW * change, SMALL)) + LEAST_EPS * torch.finfo(model.dtype).eps
    packing = _problem(lambda: _packed_difference(model, texts, expected), limit)
    cache = _problem(lambda: _cached_difference(model, texts[0], expected[0]), limit)
    return packing, cache, limit


@lru_cache(maxsize=16)
def _twins_problems(same: ConfigKey) -> tuple[str, str]:
    """The engine's problems with a configuration's tiny twin in float32."""
    config = twins.twin_config(same.config)
    with linear_experts(config):
        twin = twins.build_twin(config).float()
    return _engine_problems(twin)[:2]


def reading_record(model) -> dict[str, str]:
    """For a record: why the engine reads one text at a time; empty for packed rows."""
    problem = getattr(model, "packing_problem", "")
    return {"reading": f"one text at a time, since in packed rows {problem}"} if problem else {}


def _probe_texts(config) -> list[list[int]]:
    generator, size = torch.Generator().manual_seed(0), config.vocab_size
    texts = [torch.randint(3, size, (n,), generator=generator).tolist() for n in PROBE_LENGTHS]
    return [texts[0], texts[0][:SHARED_TOKENS] + texts[1][SHARED_TOKENS:]]


def _problem(difference: Callable[[], float], limit: float) -> str:
    """Why a way of reading is not used; empty if its states differ by no more than the limit."""
    try:
        relative = difference()
    except Exception as error:  # of many kinds; the model then reads in its own way
        return f"{type(error).__name__}: {one_line(error)[:120]}"
    if relative <= limit:
        return ""
    return f"states differ by {relative:.1g} of their size, rounding explains {limit:.1g}"


def _relative_difference(states: Tensor, expected: Tensor) -> float:
    """The largest difference of a token's states relative to their norm; infinite for NaN."""
    size = expected.double().norm(dim=-1).clamp(min=1e-30)
    parts = (states.double() - expected.double()).norm(dim=-1) / size
    return float(parts.nan_to_num(torch.inf).max())


@contextmanager
def _perturbed_embeddings(model) -> Iterator[None]:
    generator = torch.Generator().manual_seed(1)
    size = max(PERTURBATION, torch.finfo(model.dtype).eps)

    def perturb(_module, _args, output: Tensor) -> Tensor:
        noise = torch.randn(output.shape, generator=generator).to(output.device, output.dtype)
        return output * (1 + size * noise)

    handle = model.get_input_embeddings().register_forward_hook(perturb)
    try:
        yield
    finally:
        handle.remove()


def _packed_difference(model, texts: list[list[int]], expected: list[Tensor]) -> float:
    """The largest difference of packed states to those read alone."""
    shared = Segment(texts[0][:SHARED_TOKENS], kept=True)
    rests = [Segment(text[SHARED_TOKENS:], (shared,), kept=True) for text in texts]
    with use_packed_attention(model):
        apart = read(model, [Segment(text) for text in texts])
        together = read(model, [shared, *rests])
        slots = KVCache(len(texts), max(PROBE_LENGTHS) + 1, (shared,))
        for slot, rest in enumerate(rests):
            slots.fill(slot, [rest])
        written = _decoded(model, [text[0] for text in texts], slots, padding=0)
    beginning, *own = together.split([len(s.tokens) for s in (shared, *rests)])
    pairs = [(apart, torch.cat(expected))]
    pairs += [(torch.cat([beginning, rest]), e) for rest, e in zip(own, expected, strict=True)]
    last = [hidden_states(model, [*text, text[0]])[-1:] for text in texts]
    return max(_relative_difference(*pair) for pair in [*pairs, (written, torch.cat(last))])


def _cached_difference(model, text: list[int], expected: Tensor) -> float:
    """The largest difference of states with a cache to those read at once."""
    sequence = CachedSequence(model)
    lengths = (len(text) - 2, len(text) - 1, len(text))
    states = [sequence.last_state(text[:length]) for length in lengths]
    return _relative_difference(torch.cat(states), expected[-3:])


def read_alone(model, length: int) -> bool:
    """Whether a text of this length is read by the model's own forward pass.

    Raises:
        StudyError: it is, and the model's keys and values are to be kept in int8.
    """
    alone = bool(getattr(model, "packing_problem", "")) or reads_alone(model.config, length)
    if alone and kv_of(model):
        raise StudyError(
            f"variants.*.kv: a text of {length} tokens is read by the model's own forward pass, "
            "where no int8 cache is simulated; leave kv out, or the text"
        )
    return alone


def keep_keys_and_values(model, kv: str | None, *, at: str) -> None:
    """Keep the model's keys and values in this type from now on, after `prove_engine`.

    Raises:
        StudyError: the engine does not read this model by packed rows.
    """
    if kv and model.packing_problem:
        raise StudyError(
            f"{at}.kv: the model is read by its own forward pass, where no int8 cache is "
            f"simulated ({model.packing_problem}); leave kv out"
        )
    model.kv_cache = kv


@torch.inference_mode()
def hidden_states(model, tokens: list[int]) -> Tensor:
    """(tokens, hidden) of one text after the last layer, before the head."""
    reset_dynamic_rope_(model)
    ids = torch.tensor([tokens], device=model.device)
    return model.base_model(input_ids=ids, use_cache=False).last_hidden_state[0]


class CachedSequence:
    """One text that grows token by token, with its KV cache.

    Cached keys and values are used while their positions are those of the longer text, and
    computed again when the model changes the positions.
    """

    def __init__(self, model):
        self.model, self._memory = model, None

    @torch.inference_mode()
    def last_state(self, tokens: list[int]) -> Tensor:
        """(1, hidden) state of the text's last token."""
        if getattr(self.model, "cache_problem", ""):
            return hidden_states(self.model, tokens)[-1:]
        if self._memory is None or changes_at(self.model.config, len(tokens)):
            self._memory = DynamicCache(config=self.model.config)
        cached_tokens = self._memory.get_seq_length()
        reset_dynamic_rope_(self.model)
        device = self.model.device
        output = self.model.base_model(
            input_ids=torch.tensor([tokens[cached_tokens:]], device=device),
            position_ids=torch.arange(cached_tokens, len(tokens), device=device)[None],
            past_key_values=self._memory,
            use_cache=True,
        )
        return output.last_hidden_state[0, -1:]


HEAD_ROWS = 128  # positions whose logits are in memory at once


@dataclass(frozen=True)
class OptionTokens:
    """One item as token ids: a context and at least one non-empty continuation of it.

    Attributes:
        cuts: token counts at which the context may be shared with other items.
        form: so many tokens at the beginning of each option are read and not scored; fewer than
            any option has.
    """

    context: list[int]
    options: list[list[int]]
    cuts: tuple[int, ...] = ()
    form: int = 0

    def __len__(self) -> int:
        """Tokens of the context and the longest option."""
        return len(self.context) + max(map(len, self.options))

    def __post_init__(self):
        if not self.context or not self.options or not all(self.options):
            raise ValueError("an item needs a context and options of at least one token each")
        if self.form >= min(map(len, self.options)):
            raise ValueError("every option needs a token to score after its form")

    def scored_pairs(self) -> list[tuple[list[int], list[int]]]:
        """Of each option what comes before its scored tokens, and these."""
        return [(self.context + o[: self.form], o[self.form :]) for o in self.options]


def option_segment(item: OptionTokens, before: tuple[Segment, ...]) -> Segment:
    """The segment of an item: the rest of its context, then its options as branches.

    The last token of an option is predicted but never read.
    """
    length = len(item.context)
    tokens = item.context[sum(len(s.tokens) for s in before) :]
    positions = list(range(length - len(tokens), length))
    branches = [TRUNK] * len(tokens)
    for k, option in enumerate(item.options, start=TRUNK + 1):
        tokens = tokens + option[:-1]
        positions += range(length, length + len(option) - 1)
        branches += [k] * (len(option) - 1)
    return Segment(tokens, before, branches, positions)


def scored_tokens(item: OptionTokens, branches: list[int]) -> list[tuple[int, int, int]]:
    """(predicting place in the segment, token, option index) of every scored token."""
    trunk = branches.count(TRUNK)
    scored, branch_start = [], trunk
    for k, option in enumerate(item.options):
        predicting = [trunk - 1, *range(branch_start, branch_start + len(option) - 1)]
        places = zip(predicting, option, strict=True)
        scored += [(place, token, k) for place, token in places][item.form :]
        branch_start += len(option) - 1
    return scored


@torch.inference_mode()
def option_loglikelihoods(
    model, items: list[OptionTokens], *, batch_tokens: int
) -> Iterator[tuple[int, list[float]]]:
    """Yield (item index, summed log-probability of each option) as rows finish.

    Args:
        model: a causal language model of transformers, in evaluation mode.
        items: contexts and options as token ids.
        batch_tokens: the most tokens of one forward pass.
    """
    for index, scores in option_scores(model, items, batch_tokens=batch_tokens):
        yield index, [score.loglikelihood for score in scores]


@dataclass
class OptionScore:
    """Summed log-probability of an option, and whether each of its tokens is the likeliest."""

    loglikelihood: float = 0.0
    greedy: bool = True


@torch.inference_mode()
def option_scores(
    model, items: list[OptionTokens], *, batch_tokens: int, greedy: bool = False
) -> Iterator[tuple[int, list[OptionScore]]]:
    """As `option_loglikelihoods`, with whether greedy generation would write each option.

    Args:
        greedy: whether that is computed; else it is True of all.
    """
    alone = [i for i, item in enumerate(items) if read_alone(model, len(item))]
    for index in alone:
        pairs = items[index].scored_pairs()
        yield index, [_score_alone(model, before, tokens, greedy) for before, tokens in pairs]
    batched = [i for i in range(len(items)) if i not in set(alone)]
    packed_items = [items[i] for i in batched]
    for index, scores in _packed_scores(model, packed_items, batch_tokens, greedy):
        yield batched[index], scores


def text_windows(first: int, text: list[int], limit: int) -> list[OptionTokens]:
    """A text in windows that a model can read, each token predicted once.

    As lm-evaluation-harness cuts them: every window is full but the last, which looks back as
    far as it can; a full one begins after the last token of the window before it.

    Args:
        first: the token before the text.
        limit: the most tokens that the model reads.
    """
    windows = [OptionTokens([first], [text[:limit]])]
    for start in range(limit, len(text), limit):
        end = min(start + limit, len(text))
        windows.append(OptionTokens(text[end - limit - 1 : start], [text[start:end]]))
    return windows


def windowed_scores(
    model, items: list[OptionTokens], *, limit: int, batch_tokens: int
) -> Iterator[tuple[int, list[OptionScore]]]:
    """As `option_scores` with `greedy`; options longer than the model's context in windows.

    Args:
        items: one whose longest option does not fit has a context of one token.
        limit: the most tokens that the model reads.
    """
    pieces, owners = [], []
    for index, item in enumerate(items):
        if len(item) <= limit + 1:  # the last token is predicted and not read
            pieces.append(item)
            owners.append((index, None))
            continue
        for k, option in enumerate(item.options):
            windows = text_windows(item.context[-1], option, limit)
            pieces += windows
            owners += [(index, k)] * len(windows)
    missing = Counter(index for index, _ in owners)
    totals: dict[int, list[OptionScore]] = {}
    for piece, scores in option_scores(model, pieces, batch_tokens=batch_tokens, greedy=True):
        index, k = owners[piece]
        own = totals.setdefault(index, [OptionScore() for _ in items[index].options])
        for total, score in zip(own if k is None else [own[k]], scores, strict=True):
            total.loglikelihood += score.loglikelihood
            total.greedy &= score.greedy
        missing[index] -= 1
        if not missing[index]:
            yield index, totals.pop(index)


def loglikelihood_alone(model, context: list[int], option: list[int]) -> float:
    """The option's summed log-probability, from one pass over context and option."""
    return _score_alone(model, context, option, False).loglikelihood


def _score_alone(model, context: list[int], option: list[int], greedy: bool) -> OptionScore:
    hidden, first = hidden_states(model, context + option), len(context) - 1
    places = list(range(first, first + len(option)))
    logprobs, likeliest = target_logprobs(model, hidden, places, option, greedy=greedy)
    return OptionScore(sum(logprobs.tolist()), bool(likeliest.all()))


def _packed_scores(
    model, items: list[OptionTokens], batch_tokens: int, greedy: bool
) -> Iterator[tuple[int, list[OptionScore]]]:
    texts = [split_at(item.context, item.cuts) for item in items]
    make_segment = lambda index, before: option_segment(items[index], before)  # noqa: E731
    for indices, segments, suffixes in packed_batches(texts, make_segment, row_tokens=batch_tokens):
        with use_packed_attention(model):
            hidden = read(model, segments)
        starts = segment_starts(segments)
        placed = [
            (starts[suffix], items[index], suffix.branches)
            for index, suffix in zip(indices, suffixes, strict=True)
        ]
        scores = packed_option_sums(model, hidden, placed, greedy=greedy)
        yield from zip(indices, scores, strict=True)


def packed_option_sums(
    model,
    hidden: Tensor,
    placed: Sequence[tuple[int, OptionTokens, list[int]]],
    *,
    greedy: bool = False,
) -> list[list[OptionScore]]:
    """The score of each option of several items read in one row.

    Args:
        hidden: (rows, hidden) states of the row.
        placed: (start of its segment in the row, item, branches of the segment) of each item.
            A segment without context tokens follows the end of its context.
    """
    scored = [
        (start + at, token, (number, k))
        for number, (start, item, branches) in enumerate(placed)
        for at, token, k in scored_tokens(item, branches)
    ]
    scores = [[OptionScore() for _ in item.options] for _, item, _ in placed]
    places, targets, owners = (list(column) for column in zip(*scored, strict=True))
    logprobs, likeliest = target_logprobs(model, hidden, places, targets, greedy=greedy)
    for (number, k), value, is_likeliest in zip(
        owners, logprobs.tolist(), likeliest.tolist(), strict=True
    ):
        scores[number][k].loglikelihood += value
        scores[number][k].greedy &= is_likeliest
    return scores


def segment_starts(segments: list[Segment]) -> dict[Segment, int]:
    """Index of each segment's first token in the row of all segments."""
    starts, end = {}, 0
    for segment in segments:
        starts[segment] = end
        end += len(segment.tokens)
    return starts


def target_logprobs(
    model, hidden: Tensor, places: list[int], tokens: list[int], *, greedy: bool = False
) -> tuple[Tensor, Tensor]:
    """((targets,) float64 log-probability of each token at its place, whether it is the likeliest).

    Args:
        hidden: (rows, hidden) states of one forward pass.
        places: a row of `hidden` for every target; several may share one.
        tokens: the target tokens.
        greedy: whether the likeliest tokens are looked for; else all count as such.
    """
    distinct_places, inverse = torch.unique(torch.tensor(places), return_inverse=True)
    order = torch.argsort(inverse, stable=True)
    token_ids = torch.tensor(tokens)
    logprobs = torch.empty(len(places), dtype=torch.float64)
    likeliest = torch.ones(len(places), dtype=torch.bool)
    for start in range(0, len(distinct_places), HEAD_ROWS):
        chunk = distinct_places[start : start + HEAD_ROWS].to(hidden.device)
        chunk_logprobs = logits_at(model, hidden[chunk]).log_softmax(-1)
        in_chunk = order[(inverse[order] >= start) & (inverse[order] < start + HEAD_ROWS)]
        packed_batches, columns = (
            x.to(chunk_logprobs.device) for x in (inverse[in_chunk] - start, token_ids[in_chunk])
        )
        at_targets = chunk_logprobs[packed_batches, columns]
        logprobs[in_chunk] = at_targets.cpu().double()
        if greedy:
            largest = chunk_logprobs.amax(-1)[packed_batches]
            likeliest[in_chunk] = (at_targets >= largest).cpu()
    return logprobs, likeliest


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
    forms: Sequence[int] = (),
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
        forms: for each prompt, the tokens at the beginning of its options that are not scored.
    """
    stop_rules = StopRules(max_new_tokens, frozenset(stop_tokens), complete)
    texts = [split_at(p, c) for p, c in zip(prompts, cuts or [()] * len(prompts), strict=True)]
    forms = forms or [0] * len(prompts)
    items = [
        OptionTokens(prompt, list(own), form=form) if own else None
        for prompt, own, form in zip(prompts, options or [()] * len(prompts), forms, strict=True)
    ]
    lengths = [
        max(len(prompt) + max_new_tokens, len(item) if item else 0)
        for prompt, item in zip(prompts, items, strict=True)
    ]
    alone = {i for i, length in enumerate(lengths) if read_alone(model, length)}
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
    pairs = item.scored_pairs() if item else []
    loglikelihoods = tuple(loglikelihood_alone(model, *pair) for pair in pairs)
    answer, sequence = AnswerInProgress(0, loglikelihoods), CachedSequence(model)
    while True:
        logits = logits_at(model, sequence.last_state(prompt + answer.tokens))[0]
        finite = bool(logits.isfinite().all())
        if reason := answer.append_token(int(logits.argmax()), finite, stop_rules):
            return GeneratedAnswer(answer.tokens, reason, answer.loglikelihoods)


def _decoded(model, newest: list[int], slots: KVCache, *, padding: int) -> Tensor:
    """(answers, hidden) states of the newest token of each slot's answer.

    Args:
        padding: how many slots after them are read only to fill the batch.
    """
    rows, device = len(newest) + padding, model.device
    positions = slots.step(len(newest), padding, device)
    with use_sequence_ids(torch.arange(rows, device=device)):
        output = model.base_model(
            input_ids=torch.tensor([newest + [0] * padding], device=device),
            position_ids=positions,
            use_cache=False,
            packed=slots,
        )
    return output.last_hidden_state[0, : len(newest)]


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
        self.slots = KVCache(self.rows, longest, self.shared, kv=kv_of(self.model))
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
        scores = iter(packed_option_sums(self.model, hidden, placed) if placed else ())
        first_slot = len(self.active)
        for index, suffix in zip(indices, suffixes, strict=True):
            own_segments = [*suffix.before[len(self.shared) :], suffix]
            self.slots.fill(len(self.active), own_segments)
            own_scores = next(scores) if self.items[index] else ()
            loglikelihoods = tuple(score.loglikelihood for score in own_scores)
            self.active.append(AnswerInProgress(index, loglikelihoods))
        self.recent_segments = suffixes  # keeps their prefixes alive for the next prompts
        answer_rows = [ends[suffix] - 1 for suffix in suffixes]
        yield from self._append_tokens(first_slot, logits_at(self.model, hidden[answer_rows]))

    def _decode_step(self) -> Iterator[tuple[int, GeneratedAnswer]]:
        """Decode one token of every unfinished answer."""
        padding = max(0, min(FEWEST_ROWS, self.rows) - len(self.active))
        newest = [answer.tokens[-1] for answer in self.active]
        hidden = _decoded(self.model, newest, self.slots, padding=padding)
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
