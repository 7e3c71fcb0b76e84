"""int8 × int8 on a CUDA device: how weights lie, the product, and the passes around it.

cuBLASLt wants more than 16 rows and sizes that are multiples of 8; its fast kernels read both
operands along the inner size. So a weight is held as (outer, inner), with zeros up to multiples of
16 behind both sizes, and a left operand gets such zeros, too: they change no sum.

The passes around the product (abs-max, scale, rounding before; both scales and bias after) are one
Triton kernel each where torch brings Triton (`int8_triton`), and the last is part of a Triton
product where that is the faster one. A process proves them first: they have to give the same bits
as torch's operations and the same integers as float64 (`self_checks`). Elsewhere torch's
operations are used.

Whether a tile of the Triton product or cuBLASLt is faster depends on the card, the sizes and the
type of the result. So a process tries the candidates once for every shape of weight and class of
rows, on the first operands that come. A tile that does not fit the card, or whose bits are not
those of cuBLASLt and one pass after it, is left out; all ways give the same bits, so a choice
changes time alone.

Triton looks at every argument of every launch to find the kernel that was compiled for such
arguments, which takes longer than the work of a few rows. `launch` is told what the kernel depends
on beside where its tensors lie, and launches what was compiled before.
"""

from collections.abc import Callable
from dataclasses import astuple, dataclass
from functools import cache
from importlib import import_module
from importlib.util import find_spec

import torch
from torch import Tensor
from torch.nn.functional import pad

ALIGNED = 16  # bytes; Triton compiles separate kernels for aligned and other pointers
MOST = 4096  # the most compiled kernels in the cache

_compiled: dict[tuple, object] = {}
_direct = [True]  # whether compiled kernels accept the same arguments as kernels


def launch(kernel, programs: int, key: tuple, arguments: tuple, **options) -> None:
    """Launch a kernel on one axis of programs.

    Args:
        kernel: of `triton.jit`.
        programs: number of programs.
        key: everything that a compiled kernel depends on (sizes, constants, options, device),
            without its tensors' types and alignment; other arguments are not specialized.
        arguments: in the kernel's order, its constants included.
        options: `num_warps`, `num_stages`.
    """
    tensors = [a for a in arguments if isinstance(a, Tensor)]
    aligned = all(tensor.data_ptr() % ALIGNED == 0 for tensor in tensors)
    key = kernel, *key, *(tensor.dtype for tensor in tensors)
    compiled = _compiled.get(key) if aligned and _direct[0] else None
    if compiled is not None:
        try:
            compiled[programs, 1, 1](*arguments)
            return
        except TypeError:  # raised before anything is launched
            _direct[0] = False
    new_kernel = kernel[(programs,)](*arguments, **options, enable_fp_fusion=False)
    if aligned and new_kernel is not None and len(_compiled) < MOST:  # the interpreter returns None
        _compiled[key] = new_kernel


BULK_CAPABILITY = (9, 0)  # the first with a bulk copy engine


@dataclass(frozen=True)
class Tile:
    """Tile size and launch options of a Triton product.

    Attributes:
        rows, outer, inner: of the blocks.
        group: row blocks that share their weights in the cache.
        warps, stages: of the program and of its pipeline.
        bulk: the bulk copy engine (compute capability 9.0) loads operands, and each program
            computes several tiles.
        stores: that engine stores the results too.
    """

    rows: int
    outer: int
    inner: int
    group: int
    warps: int
    stages: int
    bulk: bool = False
    stores: bool = False

    def sizes(self) -> tuple:
        """Its fields, in order."""
        return astuple(self)


# (most rows of the class, its candidates). `make gpu-check` times these and others.
CANDIDATES = (
    (
        16,
        (
            Tile(16, 64, 256, 1, 4, 4),
            Tile(16, 32, 512, 1, 4, 3),
            Tile(16, 64, 256, 1, 4, 5, bulk=True),
        ),
    ),
    (64, (Tile(64, 64, 128, 1, 4, 4),)),
    (
        512,
        (
            Tile(64, 64, 128, 8, 4, 5),
            Tile(64, 128, 128, 8, 4, 4),
            Tile(128, 256, 128, 8, 8, 3),
        ),
    ),
    (
        2**31,
        (
            Tile(128, 256, 128, 8, 8, 3),
            Tile(128, 256, 128, 8, 8, 4, bulk=True),
            Tile(128, 256, 128, 8, 8, 3, bulk=True),
            Tile(128, 256, 128, 8, 8, 3, bulk=True, stores=True),
        ),
    ),
)
FEWEST_WEIGHTS = 2**18  # with fewer weights, timing costs more than it gains
FEW_ROWS = 16  # cuBLASLt needs more rows than this
MOST_ROWS = 4096  # rows of the timed operands
CALLS, ROUNDS = 8, 3
LAUNCHED_ROWS = 64  # up to here launching takes longer than the work, so launch time is included
AHEAD = 2**22  # cycles (2 ms) for which the card waits while CALLS are launched
MOST_TIME_SHARE = 0.97  # a candidate must take less than this share of the best time so far

