"""A second opinion on answers and on losses, by transformers' own forward pass.

Answers: a few items of every set are looked at while they are asked alone, and a few passages, one
sequence at a time. Layer by layer what the engine gave to every Linear is held to what transformers
gives to it, and the states before the head say what each option's log-probability and each next
token has to be. A float variant is also read whole, by a model that transformers loads by itself.
Every limit is a difference between two computations of transformers': in float64 and in the
announced type, or with weights that are off by one rounding.

Shared text: loss, KL and top-1 agreement of a few passages come from two full float64 logit
matrices. This is the second opinion on `helpers.inference.perplexity`, of whose code nothing is
used here. The baseline is loaded anew from its folder, its tokenizer too, and reads each passage by
transformers' own forward pass. A variant is not run again: the last states of the passes that its
evaluation made are kept by a hook, so that its figures are those of the path that was evaluated
(two correct int8 paths end in different logits). How much rounding matters is measured on the
baseline alone: each passage is read with two of transformers' implementations of attention, and its
softmax over the vocabulary is taken in float32 too.

Of a fine-tuning the loss, the items and the steps are checked. The examples are rendered by the
template itself, the end of a turn is read off it, and the labels are shifted by transformers. The
words around a question are the training's own.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from helpers.core.processes import set_activity
from helpers.core.records import WHOLE_VARIANT, Gate, largest, sha256_text
from helpers.evaluation.checks.forward_passes import (
    FEWEST_EPS,
    FINAL,
    OUTPUT,
    ROUNDINGS,
    Comparison,
    Playback,
    Reading,
    Trace,
    each_logprob,
    furthest_row,
    named_form,
    read_whole,
    rms,
    sum_limit,
    tie_margin,
    traced,
)
from helpers.evaluation.checks.item_gates import says_target_is_written
from helpers.evaluation.checks.recomputed_answers import (
    ExpectedGolds,
    log_likelihoods,
    render_golds,
)
from helpers.evaluation.checks.recorded_calls import linear_files
from helpers.evaluation.prompts import Prompt, context_tokens, option_tokens, render_prompt
from helpers.inference.protocols import OptionTokens
from helpers.inference.vllm_client import is_served
from helpers.sources.chat import SYSTEM, end_of_turn
from helpers.sources.items import Item
from helpers.sources.model_files import TensorFiles
from helpers.sources.models import model_folder
from helpers.sources.sampling import shared_passages
from helpers.study.loading import Job
from helpers.study.schema import EvaluationSet, FineTuning, Runtime
from helpers.verification.checkpoint_files import source_token_ids, source_tokenizer

LAYERS = "layers match transformers"
LOGPROBS = "log-probabilities match transformers"
TOKENS = "generated tokens match transformers"
GOLDS = "gold log-likelihoods match transformers"
TEXT = "shared text matches transformers"
COMPARED_TEXTS = {
    "loglikelihood": 1,
    "target": 1,
    "generate": 1,
    TEXT: 1,
}  # compared items per set, and passages
TRACE_BYTES = 48 * 2**20  # memory limit for one text's states

ExactAndRounded = tuple[Tensor, Tensor]  # (in float64, in the declared type)
ATTENTION = ("sdpa", "eager")  # two implementations in transformers
ROWS, COLUMNS = 64, 16384  # size of the float64 blocks of a logit matrix


class NoOpinion:
    """Replaces a second opinion that is not available.

    Args:
        gates: failed gates with the reason, if that is a failure.
    """

    def __init__(self, gates: Sequence[Gate] = ()):
        self._gates = gates

    @contextmanager
    def trace_item(self, _dataset: str, _item: Item) -> Iterator[list[dict]]:
        yield []

    def compare_passages(self, *_args) -> None:
        """Read no passage again."""

    def gates(self, _predictions) -> list[tuple[str, Gate]]:
        return [(WHOLE_VARIANT, gate) for gate in self._gates]


class SecondOpinion:
    """Traces a model while it answers, and compares text by text afterwards.

    Args:
        job: names the variant.
        model: the variant, on this project's engine.
        tokenizer: its tokenizer.
    """

    def __init__(self, job: Job, model, tokenizer):
        self.job, self.model, self.tokenizer = job, model, tokenizer
        self.files = linear_files(job)
        self.kv = job.recipe.kv
        self.exact = Playback(self.files, torch.float64, self.kv)
        self.rounded = Playback(self.files, self.files.dtype, self.kv)
        self.layers = self.exact.layers
        self.by_layer, self.text = Comparison(), Comparison()
        self.answers: dict[str, Comparison] = {}
        self.golds: dict[str, Comparison] = {}
        self._readings: list[Reading] = []
        self._looked_at: dict[str, int] = {}
        self._written_targets: dict[tuple[int, str], bool] = {}  # by comparison and item
        self._until: dict[int, tuple[str, ...]] = {}  # by the id of an answer's comparison
        self._next_layer = 0

    @contextmanager
    def trace_item(self, dataset: str, item: Item) -> Iterator[list[dict]]:
        """Inside, the caller asks one item alone and appends its prediction to the list."""
        evaluation_set, rows = self.job.study.evaluation.datasets[dataset], []
        number = self._looked_at.get(dataset, 0)
        prompt = render_prompt(item, evaluation_set, self.tokenizer)
        enough = number >= COMPARED_TEXTS[evaluation_set.ask.protocol]
        if enough or self._is_read_in_windows(prompt):
            yield rows
            return
        self._looked_at[dataset] = number + 1
        compared = self.answers.setdefault(dataset, Comparison())
        if evaluation_set.ask.protocol != "generate":
            tokens, compare = option_tokens(self.tokenizer, prompt), self._options
            length = len(tokens.context) + sum(map(len, tokens.options))
        else:
            tokens, compare = context_tokens(self.tokenizer, prompt), self._written
            self._until[id(compared)] = prompt.until
            gold_tokens = sum(map(len, self._render_golds(prompt, evaluation_set).tokens))
            length = len(tokens) + evaluation_set.ask.max_new_tokens + 2 * gold_tokens
        with ExitStack() as stack:
            trace = self._guarded(compared, item.id, self._trace, stack, length)
            yield rows
        if not trace:
            return
        self._guarded(compared, item.id, compare, trace, tokens, rows, item.id, compared)
        if evaluation_set.ask.protocol == "generate":
            golds = self.golds.setdefault(dataset, Comparison())
            self._guarded(golds, item.id, self._golds, trace, tokens, rows, prompt, dataset)

    def _is_read_in_windows(self, prompt: Prompt) -> bool:
        limit = self.model.config.max_position_embeddings
        return prompt.whole and len(option_tokens(self.tokenizer, prompt)) > limit

    def _render_golds(
        self, prompt: Prompt, evaluation_set: EvaluationSet, foil: str | None = None
    ) -> ExpectedGolds:
        """The golds and the foil of a prompt with a generated answer."""
        tokenizer = self.tokenizer
        return render_golds(tokenizer, tokenizer, prompt.item, evaluation_set, prompt.text, foil)

    def compare_passages(self, tokens: list[list[int]], rows: list[dict], read: Callable) -> None:
        """Read passages once more, and compare their stored rows with transformers.

        Args:
            tokens: token ids of each passage.
            rows: the stored row of each.
            read: makes the engine read a list of passages.
        """
        for passage, row in zip(tokens, rows, strict=True):
            with ExitStack() as stack:
                args = self.text, row["id"], self._trace, stack, len(passage)
                trace = self._guarded(*args)
                read([passage])
            if trace:
                self._guarded(self.text, row["id"], self._passage, passage, trace, row)

    def gates(self, predictions: Mapping[str, list[dict]]) -> list[tuple[str, Gate]]:
        """Every gate with what it invalidates.

        Args:
            predictions: stored rows, by set.
        """
        if not self.files.quantized and self._readings:
            self._guarded(self.by_layer, "as a whole", self._read_whole, predictions)
        gates = [
            (WHOLE_VARIANT, self.by_layer.gate(LAYERS, "states", "of a row")),
            (WHOLE_VARIANT, self.text.gate(TEXT, "passages", "nats")),
        ]
        for dataset, compared in self.answers.items():
            scored = self.job.study.evaluation.datasets[dataset].ask.protocol != "generate"
            name = LOGPROBS if scored else TOKENS
            gates.append((dataset, compared.gate(name, "options" if scored else "tokens", "nats")))
        for dataset, compared in self.golds.items():
            gates.append((dataset, compared.gate(GOLDS, "golds and foils", "nats")))
        return gates

    def _guarded(self, compared: Comparison, where: str, step: Callable, *args):
        """Run a step and return its result; an error is noted as a failed comparison."""
        try:
            return step(*args)
        except Exception as error:
            compared.cannot(where, error)
            return None

    def _trace(self, stack: ExitStack, length: int) -> Trace:
        return stack.enter_context(traced(self.model, self.layers, self._chosen(length)))

    def _chosen(self, tokens: int) -> list[int]:
        """The layers to trace for a text of so many tokens; successive texts cover all layers."""
        count, size = len(self.layers.blocks), torch.finfo(self.files.dtype).bits // 8
        config = self.model.config
        inner = getattr(config, "intermediate_size", None) or getattr(config, "ffn_dim", 0)
        each = tokens * size * (10 * config.hidden_size + 4 * inner)
        chosen = max(1, min(count, TRACE_BYTES // max(1, each)))
        first, self._next_layer = self._next_layer, (self._next_layer + chosen) % count
        return sorted({(first + i) % count for i in range(chosen)})

    def _states(
        self, trace: Trace, rows: list[int] | None, text: list[int], where: str
    ) -> ExactAndRounded:
        """(tokens, hidden) states before the head by transformers; compares the layers too.

        Raises:
            LookupError: the engine did not read this text.
        """
        if trace.errors:
            raise LookupError(trace.errors[0])
        if rows is None:
            raise LookupError("the engine did not read this text as it is")
        engine = {key: part[rows] for key, part in trace.states.items()}
        exact = self.exact.states(text, engine, trace.layers)
        rounded = self.rounded.states(text, engine, trace.layers)
        least = FEWEST_EPS * torch.finfo(self.files.dtype).eps
        for key, reference in exact.items():
            limit = ROUNDINGS * furthest_row(rounded[key], reference) + least
            self.by_layer.add(furthest_row(engine[key], reference), limit, f"{where} {key[0]}")
        return exact[FINAL, OUTPUT], rounded[FINAL, OUTPUT]

    def _head(self, states: ExactAndRounded, places: list[int]) -> ExactAndRounded:
        """(places, vocabulary) next-token logits at these places."""
        exact, rounded = states
        return self.exact.logits(exact[places]), self.rounded.logits(rounded[places])

    def _options(self, trace: Trace, tokens, rows: list[dict], where: str, compared) -> None:
        """Compare the summed log-probability of every option."""
        [row] = rows
        sums = row.get("logprobs") or log_likelihoods(row)
        if (written := says_target_is_written(row)) is not None:
            self._written_targets[id(compared), where] = written
        self._continuations(trace, tokens, sums, where, compared)

    def _golds(self, trace: Trace, context: list[int], rows, prompt: Prompt, dataset) -> None:
        """Compare the log-likelihood of every gold and the foil of a generated answer."""
        [row], evaluation_set = rows, self.job.study.evaluation.datasets[dataset]
        golds = self._render_golds(prompt, evaluation_set, row.get("foil"))
        tokens = OptionTokens(context, list(golds.tokens))
        compared, sums = self.golds[dataset], log_likelihoods(row)
        self._continuations(trace, tokens, sums, row["id"], compared, form=golds.form)

    def _continuations(
        self, trace: Trace, tokens: OptionTokens, sums, where: str, compared, *, form=()
    ) -> None:
        """Compare the summed log-probability of every continuation of a context.

        Args:
            form: what all continuations begin with, whose log-probability does not count.
        """
        if len(sums) != len(tokens.options):
            raise LookupError("the item has no log-probabilities")
        first, readings = len(tokens.context) - 1, []
        for k, (option, logprob) in enumerate(zip(tokens.options, sums, strict=True)):
            text, places = [*tokens.context, *option[:-1]], [*range(first, first + len(option))]
            trace_rows = trace.rows_of_option(tokens.context, tokens.options, k)
            states = self._states(trace, trace_rows, text, where)
            targets, places = option[len(form) :], places[len(form) :]
            reading = Reading(compared, where, text, places, targets, logprob, k)
            readings.append((reading, states))
        self._scored(readings)

    def _passage(self, passage: list[int], trace: Trace, row: dict) -> None:
        """Compare the loss on a passage, over its scored tokens."""
        text, first = passage[:-1], max(0, len(passage) - 1 - row["tokens"])
        states = self._states(trace, trace.rows_of(text), text, "shared text")
        places, targets = list(range(first, len(text))), passage[1 + first :]
        self._scored([(Reading(self.text, row["id"], text, places, targets, -row["nll"]), states)])

    def _scored(self, readings: list[tuple[Reading, ExactAndRounded]]) -> None:
        """Compare summed log-probabilities with the states before the head, in one pass of it."""
        self._readings += [reading for reading, _ in readings]
        exact, rounded = (
            torch.cat([states[side][reading.places] for reading, states in readings])
            for side in (0, 1)
        )
        sizes = [len(reading.places) for reading, _ in readings]
        logits = self._head((exact, rounded), list(range(sum(sizes))))
        parts = (part.split(sizes) for part in logits)
        for (reading, _), exact, rounded in zip(readings, *parts, strict=True):
            self._sum(reading, exact, rms(exact - rounded))

    def _sum(self, reading: Reading, logits: Tensor, change: float) -> None:
        difference = abs(reading.engine - float(each_logprob(logits, reading.targets).sum()))
        limit = sum_limit(change, logits, len(reading.targets), self.files.dtype)
        reading.compared.add(difference, limit, reading.where)
        written = self._written_targets.get((id(reading.compared), reading.where))
        if written is not None and reading.option == 0:
            margin = tie_margin(change, logits, self.files.dtype)
            agrees = written in possibly_written(logits, reading.targets, margin)
            place = f"{reading.where}, whether the target is written"
            reading.compared.add(0.0 if agrees else math.inf, 1.0, place)

    def _written(
        self, trace: Trace, prompt_tokens: list[int], rows: list[dict], where, compared
    ) -> None:
        """Compare a generated answer: every token is the likeliest, except for ties."""
        [row], generated_rows = rows, trace.written()
        text = [*prompt_tokens, *(trace.ids[i] for i in generated_rows)]
        prompt_rows = trace.rows_of(prompt_tokens, last=True)
        states = self._states(
            trace, None if prompt_rows is None else prompt_rows + generated_rows, text, where
        )
        places = list(range(len(prompt_tokens) - 1, len(text)))
        reading = Reading(compared, where, text, places, None, row)
        self._readings.append(reading)
        exact, rounded = self._head(states, places)
        self._decoded(reading, exact, float((exact - rounded).abs().max()))

    def _decoded(self, reading: Reading, logits: Tensor, change: float) -> None:
        """Compare the generated tokens, and the token that ended the answer, with the likeliest."""
        margin, row = tie_margin(change, logits, self.files.dtype), reading.engine
        generated, best = reading.text[reading.places[0] + 1 :], logits.amax(1)
        until = self._until.get(id(reading.compared), ())
        for place, token in enumerate(generated):
            shortfall = float(best[place] - logits[place, token])
            reading.compared.add(shortfall, margin, f"{reading.where}, token {place + 1}")
        likely = (logits[-1] >= best[-1] - margin).nonzero()[:, 0].tolist()
        if row["finish_reason"] == "stop":
            agrees = bool(self._ends() & set(likely))
            agrees &= row["output"] == self._text(generated, until)
        else:
            agrees = row["output"] in {self._text([*generated, t], until) for t in likely}
            agrees &= row["output_tokens"] == len(generated) + 1
        difference = 0.0 if agrees else math.inf
        reading.compared.add(difference, 1.0, f"{reading.where}, how it ends")

    def _text(self, tokens: Sequence[int], until: Sequence[str]) -> str:
        """The text of an answer, up to the first of the texts that end it."""
        text = self.tokenizer.decode(
            tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        for end in until:
            text = text.split(end)[0]
        return text

    def _ends(self) -> set[int]:
        """Ids that end an answer."""
        declared = self.model.generation_config.eos_token_id
        listed = declared if isinstance(declared, list) else [declared]
        return {*listed, self.tokenizer.eos_token_id, end_of_turn(self.tokenizer)} - {None}

    def _read_whole(self, predictions: Mapping[str, list[dict]]) -> None:
        """Compare the engine's results, alone and in batches, with transformers' own model."""
        logits, rms_change, largest_change = read_whole(
            self._readings, self.files, self.model.device, self.kv
        )
        stored = {
            (id(self.answers[name]), row["id"]): row["logprobs"]
            for name, rows in predictions.items()
            for row in rows
            if name in self.answers and "logprobs" in row
        }
        stored |= {
            (id(self.golds[name]), row["id"]): log_likelihoods(row)
            for name, rows in predictions.items()
            for row in rows
            if name in self.golds
        }
        stored |= {
            (id(compared), row["id"]): log_likelihoods(row)
            for name, compared in self.answers.items()
            for row in predictions[name]
            if self.job.study.evaluation.datasets[name].ask.protocol == "target"
        }
        for reading, reading_logits in zip(self._readings, logits, strict=True):
            if reading.targets is None:
                self._decoded(reading, reading_logits, largest_change)
                continue
            self._sum(reading, reading_logits, rms_change)
            if reading.option is not None:
                stored_sum = stored[id(reading.compared), reading.where][reading.option]
                self._sum(replace(reading, engine=stored_sum), reading_logits, rms_change)


def possibly_written(logits: Tensor, targets: list[int], margin: float) -> set[bool]:
    """Whether every target is the likeliest token: both if rounding may decide it.

    Args:
        logits: (targets, vocabulary) in float64.
        margin: within which rounding may swap two tokens.
    """
    places = torch.arange(len(targets))
    own = logits[places, targets]
    others = logits.clone()
    others[places, targets] = -math.inf
    lead = float((own - others.amax(1)).min())
    return {lead > 0} | ({True, False} if abs(lead) <= margin else set())


def open_second_opinion(job: Job, model, tokenizer) -> SecondOpinion | NoOpinion:
    """The second opinion on a job's model; `NoOpinion` if another engine runs the model."""
    if is_served(model):
        return NoOpinion()
    try:
        return SecondOpinion(job, model, tokenizer)
    except Exception as error:
        compared = Comparison()
        compared.cannot("the variant's files", error)
        return NoOpinion([compared.gate(LAYERS, "states", "of a row")])


