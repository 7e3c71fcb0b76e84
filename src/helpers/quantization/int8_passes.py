"""The elementwise passes around an integer product, each in one pass over memory.

torch does abs-max, division, rounding, clamping and conversion one after the other, each over
all of memory. Here each is one compiled loop (`int8_passes_numba`) over rows that fit the cache,
on the very threads that torch's own operations use: other threads would wait for a core on
which torch's still spin.

The results are equal to torch's to the bit. Each process sees that for itself before it uses
them, on numbers that include the extremes; where it does not hold, where numba is missing, and
off the CPU, torch's passes are used (`helpers.quantization.int8_checkpoint`).
"""

import ctypes
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import silu

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
