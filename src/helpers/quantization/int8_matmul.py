"""int8 × int8, exactly, on whatever device the operands lie, and the passes around it on a CPU.

On a CPU there are several ways, and which is fastest depends on the processor:

- `int8 × int8`: torch's own product (oneDNN), where the processor has AVX-512 VNNI. Elsewhere
  torch falls back to a plain loop, and oneDNN below it saturates.
- `uint8 × int8`: the same with the left operand moved up by 128, which oneDNN multiplies without a
  detour; 128 × the column sums of the weights are taken off again.
- `int8 in tiles`: the weights are put into the order that AMX reads once, and not at every call.
- `float32 in blocks`: both operands are converted, and multiplied in blocks of at most 1,024 inner
  elements. A product is at most 2¹⁴, so every partial sum is a whole number of at most 2²⁴, which
  float32 holds exactly. It needs nothing of the processor.

All of them give the same whole numbers, so no answer depends on the choice. A process makes it
once: of the ways that the processor's instructions promise to be fast, those that it has just seen
to be exact, on operands that include the largest sums, are timed, and the fastest is taken.
`int8_cuda` has the ways of CUDA devices. MPS has no integer product (`helpers.runtime.devices` has
int8 simulated there).

Around a product torch does abs-max, division, rounding, clamping and conversion one after the
other, each over all of memory. Here each is one compiled loop (`int8_passes_numba`) over rows that
fit the cache, on the very threads that torch's own operations use: other threads would wait for a
core on which torch's still spin. The results are equal to torch's to the bit. Each process sees
that for itself before it uses them, on numbers that include the extremes; where it does not hold,
where numba is missing, and off the CPU, torch's passes are used (`helpers.quantization.variants`).
"""

import ctypes
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import silu

from helpers.quantization import int8_cuda
from helpers.runtime import devices

STEP_VALUES = 2**14  # values per step of one thread
SERIAL_VALUES = 2**17  # up to here one thread is faster than several
HALF_RANGE = 127.5
SMALLEST_SCALE = torch.finfo(torch.float32).eps


def quantize_rows_cpu(x: Tensor) -> tuple[Tensor, Tensor]:
    """Int8 values of each row and its scale: abs-max / 127.5, round half to even, clamp.

    Args:
        x: (rows, features) float32 on the CPU.

    Returns:
        ((rows, features) int8, (rows, 1) float32).
    """
    x = x.contiguous()
    values = torch.empty(x.shape, dtype=torch.int8)
    scales = torch.empty(len(x), 1)
    _run("quantize_rows", x, (x, values, scales))
    return values, scales


def quantize_with_scales(x: Tensor, scale: Tensor) -> Tensor:
    """(rows, features) int8 of (rows, features) float32 x by (rows, 1) or (1,) scales."""
    x = x.contiguous()
    values = torch.empty(x.shape, dtype=torch.int8)
    _run("quantize_with_scales", x, (x, _row_scales(scale, x), values))
    return values


def rescale_cpu_(product: Tensor, scale: Tensor, columns: Tensor) -> Tensor:
    """product · scale of the row · scale of the column, as float32 in the product's own memory.

    Args:
        product: (rows, outer) whole numbers, int32 or float32, contiguous; overwritten.
        scale: (rows, 1) or (1,) float32.
        columns: (outer,) float32, contiguous.
    """
    name = "rescale_floats" if product.dtype == torch.float32 else "rescale_integers"
    _run(name, product, (product, _row_scales(scale, product), columns))
    return product.view(torch.float32)