@dataclass(frozen=True)
class Recomputed:
    """Results of `recompute`.

    Attributes:
        rows: of a few passages: `id`, `tokens`, `nll`, `kl`, `top1_agreements`, their rounding
            errors `nll_blur`, `kl_blur` (nats), `ties` (tokens), and of each token `token_kl` and
            its rounding error `token_kl_blur` (None for the baseline).
        token_counts: predicted tokens of every passage, by its id.
        texts: the scored part of every passage, by its id.
        unread: ids of the passages whose tokens occur in no pass of the model.
    """

    rows: list[dict] = field(default_factory=list)
    token_counts: dict[str, int] = field(default_factory=dict)
    texts: dict[str, str] = field(default_factory=dict)
    unread: list[str] = field(default_factory=list)


class Passes:
    """Records token ids and last hidden states of every pass of a decoder.

    Attributes:
        read: (token ids, (tokens, hidden) last states) of every row of every pass.
    """

    def __init__(self, model):
        self.read: list[tuple[list[int], Tensor]] = []
        self._hook = None
        if isinstance(model, torch.nn.Module):  # otherwise another engine runs the model
            self._hook = model.base_model.register_forward_hook(self._record, with_kwargs=True)

    def _record(self, _module, _args, options, output) -> None:
        ids, states = options["input_ids"], output.last_hidden_state
        self.read += [(i.tolist(), s.detach()) for i, s in zip(ids, states, strict=True)]

    def end(self) -> None:
        """Stop recording."""
        if self._hook is not None:
            self._hook.remove()


