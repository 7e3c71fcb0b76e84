"""Where and how a job computes: device, processor and memory, float products, experts, batches.

`auto` takes the best device there is and the dtype that suits it, once for this machine. What was
settled, and why it is not what a reader would expect, goes into the job's record.

`PROCESSOR=avx2 make …` restricts torch, oneDNN and numba by their own variables (Makefile), and
this module by STUDY_PROCESSOR, so that any machine can stand in for one without AVX-512;
`PROCESSOR=vnni` for one with AVX-512 VNNI and bfloat16, and without AMX.

The C library (glibc) is told how much freed memory to keep. Freed tensors of a few megabytes lie
between small ones that last, and such pages are kept: 1.9 GiB after one quantization of 0.6 B
weights, held by the process and by no one in it. And what lies freed at the end is returned at
once and taken back page by page for the next layer, over and over: a tenth of the time of an int8
evaluation (NOTES.md).

A product goes to the library that the processor does it best with. torch hands float32 to MKL,
which on some processors does half of what oneDNN does there (NOTES.md has figures); oneDNN comes
with torch too. bfloat16 on a processor that has no instructions for it is emulated there at a
tenth of float32's speed: the operands are multiplied in float32 instead, and the sum is rounded to
bfloat16 once, as the instructions do. A Linear multiplied here is still a plain `nn.Linear`, and
can be trained; only its `forward` is its own.

transformers stacks the experts of a mixture into two three-dimensional tensors, which no quantizer
of Linears sees and into which int8 weights cannot be loaded back. On disk every expert has its own
gate, up and down; here it has them in memory too. The function is that of the stacked experts
(tests/runtime/test_experts.py).

Batches have a budget of tokens, over sequences sorted by length; each token knows its sequence.
"""

import ctypes
import gc
import os
import platform
import re
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import replace
from functools import cache
from importlib import import_module
from itertools import groupby
from pathlib import Path
from types import MethodType

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear
from torch.overrides import TorchFunctionMode
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)
from transformers.core_model_loading import WeightRenaming

from helpers.core.errors import StudyError
from helpers.study.loading import Job
from helpers.study.schema import Runtime

FEATURES = ("avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8")
FEATURES += ("asimddp", "i8mm", "bf16")  # ARM's
RESTRICTIONS = {
    "avx2": ("avx2",),
    "vnni": ("avx2", "avx512f", "avx512_vnni", "avx512_bf16"),
}


def features() -> tuple[str, ...]:
    """The instruction sets for matrix products that this process may use."""
    allowed = RESTRICTIONS.get(restriction(), FEATURES)
    return tuple(name for name in _cpu_features() if name in allowed)


def restriction() -> str:
    """The restriction of this run, a key of RESTRICTIONS; empty if there is none.

    Raises:
        StudyError: STUDY_PROCESSOR is set to another value.
    """
    setting = os.environ.get("STUDY_PROCESSOR", "")
    if setting and setting not in RESTRICTIONS:
        raise StudyError(
            f"PROCESSOR = {setting!r} is not one of {', '.join(RESTRICTIONS)}; leave it out"
        )
    return setting


@cache
def _cpu_features() -> tuple[str, ...]:
    path = Path("/proc/cpuinfo")
    words = set(path.read_text("utf-8").split()) if path.is_file() else set()
    return tuple(name for name in FEATURES if name in words)


def has_int8_units() -> bool:
    """Whether torch multiplies int8 faster than float32 here, which takes AVX-512 VNNI."""
    return "avx512_vnni" in features()


def has_bfloat16_units() -> bool:
    """Whether the processor has bfloat16 instructions; emulation is slower than float32."""
    return bool({"avx512_bf16", "amx_bf16", "bf16"} & set(features()))


def processor_name() -> str:
    """The CPU's model name, or its architecture."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text("utf-8").splitlines() if path.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    own = names[0] if names else platform.processor() or platform.machine()
    return f"{own} (kept to {restriction()})" if restriction() else own


def processor_class() -> str:
    """The processor's class by its int8 instructions."""
    own = features()
    if "amx_int8" in own:
        return "AMX"
    if "avx512_vnni" in own:
        return "AVX-512 VNNI"
    if "avx512f" in own:
        return "AVX-512"
    return "AVX2" if "avx2" in own else platform.machine()


M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # as malloc.h numbers them
SPARE_BYTES = 2**27  # kept for later allocations
LARGE_BYTES = 2**25  # larger blocks are mapped separately and returned at once


def release_memory() -> None:
    """Collect garbage and return freed pages to the system."""
    gc.collect()
    trim_heap()