_chosen: dict[tuple, Tile | None] = {}


def candidate_tiles(rows: int) -> tuple[int, tuple[Tile, ...]]:
    """(most rows of the size class of `rows`, candidate tiles of that class)."""
    return next(each for each in CANDIDATES if rows <= each[0])


def plain_tile(rows: int) -> Tile:
    """A tile that fits any card with int8 units."""
    return next(tile for tile in candidate_tiles(rows)[1] if not tile.bulk)


def choose_tile(
    product: Callable[..., Tensor], around_cublas: Callable[..., Tensor], *operands
) -> Tile | None:
    """The tile of the fastest product for such operands; None if cuBLASLt is the fastest.

    Args:
        product: the Triton product; its tile is a keyword argument.
        around_cublas: the product by cuBLASLt with one pass after it.
        operands: a, weight, scale, columns, bias and dtype, as `int8_cuda` has them.
    """
    a, weight, scale, _, bias, dtype = operands
    if weight.numel() < FEWEST_WEIGHTS or not a.is_cuda:
        return plain_tile(len(a)) if len(a) <= FEW_ROWS else None
    most, tiles = candidate_tiles(len(a))
    key = a.device, most, *weight.shape, dtype, bias is None, scale.numel() == 1
    if key not in _chosen:
        if torch.cuda.is_current_stream_capturing():  # timing is not possible during capture
            return None
        _chosen[key] = _fastest_tile(product, around_cublas, _limit_rows(operands), tiles)
    return _chosen[key]


def chosen_tiles() -> list[dict]:
    """The choices of this process, for a report."""
    return [
        {"rows up to": key[1], "outer": key[2], "inner": key[3], "type": str(key[4])[6:]}
        | {"tile": "cuBLASLt and one pass" if tile is None else str(tile.sizes())}
        for key, tile in _chosen.items()
    ]


def _limit_rows(operands: tuple) -> tuple:
    a, weight, scale, *rest = operands
    scale = scale if scale.numel() == 1 else scale[:MOST_ROWS]
    return a[:MOST_ROWS], weight, scale, *rest


def _fastest_tile(product, around_cublas, operands: tuple, tiles: tuple[Tile, ...]) -> Tile | None:
    expected = around_cublas(*operands)
    wait_cycles = 0 if len(expected) <= LAUNCHED_ROWS else AHEAD
    fastest, shortest = None, _seconds(lambda: around_cublas(*operands), wait_cycles)
    for tile in tiles:
        if tile.bulk and not _has_bulk_copies(expected.device):
            continue
        by_tile = lambda tile=tile: product(*operands, tile=tile)  # noqa: E731
        try:
            is_exact = torch.equal(by_tile(), expected)
        except Exception:  # any type: the tile does not fit the card, or does not compile
            continue
        if not is_exact:
            continue
        seconds = _seconds(by_tile, wait_cycles)
        if seconds < MOST_TIME_SHARE * shortest:
            fastest, shortest = tile, seconds
    return fastest


