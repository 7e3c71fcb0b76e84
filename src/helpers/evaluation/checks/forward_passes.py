"""Forward passes by transformers itself, compared with those of the engine, text by text.

Traces: hooks copy what goes into a few decoder layers and into and out of each of their Linears.
The rows of a text are then looked for by its token ids, wherever the engine computed them.

Playback: two correct int8 implementations part after a few layers, since a last bit tips a value
over a rounding edge. Played back, a Linear answers as it did in the evaluation, so that nothing of
a difference is carried on: what transformers gives to every Linear, and makes of every layer, is
held to what the engine gave and made, within the rounding of one step. The Linears themselves are
held to the tensors on disk apart from this (`recorded_calls`).

A fresh model: transformers' own model of a folder, one sequence at a time, with nothing of this
engine. Used for float variants.

How far two computations of one thing are apart is told in parts of what rounding allows.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM
from transformers.initialization import no_init_weights
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface

from helpers.core.architectures import HEAD
from helpers.core.records import Gate, largest
from helpers.evaluation.checks.recorded_calls import LinearFiles
from helpers.runtime.discovery import architecture, block_names, linear_names

ROUNDINGS = 6.0  # multiple of the rounding error measured in transformers
FEWEST_EPS = 8.0  # the least limit on states, in eps of the declared type
SOFTMAX_EPS = 16.0  # allowed bias of a float32 softmax over a large vocabulary, in eps
STORED = 2e-6  # rounding of log-probabilities stored with six decimals


@dataclass
class Comparison:
    """Differences of one kind, as multiples of their limits.

    Attributes:
        number: of compared values.
        worst: the largest difference, as a multiple of its limit.
        where: the name of that value.
        words: that difference and its limit, in words.
        errors: reasons why values could not be compared.
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

    def cannot(self, where: str, error: Exception) -> None:
        """Note that a value could not be compared."""
        reason = " ".join(str(error).split())[:160]
        self.errors.append(f"{where}: {type(error).__name__}: {reason}")

    def gate(self, name: str, compared: str, unit: str) -> Gate:
        """The gate that all differences lie within rounding."""
        measured = f"{self.number:,} {compared} compared"
        if self.words:
            measured += f"; the furthest from transformers' ({self.where}) {self.words} {unit}"
        if self.errors:
            measured += f"; {len(self.errors)} could not be: {self.errors[0]}"
        passed = self.number > 0 and self.worst <= 1 and not self.errors
        return Gate(name, passed, measured, "all of them within rounding")


def each_logprob(logits: Tensor, targets: Sequence[int]) -> Tensor:
    """(rows,) float64 log-probability of each target."""
    return logits.double().log_softmax(-1).gather(1, torch.tensor(targets)[:, None])[:, 0]


def rms(values: Tensor) -> float:
    """Root mean square."""
    return float(values.double().square().mean().sqrt())


def furthest_row(values: Tensor, reference: Tensor) -> float:
    """The largest relative difference of a row, by norms; infinite for NaN."""
    size = reference.double().norm(dim=1).clamp(min=1e-30)
    parts = (values.double() - reference.double()).norm(dim=1) / size
    return float(parts.nan_to_num(torch.inf).max())


def sum_limit(change: float, logits: Tensor, count: int, dtype: torch.dtype) -> float:
    """The rounding error allowed in a summed log-probability.

    Roundings of logits have random signs; those of a float32 softmax may be biased.

    Args:
        change: root mean square change of a logit by rounding.
        logits: (tokens, vocabulary), for their size.
        count: of tokens.
        dtype: the announced float type.
    """
    size = float(logits.abs().max())
    one_sided = SOFTMAX_EPS * torch.finfo(torch.float32).eps * size
    each = ROUNDINGS * change + torch.finfo(dtype).eps * size
    return count**0.5 * each + count * one_sided + STORED


def tie_margin(change: float, logits: Tensor, dtype: torch.dtype) -> float:
    """The logit difference within which rounding may swap the two likeliest tokens.

    Args:
        change: the largest change of a logit by rounding.
    """
    return 3 * change + torch.finfo(dtype).eps * float(logits.abs().max())


