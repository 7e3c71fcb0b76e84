"""Recorded calls of Linears and norms during an evaluation, and the gates on them.

Of every call of a Linear one row is kept, with a few of its outputs, until it is compared with the
product of the tensors on disk, in float64. Of a few calls, early and late ones of each kind of
pass, several rows are kept for the gates. Only these rows are copied.

The product is an opinion of its own: tensors are read by safetensors, and the rules of int8 are
written out again. Nothing is shared with what loads, quantizes or multiplies in an evaluation.

The gates of a checkpoint look at a model that is loaded for them. Here it is the calls of the
evaluation itself. An evaluation that goes on after a crash makes fewer calls, and its record has
to be the same: a gate that holds says so without counting them.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

from helpers.core.architectures import HEAD
from helpers.core.records import Gate, largest
from helpers.inference.vllm_client import is_served
from helpers.runtime.devices import current_sequence_ids
from helpers.runtime.discovery import architecture, linear_names
from helpers.sources.model_files import load_config, skeleton
from helpers.sources.models import model_folder
from helpers.study.loading import Job
from helpers.study.schema import Numbers, Ruler, is_ignored
from helpers.verification import rulers
from helpers.verification.checkpoint_files import source_token_ids, source_tokenizer

STEPS = 127.5  # compressed-tensors: abs-max in steps, for 256 levels
TIE = 1e-3  # in steps; a value this close to a midpoint may round either way
EPS32 = 2.0**-23
QUANTIZED, FLOAT = "quantized Linears in the evaluation", "float parts in the evaluation"
WHOLE = "every Linear read every token"
Measured = tuple[bool, str, str]


class TensorReader:
    """The tensors of a folder by name, from its index, its single file, or all its files.

    Names are the model's; where transformers' files call a tensor otherwise, by its list of names.
    """

    def __init__(self, folder: Path):
        self._folder = folder
        index, whole = folder / "model.safetensors.index.json", folder / "model.safetensors"
        if index.is_file():
            places = json.loads(index.read_text("utf-8"))["weight_map"]
            self._places = {name: folder / file for name, file in places.items()}
        else:
            self._places = {}
            for path in [whole] if whole.is_file() else sorted(folder.glob("*.safetensors")):
                with safe_open(path, framework="pt") as file:
                    self._places |= dict.fromkeys(file.keys(), path)
        own_names = skeleton(load_config(folder)).own_names
        self._stored = {name: name for name in self._places}
        for stored, own in own_names.items():
            stem, own_stem = stored.removesuffix("weight"), own.removesuffix("weight")
            for part in ("", "weight", "weight_scale", "input_scale", *rulers.PARTS):
                name, own_name = (stored, own) if not part else (stem + part, own_stem + part)
                if name in self._places and name != own_name:
                    self._stored.pop(name, None)
                    self._stored[own_name] = name

    def __contains__(self, name: str) -> bool:
        return name in self._stored

    def __iter__(self):
        return iter(self._stored)

    def __getitem__(self, name: str) -> Tensor:
        stored = self._stored[name]
        with safe_open(self._places[stored], framework="pt") as file:
            return file.get_tensor(stored)

    def weight_name(self, module: str) -> str:
        """The name of a module's weight tensor; for a tied head, that of the embeddings."""
        own, tables = f"{module}.weight", [] if module != HEAD else self._tables
        return next((name for name in [own, *tables] if name in self), own)

    @cached_property
    def _tables(self) -> list[str]:
        embeddings = architecture(load_config(self._folder)).embeddings
        return [f"{name}.weight" for name in embeddings[:1]]


@dataclass(frozen=True)
class Products:
    """Expected outputs of a Linear for some rows, each (rows, columns) float64.

    Attributes:
        exact: by the declared scheme.
        allowed: the largest rounding error of a correct implementation.
        unrounded: with float activations.
    """

    exact: Tensor
    allowed: Tensor
    unrounded: Tensor


