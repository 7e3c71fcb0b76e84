"""int8 × int8, exactly, on whatever device the operands lie.

On a CPU there are several ways, and which is fastest depends on the processor:

- `int8 × int8`: torch's own product (oneDNN), where the processor has AVX-512 VNNI. Elsewhere
  torch falls back to a plain loop, and oneDNN below it saturates.
- `uint8 × int8`: the same with the left operand moved up by 128, which oneDNN multiplies
  without a detour; 128 × the column sums of the weights are taken off again.
- `int8 in tiles`: the weights are put into the order that AMX reads once, and not at every call.
- `float32 in blocks`: both operands are converted, and multiplied in blocks of at most 1,024
  inner elements. A product is at most 2¹⁴, so every partial sum is a whole number of at most
  2²⁴, which float32 holds exactly. It needs nothing of the processor.

All of them give the same whole numbers, so no answer depends on the choice. A process makes it
once: of the ways that the processor's instructions promise to be fast, those that it has just
seen to be exact, on operands that include the largest sums, are timed, and the fastest is taken.

`int8_cuda` has the ways of CUDA devices. MPS has no integer product
(`helpers.runtime.devices` has int8 simulated there).
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from helpers.quantization import int8_cuda
from helpers.runtime import processors

BLOCK = 1024  # 2¹⁴ × 1,024 = 2²⁴, up to which float32 holds every whole number
TRIED = (256, 576, 1536)  # rows, inner, outer of the products that are timed
ROUNDS, ROUND_S = 5, 0.008  # each way is timed in turns with the others, so often and so long
CLEARLY = 0.9  # of the time of the way before it: less is left to chance


@dataclass(frozen=True)
class Way:
    """One way to multiply int8 matrices on a CPU.

    Attributes:
        name: for records.
        features: instructions of which the processor must have one; none for all processors.
        pack: (outer, inner) int8 weight → the tensors this way multiplies by.
        multiply: (rows, inner) int8 and what `pack` gave → (rows, outer) whole numbers: int32,
            or float32 that is int32 rounded once.
    """

    name: str
    features: tuple[str, ...]
    pack: Callable[[Tensor], tuple[Tensor, ...]]
    multiply: Callable[..., Tensor]


def _int_mm(a: Tensor, weight: Tensor) -> Tensor:
    """(rows, outer) int32 a @ weightᵀ; torch 2.13 returns garbage for one inner element."""
    if weight.shape[1] == 1:
        return a.int() * weight.int().t()
    return torch._int_mm(a, weight.t())


def _multiply_uint8(a: Tensor, weight: Tensor, shift: Tensor) -> Tensor:
    """(a + 128) @ weightᵀ - 128 · the sums of the weight's rows."""
    up = a.view(torch.uint8) ^ 128  # two's complement: the highest bit is the sign
    return _int_mm(up, weight).sub_(shift)


def _pack_uint8(weight: Tensor) -> tuple[Tensor, ...]:
    return weight.contiguous(), 128 * weight.sum(1, dtype=torch.int32)


def _pack_tiles(weight: Tensor) -> tuple[Tensor, ...]:
    return (torch.ops.onednn.qlinear_prepack(weight.contiguous(), None),)


def _multiply_tiles(a: Tensor, packed: Tensor) -> Tensor:
    scale, zero_point = torch.ones(1), torch.zeros(1, dtype=torch.int32)
    plain = (None, 1.0, 0, torch.float32, "none", [], "")  # no bias, no scales, no function after
    return torch.ops.onednn.qlinear_pointwise(a, 1.0, 0, packed, scale, zero_point, *plain)


def _multiply_blocks(a: Tensor, weight_t: Tensor) -> Tensor:
    blocks = zip(a.split(BLOCK, dim=1), weight_t.split(BLOCK), strict=True)
    partial = [left.float() @ right.float() for left, right in blocks]
    if len(partial) <= 2:  # one sum of two whole numbers rounds as int32 to float32 does
        return partial[0] if len(partial) == 1 else partial[0].add_(partial[1])
    total = partial[0].to(torch.int32)
    for block in partial[1:]:
        total += block.to(torch.int32)
    return total