FINAL = "final norm"  # the head's input
INPUT, OUTPUT = "input", "output"


@dataclass(frozen=True)
class Layers:
    """Module names of a decoder.

    Attributes:
        blocks: names of the decoder layers, in order.
        played: by layer, the modules whose outputs can be played back: its Linears or, in a
            mixture, the experts as a whole.
    """

    blocks: list[str]
    played: list[list[str]]

    @classmethod
    def from_config(cls, config) -> "Layers":
        blocks = block_names(config)
        names = [n.split(".experts.")[0] + ".experts" if ".experts." in n else n
                 for n in linear_names(config) if n != HEAD]  # fmt: skip
        names = list(dict.fromkeys(names))
        return cls(blocks, [[n for n in names if n.startswith(f"{b}.")] for b in blocks])


@dataclass
class Trace:
    """The rows of all passes of one text, one per token, in the order of computation.

    Attributes:
        layers: indices of the traced decoder layers.
        ids: token id of each row.
        decoding: whether a row was computed alone, after earlier passes.
        states: (module, INPUT or OUTPUT) → (rows, features).
        errors: reasons why rows could not be stored.
    """

    layers: list[int]
    ids: list[int] = field(default_factory=list)
    decoding: list[bool] = field(default_factory=list)
    parts: dict[tuple[str, str], list[Tensor]] = field(default_factory=dict)
    errors: list[str] = field(default_factory=list)

    @cached_property
    def states(self) -> dict[tuple[str, str], Tensor]:
        return {key: torch.cat(parts) for key, parts in self.parts.items()}

    def written(self) -> list[int]:
        """Indices of the rows that were decoded one token at a time, in order."""
        return [row for row, decoding in enumerate(self.decoding) if decoding]

    def rows_of(self, tokens: Sequence[int], *, last: bool = False) -> list[int] | None:
        """Row indices of a text that was read in one piece; None if it was not.

        Args:
            last: the rows of its last reading; else of its first.
        """
        size, tokens = len(tokens), list(tokens)
        starts = range(len(self.ids) - size + 1)
        for start in reversed(starts) if last else starts:
            if self.ids[start : start + size] == tokens and not any(
                self.decoding[start : start + size]
            ):
                return list(range(start, start + size))
        return None

    def rows_of_option(
        self, context: Sequence[int], options: Sequence[Sequence[int]], k: int
    ) -> list[int] | None:
        """Row indices of a context and its k-th option, without the option's last token.

        All options may follow one context in a single pass, one after the other.
        """
        tails = [list(option[:-1]) for option in options]
        whole = self.rows_of([*context, *(token for tail in tails for token in tail)])
        if whole is None:
            return self.rows_of([*context, *tails[k]])
        begin = len(context) + sum(map(len, tails[:k]))
        return whole[: len(context)] + whole[begin : begin + len(tails[k])]


