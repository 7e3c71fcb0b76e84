"""A second opinion on answers, by transformers' own forward pass, one sequence at a time.

A few items of every set are looked at while they are asked alone, and a few passages. Layer by
layer what the engine gave to every Linear is held to what transformers gives to it, and the
states before the head say what each option's log-probability and each next token has to be. A
float variant is also read whole, by a model that transformers loads by itself. Every limit is
a difference between two computations of transformers': in float64 and in the announced type,
or with weights that are off by one rounding.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from helpers.core.records import WHOLE_VARIANT, Gate
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
    read_whole,
    rms,
    sum_limit,
    tie_margin,
    traced,
)
from helpers.evaluation.checks.recomputed_answers import (
    ExpectedGolds,
    log_likelihoods,
    render_golds,
)
from helpers.evaluation.checks.recomputed_tasks import says_target_is_written
from helpers.evaluation.checks.recorded_calls import linear_files
from helpers.evaluation.prompts import Prompt, context_tokens, option_tokens, render_prompt
from helpers.inference.protocols import OptionTokens
from helpers.inference.vllm_client import is_served
from helpers.sources.chat import end_of_turn
from helpers.sources.items import Item
from helpers.study.loading import Job
from helpers.study.schema import EvaluationSet

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
        self.exact = Playback(self.files, torch.float64)
        self.rounded = Playback(self.files, self.files.dtype)
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
            self._readings, self.files, self.model.device
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