def recompute(job: Job, model, passes: Passes) -> Recomputed:
    """Compute the figures of the first and the last passage, and the token counts of all.

    Args:
        job: names the variant.
        model: that variant; it reads again only if another engine runs it.
        passes: the recorded passes of its evaluation; recording stops here.
    """
    passes.end()
    folder, texts = model_folder(job.study, job.model, job.paths), shared_passages(job.study)
    limit = job.study.evaluation.shared_text.max_tokens
    tokenizer = source_tokenizer(job)
    tokenized = [source_token_ids(tokenizer, text, plain=True) for text in texts]
    tokens = [ids_of_text[:limit] for ids_of_text, _ in tokenized]
    starts = [
        max(1, special_tokens) for _, special_tokens in tokenized
    ]  # index of the first scored token
    ids = [sha256_text(text)[:16] for text in texts]
    baseline = transformers_model(folder, job.study.runtime)
    dtype = getattr(torch, job.recipe.dtype or job.study.runtime.dtype)
    rows = []
    for place in sorted({0, len(texts) - 1}):
        first, second = (
            _transformers_logits(baseline, tokens[place], implementation)
            for implementation in ATTENTION
        )
        logits = None
        if job.variant != job.study.baseline:
            states = _recorded_states(tokens[place][:-1], passes.read, model)
            logits = None if states is None else _head_logits(baseline, states, dtype)
            if logits is None:
                continue  # no pass read it, and the gate reports the missing row
        scored = slice(starts[place] - 1, None)
        logits = None if logits is None else logits[scored]
        row = compare_passage(tokens[place][scored], first[scored], second[scored], logits)
        rows.append({"id": ids[place], **row})
    predicted = {k: t[start:] for k, t, start in zip(ids, tokens, starts, strict=True)}
    counts = {key: len(ids_of_text) for key, ids_of_text in predicted.items()}
    read = {
        k: tokenizer.decode(
            ids_of_text, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        for k, ids_of_text in predicted.items()
    }
    places = zip(ids, tokens, strict=True)
    unread = [
        key
        for key, ids_of_text in places
        if _recorded_states(ids_of_text[:-1], passes.read, model) is None
    ]
    return Recomputed(rows, counts, read, unread)


def transformers_model(folder: Path, runtime: Runtime):
    """The model of a folder as transformers loads and runs it."""
    model = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=getattr(torch, runtime.dtype),
        device_map=runtime.device_map,
        use_safetensors=True,
        local_files_only=True,
        trust_remote_code=False,
    )
    return (model if runtime.device_map else model.to(runtime.device)).eval()