def gated_silu(gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """SiLU(gate) · up, with the int8 values and the scale of each of its rows.

    Args:
        gate, up: (rows, features) float32 on the CPU, with any row stride.

    Returns:
        ((rows, features) float32, (rows, features) int8, (rows, 1) float32).
    """
    gate, up = (x if x.stride(1) == 1 else x.contiguous() for x in (gate, up))
    mixed, scales = torch.empty(gate.shape), torch.empty(len(gate), 1)
    values = torch.empty(gate.shape, dtype=torch.int8)
    strides = (gate.stride(0), up.stride(0))
    _run("gated_silu", mixed, (gate, up, mixed, values, scales), *strides)
    return mixed, values, scales


def _row_scales(scale: Tensor, x: Tensor) -> Tensor:
    if scale.numel() == len(x):
        return scale
    return scale.reshape(-1).expand(len(x)).contiguous()


def _run(name: str, over: Tensor, operands: tuple[Tensor, ...], *more: int) -> None:
    """Run a pass over the rows of a matrix, on as many threads as torch uses."""
    passes, team = _loaded()
    rows, length = over.shape
    step = max(1, STEP_VALUES // max(1, length))
    addresses = [tensor.data_ptr() for tensor in operands]
    job = passes.job(0, rows, length, step, *addresses, *more)
    threads = torch.get_num_threads() if over.numel() > SERIAL_VALUES else 1
    if threads == 1 or team is None:
        passes.call[name](ctypes.addressof(job))
    else:
        team(passes.address[name], ctypes.addressof(job), threads, 0)


class _Passes:
    """The compiled functions and their addresses, by name."""

    def __init__(self):
        from helpers.quantization import int8_passes_numba

        signature = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
        self.job = ctypes.c_int64 * int8_passes_numba.JOB
        self.address = int8_passes_numba.PASSES
        self.call = {name: signature(at) for name, at in self.address.items()}


@cache
def _loaded() -> tuple[_Passes, Callable | None]:
    return _Passes(), _torch_thread_team()


def _torch_thread_team() -> Callable | None:
    """GOMP_parallel of torch's OpenMP library; None if torch uses another library."""
    maps = Path("/proc/self/maps")
    lines = maps.read_text("utf-8").splitlines() if maps.is_file() else []
    own = str(Path(torch.__file__).parent.parent)
    for path in dict.fromkeys(line.split(maxsplit=5)[-1] for line in lines if "gomp" in line):
        if path.startswith(own):
            team = ctypes.CDLL(path).GOMP_parallel
            team.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
            team.restype = None
            return team
    return None


@cache
def are_available() -> bool:
    """Whether numba is installed and every pass gives torch's bits on this processor."""
    try:
        return _equal_torch()
    except ImportError:
        return False


@torch.inference_mode()
def _equal_torch() -> bool:
    generator = torch.Generator().manual_seed(0)
    sizes = 10.0 ** torch.linspace(-40, 36, 37)[:, None]  # subnormal to near the largest
    x = torch.randn(37, 83, generator=generator) * sizes
    x[3], x[5, 0] = 0.0, 0.0
    gate, up = (torch.randn(64, 96, generator=generator) for _ in range(2))
    gate *= torch.linspace(0, 60, 64)[:, None]
    product = torch.randint(-(2**30), 2**30, (37, 83), generator=generator, dtype=torch.int32)
    columns = torch.rand(83, generator=generator)
    scale = _torch_scale(x)
    mixed = silu(gate) * up
    rescaled = product.float() * scale * columns
    pairs = [
        (quantize_rows_cpu(x), (_torch_values(x, scale), scale)),
        ((quantize_with_scales(x, scale),), (_torch_values(x, scale),)),
        (gated_silu(gate, up), (mixed, _torch_values(mixed, _torch_scale(mixed)))),
        ((rescale_cpu_(product.float(), scale, columns),), (rescaled,)),
        ((rescale_cpu_(product, scale, columns),), (rescaled,)),
    ]
    return all(
        torch.equal(ours, theirs)
        for results, expected in pairs
        for ours, theirs in zip(results, expected, strict=False)
    )


def _torch_scale(x: Tensor) -> Tensor:
    scale = x.abs().amax(-1, keepdim=True) / HALF_RANGE
    return torch.where(scale == 0, SMALLEST_SCALE, scale)


def _torch_values(x: Tensor, scale: Tensor) -> Tensor:
    return torch.div(x, scale).round_().clamp_(-128, 127).to(torch.int8)


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
    features = set(devices.features())
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