@contextmanager
def traced(model: nn.Module, layers: Layers, chosen: Sequence[int]) -> Iterator[Trace]:
    """Inside, the caller asks one text, and the chosen layers' inputs and outputs are stored."""
    trace = Trace(list(chosen))
    one_row = [False]

    def guarded(step) -> Callable:
        def hook(*args) -> None:
            try:
                step(*args)
            except Exception as error:  # tracing must not stop the evaluation
                trace.errors.append(f"{type(error).__name__}: {error}")

        return hook

    def begin(_module, args, kwargs) -> None:
        ids = kwargs.get("input_ids", args[0] if args else None).reshape(-1)
        slots = "packed" in kwargs and not hasattr(kwargs["packed"], "spans")
        one_row[0] = slots or len(ids) == 1
        kept_ids = ids[:1] if one_row[0] else ids
        trace.ids += kept_ids.tolist()
        trace.decoding += [one_row[0]] * len(kept_ids)

    def keep(key, x: Tensor) -> None:
        rows = x.detach().reshape(-1, x.shape[-1])
        rows = rows[:1] if one_row[0] else rows
        trace.parts.setdefault(key, []).append(rows.to("cpu", copy=True))

    def keep_input(name: str, _module, args, kwargs) -> None:
        keep((name, INPUT), args[0] if args else kwargs["hidden_states"])

    def keep_output(name: str, _module, _args, output) -> None:
        keep((name, OUTPUT), output[0] if isinstance(output, tuple) else output)

    def keep_final(_module, _args, output) -> None:
        keep((FINAL, OUTPUT), output.last_hidden_state)

    hooks = [
        model.base_model.register_forward_pre_hook(guarded(begin), with_kwargs=True),
        model.base_model.register_forward_hook(guarded(keep_final)),
    ]
    modules = [n for i in chosen for n in (layers.blocks[i], *layers.played[i])]
    for name in modules:
        module = model.get_submodule(name)
        hook = guarded(partial(keep_input, name))
        hooks.append(module.register_forward_pre_hook(hook, with_kwargs=True))
    for name in dict.fromkeys([*modules, layers.blocks[-1]]):
        hooks.append(
            model.get_submodule(name).register_forward_hook(guarded(partial(keep_output, name)))
        )
    try:
        yield trace
    finally:
        for hook in hooks:
            hook.remove()


HEAD_CHUNK = 16384  # rows of the vocabulary at a time
States = Mapping[tuple[str, str], Tensor]


# Keys and values in int8: one scale for a token and head, its largest magnitude in 127 steps. A
# value so close to a midpoint of two steps, in steps, may be rounded either way by a correct
# program: float32 of a magnitude of 127 steps is known to 1e-5 steps, and a rotation by a position
# adds a few roundings.
NEAR_TIE = 2e-4


def attention_with_cache(kv: str | None, *, near_ties_turned: bool = False) -> str:
    """The name by which transformers finds the attention over keys and values kept in `kv`.

    Args:
        near_ties_turned: round what is close to a midpoint the other way. Beside the plain
            rounding that shows what the freedom of a correct program changes.
    """
    if kv is None:
        return "eager"
    name = f"{kv}_cache_turned" if near_ties_turned else f"{kv}_cache"
    AttentionInterface.register(name, partial(_attend_int8, turned=near_ties_turned))
    AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS["eager"])
    return name


def _attend_int8(
    module, query, key, value, attention_mask, scaling=None, *, turned: bool, **_options
) -> tuple[Tensor, Tensor]:
    """softmax(q kᵀ · scaling + mask) v in the type of the query, of rounded keys and values.

    Args:
        query: (batch, heads, tokens, head_dim); key and value with a part of the heads.
        attention_mask: added to the scores; None for plain causal attention.
    """
    repeats = query.shape[1] // key.shape[1]
    key, value = (
        _kept_in_int8(states, turned).repeat_interleave(repeats, 1) for states in (key, value)
    )
    scores = query @ key.mT * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if attention_mask is None:
        future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        scores = scores.masked_fill(future, -torch.inf)
    else:
        scores = scores + attention_mask[..., : key.shape[-2]]
    weights = scores.softmax(-1)
    return (weights @ value).transpose(1, 2).contiguous(), weights


def _kept_in_int8(states: Tensor, turned: bool) -> Tensor:
    exact = states.to(torch.promote_types(states.dtype, torch.float32))
    largest_magnitude = exact.abs().max(dim=-1, keepdim=True).values
    step = torch.where(largest_magnitude == 0, 1.0, largest_magnitude / 127)
    levels = exact / step
    rounded = levels.round()
    if turned:
        is_near = ((levels - levels.floor()) - 0.5).abs() < NEAR_TIE
        other = torch.where(rounded > levels, levels.floor(), levels.ceil())
        rounded = torch.where(is_near, other, rounded)
    return (rounded * step).to(states.dtype)