@torch.inference_mode()
def _transformers_logits(model, tokens: list[int], attention: str) -> Tensor:
    """(tokens - 1, vocabulary) logits of the next tokens, by the model's own forward."""
    model.set_attn_implementation(attention)
    ids = torch.tensor([tokens[:-1]], device=model.device)
    return model(input_ids=ids, use_cache=False).logits[0].cpu()


def _recorded_states(tokens: list[int], passes: list, model) -> Tensor | None:
    """(tokens, hidden) states of a passage in the recorded passes; None if no pass has it."""
    if not isinstance(model, torch.nn.Module):
        return model.states(tokens)
    for read, states in passes:
        for start in range(len(read) - len(tokens) + 1):
            if read[start : start + len(tokens)] == tokens:
                return states[start : start + len(tokens)]
    return None


@torch.inference_mode()
def _head_logits(baseline, states: Tensor, dtype: torch.dtype) -> Tensor:
    """(tokens, vocabulary) logits: the product in float64, rounded once to the declared type.

    No variant changes the head, so it is the baseline's.
    """
    head, parts = baseline.get_output_embeddings(), []
    x, bias = states.double().cpu(), getattr(head, "bias", None)
    for start in range(0, len(head.weight), COLUMNS):
        chosen = slice(start, start + COLUMNS)
        logits = x @ head.weight[chosen].to(dtype).double().cpu().T
        if bias is not None:
            logits += bias[chosen].to(dtype).double().cpu()
        parts.append(named_form(logits, baseline.config).to(dtype))
    return torch.cat(parts, dim=1)


