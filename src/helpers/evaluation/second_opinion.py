"""A second opinion on answers, by transformers' own forward pass, one sequence at a time.

A few items of every set are looked at while they are asked alone, and a few passages. Layer by
layer what the engine gave to every Linear is held to what transformers gives to it, and the
states before the head say what each option's log-probability and each next token has to be. A
float variant is also read whole, by a model that transformers loads by itself. Every limit is
a difference between two computations of transformers': in float64 and in the announced type,
or with weights that are off by one rounding.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from helpers.evaluation.call_gates import linear_files
from helpers.evaluation.fresh_model import FreshModel
from helpers.evaluation.playback import Playback
from helpers.evaluation.prompts import option_tokens, prompt
from helpers.evaluation.served import is_served
from helpers.evaluation.traces import FINAL, OUTPUT, Trace, traced
from helpers.sources.chat_template import end_of_turn
from helpers.sources.conversations import tokenize
from helpers.sources.items import Item
from helpers.study.gates import WHOLE_VARIANT, Gate
from helpers.study.opening import Job

LAYERS = "layers as transformers computes them"
LOGPROBS = "log-probabilities as transformers computes them"
TOKENS = "generated tokens as transformers decodes them"
TEXT = "shared text as transformers reads it"
LOOKED_AT = {"loglikelihood": 1, "generate": 1, TEXT: 1}  # items of every set, and passages
TRACE_BYTES = 48 * 2**20  # of one item's states
ROUNDINGS = 6.0  # how often the rounding that transformers shows itself
FEWEST_EPS = 8.0  # no limit lies below so many spacings of the announced type
STORED = 2e-6  # log-probabilities are stored with six decimals


Finals = tuple[Tensor, Tensor]  # in float64, and in the announced type


@dataclass
class Comparison:
    """Differences of one kind, in parts of what is allowed.

    Attributes:
        number: of values compared.
        worst: the largest difference, in parts of its limit.
        where: of what.
        words: that difference and its limit.
        errors: why something could not be compared.
    """

    number: int = 0
    worst: float = 0.0
    where: str = ""
    words: str = ""
    errors: list[str] = field(default_factory=list)

    def add(self, difference: float, limit: float, where: str) -> None:
        self.number += 1
        part = difference / limit if math.isfinite(difference) else math.inf
        if not part <= self.worst:
            self.worst, self.where = part, where
            self.words = f"{difference:.2g}, at most {limit:.2g}"

    def gate(self, name: str, what: str, measured_in: str) -> Gate:
        passed = self.number > 0 and self.worst <= 1 and not self.errors
        told = f"{self.number:,} {what}"
        if self.words:
            told += f"; the furthest from transformers' ({self.where}) {self.words} {measured_in}"
        if self.errors:
            told += f"; {len(self.errors)} not compared: {self.errors[0]}"
        return Gate(name, passed, told, "within rounding, all of them")


class SecondOpinion:
    """Looks on while a model is asked, and compares afterwards, item by item.

    Args:
        job: the variant at hand.
        model: the variant, on this project's engine.
        tokenizer: its tokenizer.
    """

    def __init__(self, job: Job, model, tokenizer):
        self.job, self.model, self.tokenizer = job, model, tokenizer
        self.files = linear_files(job)
        self.whole = not self.files.quantized
        self.exact = Playback(self.files, torch.float64)
        self.rounded = Playback(self.files, self.files.dtype)
        self.layers = self.exact.layers
        self.by_layer, self.text = Comparison(), Comparison()
        self.answers: dict[str, Comparison] = {}
        self._next, self._pending = 0, []
        self._looked: dict[str, int] = {}

    @contextmanager
    def of(self, dataset: str, item: Item) -> Iterator[list[dict]]:
        """Inside, one item is asked alone; its prediction is put into the list."""
        wanted, rows = self.job.study.evaluation.datasets[dataset], []
        number = self._looked.get(dataset, 0)
        if number >= LOOKED_AT[wanted.ask.protocol]:
            yield rows
            return
        self._looked[dataset] = number + 1
        asked = prompt(item, wanted, self.tokenizer)
        compared = self.answers.setdefault(dataset, Comparison())
        if wanted.ask.protocol == "loglikelihood":
            tokens = option_tokens(self.tokenizer, asked)
            length = len(tokens.context) + sum(map(len, tokens.options))
            with traced(self.model, self.layers, self._chosen(length)) as trace:
                yield rows
            self._look(compared, item.id, self._options, trace, tokens, rows, item.id, compared)
            return
        tokens = tokenize(self.tokenizer, asked.text)
        with traced(
            self.model, self.layers, self._chosen(len(tokens) + wanted.ask.max_new_tokens)
        ) as trace:
            yield rows
        self._look(compared, item.id, self._written, trace, tokens, rows, item.id, compared)

    def _look(self, compared: Comparison, where: str, look, *args) -> None:
        """Compare; one that cannot be compared is a failure, and stops nothing."""
        try:
            look(*args)
        except Exception as error:
            reason = " ".join(str(error).split())[:160]
            compared.errors.append(f"{where}: {type(error).__name__}: {reason}")

    def _chosen(self, tokens: int) -> list[int]:
        """The layers to look into for a text of so many tokens; over all texts, all of them."""
        count, size = len(self.layers.blocks), torch.finfo(self.files.dtype).bits // 8
        config = self.model.config
        inner = getattr(config, "intermediate_size", None) or getattr(config, "ffn_dim", 0)
        each = tokens * size * (10 * config.hidden_size + 4 * inner)
        chosen = max(1, min(count, TRACE_BYTES // max(1, each)))
        first, self._next = self._next, (self._next + chosen) % count
        return sorted({(first + i) % count for i in range(chosen)})

    def _states(self, trace: Trace, rows: list[int] | None, ids: list[int], where: str) -> Finals:
        """States before the head, by transformers; layers are compared on the way.

        Raises:
            LookupError: the engine read no such text.
        """
        if rows is None:
            raise LookupError("the engine did not read this text as it is")
        engine = {key: part[rows] for key, part in trace.states.items()}
        exact = self.exact.states(ids, engine, trace.layers)
        rounded = self.rounded.states(ids, engine, trace.layers)
        eps = torch.finfo(self.files.dtype).eps
        for key, reference in exact.items():
            own = _furthest(rounded[key], reference)
            limit = ROUNDINGS * own + FEWEST_EPS * eps
            self.by_layer.add(_furthest(engine[key], reference), limit, f"{where} {key[0]}")
        return exact[FINAL, OUTPUT], rounded[FINAL, OUTPUT]

    def _options(self, trace: Trace, tokens, rows: list[dict], where: str, compared) -> None:
        """The log-probability of every option, summed over its tokens."""
        [row] = rows
        if len(row.get("logprobs", ())) != len(tokens.options):
            raise LookupError("the item has no log-probabilities")
        for k, option in enumerate(tokens.options):
            text, places = [*tokens.context, *option[:-1]], _before(tokens.context, option)
            found = trace.rows_of_option(tokens.context, tokens.options, k)
            states = self._states(trace, found, text, where)
            if self.whole:
                self._pending.append((compared, where, text, places, option, row["logprobs"][k]))
            self._scored(compared, where, self._head(states, places), option, row["logprobs"][k])

    def _head(self, states: Finals, places: list[int]) -> Finals:
        """(places, vocabulary) logits in float64, and with the announced type's roundings."""
        exact, rounded = states
        return self.exact.logits(exact[places]), self.rounded.logits(rounded[places])

    def _scored(self, compared, where: str, logits: Finals, targets, said: float) -> None:
        """What the engine said of some tokens together, by logits as `_head` gives them."""
        exact, rounded = logits
        limit = self._sum_limit(_rms(exact - rounded), exact, len(targets))
        compared.add(abs(said - float(_each(exact, targets).sum())), limit, where)

    def _sum_limit(self, off: float, logits: Tensor, count: int) -> float:
        """How far a sum of log-probabilities may be off, of which one is off by so much.

        Args:
            off: root mean square change of a logit by rounding, all of the vocabulary.

        Their roundings fall either way, but for those of a softmax in float32, which a large
        vocabulary pulls to one side.
        """
        eps, size = torch.finfo(self.files.dtype).eps, float(logits.abs().max())
        one_sided = 16 * torch.finfo(torch.float32).eps * size
        return count**0.5 * (ROUNDINGS * off + eps * size) + count * one_sided + STORED

    def _margin(self, off: float, logits: Tensor) -> float:
        """How far behind the likeliest a token may lie that is as likely, but for rounding."""
        return 3 * off + torch.finfo(self.files.dtype).eps * float(logits.abs().max())

    def _written(self, trace: Trace, asked: list[int], rows: list[dict], where, compared) -> None:
        """Every generated token is the likeliest, but for ties."""
        [row] = rows
        written = trace.written()
        text = [*asked, *(trace.ids[i] for i in written)]
        begin = trace.rows_of(asked)
        states = self._states(trace, None if begin is None else begin + written, text, where)
        places = list(range(len(asked) - 1, len(text)))
        if self.whole:
            self._pending.append((compared, where, text, places, None, row))
        exact, rounded = self._head(states, places)
        margin = self._margin(float((exact - rounded).abs().max()), exact)
        self._decoded(compared, where, exact, margin, text[len(asked) :], row)

    def _decoded(self, compared, where: str, logits: Tensor, margin: float, fed, row: dict) -> None:
        """The tokens fed back were the likeliest, and so was what the answer ended with."""
        best = logits.amax(1)
        for place, token in enumerate(fed):
            behind = float(best[place] - logits[place, token])
            compared.add(behind, margin, f"{where}, token {place + 1}")
        likely = (logits[-1] >= best[-1] - margin).nonzero()[:, 0].tolist()
        if row["finish_reason"] == "stop":
            ends, texts = self._ends() & set(likely), {self._text(fed)}
            agrees = bool(ends) and row["output"] in texts
        else:
            agrees = row["output"] in {self._text([*fed, token]) for token in likely}
            agrees &= row["output_tokens"] == len(fed) + 1
        compared.add(0.0 if agrees else math.inf, 1.0, f"{where}, how it ends")

    def _text(self, tokens: Sequence[int]) -> str:
        return self.tokenizer.decode(tokens, skip_special_tokens=True)

    def _ends(self) -> set[int]:
        declared = self.model.generation_config.eos_token_id
        listed = declared if isinstance(declared, list) else [declared]
        return {*listed, self.tokenizer.eos_token_id, end_of_turn(self.tokenizer)} - {None}

    def passages(self, tokens: list[list[int]], rows: list[dict], read: Callable) -> None:
        """Have passages read once more, and hold what was stored of them to transformers.

        Args:
            tokens: of each passage.
            rows: what the evaluation stored of each.
            read: has the engine read a list of passages.
        """
        for passage, row in zip(tokens, rows, strict=True):
            with traced(self.model, self.layers, self._chosen(len(passage))) as trace:
                read([passage])
            self._look(self.text, row["id"], self._passage, passage, trace, row)

    def _passage(self, passage: list[int], trace: Trace, row: dict) -> None:
        text, targets = passage[:-1], passage[1:]
        states = self._states(trace, trace.rows_of(text), text, "shared text")
        places = list(range(len(text)))
        if self.whole:
            self._pending.append((self.text, row["id"], text, places, targets, -row["nll"]))
        self._scored(self.text, row["id"], self._head(states, places), targets, -row["nll"])

    def gates(self) -> list[tuple[str, Gate]]:
        """Every gate with what it invalidates."""
        if self._pending:
            everything = Comparison()
            self._look(everything, "transformers' model", self._read_whole)
            for compared in [self.text, *self.answers.values()]:
                compared.errors += everything.errors
        found = [
            (WHOLE_VARIANT, self.by_layer.gate(LAYERS, "states of layers and Linears", "of a row")),
            (WHOLE_VARIANT, self.text.gate(TEXT, "passages", "nats")),
        ]
        for dataset, compared in self.answers.items():
            ask = self.job.study.evaluation.datasets[dataset].ask
            scored = ask.protocol == "loglikelihood"
            name, what = (LOGPROBS, "options") if scored else (TOKENS, "tokens")
            found.append((dataset, compared.gate(name, what, "nats")))
        return found

    def _read_whole(self) -> None:
        """Read what was put off by transformers' own model, then once more with shaken weights."""
        fresh, logits = FreshModel(self.files, self.model.device), []
        for _, _, text, places, _, _ in self._pending:
            logits.append(fresh.logits(text, places))
        fresh.shake_()
        by_token = by_logit = 0.0
        for index in self._subset():
            _, _, text, places, targets, _ = self._pending[index]
            shaken = fresh.logits(text, places)
            by_logit = max(by_logit, float((shaken - logits[index]).abs().max()))
            if targets is not None:
                by_token = max(by_token, _rms(shaken - logits[index]))
        for (compared, where, text, _, targets, said), found in zip(
            self._pending, logits, strict=True
        ):
            if targets is None:
                fed = text[len(text) - len(found) + 1 :]
                self._decoded(compared, where, found, self._margin(by_logit, found), fed, said)
                continue
            limit = self._sum_limit(by_token, found, len(targets))
            compared.add(abs(said - float(_each(found, targets).sum())), limit, where)

    def _subset(self) -> list[int]:
        """The first text of every comparison: enough to see how far rounding goes."""
        first: dict[int, int] = {}
        for index, (compared, *_) in enumerate(self._pending):
            first.setdefault(id(compared), index)
        return list(first.values())


def _before(context: list[int], option: list[int]) -> list[int]:
    """Places of the tokens that predict an option's."""
    return list(range(len(context) - 1, len(context) + len(option) - 1))


def _each(logits: Tensor, targets: Sequence[int]) -> Tensor:
    """(rows,) log-probability of each target."""
    return logits.double().log_softmax(-1).gather(1, torch.tensor(targets)[:, None])[:, 0]


def _rms(values: Tensor) -> float:
    return float(values.double().square().mean().sqrt())


def _furthest(found: Tensor, reference: Tensor) -> float:
    """The largest difference of a row, in parts of the row's own size."""
    size = reference.double().norm(dim=1).clamp(min=1e-30)
    parts = (found.double() - reference.double()).norm(dim=1) / size
    return float(parts.nan_to_num(torch.inf).max())


def second_opinion(job: Job, model, tokenizer) -> SecondOpinion | None:
    """Who looks on while a few items are asked alone; None where an engine runs elsewhere."""
    return None if is_served(model) else SecondOpinion(job, model, tokenizer)