def trim_heap() -> None:
    """Return freed pages to the system if the C library can (glibc); else do nothing."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def set_malloc_thresholds() -> None:
    """Make malloc keep SPARE_BYTES of freed memory and map large blocks separately (glibc)."""
    set_option = getattr(ctypes.CDLL(None), "mallopt", None)
    if set_option is not None:
        set_option(M_MMAP_THRESHOLD, LARGE_BYTES)
        set_option(M_TRIM_THRESHOLD, SPARE_BYTES)


def exclude_imports_from_gc() -> None:
    """Exclude the objects that exist now, mostly of libraries, from garbage collection.

    Only the first call in a process does so, since models are freed later. A collection took a
    third of a second before.
    """
    if not gc.get_freeze_count():
        gc.freeze()


NO_BFLOAT16 = (
    "the processor has no bfloat16 units: bfloat16 operands are multiplied in float32 and rounded "
    "once, and training does not cast"
)
NO_INT8 = {"mps": "torch has no int8 product there, so int8 is simulated (quantized: reference)"}


def prepare(job: Job) -> Job:
    """The job with its runtime resolved on this machine; sets threads and seeds.

    Raises:
        StudyError: the study names a device that this machine lacks.
    """
    requested = job.study.runtime
    runtime = resolve_runtime(requested)
    set_malloc_thresholds()
    exclude_imports_from_gc()
    torch.set_num_threads(runtime.threads)
    torch.manual_seed(job.study.seed)
    study = job.study.model_copy(update={"runtime": runtime})
    return replace(job, study=study, runtime=describe_runtime(runtime, requested))


def resolve_runtime(runtime: Runtime) -> Runtime:
    """The runtime with `auto` replaced: an available device, its dtype and kernel.

    Raises:
        StudyError: the study names a device that this machine lacks.
    """
    device = best_device() if runtime.device == "auto" else runtime.device
    if not is_available(device):
        raise StudyError(
            f"runtime.device = {device!r} but this machine has none; use 'auto' or 'cpu'"
        )
    dtype = best_dtype(device) if runtime.dtype == "auto" else runtime.dtype
    device_map = runtime.device_map if device == "cuda" and torch.cuda.device_count() > 1 else None
    quantized = "reference" if device in NO_INT8 else runtime.quantized
    changes = {"device": device, "dtype": dtype, "device_map": device_map, "quantized": quantized}
    return runtime.model_copy(update=changes)


def best_device() -> str:
    """cuda, else mps, else cpu."""
    return next(device for device in ("cuda", "mps", "cpu") if is_available(device))


def is_available(device: str) -> bool:
    """Whether this machine has a device of a kind: cuda, mps or cpu."""
    match device:
        case "cuda":
            return torch.cuda.is_available()
        case "mps":
            return torch.backends.mps.is_available()
    return device == "cpu"


def best_dtype(device: str) -> str:
    """bfloat16 on a GPU that has it, else float32."""
    if device == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    if device == "mps":
        try:
            torch.ones(1, dtype=torch.bfloat16, device="mps") + 1
        except (TypeError, RuntimeError):  # systems before macOS 14
            return "float32"
        return "bfloat16"
    return "float32"


def describe_runtime(runtime: Runtime, requested: Runtime) -> dict:
    """The runtime for the record: the device's name, and every difference from the request.

    Args:
        runtime: as resolved.
        requested: as in the study file.
    """
    notes = []
    if runtime.quantized != requested.quantized:
        notes.append(f"{runtime.device}: {NO_INT8[runtime.device]}")
    if requested.device_map and not runtime.device_map:
        notes.append("one device: device_map has nothing to spread over")
    if runtime.device == "cpu" and not has_bfloat16_units():
        notes.append(NO_BFLOAT16)
    settings = runtime.model_dump(exclude={"cost"})
    return {**settings, "device_name": device_name(runtime.device), "notes": notes}


def device_name(device: str) -> str:
    """The model name of the processor or of the cards."""
    if device == "cuda":
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        return ", ".join(names)
    return processor_name()


def place_on_device(model, runtime: Runtime):
    """The model on its device, or split over all GPUs if the study sets `device_map`.

    The decoder and the head, which this project calls separately, return their output on the
    device of their input, as an unsplit model does.
    """
    if not runtime.device_map:
        return model.to(runtime.device)
    from accelerate import dispatch_model, infer_auto_device_map
    from accelerate.utils import get_balanced_memory

    split_options = {"no_split_module_classes": list(model._no_split_modules or ())}
    device_map = infer_auto_device_map(
        model, max_memory=get_balanced_memory(model, **split_options), **split_options
    )
    model = dispatch_model(model, device_map=device_map, force_hooks=True)
    return return_to_input_device(model)


def modules_by_device(model) -> dict[str, dict[str, str]]:
    """The modules of a split model by device, for its record; {} for an unsplit model.

    Consecutive layers are named by the first and the last.
    """
    names: dict[str, list[str]] = {}
    for name, device in getattr(model, "hf_device_map", {}).items():
        place = f"cuda:{device}" if isinstance(device, int) else str(device)
        names.setdefault(place, []).append(name)
    if len(names) < 2:
        return {}
    return {"modules": {place: ", ".join(_merged_ranges(each)) for place, each in names.items()}}


def _merged_ranges(names: list[str]) -> Iterator[str]:
    """The names, `layers.1` and `layers.2` and `layers.3` as `layers.1-3`."""
    numbered = [(name, *name.rpartition(".")[::2]) for name in names]
    for _, entries in groupby(enumerate(numbered), key=_range_key):
        entries = [entry for _, entry in entries]
        first, last = entries[0][0], entries[-1][2]
        yield first if len(entries) == 1 else f"{first}-{last}"


def _range_key(place: tuple[int, tuple[str, str, str]]) -> tuple[str, int | None]:
    """A key that only names with consecutive numbers share."""
    index, (name, parent, number) = place
    return (parent, int(number) - index) if number.isdecimal() else (name, None)


def return_to_input_device(model):
    """The model, whose decoder and head now return their output on the device of their input."""
    for part in (model.base_model, model.get_output_embeddings()):
        part.register_forward_hook(_to_input_device, with_kwargs=True)
    return model


def _to_input_device(_module, args: tuple, kwargs: dict, output):
    """Move the output to the device of the first input tensor."""
    from accelerate.utils import send_to_device

    tensors = (x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor))
    return send_to_device(output, next(tensors).device)


def token_budget_batches(lengths: list[int], *, batch_tokens: int) -> list[list[int]]:
    """Indices of sequences, longest first, so that rows × longest row ≤ `batch_tokens`.

    A sequence longer than the budget is a batch of its own. Ties keep their order.
    """
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    batches: list[list[int]] = []
    for index in order:
        longest = lengths[batches[-1][0]] if batches else 0
        if batches and (len(batches[-1]) + 1) * longest <= batch_tokens:
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches


def pad(rows: list[list[int]], *, value: int, side: str, device) -> Tensor:
    """(rows, longest) int64, short rows filled with `value` on the given side."""
    width = max(len(row) for row in rows)
    filled = torch.full((len(rows), width), value, dtype=torch.long)
    for i, row in enumerate(rows):
        if side == "right":
            filled[i, : len(row)] = torch.tensor(row, dtype=torch.long)
        else:
            filled[i, width - len(row) :] = torch.tensor(row, dtype=torch.long)
    return filled.to(device)


FEWEST_ROWS = 16  # of a matrix product; with fewer, libraries use kernels that sum in another order

# The tensor by device, its original device first; a model on several devices copies it.
_SEQUENCE_IDS: ContextVar[dict[torch.device, Tensor] | None] = ContextVar("owners", default=None)


@contextmanager
def use_sequence_ids(sequence_ids: Tensor | None) -> Iterator[None]:
    """Inside the context, the tokens of a forward pass belong to different texts.

    Args:
        owners: (tokens,) int64, the number of each token's text; None if there is one text.
    """
    token = _SEQUENCE_IDS.set(None if sequence_ids is None else {sequence_ids.device: sequence_ids})
    try:
        yield
    finally:
        _SEQUENCE_IDS.reset(token)


def current_sequence_ids(device: torch.device | None = None) -> Tensor | None:
    """(tokens,) number of each token's text in this forward pass; None if there is one text.

    Args:
        device: the device of the result, to which it is copied once; None for the original.
    """
    copies = _SEQUENCE_IDS.get()
    if copies is None:
        return None
    source_ids = next(iter(copies.values()))
    if device is None:
        return source_ids
    if device not in copies:
        copies[device] = source_ids.to(device)
    return copies[device]


NOT_MULTIPLIED = (
    nn.Linear,
    nn.Embedding,
)  # classes with a matrix whose product is not computed here


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """(..., outer) x @ weightᵀ + bias, by oneDNN on a CPU, else by torch's choice.

    Args:
        x: (..., inner).
        weight: (outer, inner).
        bias: (outer,) or None.
    """
    if x.dtype == weight.dtype == torch.bfloat16 and is_emulated(x):
        bias_float32 = None if bias is None else bias.float()
        return product(x.float(), weight.float(), bias_float32).to(torch.bfloat16)
    if not _by_onednn(x, weight):
        return linear(x, weight, bias)
    if torch.is_grad_enabled():
        return _Product.apply(x, weight, bias)
    return _onednn_product(x, weight, bias)


def grouped_product(x: Tensor, weight: Tensor) -> Tensor:
    """(groups, rows, outer) x @ weightᵀ of every group; a row is the same among any 16 or more.

    MKL's batched product depends on the number of rows: with AVX2 always, else if outer = 1.

    Args:
        x: (groups, rows, inner).
        weight: (groups, outer, inner).
    """
    if not _by_onednn(x, weight):
        return x @ weight.transpose(1, 2)
    return torch.stack([product(*pair) for pair in zip(x, weight, strict=True)])


def is_emulated(x: Tensor) -> bool:
    """Whether x is bfloat16 on a CPU that has no instructions for its products."""
    return x.dtype == torch.bfloat16 and x.device.type == "cpu" and not has_bfloat16_units()


def widened(*operands: Tensor) -> tuple[Tensor, ...]:
    """The operands of a product, emulated bfloat16 cast to float32 as `product` does."""
    return tuple(x.float() if is_emulated(x) else x for x in operands)


def _by_onednn(x: Tensor, weight: Tensor) -> bool:
    return (
        x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and x.numel() > 0
        and not torch.is_autocast_enabled("cpu")
        and torch.backends.mkldnn.is_available()
    )


def _onednn_product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    weight = weight.contiguous()
    product = torch.ops.mkldnn._linear_pointwise(rows, weight, bias, "none", [], "")
    return product.reshape(*x.shape[:-1], len(weight))


class _Product(torch.autograd.Function):
    """The product and its gradients, which are products too."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _onednn_product(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        needed = ctx.needs_input_grad
        grads, rows = grad.reshape(-1, len(weight)), x.reshape(-1, x.shape[-1])
        return (
            _onednn_product(grads, weight.t()).reshape(x.shape) if needed[0] else None,
            _onednn_product(grads.t(), rows.t()) if needed[1] else None,
            grads.sum(0) if needed[2] else None,
        )