def compare_passage(
    tokens: list[int], first: Tensor, second: Tensor, logits: Tensor | None
) -> dict:
    """The row of one passage.

    Args:
        tokens: token ids; the rows of the matrices predict all but the first one.
        first: (tokens - 1, vocabulary) the baseline's logits, the reference.
        second: the same by another implementation of attention; they differ by rounding.
        logits: the variant's; None for the baseline itself.
    """
    total: Counter[str] = Counter()
    token_kls: list[tuple[Tensor, Tensor]] = []  # by both readings of the baseline
    for start in range(0, len(first), ROWS):
        rows = slice(start, start + ROWS)
        targets = torch.tensor(tokens[1:])[rows, None]
        own = None if logits is None else logits[rows].double()
        sums, kls = _sums(first[rows].double(), second[rows].double(), own, targets)
        total.update(sums)
        token_kls.append(kls)
    kl, other_kl = (torch.cat(parts) for parts in zip(*token_kls, strict=True))  # (tokens - 1,)
    blur = (kl - other_kl).abs()  # its root of summed squares is a blur that cannot cancel
    return {
        "tokens": len(tokens) - 1,
        "nll": total["nll"],
        "kl": total["kl"],
        "top1_agreements": total["same"],
        "nll_blur": abs(total["nll"] - total["other_nll"]) + abs(total["softmax"]),
        "kl_blur": max(abs(total["kl"] - total["other_kl"]), blur.norm().item()),
        "ties": total["ties"],
        "token_kl": None if logits is None else kl.tolist(),
        "token_kl_blur": None if logits is None else blur.tolist(),
    }