class Playback:
    """A transformers model with a folder's norms, embeddings and head, and no Linear weights.

    Args:
        files: the variant's folder.
        dtype: the computing type: float64, or the declared type to measure its rounding.
        kv: `int8` if keys and values are kept in int8.
    """

    def __init__(self, files: LinearFiles, dtype: torch.dtype, kv: str | None = None):
        self.files, self.dtype = files, dtype
        attention = attention_with_cache(kv, near_ties_turned=dtype != torch.float64)
        config = AutoConfig.from_pretrained(files.folder, local_files_only=True)
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        self.layers = Layers.from_config(config)
        with init_empty_weights(include_buffers=False), no_init_weights():
            self.model = AutoModelForCausalLM.from_config(
                config, attn_implementation=attention, dtype=dtype
            ).eval()
        self._table = f"{architecture(config).embeddings[0]}"
        played = set(linear_names(config)) | {n for names in self.layers.played for n in names}
        for name, _ in list(self.model.named_parameters()):
            owner = name.rpartition(".")[0]
            if owner not in played | {HEAD, self._table} and not owner.endswith(".experts"):
                self._set(name, self._tensor(name))
        self._blocks = [self.model.get_submodule(name) for name in self.layers.blocks]

    def _tensor(self, name: str) -> Tensor:
        """A float tensor of the folder, rounded to the declared type."""
        return self.files.tensors[name].to(self.files.dtype).to(self.dtype)

    def _set(self, name: str, tensor: Tensor) -> None:
        owner, _, own = name.rpartition(".")
        setattr(self.model.get_submodule(owner), own, nn.Parameter(tensor, requires_grad=False))

    @torch.inference_mode()
    def states(self, ids: list[int], played: States, chosen: list[int]) -> dict:
        """Inputs of every Linear of the chosen layers and outputs of these layers.

        Args:
            ids: the token ids of the text.
            played: recorded (rows, features) of the same tokens by (module, INPUT or OUTPUT).
            chosen: the layers to compute; the others are skipped.
        """
        outputs: dict[tuple[str, str], Tensor] = {}
        unique = sorted(set(ids))
        table = self.files.tensors[f"{self._table}.weight"][unique]
        self._set(f"{self._table}.weight", table.to(self.files.dtype).to(self.dtype))
        last = len(self._blocks) - 1
        for index, block in enumerate(self._blocks):
            name = self.layers.blocks[index]
            if index in chosen:
                block.forward = self._computed(block, name, played, outputs)
                for linear in self.layers.played[index]:
                    module = self.model.get_submodule(linear)
                    module.forward = self._played(linear, played, outputs)
            else:
                block.forward = self._skipped(played[name, OUTPUT] if index == last else None)
        tokens = torch.tensor([[unique.index(i) for i in ids]])
        output = self.model.base_model(input_ids=tokens, use_cache=False)
        outputs[FINAL, OUTPUT] = output.last_hidden_state[0]
        return outputs

    def _computed(self, block, name: str, played: States, outputs: dict) -> Callable:
        """A layer's own forward on the engine's input of that layer."""
        own_forward = type(block).forward

        def forward(hidden_states, *args, **kwargs):
            if name == self.layers.blocks[0]:
                outputs[name, INPUT] = hidden_states[0]
            layer_input = played[name, INPUT].to(self.dtype)[None]
            output = own_forward(block, layer_input, *args, **kwargs)
            outputs[name, OUTPUT] = (output[0] if isinstance(output, tuple) else output)[0]
            return output

        return forward

    def _played(self, name: str, played: States, outputs: dict) -> Callable:
        """A forward that stores a Linear's input and returns the engine's output."""

        def forward(x, *_args):
            outputs[name, INPUT] = x.reshape(-1, x.shape[-1])
            output = played[name, OUTPUT].to(self.dtype)
            return output.reshape(*x.shape[:-1], output.shape[-1])

        return forward

    def _skipped(self, output: Tensor | None) -> Callable:
        """A forward that returns its input, or the engine's output if there is one."""

        def forward(hidden_states, *_args, **_kwargs):
            return hidden_states if output is None else output.to(self.dtype)[None]

        return forward

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """(rows, vocabulary) float64 of the head on disk, a part of the vocabulary at a time."""
        tensors = self.files.tensors
        weight = tensors[tensors.weight_name(HEAD)]
        parts = [
            hidden.to(self.dtype) @ part.to(self.files.dtype).to(self.dtype).T
            for part in weight.split(HEAD_CHUNK)
        ]
        logits = torch.cat(parts, dim=1).double()
        if (bias := f"{HEAD}.bias") in tensors:
            logits += tensors[bias].to(self.files.dtype).double()
        return named_form(logits, self.model.config)