def use_onednn(model):
    """The model, whose Linears now use `product` unless they have a `forward` of their own.

    Other modules with a matrix, such as routers of mixtures, use it too: with MKL and AVX2 a row
    of their output would depend on the number of rows.
    """
    for module in model.modules():
        if "forward" in vars(module):
            continue
        if type(module) is nn.Linear:
            module.forward = MethodType(_forward, module)
        elif _has_matrix(module):
            module.forward = MethodType(_with_products, module)
    return model


def _has_matrix(module: nn.Module) -> bool:
    matrix = module._parameters.get("weight")
    return matrix is not None and matrix.ndim == 2 and not isinstance(module, NOT_MULTIPLIED)


class _Products(TorchFunctionMode):
    """Inside the context, `torch.nn.functional.linear` is `product`."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        return (product if function is linear else function)(*args, **(kwargs or {}))


def _with_products(module: nn.Module, *args, **kwargs):
    with _Products():
        return type(module).forward(module, *args, **kwargs)


def _forward(module: nn.Linear, input: Tensor) -> Tensor:
    return product(input, module.weight, module.bias)


class _Linear(nn.Linear):
    forward = _forward


@contextmanager
def simulated_by_onednn(model) -> Iterator[None]:
    """Inside the context, the products that compressed-tensors simulates use `product` too.

    It calls the `forward` of a Linear's class, so the class is replaced, and restored at the
    end: only modules of class `nn.Linear` are saved as int8.
    """
    linears = [module for module in model.modules() if type(module) is nn.Linear]
    for module in linears:
        module.__class__ = _Linear
    try:
        yield
    finally:
        for module in linears:
            module.__class__ = nn.Linear


class Expert(nn.Module):
    """One gated MLP: down(act(gate(x)) · up(x)).

    Args:
        width, inner: features of x, and between gate and down.
        activation: between gate and product.
    """

    def __init__(self, width: int, inner: int, activation: nn.Module):
        super().__init__()
        self.gate_proj = nn.Linear(width, inner, bias=False)
        self.up_proj = nn.Linear(width, inner, bias=False)
        self.down_proj = nn.Linear(inner, width, bias=False)
        self.act_fn = activation

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class LinearExperts(nn.ModuleList):
    """All experts of a block, each applied to the tokens that the router assigns to it.

    With `every_token` each expert reads all tokens, so that statistics of the inputs of its
    Linears do not depend on the router; the output stays the same.

    Args:
        stack: transformers' module of the experts, for its sizes and its activation.

    llm-compressor replaces experts by Linears too, but does not keep an output bit-equal for
    any number of tokens, which batch invariance needs.
    """

    def __init__(self, stack: nn.Module):
        count, width, inner = stack.down_proj.shape
        super().__init__([Expert(width, inner, stack.act_fn) for _ in range(count)])
        self.every_token = False

    def forward(self, x: Tensor, expert_indices: Tensor, weights: Tensor) -> Tensor:
        """Σ weight · expert(x) over the selected experts of each token.

        Args:
            x: (tokens, hidden).
            expert_indices: (tokens, k) the experts of each token.
            weights: (tokens, k) their weights.
        """
        mixed = torch.zeros_like(x)
        for index, expert in enumerate(self):
            tokens, slot = torch.where(expert_indices == index)
            if self.every_token:
                outputs = expert(x)[tokens]
            elif len(tokens):
                outputs = _expert_outputs(expert, x, tokens)
            else:
                continue
            weighted = outputs * weights[tokens, slot, None]
            mixed.index_add_(0, tokens, weighted.to(mixed.dtype))
        return mixed


def _expert_outputs(expert: Expert, x: Tensor, tokens: Tensor) -> Tensor:
    """The expert's outputs for some tokens, independent of their number.

    Fewer than FEWEST_ROWS tokens are padded, since products of few rows sum in another order.
    The sequence ids go along, since a dynamic scale per tensor is one per text.
    """
    count = len(tokens)
    if count < FEWEST_ROWS:
        tokens = torch.cat([tokens, tokens[-1:].expand(FEWEST_ROWS - count)])
    sequence_ids = current_sequence_ids(tokens.device)
    with use_sequence_ids(None if sequence_ids is None else sequence_ids[tokens]):
        return expert(x[tokens])[:count]


@contextmanager
def experts_as_linears(model_type: str, experts: str) -> Iterator[None]:
    """Inside the context, models of a family are built with `LinearExperts`.

    No expert is then stacked on loading or unstacked on saving; where the files call its Linears
    otherwise (w1, w3, w2), they are renamed.

    Args:
        experts: transformers' class of the family's stacked experts; empty if there is none.
    """
    if not experts:
        yield
        return
    module, _, name = experts.rpartition(".")
    modeling, conversion = import_module(module), get_checkpoint_conversion_mapping(model_type)
    stacked = getattr(modeling, name)
    unstacked = [one for c in conversion or () for one in _without_stacking(c)]

    class Unstacked:
        """Nothing is an instance of it, so transformers does not initialize ours as its own."""

        def __new__(cls, *args, **kwargs) -> LinearExperts:
            with torch.device("meta"):
                stack = stacked(*args, **kwargs)
            return LinearExperts(stack)

    setattr(modeling, name, Unstacked)
    register_checkpoint_conversion_mapping(model_type, unstacked, overwrite=True)
    try:
        yield
    finally:
        setattr(modeling, name, stacked)
        register_checkpoint_conversion_mapping(model_type, conversion, overwrite=True)


@contextmanager
def as_plain_linears(classes: Iterable[str]) -> Iterator[None]:
    """Inside the context, models are built with `nn.Linear` in place of these classes.

    Args:
        classes: full names of classes of transformers that compute what a plain Linear computes.
    """
    with ExitStack() as restored:
        for module, _, name in (path.rpartition(".") for path in classes):
            modeling = import_module(module)
            restored.callback(setattr, modeling, name, getattr(modeling, name))
            setattr(modeling, name, nn.Linear)
        yield


STACKED = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
EXPERT_WEIGHT = re.compile(r".*experts\\?\.\*\.(\w+)\.weight")


def _without_stacking(conversion) -> Iterator:
    """The conversion; if it stacks the projections of all experts, the new names of each."""
    names = [EXPERT_WEIGHT.fullmatch(pattern) for pattern in conversion.source_patterns]
    own = STACKED.get(conversion.target_patterns[0].rpartition("experts.")[2], ())
    if len(names) != len(own) or not all(names):
        yield conversion
        return
    for name, own_name in zip([match[1] for match in names], own, strict=True):
        if name != own_name:
            yield WeightRenaming(rf"experts.(\d+).{name}.", rf"experts.\1.{own_name}.")


@contextmanager
def every_expert_reads(model):
    """Inside the context, every expert of the model reads every token."""
    mixtures = [m for m in model.modules() if isinstance(m, LinearExperts)]
    for mixture in mixtures:
        mixture.every_token = True
    try:
        yield
    finally:
        for mixture in mixtures:
            mixture.every_token = False