def _sums(
    first: Tensor, second: Tensor, logits: Tensor | None, targets: Tensor
) -> tuple[dict, tuple[Tensor, Tensor]]:
    """(sums over some tokens, the KL of each), of float64 logits and (tokens, 1) targets.

    The KL and the baseline's own loss come from both readings of the baseline; `softmax` is
    the error of a float32 softmax in its loss.
    """
    references = [matrix.log_softmax(-1) for matrix in (first, second)]
    logprobs = references if logits is None else [logits.log_softmax(-1)] * 2
    losses = [-matrix.gather(1, targets).sum().item() for matrix in (*logprobs, references[0])]
    float32_loss = -first.float().log_softmax(-1).gather(1, targets).double().sum().item()
    pairs = zip(references, logprobs, strict=True)
    kls = tuple((p.exp() * (p - q)).sum(-1) for p, q in pairs)  # (tokens,) each
    chosen, blur = first if logits is None else logits, (first - second).abs().amax(-1)
    sums = {
        "nll": losses[0],
        "other_nll": losses[1],
        "softmax": float32_loss - losses[2],
        "kl": kls[0].sum().item(),
        "other_kl": kls[1].sum().item(),
        "same": int((first.argmax(-1) == chosen.argmax(-1)).sum()),
        "ties": int((_is_tied(first, blur) | _is_tied(chosen, blur)).sum()),
    }
    return sums, kls


