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

from helpers.core.gates import WHOLE_VARIANT, Gate
from helpers.evaluation.checks.call_gates import linear_files
from helpers.evaluation.checks.fresh_model import Reading, read_whole
from helpers.evaluation.checks.gold_gates import DueGolds, due_golds, log_likelihoods
from helpers.evaluation.checks.playback import Playback
from helpers.evaluation.checks.rounding_bounds import (
    FEWEST_EPS,
    ROUNDINGS,
    Comparison,
    each_logprob,
    furthest_row,
    rms,
    sum_limit,
    tie_margin,
)
from helpers.evaluation.checks.traces import FINAL, OUTPUT, Trace, traced
from helpers.evaluation.prompts import Prompt, option_tokens, prompt
from helpers.inference.loglikelihood import OptionTokens
from helpers.inference.vllm_protocols import is_served
from helpers.sources.chat_conversations import tokenize
from helpers.sources.chat_template import end_of_turn
from helpers.sources.items import Item
from helpers.study.schema import EvaluationSet
from helpers.study.study_run import Job

LAYERS = "layers as transformers computes them"
LOGPROBS = "log-probabilities as transformers computes them"
TOKENS = "generated tokens as transformers decodes them"
GOLDS = "golds as likely as transformers computes"
TEXT = "shared text as transformers reads it"
LOOKED_AT = {"loglikelihood": 1, "generate": 1, TEXT: 1}  # items of every set, and passages
TRACE_BYTES = 48 * 2**20  # of one text's states

Both = tuple[Tensor, Tensor]  # in float64, and in the announced type


class NoOpinion:
    """Stands for a second opinion that cannot be had.

    Args:
        gates: why not, if that is a failure.
    """

    def __init__(self, gates: Sequence[Gate] = ()):
        self._gates = gates

    @contextmanager
    def of(self, _dataset: str, _item: Item) -> Iterator[list[dict]]:
        yield []

    def passages(self, *_args) -> None:
        """None is read again."""

    def gates(self, _predictions) -> list[tuple[str, Gate]]:
        return [(WHOLE_VARIANT, gate) for gate in self._gates]


