"""Float products of Linears on a CPU, experts as Linears, and batches of token sequences.

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

import re
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from importlib import import_module
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

from helpers.runtime.devices import has_bfloat16_units


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