@dataclass(frozen=True)
class LinearFile:
    """Some columns of one Linear, from the files of a variant.

    Attributes:
        weight: (columns, in_features), int8 or float; a ruler's as the numbers they stand for.
        step: (columns,) of the int8 weights; None for a float Linear.
        bias: (columns,) float, or None.
        activations: the declared granularity; None for a float Linear.
        input_scale: () float32 of `tensor_static`, else None.
        eps: relative spacing of the float type that inputs and outputs have.
        simulated: whether int8 is simulated in that float type.
        numbers: what a ruler rounds activations to, with one step for a token; else None.
    """

    weight: Tensor
    step: Tensor | None
    bias: Tensor | None
    activations: str | None
    input_scale: Tensor | None
    eps: float
    simulated: bool = False
    numbers: Numbers | None = None

    def products(self, x: Tensor, absmax: Tensor | None = None) -> Products:
        """The expected outputs.

        Args:
            x: (rows, in_features), the Linear's inputs.
            absmax: (rows,) largest magnitude in each row's text, for `tensor_dynamic`.
        """
        x = x.float()
        weight = self.weight.double() * (1 if self.step is None else self.step.double()[:, None])
        bias = 0 if self.bias is None else self.bias.double()
        unrounded = x.double() @ weight.T + bias
        if self.numbers is not None:
            rounded, scale, ties = self._rounded_by_ruler(x)
        elif self.activations is None:
            rounded, scale, ties = x.double(), None, None
        else:
            rounded, scale, ties = self._rounded(x, absmax)
        exact = rounded @ weight.T + bias
        size = rounded.norm(dim=1, keepdim=True) * weight.norm(dim=1)
        bound = size + (0 if self.bias is None else bias.abs())
        # K rounded additions are off by up to √K roundings of the largest partial sum, which one
        # outlier channel makes as large as the bound. Integers are added exactly.
        in_floats = self.activations is None or self.simulated
        additions = max(8.0, weight.shape[1] ** 0.5) if in_floats else 8.0
        allowed = additions * EPS32 * bound + 2 * self.eps * exact.abs()
        allowed += self._narrow(size, weight)
        if ties is not None:  # each tie may be one step off
            allowed += (ties.double() * scale.double()) @ weight.abs().T
            if self.simulated and self.eps > EPS32:
                allowed += 4 * scale.double() * weight.norm(dim=1) + 2 * self.eps * size
        return Products(exact, allowed, unrounded)

    def _narrow(self, size: Tensor, weight: Tensor) -> Tensor | float:
        """The rounding error of sums of products in a float type narrower than float32."""
        if self.eps <= EPS32 or self.activations is not None:
            return 0.0
        return 4 * self.eps * size / weight.shape[1] ** 0.5

    def _rounded(self, x: Tensor, absmax: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """((rows, in) float64 quantized values, (rows, 1) step, (rows, in) bool: near a tie)."""
        if self.activations == "tensor_static":
            scale = self.input_scale.float().expand(len(x))
        else:
            top = x.abs().amax(1) if self.activations == "token_dynamic" else absmax.float()
            scale = top / STEPS
        scale = torch.where(scale == 0, torch.full_like(scale, EPS32), scale)[:, None]
        steps = x.double() / scale.double()
        levels = (x / scale).round().clamp(-128, 127).double()
        ties = (steps - steps.floor() - 0.5).abs() < TIE
        ties &= (steps > -128) & (steps < 127)
        return levels * scale.double(), scale, ties

    def _rounded_by_ruler(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """As `_rounded`; ties are (rows, in) float64, how many steps a value may be off."""
        scale = rulers.activation_steps(x, self.numbers)
        steps = x.double() / scale.double()
        levels = rulers.nearest(x / scale, self.numbers).double()
        gap = rulers.spacing(steps, self.numbers)
        ties = ((steps / gap - (steps / gap).floor() - 0.5).abs() < TIE) * gap
        return levels * scale.double(), scale, ties


@dataclass(frozen=True)
class LinearFiles:
    """Every Linear of a variant's folder.

    Attributes:
        folder: the checkpoint, or the source of a variant without one.
        quantized: names of the Linears that the variant declares as int8.
        activations: their declared granularity.
        dtype: the declared float type of everything else.
        simulated: whether int8 is simulated in that type.
        ruler: what a ruler rounds, instead of int8 weights and activations.
    """

    folder: Path
    quantized: frozenset[str]
    activations: str | None
    dtype: torch.dtype
    simulated: bool
    ruler: Ruler | None = None

    @cached_property
    def tensors(self) -> TensorReader:
        return TensorReader(self.folder)

    def linear(self, name: str, columns: Tensor) -> LinearFile:
        """Some columns of a Linear.

        Raises:
            KeyError: a tensor of the Linear is missing.
        """
        tensors, int8 = self.tensors, name in self.quantized
        bias = tensors[f"{name}.bias"][columns] if f"{name}.bias" in tensors else None
        eps = torch.finfo(self.dtype).eps
        if int8 and self.ruler:
            of_weights, of_activations = self.ruler
            if of_weights is None:
                weight = tensors[f"{name}.weight"][columns].to(self.dtype)
            else:
                weight = rulers.stored_weight(tensors, name, of_weights).values[columns]
            return LinearFile(weight, None, bias, None, None, eps, True, of_activations)
        weight = tensors[tensors.weight_name(name)][columns]
        if not int8:
            if not weight.is_floating_point():
                raise TypeError(f"{name} is {weight.dtype} on disk and claimed to be float")
            bias = None if bias is None else bias.to(self.dtype)
            return LinearFile(weight.to(self.dtype), None, bias, None, None, eps)
        step = tensors[f"{name}.weight_scale"].float().reshape(-1)
        step = step[columns] if len(step) > 1 else step.expand(len(columns))
        static = self.activations == "tensor_static"
        scale = tensors[f"{name}.input_scale"].float().reshape(()) if static else None
        return LinearFile(weight, step, bias, self.activations, scale, eps, self.simulated)


PACKED, DECODING, SHARED_TEXT = "packed rows", "decoding", "shared text"
BUFFERED = 32  # rows per comparison
CHECKED_COLUMNS = 16  # output columns compared in every call
KEPT_ROWS, KEPT_COLUMNS = 3, 512  # rows and columns stored of a kept call
MOST_ERRORS = 10
GROWTH = 1.25  # the next kept call has at least so many times the number of the last


@dataclass(frozen=True)
class KeptCall:
    """A few rows of one call.

    Attributes:
        number: of the call, within its kind of pass.
        x: (rows, in_features).
        y: (rows, columns), some of the outputs.
        absmax: (rows,) largest magnitude in each row's text; only where one scale is a text's.
    """

    number: int
    x: Tensor
    y: Tensor
    absmax: Tensor | None = None


@dataclass
class ModuleCalls:
    """The calls of one module.

    Attributes:
        calls, rows: how many, by kind of pass.
        kept: the first and the latest of the kept calls, by kind of pass.
    """

    name: str
    columns: Tensor
    calls: Counter = field(default_factory=Counter)
    rows: Counter = field(default_factory=Counter)
    kept: dict[str, list[KeptCall]] = field(default_factory=dict)
    _next: dict[str, float] = field(default_factory=dict)

    def count(self, kind: str, rows: int) -> int | None:
        """Count a call; return its number if it should be kept, else None."""
        self.calls[kind] += 1
        self.rows[kind] += rows
        number = self.calls[kind]
        if number < self._next.get(kind, 1):
            return None
        self._next[kind] = number * GROWTH + 1e-9
        return number

    def keep(self, kind: str, call: KeptCall) -> None:
        self.kept[kind] = [*self.kept.get(kind, [])[:1], call]


@dataclass
class LinearCalls(ModuleCalls):
    """The calls of one Linear; one row of each is compared with the tensors on disk.

    Attributes:
        file: the few columns in which every call is compared.
        arithmetic: number of calls that agree with the `announced` arithmetic, with `float`
            activations, or with `neither`.
    """

    file: LinearFile | None = None
    checked: Tensor | None = None
    arithmetic: Counter = field(default_factory=Counter)
    _x: Tensor | None = None
    _y: Tensor | None = None
    _absmax: list[Tensor] = field(default_factory=list)
    _filled: int = 0

    def add_row(self, x: Tensor, y: Tensor, absmax: Tensor | None) -> None:
        """Buffer one row of a call: (in_features,) and (out_features,)."""
        if self._x is None or self._x.device != x.device or self._x.dtype != x.dtype:
            self.compare()
            self._x = x.new_empty(BUFFERED, len(x))
            self._y = y.new_empty(BUFFERED, len(self.checked))
            self._places = self.checked.to(x.device)
        self._x[self._filled] = x
        self._y[self._filled] = y[self._places]
        if absmax is not None:
            self._absmax.append(absmax)
        self._filled += 1
        if self._filled == BUFFERED:
            self.compare()

    def compare(self) -> None:
        """Count the buffered rows by the arithmetic that explains their outputs."""
        if not self._filled:
            return
        x, y = self._x[: self._filled].cpu(), self._y[: self._filled].cpu().double()
        absmax = torch.stack(self._absmax).cpu() if self._absmax else None
        self._filled, self._absmax = 0, []
        products = self.file.products(x, absmax)
        agrees = ((y - products.exact).abs() <= products.allowed).all(1)
        like_float = ((y - products.unrounded).abs() <= products.allowed).all(1)
        self.arithmetic["announced"] += int(agrees.sum())
        self.arithmetic["float"] += int((~agrees & like_float).sum())
        self.arithmetic["neither"] += int((~agrees & ~like_float).sum())


class CallRecorder:
    """Records the calls of a model's Linears and norms.

    Args:
        model: the variant, on this project's engine.
        files: its Linears on disk.
        linears: names of all Linears, including the head.
        norms: names of the norms whose formula is known.
        experts: names of the Linears that read only the tokens routed to them.

    Attributes:
        passes, tokens: forward passes of the decoder and tokens they read, by kind.
    """

    def __init__(
        self, model: nn.Module, files: LinearFiles, linears, *, norms=(), experts=frozenset()
    ):
        self.model, self.files, self.experts = model, files, frozenset(experts)
        self.errors: list[str] = []
        self.linears = {name: self._linear(name) for name in linears}
        self.norms = {name: ModuleCalls(name, torch.arange(0)) for name in norms}
        self.passes, self.tokens = Counter(), Counter()
        self._kind, self._phase, self._starts = PACKED, PACKED, None

    def _linear(self, name: str) -> LinearCalls:
        module = self.model.get_submodule(name)
        width, seed = module.out_features, sum(name.encode())
        order = torch.randperm(width, generator=torch.Generator().manual_seed(seed))
        checked = order[:CHECKED_COLUMNS]
        calls = LinearCalls(name, order[:KEPT_COLUMNS], checked=checked)
        self._guarded(self._read, calls)
        return calls

    def _read(self, calls: LinearCalls) -> None:
        calls.file = self.files.linear(calls.name, calls.checked)

    @property
    def summary(self) -> str:
        """The numbers of recorded calls and passes, as a sentence."""
        calls = sum(sum(linear.calls.values()) for linear in self.linears.values())
        passes = ", ".join(f"{n:,} of {kind}" for kind, n in self.passes.items())
        return f"{calls:,} calls of {len(self.linears)} Linears in these passes: {passes}"

    def record(self, phase: str, ask: Callable, *args):
        """Return `ask(*args)` and record its calls of the model."""
        with self.during(phase):
            return ask(*args)

    @contextmanager
    def during(self, phase: str) -> Iterator[None]:
        """Inside, calls are recorded.

        Args:
            phase: PACKED for questions, or SHARED_TEXT.
        """
        self._phase = self._kind = phase
        hooks = [self.model.base_model.register_forward_pre_hook(self._pass, with_kwargs=True)]
        for name, calls in self.linears.items():
            hooks.append(self.model.get_submodule(name).register_forward_hook(self._of(calls)))
        for name, calls in self.norms.items():
            hooks.append(self.model.get_submodule(name).register_forward_hook(self._norm(calls)))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
            for calls in self.linears.values():
                self._guarded(calls.compare)

    def _pass(self, _module, args: tuple, kwargs: dict) -> None:
        self._guarded(self._begin, args, kwargs)

    def _begin(self, args: tuple, kwargs: dict) -> None:
        """Count a forward pass of the decoder, and note where its texts start."""
        ids = kwargs.get("input_ids", args[0] if args else None)
        positions = kwargs.get("position_ids")
        slots = "packed" in kwargs and not hasattr(kwargs["packed"], "spans")
        decoding = slots or ids.shape[-1] == 1
        self._kind = DECODING if decoding and self._phase == PACKED else self._phase
        self.passes[self._kind] += 1
        self.tokens[self._kind] += ids.numel()
        if positions is None:
            positions = torch.arange(ids.shape[-1]).expand(ids.shape)
        self._single, self._width = decoding, ids.numel()
        if self.files.activations == "tensor_dynamic":
            begins = positions.reshape(-1) == 0
            self._starts = begins.nonzero()[:, 0].tolist()

    def _of(self, calls: LinearCalls):
        def hook(_module, args: tuple, output: Tensor) -> None:
            self._guarded(self._record, calls, args[0], output)

        return hook

    def _norm(self, calls: ModuleCalls):
        def hook(_module, args: tuple, output: Tensor) -> None:
            self._guarded(self._record_norm, calls, args[0], output)

        return hook

    def _guarded(self, step, *args) -> None:
        """Run a step; an error is noted and never stops the evaluation."""
        try:
            step(*args)
        except Exception as error:
            if len(self.errors) < MOST_ERRORS:
                self.errors.append(f"{type(error).__name__}: {' '.join(str(error).split())}"[:160])

    @torch.no_grad()
    def _record(self, calls: LinearCalls, x: Tensor, y: Tensor) -> None:
        x, y = x.reshape(-1, x.shape[-1]), y.reshape(-1, y.shape[-1])
        rows = len(x)
        number = calls.count(self._kind, rows)
        if not rows or calls.file is None:
            return
        one_scale_a_text = calls.file.activations == "tensor_dynamic"
        place = sum(calls.calls.values()) * 7919 % rows
        calls.add_row(x[place], y[place], self._absmax(x, place) if one_scale_a_text else None)
        if number is None:
            return
        places = sorted({place, (place + rows // 2) % rows, (place + rows // 3) % rows})
        tops = torch.stack([self._absmax(x, p) for p in places]).cpu() if one_scale_a_text else None
        rows_kept = x[places].cpu(), y[places][:, calls.columns.to(y.device)].cpu()
        calls.keep(self._kind, KeptCall(number, *rows_kept, tops))

    @torch.no_grad()
    def _record_norm(self, calls: ModuleCalls, x: Tensor, y: Tensor) -> None:
        x, y = x.reshape(-1, x.shape[-1]), y.reshape(-1, y.shape[-1])
        if (number := calls.count(self._kind, len(x))) is not None and len(x):
            places = sorted({0, number * 7919 % len(x), len(x) - 1})
            calls.keep(self._kind, KeptCall(number, x[places].cpu(), y[places].cpu()))

    def _absmax(self, x: Tensor, place: int) -> Tensor:
        """() largest magnitude in the text that contains a row."""
        if len(x) != self._width:  # an expert reads only its routed tokens
            owners = current_sequence_ids(x.device)
            return (x if owners is None else x[owners == owners[place]]).abs().amax()
        if self._single:
            return x[place].abs().amax()
        begin = max((s for s in self._starts if s <= place), default=0)
        end = min((s for s in self._starts if s > place), default=len(x))
        return x[begin:end].abs().amax()


class NoCalls:
    """Replaces a recorder if calls cannot be recorded.

    Args:
        reason: why not, if that is a failure; empty for a model on another engine.
    """

    summary = "calls are not recorded"

    def __init__(self, reason: str = ""):
        self.reason = reason

    def record(self, _phase: str, ask: Callable, *args):
        return ask(*args)


def call_recorder(job: Job, model) -> CallRecorder | NoCalls:
    """The recorder of the calls of a job's variant, or its replacement."""
    if is_served(model):
        return NoCalls()
    try:
        config = load_config(model_folder(job.study, job.model, job.paths))
        linears = linear_names(config)
        experts = [n for n in linears if ".experts." in n] if architecture(config).experts else []
        norms = [norm.name for norm in architecture(config).norms]
        return CallRecorder(model, linear_files(job), linears, norms=norms, experts=experts)
    except Exception as error:  # the evaluation continues, and its gate fails
        return NoCalls(f"{type(error).__name__}: {' '.join(str(error).split())[:200]}")


def linear_files(job: Job) -> LinearFiles:
    """The files of the job's variant, with the scheme it declares."""
    source, recipe = model_folder(job.study, job.model, job.paths), job.recipe
    claim, runtime = job.claim, job.study.runtime
    changed = recipe.needs_checkpoint
    folder = job.paths.checkpoint(job.model, job.variant) if changed else source
    names = linear_names(load_config(source)) if claim.compressed else []
    kept_float = [n for n in names if is_ignored(n, claim.ignore)]
    return LinearFiles(
        folder,
        frozenset(names) - frozenset(kept_float),
        claim.scheme[1] if claim.quantized else None,
        getattr(torch, recipe.dtype or runtime.dtype),
        simulated=runtime.quantized == "reference" or claim.ruler is not None,
        ruler=claim.ruler,
    )


def call_gates(
    job: Job,
    calls: CallRecorder | NoCalls,
    predictions: Mapping[str, list[dict]],
    passages: list[dict],
    resumed: Mapping[str, set[str]],
) -> list[Gate]:
    """The gates on an evaluation's calls; none if another engine ran the model.

    Args:
        predictions: rows of every evaluation set.
        passages: rows of the shared text.
        resumed: ids of the items that an interrupted run had answered, by set.
    """
    if isinstance(calls, NoCalls):
        measured = f"could not be checked: {calls.reason}"
        return [Gate(WHOLE, False, measured, "can be checked")] if calls.reason else []
    new_predictions = {
        name: [row for row in rows if row["id"] not in resumed.get(name, set())]
        for name, rows in predictions.items()
    }
    gates = [guarded_gate(WHOLE, lambda: _every_token_check(job, calls, new_predictions, passages))]
    if calls.files.quantized:
        gates.append(guarded_gate(QUANTIZED, lambda: _quantized_check(calls)))
    return [*gates, guarded_gate(FLOAT, lambda: _float_check(job, calls))]


def guarded_gate(name: str, check: Callable[[], Measured]) -> Gate:
    """The gate of a check; an exception fails the gate and becomes its reason."""
    try:
        passed, measured, limit = check()
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        measured = f"could not be checked: {type(error).__name__}: {reason}"
        return Gate(name, False, measured, "can be checked")
    return Gate(name, bool(passed), measured, limit)


def _every_token_check(job: Job, calls: CallRecorder, fresh, passages) -> Measured:
    """The decoder read every token that the answers need, and each Linear processed them all."""
    miscounted = [
        name
        for name, linear in calls.linears.items()
        if name != HEAD and name not in calls.experts
        if (linear.calls, linear.rows) != (calls.passes, calls.tokens)
    ]
    expected = _fewest_tokens(job, fresh, passages)
    if getattr(calls.model, "cache_problem", ""):  # each token is read with all before it
        expected[PACKED] += expected.pop(DECODING)
    read = {kind: calls.tokens[kind] for kind in expected}
    missing = [kind for kind in expected if read[kind] < expected[kind]]
    extra = read[SHARED_TEXT] != expected[SHARED_TEXT]
    passed = not (miscounted or missing or extra or calls.errors)
    measured = f"all {len(calls.linears)} Linears in every pass; every token was read"
    if not passed:
        tokens = ", ".join(
            f"{read[kind]:,} of {n:,} tokens in {kind}" for kind, n in expected.items()
        )
        example = f" ({miscounted[0]})" if miscounted else ""
        measured = f"{tokens}; {len(miscounted)} Linears were called for others{example}"
        measured += f"; {calls.errors[0]}" if calls.errors else ""
    return passed, measured, "every Linear for every token, as many as the answers need"


def _fewest_tokens(job: Job, fresh: Mapping[str, list[dict]], passages) -> dict[str, int]:
    """The least number of tokens that these answers require, by kind of pass."""
    packed = decoding = 0
    for name, rows in fresh.items():
        if job.study.evaluation.datasets[name].ask.protocol == "generate":
            packed += len(rows)  # of golds and foils the last token is predicted and not read
            for row in rows:
                form, foils = row.get("gold_form_tokens", 0), [row.get("foil_tokens") or 0]
                sizes = [form + n for n in [*row.get("gold_tokens", ()), *foils] if n]
                packed += sum(n - 1 for n in sizes)
            decoding += sum(max(0, row["output_tokens"] - 1) for row in rows)
        else:  # the last token of an option is predicted and not read
            options = [len(row.get("logprobs", [])) or row["output_tokens"] for row in rows]
            packed += sum(
                1 + row["output_tokens"] - n for row, n in zip(rows, options, strict=True)
            )
    special_tokens = source_token_ids(source_tokenizer(job), "a text", plain=True)[
        1
    ]  # all but one are read and not predicted
    shared = sum(row["tokens"] + max(0, special_tokens - 1) for row in passages)
    return {PACKED: packed, DECODING: decoding, SHARED_TEXT: shared}


def _quantized_check(calls: CallRecorder) -> Measured:
    """Every call returns the product of the stored weights, activations rounded as declared."""
    linears = [calls.linears[name] for name in sorted(calls.files.quantized)]
    arithmetic = sum((linear.arithmetic for linear in linears), Counter())
    total = sum(sum(linear.calls.values()) for linear in linears)
    number, worst, worst_name = _worst_linear_call(calls, linears)
    announced = "the ruler's" if calls.files.ruler else "int8, "
    announced += (calls.files.activations or "").replace("_", " ")
    passed = arithmetic["announced"] == total > 0 and worst <= 1
    measured = f"every call of {len(linears)} Linears is {announced}"
    if not passed:
        measured = (
            f"{total:,} calls of {len(linears)} Linears: {arithmetic['announced']:,} "
            f"{announced}, {arithmetic['float']:,} float, {arithmetic['neither']:,} neither; of "
            f"{number:,} calls kept, the furthest{worst_name} is {worst:.2g} roundings off"
        )
    product = "product" if calls.files.ruler else "integer product"
    return passed, measured, f"every call the {product} of the files, but for rounding"


def _float_check(job: Job, calls: CallRecorder) -> Measured:
    """Norms, head and float Linears agree with float64 on the stored tensors within rounding."""
    linears = [c for name, c in calls.linears.items() if name not in calls.files.quantized]
    total = sum(sum(linear.calls.values()) for linear in linears)
    arithmetic = sum((linear.arithmetic for linear in linears), Counter())
    number, worst, worst_name = _worst_linear_call(calls, linears)
    norms, worst_norm, worst_norm_name = _worst_norm_call(job, calls)
    dtype = str(calls.files.dtype).removeprefix("torch.")
    uncalled = [c.name for c in [*linears, *calls.norms.values()] if not c.calls]
    uncalled = [name for name in uncalled if name not in calls.experts]
    passed = arithmetic["announced"] == total and largest((worst, worst_norm)) <= 1 and not uncalled
    measured = f"every call of {len(linears)} float Linears and {len(calls.norms)} norms in {dtype}"
    if not passed:
        measured = (
            f"{arithmetic['announced']:,} of {total:,} calls of {len(linears)} float Linears in "
            f"{dtype}; of {number:,} calls kept, the furthest{worst_name} is {worst:.2g} roundings "
            f"off; of {norms:,} calls of norms, the furthest{worst_norm_name} is "
            f"{worst_norm:.2g} off"
        )
        measured += f"; {uncalled[0]} was never called" if uncalled else ""
    return passed, measured, "every call what float64 makes of the files, but for rounding"


def _worst_linear_call(calls: CallRecorder, linears: list[LinearCalls]) -> tuple[int, float, str]:
    """(calls compared, largest difference as a multiple of the allowed one, name of its Linear)."""
    number, worst, worst_name = 0, 0.0, ""
    for linear in linears:
        recorded = [call for pair in linear.kept.values() for call in pair]
        if not recorded:
            continue
        file = calls.files.linear(linear.name, linear.columns)
        tops = [call.absmax for call in recorded if call.absmax is not None]
        products = file.products(
            torch.cat([call.x for call in recorded]), torch.cat(tops) if tops else None
        )
        y = torch.cat([call.y for call in recorded]).double()
        ratio = _largest_ratio(y, products.exact, products.allowed)
        number += len(recorded)
        if not ratio <= worst:
            worst, worst_name = ratio, f" ({linear.name})"
    return number, worst, worst_name


def _largest_ratio(y: Tensor, exact: Tensor, allowed: Tensor) -> float:
    """The largest difference as a multiple of the allowed one; infinite if one is not finite."""
    ratios = (y - exact).abs() / allowed.clamp(min=1e-300)
    return float(ratios.nan_to_num(nan=torch.inf).max())


def _worst_norm_call(job: Job, calls: CallRecorder) -> tuple[int, float, str]:
    """(calls compared, largest difference as a multiple of the allowed one, name of its norm)."""
    config = load_config(model_folder(job.study, job.model, job.paths))
    number, worst, worst_name = 0, 0.0, ""
    for name, norm in calls.norms.items():
        recorded = [call for pair in norm.kept.values() for call in pair]
        if not recorded:
            continue
        x = torch.cat([call.x for call in recorded]).double()
        y = torch.cat([call.y for call in recorded]).double()
        exact, size = exact_norm(x, calls.files, name, config)
        eps = torch.finfo(calls.files.dtype).eps
        ratio = _largest_ratio(y, exact, 4 * eps * size + 8 * 2.0**-23 * size)
        number += len(recorded)
        if not ratio <= worst:
            worst, worst_name = ratio, f" ({name})"
    return number, worst, worst_name


def exact_norm(x: Tensor, files: LinearFiles, name: str, config) -> tuple[Tensor, Tensor]:
    """((rows, features) float64 output of a norm, magnitude that scales its rounding)."""
    tensors = files.tensors
    norm = next(norm for norm in architecture(config).norms if norm.name == name)
    weight = tensors[f"{name}.weight"].to(files.dtype).double() + norm.offset
    bias = torch.zeros_like(weight)
    if f"{name}.bias" in tensors:
        bias = tensors[f"{name}.bias"].to(files.dtype).double()
    if not norm.centred:
        exact = weight * x * (x.square().mean(-1, keepdim=True) + norm.eps).rsqrt()
        return exact + bias, exact.abs() + bias.abs()
    spread = (x.var(-1, keepdim=True, unbiased=False) + norm.eps).rsqrt()
    centred = (x - x.mean(-1, keepdim=True)) * spread * weight
    size = (x.abs() + x.abs().mean(-1, keepdim=True)) * spread * weight.abs() + bias.abs()
    return centred + bias, size