def _is_tied(logits: Tensor, blur: Tensor) -> Tensor:
    """(tokens,) bool: whether rounding may change which token is the most likely one.

    Args:
        logits: (tokens, vocabulary).
        blur: (tokens,) how much rounding changes them.
    """
    best = logits.topk(2, dim=-1).values
    size = best[:, 0].abs() * torch.finfo(torch.float32).eps
    return best[:, 0] - best[:, 1] <= 2 * (blur + size)


IGNORED = -100  # transformers' label for tokens without loss
CLOSE = {"float32": 1e-3}  # relative, of a mean over all tokens
LONGEST_STEP = 3.2  # the most a step of AdamW moves a weight, in learning rates
COARSE = 0.02  # tolerance if the trained weights were rounded when saved


def steps_gate(settings: FineTuning, results: dict) -> Gate:
    """Training took one step per batch and epoch; no held-out item was trained on."""
    items = results.get("items", {})
    trained, heldout = items.get("training", []), items.get("heldout", [])
    expected = settings.epochs * math.ceil(settings.items / settings.batch_items)
    shared = set(trained) & set(heldout)
    sizes = len(set(trained)), len(set(heldout))
    return Gate(
        "training steps and held-out split",
        results["steps"] == expected == len(results["losses"])
        and sizes == (settings.items, settings.heldout_items)
        and not shared,
        f"{results['steps']} steps; {sizes[0]} items, {sizes[1]} held out, {len(shared)} in both",
        f"{expected} steps; {settings.items} items, {settings.heldout_items} held out, "
        "none in both",
    )