class SecondOpinion:
    """Looks on while a model is asked, and compares afterwards, text by text.

    Args:
        job: the variant at hand.
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
        self._next_layer = 0

    @contextmanager
    def of(self, dataset: str, item: Item) -> Iterator[list[dict]]:
        """Inside, one item is asked alone; its prediction is put into the list."""
        asking, rows = self.job.study.evaluation.datasets[dataset], []
        number = self._looked_at.get(dataset, 0)
        if number >= LOOKED_AT[asking.ask.protocol]:
            yield rows
            return
        self._looked_at[dataset] = number + 1
        compared = self.answers.setdefault(dataset, Comparison())
        asked = prompt(item, asking, self.tokenizer)
        if asking.ask.protocol == "loglikelihood":
            tokens, look = option_tokens(self.tokenizer, asked), self._options
            length = len(tokens.context) + sum(map(len, tokens.options))
        else:
            tokens, look = tokenize(self.tokenizer, asked.text), self._written
            length = (
                len(tokens) + asking.ask.max_new_tokens + 2 * sum(self._golds(asked, asking).sizes)
            )
        with ExitStack() as stack:
            trace = self._guarded(compared, item.id, self._trace, stack, length)
            yield rows
        if not trace:
            return
        self._guarded(compared, item.id, look, trace, tokens, rows, item.id, compared)
        if asking.ask.protocol == "generate":
            golds = self.golds.setdefault(dataset, Comparison())
            self._guarded(golds, item.id, self._read_after, trace, tokens, rows, asked, dataset)

    def _golds(self, asked: Prompt, asking: EvaluationSet, foil: str | None = None) -> DueGolds:
        """What has to be read after a prompt that is answered in writing."""
        tokenizer = self.tokenizer
        return due_golds(tokenizer, tokenizer, asked.item, asking, asked.text, foil)

    def passages(self, tokens: list[list[int]], rows: list[dict], read: Callable) -> None:
        """Have passages read once more, and hold what was stored of them to transformers.

        Args:
            tokens: of each passage.
            rows: what the evaluation stored of each.
            read: has the engine read a list of passages.
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
            predictions: what the evaluation stored, by set.
        """
        if not self.files.quantized and self._readings:
            self._guarded(self.by_layer, "as a whole", self._read_whole, predictions)
        gates = [
            (WHOLE_VARIANT, self.by_layer.gate(LAYERS, "states", "of a row")),
            (WHOLE_VARIANT, self.text.gate(TEXT, "passages", "nats")),
        ]
        for dataset, compared in self.answers.items():
            scored = self.job.study.evaluation.datasets[dataset].ask.protocol == "loglikelihood"
            name = LOGPROBS if scored else TOKENS
            gates.append((dataset, compared.gate(name, "options" if scored else "tokens", "nats")))
        for dataset, compared in self.golds.items():
            gates.append((dataset, compared.gate(GOLDS, "golds and foils", "nats")))
        return gates

    def _guarded(self, compared: Comparison, where: str, step: Callable, *args):
        """What a step returns; one that cannot be made is a failure, and stops nothing."""
        try:
            return step(*args)
        except Exception as error:
            compared.cannot(where, error)
            return None

    def _trace(self, stack: ExitStack, length: int) -> Trace:
        return stack.enter_context(traced(self.model, self.layers, self._chosen(length)))

    def _chosen(self, tokens: int) -> list[int]:
        """The layers to look into for a text of so many tokens; over all texts, all of them."""
        count, size = len(self.layers.blocks), torch.finfo(self.files.dtype).bits // 8
        config = self.model.config
        inner = getattr(config, "intermediate_size", None) or getattr(config, "ffn_dim", 0)
        each = tokens * size * (10 * config.hidden_size + 4 * inner)
        chosen = max(1, min(count, TRACE_BYTES // max(1, each)))
        first, self._next_layer = self._next_layer, (self._next_layer + chosen) % count
        return sorted({(first + i) % count for i in range(chosen)})

    def _states(self, trace: Trace, rows: list[int] | None, text: list[int], where: str) -> Both:
        """(tokens, hidden) states before the head, by transformers; layers compared on the way.

        Raises:
            LookupError: the engine read no such text.
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

    def _head(self, states: Both, places: list[int]) -> Both:
        """(places, vocabulary) logits of what follows these places."""
        exact, rounded = states
        return self.exact.logits(exact[places]), self.rounded.logits(rounded[places])

    def _options(self, trace: Trace, tokens, rows: list[dict], where: str, compared) -> None:
        """The log-probability of every option, summed over its tokens."""
        [row] = rows
        self._continued(trace, tokens, row.get("logprobs", ()), where, compared)

    def _read_after(self, trace: Trace, context: list[int], rows, asked: Prompt, dataset) -> None:
        """The log-likelihood of every gold and the foil after the prompt of a written answer."""
        [row], asking = rows, self.job.study.evaluation.datasets[dataset]
        due = self._golds(asked, asking, row.get("foil"))
        tokens = OptionTokens(context, list(due.tokens))
        self._continued(trace, tokens, log_likelihoods(row), row["id"], self.golds[dataset])

    def _continued(self, trace: Trace, tokens: OptionTokens, sums, where: str, compared) -> None:
        """The log-probability of every text that continues a context."""
        if len(sums) != len(tokens.options):
            raise LookupError("the item has no log-probabilities")
        first, looks = len(tokens.context) - 1, []
        for k, (option, logprob) in enumerate(zip(tokens.options, sums, strict=True)):
            text, places = [*tokens.context, *option[:-1]], [*range(first, first + len(option))]
            found = trace.rows_of_option(tokens.context, tokens.options, k)
            states = self._states(trace, found, text, where)
            looks.append((Reading(compared, where, text, places, option, logprob, k), states))
        self._scored(looks)

    def _passage(self, passage: list[int], trace: Trace, row: dict) -> None:
        """The loss on a passage, but for what is not predicted of its beginning."""
        text, first = passage[:-1], max(0, len(passage) - 1 - row["tokens"])
        states = self._states(trace, trace.rows_of(text), text, "shared text")
        places, targets = list(range(first, len(text))), passage[1 + first :]
        self._scored([(Reading(self.text, row["id"], text, places, targets, -row["nll"]), states)])

    def _scored(self, looks: list[tuple[Reading, Both]]) -> None:
        """Hold the log-probability of some tokens of each text to its states before the head."""
        self._readings += [reading for reading, _ in looks]
        together = tuple(
            torch.cat([states[side][reading.places] for reading, states in looks])
            for side in (0, 1)
        )
        sizes = [len(reading.places) for reading, _ in looks]
        logits = (part.split(sizes) for part in self._head(together, list(range(sum(sizes)))))
        for (reading, _), exact, rounded in zip(looks, *logits, strict=True):
            self._sum(reading, exact, rms(exact - rounded))

    def _sum(self, reading: Reading, logits: Tensor, change: float) -> None:
        difference = abs(reading.engine - float(each_logprob(logits, reading.targets).sum()))
        limit = sum_limit(change, logits, len(reading.targets), self.files.dtype)
        reading.compared.add(difference, limit, reading.where)

    def _written(self, trace: Trace, asked: list[int], rows: list[dict], where, compared) -> None:
        """Every generated token is the likeliest, but for ties."""
        [row], written = rows, trace.written()
        text = [*asked, *(trace.ids[i] for i in written)]
        begin = trace.rows_of(asked, last=True)
        states = self._states(trace, None if begin is None else begin + written, text, where)
        places = list(range(len(asked) - 1, len(text)))
        reading = Reading(compared, where, text, places, None, row)
        self._readings.append(reading)
        exact, rounded = self._head(states, places)
        self._decoded(reading, exact, float((exact - rounded).abs().max()))

    def _decoded(self, reading: Reading, logits: Tensor, change: float) -> None:
        """The tokens fed back were the likeliest, and so was what the answer ended with."""
        margin, row = tie_margin(change, logits, self.files.dtype), reading.engine
        fed, best = reading.text[reading.places[0] + 1 :], logits.amax(1)
        for place, token in enumerate(fed):
            behind = float(best[place] - logits[place, token])
            reading.compared.add(behind, margin, f"{reading.where}, token {place + 1}")
        likely = (logits[-1] >= best[-1] - margin).nonzero()[:, 0].tolist()
        if row["finish_reason"] == "stop":
            agrees = bool(self._ends() & set(likely)) and row["output"] == self._text(fed)
        else:
            agrees = row["output"] in {self._text([*fed, token]) for token in likely}
            agrees &= row["output_tokens"] == len(fed) + 1
        difference = 0.0 if agrees else math.inf
        reading.compared.add(difference, 1.0, f"{reading.where}, how it ends")

    def _text(self, tokens: Sequence[int]) -> str:
        return self.tokenizer.decode(tokens, skip_special_tokens=True)

    def _ends(self) -> set[int]:
        """Ids that end an answer."""
        declared = self.model.generation_config.eos_token_id
        listed = declared if isinstance(declared, list) else [declared]
        return {*listed, self.tokenizer.eos_token_id, end_of_turn(self.tokenizer)} - {None}

    def _read_whole(self, predictions: Mapping[str, list[dict]]) -> None:
        """Hold what the engine said, alone and in company, to a model that transformers loads."""
        logits, mean, most = read_whole(self._readings, self.files, self.model.device)
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
        for reading, found in zip(self._readings, logits, strict=True):
            if reading.targets is None:
                self._decoded(reading, found, most)
                continue
            self._sum(reading, found, mean)
            if reading.option is not None:
                said = stored[id(reading.compared), reading.where][reading.option]
                self._sum(replace(reading, engine=said), found, mean)


def second_opinion(job: Job, model, tokenizer) -> SecondOpinion | NoOpinion:
    """Who looks on while a few items are asked alone; nobody, where an engine runs elsewhere."""
    if is_served(model):
        return NoOpinion()
    try:
        return SecondOpinion(job, model, tokenizer)
    except Exception as error:
        compared = Comparison()
        compared.cannot("the variant's files", error)
        return NoOpinion([compared.gate(LAYERS, "states", "of a row")])