SCALES = {"logits_scaling": -1, "logit_scale": 1}  # power of the number that scales the logits
CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")


def named_form(products: Tensor, config) -> Tensor:
    """Logits from the head's products by what transformers' families call their numbers."""
    for name, power in SCALES.items():
        products = products * getattr(config, name, 1.0) ** power
    cap = next((cap for name in CAPS if (cap := getattr(config, name, None))), None)
    return products if cap is None else cap * torch.tanh(products / cap)


PERTURBED_ROWS = 8192  # rows of a weight in one step


@dataclass(frozen=True)
class Reading:
    """A text to read again, and the engine's result for it.

    Attributes:
        compared: collects the differences.
        where: a name of the text for messages.
        text: token ids.
        places: indices whose next token is predicted.
        targets: these next tokens; None for generated text, which takes the likeliest.
        engine: the summed log-probability of the targets, or the prediction's row.
        option: index among its item's options, if the text ends with one.
    """

    compared: Comparison
    where: str
    text: list[int]
    places: list[int]
    targets: list[int] | None
    engine: float | dict
    option: int | None = None


class FreshModel:
    """A float variant as transformers loads it, with its eager attention.

    Args:
        kv: `int8` if keys and values are kept in int8.
    """

    def __init__(self, files: LinearFiles, device, kv: str | None = None):
        model = AutoModelForCausalLM.from_pretrained(
            files.folder,
            dtype=files.dtype,
            attn_implementation=attention_with_cache(kv),
            local_files_only=True,
            trust_remote_code=False,
        )
        self.model = model.to(device).eval()

    @torch.inference_mode()
    def logits(self, text: Sequence[int], places: Sequence[int]) -> Tensor:
        """(places, vocabulary) float32 next-token logits at some places of one sequence."""
        ids = torch.tensor([list(text)], device=self.model.device)
        keep = torch.tensor(list(places), device=self.model.device)
        output = self.model(input_ids=ids, use_cache=False, logits_to_keep=keep)
        return output.logits[0].float().cpu()

    @torch.no_grad()
    def shake_(self) -> None:
        """Move every weight by one rounding of its type, up or down at random with a fixed seed.

        Two correct programs may differ by as much as that changes a log-probability.
        """
        generator = torch.Generator().manual_seed(1)
        for weight in self.model.parameters():
            eps = torch.finfo(weight.dtype).eps
            for rows in weight.split(PERTURBED_ROWS):
                signs = torch.randint(0, 2, rows.shape, generator=generator, dtype=torch.int8)
                rows.mul_((1 + eps * (2 * signs - 1).float()).to(rows))


def read_whole(
    readings: list[Reading], files: LinearFiles, device, kv: str | None = None
) -> tuple[list[Tensor], float, float]:
    """Read every text with transformers' own model, and measure the effect of rounding.

    Returns:
        logits of each reading; the root mean square and the maximum of the logit changes that
        one rounding of every weight causes, over one scored text of every kind.
    """
    fresh = FreshModel(files, device, kv)
    logits = [fresh.logits(r.text, r.places) for r in readings]
    fresh.shake_()
    rms_change = largest_change = 0.0
    for index in _one_of_each_kind(readings):
        difference = fresh.logits(readings[index].text, readings[index].places) - logits[index]
        rms_change = largest((rms_change, rms(difference)))
        largest_change = largest((largest_change, float(difference.abs().max())))
    return logits, rms_change, largest_change


def _one_of_each_kind(readings: list[Reading]) -> list[int]:
    """Index of the first scored text of every kind; 0 if none is scored."""
    first: dict[int, int] = {}
    for index, reading in enumerate(readings):
        if reading.targets is not None:
            first.setdefault(id(reading.compared), index)
    return list(first.values()) or [0]
