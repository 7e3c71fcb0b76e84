"""What the machine multiplies per second at best: the line that no model can cross.

Square products that suit the machine, and the very products of the model's Linears, in
every arithmetic that a variant can use. The best of all shapes and libraries counts, since a
limit is asked for and not an average.
"""

import time
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from helpers.quantization import int8_matmul
from helpers.runtime.linears import product
from helpers.runtime.processors import has_bfloat16_units

SQUARE = 2048
SECONDS_A_SHAPE = 0.06
FEWEST = 2
ARITHMETICS = ("float32", "bfloat16", "int8")


def gemm_peaks(
    shapes: Sequence[tuple[int, int]], *, rows: int, threads: int, device: str
) -> dict[str, float | None]:
    """Operations per second of the best matrix product, by arithmetic; None where it has none.

    Args:
        shapes: (in_features, out_features) of the model's Linears.
        rows: of the left operand, as many as evaluation reads tokens at once.
        threads: how many cores to use.
        device: where to multiply.
    """
    torch.set_num_threads(threads)
    sizes = [(SQUARE, SQUARE, SQUARE), *((rows, *shape) for shape in dict.fromkeys(shapes))]
    return {kind: _best(sizes, kind, device) for kind in ARITHMETICS}


def _best(sizes: list[tuple[int, int, int]], kind: str, device: str) -> float | None:
    try:
        return max(_operations_a_second(*size, kind, device) for size in sizes)
    except NotImplementedError:  # `int8_matmul.multiply` on a device without the product
        return None


def _operations_a_second(rows: int, inner: int, outer: int, kind: str, device: str) -> float:
    dtype = getattr(torch, kind)
    left, right = (
        torch.randint(-100, 100, shape, device=device).to(dtype)
        for shape in ((rows, inner), (inner, outer))
    )
    if kind == "int8":
        packed = int8_matmul.pack(right.t().contiguous())
        seconds = _shortest(partial(int8_matmul.multiply, left, packed), device)
    else:
        right = right.t().contiguous().t()  # the memory layout of nn.Linear's weight
        seconds = min(_shortest(partial(f, left, right), device) for f in _products(kind))
    return 2 * rows * inner * outer / seconds


def _products(kind: str) -> list[Callable[[Tensor, Tensor], Tensor]]:
    """The functions that multiply two matrices in torch here."""
    if kind == "bfloat16" and not has_bfloat16_units():
        return [_linear_product]  # torch's bfloat16 emulation takes seconds per product
    return [torch.matmul, _linear_product]


@torch.inference_mode()
def _linear_product(left: Tensor, right: Tensor) -> Tensor:
    return product(left, right.t())


def _shortest(multiply: Callable, device: str) -> float:
    """Seconds of the fastest of several runs, after one warm-up run."""
    multiply()
    shortest, start, runs = float("inf"), time.perf_counter(), 0
    while runs < FEWEST or time.perf_counter() - start < SECONDS_A_SHAPE:
        _settle(device)
        call_start = time.perf_counter()
        multiply()
        _settle(device)
        shortest, runs = min(shortest, time.perf_counter() - call_start), runs + 1
    return shortest


def _settle(device: str) -> None:
    if device != "cpu":
        getattr(torch, device).synchronize()