INT8 = Way(
    "int8 × int8",
    ("avx512_vnni",),
    lambda weight: (weight.contiguous(),),
    _int_mm,
)
UINT8 = Way("uint8 × int8", ("avx512_vnni",), _pack_uint8, _multiply_uint8)
TILES = Way("int8 in tiles", ("amx_int8",), _pack_tiles, _multiply_tiles)
BLOCKS = Way("float32 in blocks", (), lambda weight: (weight.t().contiguous(),), _multiply_blocks)
WAYS = {way.name: way for way in (INT8, UINT8, TILES, BLOCKS)}


@cache
def cpu_way() -> Way:
    """The way this process multiplies on the CPU."""
    own = set(processors.features())
    suited = [way for way in WAYS.values() if own & set(way.features) and is_exact(way)]
    if not suited:
        return BLOCKS
    rounds = [{way.name: _seconds(way) for way in suited} for _ in range(ROUNDS)]
    shortest = {way.name: min(each[way.name] for each in rounds) for way in suited}
    fastest = suited[0]
    for way in suited[1:]:
        if shortest[way.name] < CLEARLY * shortest[fastest.name]:
            fastest = way
    return fastest


@torch.inference_mode()
def is_exact(way: Way) -> bool:
    """Whether a way gives float64's sums: of random operands, of the largest, and beyond 2²⁴."""
    generator = torch.Generator().manual_seed(0)
    random = torch.randint(-128, 128, (67, 1100), generator=generator).to(torch.int8)
    least = torch.full((19, 2100), -128, dtype=torch.int8)
    cases = [(random[:35], random[35:]), (least[:3], least[3:]), (random[:1], random[1:])]
    cases.append((least, torch.arange(2100).to(torch.int8).repeat(8, 1)))
    for a, weight in cases:
        expected = (a.double() @ weight.double().t()).float()
        try:
            product = way.multiply(a, *way.pack(weight))
        except (RuntimeError, AttributeError, NotImplementedError):  # this torch lacks it
            return False
        if not torch.equal(product.float(), expected):
            return False
    return True


@torch.inference_mode()
def _seconds(way: Way) -> float:
    """The shortest of several runs of a product."""
    rows, inner, outer = TRIED
    a = torch.ones(rows, inner, dtype=torch.int8)
    packed = way.pack(torch.ones(outer, inner, dtype=torch.int8))
    way.multiply(a, *packed)
    shortest, began = float("inf"), time.perf_counter()
    while time.perf_counter() - began < ROUND_S:
        started = time.perf_counter()
        way.multiply(a, *packed)
        shortest = min(shortest, time.perf_counter() - started)
    return shortest


def pack(weight: Tensor) -> tuple[Tensor, ...]:
    """The (outer, inner) int8 weight as its device multiplies by it best."""
    if weight.device.type == "cpu":
        return cpu_way().pack(weight)
    return int8_cuda.pack(weight)


def unpack(packed: tuple[Tensor, ...]) -> Tensor:
    """(inner, outer) int8: the weight again, read off the product where its order is hidden."""
    weight = packed[0]
    if weight.device.type != "cpu":
        return weight.t()
    if cpu_way() is BLOCKS:
        return weight
    if cpu_way() is not TILES:
        return weight.t()
    identity = torch.eye(weight.shape[0], dtype=torch.int8)
    return cpu_way().multiply(identity, *packed).to(torch.int8)


def multiply(a: Tensor, packed: tuple[Tensor, ...]) -> Tensor:
    """(rows, outer) a @ weightᵀ, exactly: int32, or float32 that is int32 rounded once.

    Args:
        a: (rows, inner) int8.
        packed: what `pack` made of the weight, on the same device.

    Raises:
        NotImplementedError: the device has no such product.
    """
    match a.device.type:
        case "cpu":
            return cpu_way().multiply(a, *packed)
        case "cuda":
            return int8_cuda.multiply(a, packed[0])
    raise NotImplementedError(
        f"torch has no int8 product on {a.device.type}; set runtime.quantized to reference"
    )
