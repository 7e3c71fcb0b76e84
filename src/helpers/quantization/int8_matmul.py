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

BLOCK = 1024  # 2¹⁴ × 1,024 = 2²⁴, up to which float32 represents every integer
TRIED = (256, 576, 1536)  # rows, inner, outer of the products that are timed
ROUNDS, ROUND_S = 5, 0.008  # rounds of interleaved timing, seconds per product and round
MOST_TIME_SHARE = 0.9  # a product must take less than this share of the best time so far


@dataclass(frozen=True)
class CpuProduct:
    """One implementation of the int8 product on a CPU.

    Attributes:
        name: for records.
        features: instruction sets of which the processor needs one; empty for any processor.
        pack: (outer, inner) int8 weight → packed tensors.
        multiply: (rows, inner) int8 and packed tensors → (rows, outer) integers as int32, or as
            float32 rounded once from int32.
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
    plain = (
        None,
        1.0,
        0,
        torch.float32,
        "none",
        [],
        "",
    )  # no bias, no scales, no activation function
    return torch.ops.onednn.qlinear_pointwise(a, 1.0, 0, packed, scale, zero_point, *plain)


def _multiply_blocks(a: Tensor, weight_t: Tensor) -> Tensor:
    blocks = zip(a.split(BLOCK, dim=1), weight_t.split(BLOCK), strict=True)
    partial = [left.float() @ right.float() for left, right in blocks]
    if len(partial) <= 2:  # the sum of two integers rounds like int32 to float32
        return partial[0] if len(partial) == 1 else partial[0].add_(partial[1])
    total = partial[0].to(torch.int32)
    for block in partial[1:]:
        total += block.to(torch.int32)
    return total


INT8 = CpuProduct(
    "int8 × int8",
    ("avx512_vnni",),
    lambda weight: (weight.contiguous(),),
    _int_mm,
)
UINT8 = CpuProduct("uint8 × int8", ("avx512_vnni",), _pack_uint8, _multiply_uint8)
TILES = CpuProduct("int8 in tiles", ("amx_int8",), _pack_tiles, _multiply_tiles)
BLOCKS = CpuProduct(
    "float32 in blocks", (), lambda weight: (weight.t().contiguous(),), _multiply_blocks
)
CPU_PRODUCTS = {way.name: way for way in (INT8, UINT8, TILES, BLOCKS)}


@cache
def cpu_product() -> CpuProduct:
    """The product that this process uses on the CPU: the fastest exact one."""
    features = set(processors.features())
    usable = [
        product
        for product in CPU_PRODUCTS.values()
        if features & set(product.features) and is_exact(product)
    ]
    if not usable:
        return BLOCKS
    rounds = [{product.name: _seconds(product) for product in usable} for _ in range(ROUNDS)]
    shortest = {
        product.name: min(seconds[product.name] for seconds in rounds) for product in usable
    }
    fastest = usable[0]
    for product in usable[1:]:
        if shortest[product.name] < MOST_TIME_SHARE * shortest[fastest.name]:
            fastest = product
    return fastest


@torch.inference_mode()
def is_exact(product: CpuProduct) -> bool:
    """Whether a product equals float64's for random operands, largest sums and sums beyond 2²⁴."""
    generator = torch.Generator().manual_seed(0)
    random = torch.randint(-128, 128, (67, 1100), generator=generator).to(torch.int8)
    least = torch.full((19, 2100), -128, dtype=torch.int8)
    cases = [(random[:35], random[35:]), (least[:3], least[3:]), (random[:1], random[1:])]
    cases.append((least, torch.arange(2100).to(torch.int8).repeat(8, 1)))
    for a, weight in cases:
        expected = (a.double() @ weight.double().t()).float()
        try:
            result = product.multiply(a, *product.pack(weight))
        except (RuntimeError, AttributeError, NotImplementedError):  # not available in this torch
            return False
        if not torch.equal(result.float(), expected):
            return False
    return True


@torch.inference_mode()
def _seconds(product: CpuProduct) -> float:
    """Seconds of the fastest of several runs of a product."""
    rows, inner, outer = TRIED
    a = torch.ones(rows, inner, dtype=torch.int8)
    packed = product.pack(torch.ones(outer, inner, dtype=torch.int8))
    product.multiply(a, *packed)
    shortest, start = float("inf"), time.perf_counter()
    while time.perf_counter() - start < ROUND_S:
        call_start = time.perf_counter()
        product.multiply(a, *packed)
        shortest = min(shortest, time.perf_counter() - call_start)
    return shortest


def pack(weight: Tensor) -> tuple[Tensor, ...]:
    """The (outer, inner) int8 weight, packed for its device."""
    if weight.device.type == "cpu":
        return cpu_product().pack(weight)
    return int8_cuda.pack_cuda(weight)


def unpack(packed: tuple[Tensor, ...]) -> Tensor:
    """(inner, outer) int8 weight; recovered by a product if the packed layout is opaque."""
    weight = packed[0]
    if weight.device.type != "cpu":
        return weight.t()
    if cpu_product() is BLOCKS:
        return weight
    if cpu_product() is not TILES:
        return weight.t()
    identity = torch.eye(weight.shape[0], dtype=torch.int8)
    return cpu_product().multiply(identity, *packed).to(torch.int8)


def multiply(a: Tensor, packed: tuple[Tensor, ...]) -> Tensor:
    """(rows, outer) a @ weightᵀ, exactly: int32, or float32 that is int32 rounded once.

    Args:
        a: (rows, inner) int8.
        packed: the weight as `pack` returned it, on the same device.

    Raises:
        NotImplementedError: the device has no such product.
    """
    match a.device.type:
        case "cpu":
            return cpu_product().multiply(a, *packed)
        case "cuda":
            return int8_cuda.multiply_cuda(a, packed[0])
    raise NotImplementedError(
        f"torch has no int8 product on {a.device.type}; set runtime.quantized to reference"
    )
