"""Two cards that are not there: tensors that say they lie on one, computed on the CPU.

As CUDA's do, a tensor on a card refuses to meet one that lies on the other card or on the CPU,
but for numbers, copies and indices of a CPU. Nothing here knows the code it is used on.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

aten = torch.ops.aten
CPU = torch.device("cpu")
CROSSING = {aten._to_copy, aten.to, aten.copy_, aten.is_same_size}  # may read another device
INDEXED = {aten.index, aten.index_put_, aten.index_put, aten._index_put_impl_}
INDEXING = {Tensor.__getitem__, Tensor.__setitem__}
SCALARS = {Tensor.__int__, Tensor.__float__, Tensor.__bool__, Tensor.__index__}
# Methods that ask a driver on their way to the operation.
GUARDED = {
    Tensor.copy_: aten.copy_.default,
    Tensor.contiguous: aten.contiguous.default,
    Tensor.nonzero: aten.nonzero.default,
}
MEMORY_BYTES = 2**35


class CardTensor(Tensor):
    """A tensor that says it lies on a card; `held` has its numbers."""

    @staticmethod
    def __new__(cls, held: Tensor, device: torch.device):
        how = {"strides": held.stride(), "storage_offset": held.storage_offset()}
        made = Tensor._make_wrapper_subclass(
            cls, held.shape, dtype=held.dtype, device=device, **how
        )
        made.held = held
        return made

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return _computed(function, args, kwargs or {})

    @property
    def data(self) -> "CardTensor":
        return CardTensor(self.held.detach(), self.device)

    @data.setter
    def data(self, other: "CardTensor") -> None:
        self.held = other.held

    def data_ptr(self) -> int:
        return self.held.data_ptr()

    def tolist(self):
        return self.held.tolist()

    def __repr__(self, **_how) -> str:
        return f"{self.held} on {self.device}"


@contextmanager
def pretended(monkeypatch, *, cards: int) -> Iterator[None]:
    """Inside, torch sees so many cards and puts tensors onto them."""
    cuda = {
        "is_available": lambda: True,
        "is_initialized": lambda: False,
        "device_count": lambda: cards,
        "is_bf16_supported": lambda including_emulation=True: True,
        "get_device_name": lambda i: f"card {i}",
        "get_device_capability": lambda _device=None: (7, 5),  # no Triton
        "get_device_properties": lambda _device: SimpleNamespace(
            total_memory=MEMORY_BYTES, is_integrated=False, name="card"
        ),
        "mem_get_info": lambda _device=None: (MEMORY_BYTES, MEMORY_BYTES),
        "memory_reserved": lambda _device=None: 0,
        "memory_allocated": lambda _device=None: 0,
    }
    for name, answer in cuda.items():
        monkeypatch.setattr(torch.cuda, name, answer)
    monkeypatch.setattr("accelerate.big_modeling.check_cuda_p2p_ib_support", lambda: True)
    monkeypatch.setenv("HF_DEACTIVATE_ASYNC_LOAD", "1")  # another thread does not pretend
    before = torch._C._only_lift_cpu_tensors()
    replaced = torch.__future__.get_overwrite_module_params_on_conversion()
    torch._C._set_only_lift_cpu_tensors(True)
    torch.__future__.set_overwrite_module_params_on_conversion(True)  # parameters, not their data
    try:
        with _Calls(), _Operations():
            yield
    finally:
        torch._C._set_only_lift_cpu_tensors(before)
        torch.__future__.set_overwrite_module_params_on_conversion(replaced)


class _Calls(TorchFunctionMode):
    """Calls from Python that would ask a driver: cards by number, indices, copies."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs, place = dict(kwargs or {}), int(function is not torch.device)
        if function is Tensor.to or (function is torch.device and len(args) == 1):
            args = (*args[:place], *map(_numbered, args[place : place + 1]), *args[place + 1 :])
        if "device" in kwargs:
            kwargs["device"] = _numbered(kwargs["device"])
        if args and isinstance(args[0], CardTensor):
            if function in SCALARS:
                return function(args[0].held)
            if function in INDEXING:
                return _indexed(function, *args)
            if function in GUARDED:
                return _computed(GUARDED[function], args, kwargs)
        return function(*args, **kwargs)


def _numbered(place):
    """A card by its number or without one, as torch's own calls take it; all else as it is."""
    if type(place) is int:
        return f"cuda:{place}"
    return "cuda:0" if place in ("cuda", torch.device("cuda")) else place


class _Operations(TorchDispatchMode):
    """Operations that make a tensor on a card, or copy one onto it, make a `CardTensor`."""

    # Under this key torch asks no driver for a device; its own pretended tensors have it, too.
    _mode_key = torch._C._TorchDispatchModeKey.FAKE

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return _computed(function, args, kwargs or {})


def _held(x):
    if isinstance(x, torch.device):
        return CPU if x.type == "cuda" else x
    return x.held if isinstance(x, CardTensor) else x


def _indexed(function, x: CardTensor, index, *value):
    """A part of a tensor, read or set."""
    for part in (*tree_leaves(index), *(v for v in value if isinstance(v, Tensor) and v.dim())):
        allowed = {x.device} if any(part is v for v in value) else {x.device, CPU}
        if isinstance(part, Tensor) and part.device not in allowed:
            raise RuntimeError(f"an index or value on {part.device}, a tensor on {x.device}")
    with torch._C.DisableTorchFunction(), torch.inference_mode(False):
        part = function(x.held, tree_map(_held, index), *map(_held, value))
        return CardTensor(part, x.device) if isinstance(part, Tensor) else part


def _computed(function, args: tuple, kwargs: dict):
    """The result of an operation, on the card that was named or that its operands lie on."""
    given, packet = tree_leaves((args, kwargs)), function.overloadpacket
    operands = [x for x in given if isinstance(x, Tensor)]
    if packet not in CROSSING:
        checked = [
            x
            for i, x in enumerate(operands)
            if x.device != CPU or (x.dim() and not (i and packet in INDEXED))
        ]
        if len(places := {x.device for x in checked}) > 1:
            raise RuntimeError(f"{function}: operands on {sorted(map(str, places))}")
    named = [x for x in given if isinstance(x, torch.device)]
    if all(x.device == CPU for x in operands) and all(x.type != "cuda" for x in named):
        return function(*args, **kwargs)
    device = _place(function, operands, named)
    known = {id(_held(x)): x for x in operands}

    def placed(x):
        if not isinstance(x, Tensor):
            return x
        before = known.get(id(x))
        if before is not None and before.device == device:
            return before
        own = x if before is None else x.clone()  # a copy onto another device
        return own if device == CPU else CardTensor(own, device)

    # As ordinary tensors: of those, inference mode's own cannot be views.
    with torch.inference_mode(False), torch.no_grad():
        if packet is torch.ops.aten._int_mm:
            return placed(_exact(*map(_held, args)))
        return tree_map(placed, function(*tree_map(_held, args), **tree_map(_held, kwargs)))


def _exact(a: Tensor, b: Tensor) -> Tensor:
    """A card's integer product; a CPU's own is wrong where oneDNN is kept to less than VNNI."""
    return (a.double() @ b.double()).int()


def _place(function, operands: list[Tensor], named: list[torch.device]) -> torch.device:
    """The device of an operation's result."""
    if named:
        return named[0]
    if function is aten.to.other:
        return operands[1].device
    if function.overloadpacket is aten.copy_:
        return operands[0].device
    return next((x.device for x in operands if x.device != CPU), CPU)