def _seconds(call: Callable[[], Tensor], wait_cycles: int) -> float:
    """Seconds per call of several consecutive calls.

    Args:
        wait_cycles: cycles for which the card waits while the calls are launched; with 0, launch
            time is included.
    """
    durations = []
    for _ in range(ROUNDS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        if wait_cycles:
            torch.cuda._sleep(wait_cycles)
        start.record()
        for _ in range(CALLS):
            call()
        end.record()
        end.synchronize()
        durations.append(start.elapsed_time(end) / 1000 / CALLS)
    return min(durations)


@cache
def _has_bulk_copies(device: torch.device) -> bool:
    """Whether a device has a bulk copy engine."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= BULK_CAPABILITY


MULTIPLE = 16  # sizes of a packed weight are multiples of it; one instruction loads 16 int8
ROWS = 17  # the fewest rows that cuBLASLt accepts
CAPABILITY = (8, 0)  # the first whose int8 units Triton supports
CUBLAS_PRODUCT, TRITON_PRODUCT = "int8 × int8 by cuBLASLt", "int8 × int8, fused in Triton"
HALF_RANGE = 127.5
LEAST = torch.finfo(torch.float32).eps


def pack_cuda(weight: Tensor) -> tuple[Tensor, ...]:
    """(outer, inner) int8 weight as a view of a matrix padded with zeros."""
    outer, inner = weight.shape
    padded = pad(weight, (0, -inner % MULTIPLE, 0, -outer % MULTIPLE)).contiguous()
    return (padded[:outer, :inner],)


def padded_matrix(weight: Tensor) -> Tensor:
    """The padded matrix behind a packed (outer, inner) weight."""
    outer, width = len(weight), weight.stride(0)
    return weight.as_strided((outer + -outer % MULTIPLE, width), (width, 1))


def multiply_cuda(a: Tensor, weight: Tensor) -> Tensor:
    """(rows, outer) int32 a @ weightᵀ.

    Args:
        a: (rows, inner) int8.
        weight: (outer, inner) int8 as `pack` gave it.
    """
    rows, outer, padded = len(a), len(weight), padded_matrix(weight)
    if not rows or not padded.numel():
        return a.new_zeros(rows, outer, dtype=torch.int32)
    padding = padded.shape[1] - a.shape[1], max(0, ROWS - rows)
    a = pad(a, (0, padding[0], 0, padding[1])) if any(padding) else a.contiguous()
    return torch._int_mm(a, padded.t())[:rows, :outer]


def quantize_rows_cuda(x: Tensor) -> tuple[Tensor, Tensor]:
    """((rows, features) int8, (rows, 1) float32 scale) of (rows, features) x on the card."""
    with torch.cuda.device_of(x):
        return _triton().launch_quantize_rows(x)


def rescaled_product(a: Tensor, weight: Tensor, scale, columns, bias, dtype) -> Tensor:
    """(rows, outer) a @ weightᵀ · scale · columns + bias by the fastest fused product.

    Args:
        a: (rows, inner) int8.
        weight: (outer, inner) int8 as `pack` gave it.
        scale: (rows, 1) or (1,) float32.
        columns: (outer,) float32.
        bias: (outer,) float32 or None.
        dtype: of the result, rounded to once, from float32.
    """
    if not len(a):
        return torch.empty(0, len(weight), dtype=dtype, device=a.device)
    operands = a, weight, scale, columns, bias, dtype
    with torch.cuda.device_of(a):
        product = _triton().launch_product
        tile = choose_tile(product, cublas_rescaled_product, *operands)
        return product(*operands, tile=tile) if tile else cublas_rescaled_product(*operands)


def cublas_rescaled_product(a: Tensor, weight: Tensor, *rest) -> Tensor:
    """The same by cuBLASLt's product and one rescaling pass."""
    return _triton().launch_rescale(multiply_cuda(a, weight), *rest)


def uses_triton(device: torch.device) -> bool:
    """Whether the Triton kernels are available and passed this process's self-checks."""
    return device.type == "cuda" and product_kind(device.index or 0) == TRITON_PRODUCT


@cache
def product_kind(index: int = 0) -> str:
    """The product that this process uses on a card: CUBLAS_PRODUCT or TRITON_PRODUCT."""
    checks = self_checks(torch.device("cuda", index))
    return TRITON_PRODUCT if checks and all(checks.values()) else CUBLAS_PRODUCT


def triton_unavailable_reason(device: torch.device) -> str | None:
    """The reason why a device has no Triton kernels; None if they can be tried."""
    if find_spec("triton") is None:
        return "Triton is not installed"
    if device.type != "cuda":
        return None  # Triton's own interpreter, in tests
    if torch.cuda.get_device_capability(device) < CAPABILITY:
        return "compute capability below 8.0: torch's passes around cuBLASLt"
    return None


@torch.inference_mode()
def self_checks(device: torch.device) -> dict[str, bool]:
    """Results of the self-checks by name: the kernels give torch's bits and float64's integers.

    Empty if there are no kernels.
    """
    if triton_unavailable_reason(device):
        return {}
    try:
        with torch.device("cpu"):  # whatever device the caller makes tensors on
            return {name: check() for name, check in _check_functions(device).items()}
    except Exception as error:  # compilation can raise many types
        return {f"{type(error).__name__}: {str(error)[:200]}": False}


@cache
def _triton():
    return import_module("helpers.quantization.int8_triton")


def _check_functions(device: torch.device) -> dict:
    generator = torch.Generator().manual_seed(0)
    powers = 10.0 ** torch.linspace(-40, 36, 37)[:, None]  # subnormal to near the largest
    x = torch.randn(37, 208, generator=generator) * powers
    x[3], x[5, 0] = 0.0, 0.0
    ties = (torch.arange(512) - 256.0)[None] / 2  # an abs-max of 127.5 has a step of 1
    ties[0, 0] = 127.5
    ties = ties.clamp(-127.5, 127.5)
    return {
        "values and scales of rows": lambda: _same_values(x.to(device)),
        "values and scales of bfloat16": lambda: _same_values(x.to(device, torch.bfloat16)),
        "ties are rounded to even": lambda: _same_values(ties.to(device)),
        "a NaN stays one": lambda: _keeps_nan(device),
        "integers, few rows": lambda: _same_integers(generator, (3, 304, 80), device),
        "integers, some rows": lambda: _same_integers(generator, (130, 304, 80), device),
        "integers, many rows": lambda: _same_integers(generator, (1040, 208, 272), device),
        "odd sizes": lambda: _same_integers(generator, (5, 77, 13), device),
        "the largest sums": lambda: _same_integers(None, (19, 2100, 40), device),
        "both scales and a bias": lambda: _same_rescaled(generator, device),
        "launched again": lambda: _same_when_relaunched(generator, device),
    }


def _same_values(x: Tensor) -> bool:
    values, scale = quantize_rows_cuda(x)
    float32 = x.float()
    absmax = float32.abs().amax(-1, keepdim=True)
    expected = absmax / torch.full_like(absmax, HALF_RANGE)
    expected = torch.where(expected == 0, LEAST, expected)
    rounded = torch.div(float32, expected).round_().clamp_(-128, 127).to(torch.int8)
    return torch.equal(scale, expected) and torch.equal(values, rounded)


def _keeps_nan(device: torch.device) -> bool:
    x = torch.ones(2, 64, device=device)
    x[0, 7] = float("nan")
    scale = quantize_rows_cuda(x)[1]
    return bool(scale[0].isnan() & scale[1].isfinite())


def _operands(generator, shape: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
    rows, inner, outer = shape
    if generator is None:
        least = torch.full((rows, inner), -128, dtype=torch.int8)
        return least, least[:1].expand(outer, -1)
    both = torch.randint(-128, 128, (rows + outer, inner), generator=generator).to(torch.int8)
    return both[:rows], both[rows:]


def _same_integers(generator, shape: tuple[int, int, int], device: torch.device) -> bool:
    """Every fused product, with scales of 1, is float64's sum rounded once to float32."""
    a, weight = _operands(generator, shape)
    expected = (a.double() @ weight.double().t()).float()
    (packed,), ones = pack_cuda(weight.to(device)), torch.ones(len(a) + len(weight), device=device)
    scale, columns = ones[: len(a), None], ones[len(a) :]
    products = [
        product_function(a.to(device), packed, scale, columns, None, torch.float32)
        for product_function in (_triton_rescaled_product, cublas_rescaled_product)
    ]
    return all(torch.equal(product.cpu(), expected) for product in products)


def _same_when_relaunched(generator, device: torch.device) -> bool:
    """Compiled kernels give correct results for other operands of the same sizes."""
    shape = 9, 288, 64
    repeated = [_same_integers(generator, shape, device) for _ in range(3)]
    rows = [torch.randn(9, 288, generator=generator) for _ in range(3)]
    return all(repeated) and all(_same_values(x.to(device)) for x in rows)


def _triton_rescaled_product(a: Tensor, *rest) -> Tensor:
    """The product by a plain tile; other tiles are checked when they are chosen."""
    return _triton().launch_product(a, *rest, tile=plain_tile(len(a)))


def _same_rescaled(generator, device: torch.device) -> bool:
    """Scales and bias are applied in torch's order, without a fused multiply-add."""
    a, weight = _operands(generator, (33, 1024, 48))
    scale, columns = torch.rand(33, 1, generator=generator), torch.rand(48, generator=generator)
    bias, product = torch.randn(48, generator=generator), a.double() @ weight.double().t()
    scales_and_bias = [t.to(device) for t in (scale, columns, bias)]
    a, (packed,) = a.to(device), pack_cuda(weight.to(device))
    for dtype in (torch.float32, torch.bfloat16):
        expected = (
            product.float().to(device) * scales_and_bias[0] * scales_and_bias[1]
            + scales_and_bias[2]
        ).to(dtype)
        for product_function in (_triton_rescaled_product, cublas_rescaled_product):
            if not torch.equal(product_function(a, packed, *scales_and_bias, dtype), expected):
                return False
    return True