def weights_gate(start, folder, settings: FineTuning, results: dict, *, dtype: str) -> Gate:
    """Every tensor changed, and none by more than AdamW allows at the declared learning rate.

    A step of Adam is at most (1 - β₁) / √(1 - β₂) rates long (Kingma and Ba, arXiv:1412.6980).
    """
    before, after = (TensorFiles(path, dtype=torch.float32) for path in (start, folder))
    changes = {n: float((after[n] - before[n]).abs().max()) for n in after if n in before}
    unmoved, furthest = (
        [n for n, change in changes.items() if not change],
        largest(changes.values()),
    )
    limit = LONGEST_STEP * settings.learning_rate * results["steps"]
    if dtype != "float32":  # a step may be less than half the spacing of saved weights
        unmoved, limit = [], limit + max(float(before[n].abs().max()) for n in changes) * 2**-8
    example = f" ({unmoved[0]})" if unmoved else ""
    return Gate(
        "weight changes within the learning rate",
        not unmoved and 0 < furthest <= limit,
        f"{len(unmoved)} of {len(changes)} tensors did not move{example}; "
        f"the furthest by {furthest:.3g}",
        f"all of them, by at most {limit:.3g}",
    )


def loss_gate(folder, tokenizer, heldout: list[Item], results: dict, *, dtype: str) -> Gate:
    """The trained model's loss on the held-out answers equals the recorded one.

    Args:
        folder: the trained model's files.
        heldout: the held-out items.
        results: from the record of the fine-tuning.
    """
    name, recorded = "held-out loss matches transformers", results["heldout_loss_after"]
    set_activity("the held-out loss a second time")
    try:
        recomputed = heldout_loss(folder, tokenizer, heldout)
    except Exception as error:  # a folder that cannot be read, a template without the solution
        return Gate(name, False, f"{type(error).__name__}: {error}", "can be computed")
    tolerance = CLOSE.get(dtype, COARSE)
    return Gate(
        name,
        math.isclose(recorded, recomputed, rel_tol=tolerance),
        f"{recorded:.6g} nats a token on record, {recomputed:.6g} again",
        f"but for {tolerance:g} of it",
    )


@torch.inference_mode()
def heldout_loss(folder, tokenizer, items: list[Item]) -> float:
    """Mean loss in nats over the tokens of the worked solutions and of their end-of-turn."""
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, local_files_only=True, trust_remote_code=False
    ).eval()
    total = count = 0.0
    for item in items:
        ids, answer = training_example(tokenizer, item)
        labels = [IGNORED] * (len(ids) - answer) + ids[-answer:]
        output = model(input_ids=torch.tensor([ids]), labels=torch.tensor([labels]))
        total, count = total + output.loss.item() * answer, count + answer
    return total / count


def training_example(tokenizer, item: Item) -> tuple[list[int], int]:
    """(token ids of prompt, solution and end of turn; number of ids after the prompt)."""
    turns = [("system", SYSTEM["openmath"]), ("user", item.question), ("assistant", item.solution)]
    messages = [{"role": role, "content": content} for role, content in turns]
    prompt = tokenizer.apply_chat_template(messages[:2], tokenize=False, add_generation_prompt=True)
    conversation, solution = (
        tokenizer.apply_chat_template(messages, tokenize=False),
        item.solution.strip(),
    )
    token_ids = lambda part: tokenizer(part, add_special_tokens=False).input_ids  # noqa: E731
    added = tokenizer.added_tokens_decoder.items()
    special = {i for i, token in added if token.special} | set(tokenizer.all_special_ids)
    end_of_turn = [
        i
        for i in token_ids(conversation[conversation.rindex(solution) + len(solution) :])
        if i in special
    ]
    answer = [*token_ids(item.solution), *(end_of_turn or [tokenizer.eos_token_id])[:1]]
    return token_ids(prompt) + answer, len(answer)
