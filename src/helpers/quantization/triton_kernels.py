"""Triton kernels around int8 products on a card: quantized rows, rescaled products.

Each does in one pass over memory what torch does in several, in torch's order of float32
operations: a division is IEEE's, nothing is contracted to a fused multiply-add, rounding is
half to even. Imported only where Triton is there (`cuda_products`).
"""

from dataclasses import dataclass
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

MAGNITUDE = tl.constexpr(0x7FFFFFFF)  # all bits of a float32 but its sign
HALF_RANGE = tl.constexpr(127.5)
LEAST = tl.constexpr(torch.finfo(torch.float32).eps)
# Added and taken off again, it rounds a float32 below 2²² to an integer, half to even.
ROUNDER = tl.constexpr(1.5 * 2**23)
ROW_VALUES = 16384  # of a row that one program holds at once


@dataclass(frozen=True)
class Tile:
    """What one program of a product computes, and how.

    Attributes:
        rows, outer, inner: of the blocks.
        group: row blocks that share their weights in the cache.
        warps, stages: of the program and of its pipeline.
        bulk: operands come by the bulk copy engine (compute capability 9.0), and a program
            makes one tile after the other.
    """

    rows: int
    outer: int
    inner: int
    group: int
    warps: int
    stages: int
    bulk: bool = False


# For up to so many rows; the last for all more.
TILES = (
    (16, Tile(16, 32, 256, 1, 4, 4)),
    (64, Tile(64, 64, 128, 1, 4, 4)),
    (512, Tile(128, 128, 128, 8, 8, 3)),
    (2**31, Tile(128, 256, 128, 8, 8, 3)),
)


def multiplies_well(rows: int, outer: int, inner: int) -> bool:
    """Whether the Triton product is taken; else cuBLASLt's and one pass after it."""
    return rows <= 16


def tile_for(rows: int) -> Tile:
    """The tile of a product of so many rows."""
    return next(tile for most, tile in TILES if rows <= most)


@triton.jit
def _quantize(x, step):
    """x / step as int8: clamped first, which leaves the same integers, and rounded to even."""
    steps = tl.minimum(tl.maximum(tl.div_rn(x, step), -128.0), 127.0)
    return ((steps + ROUNDER) - ROUNDER).to(tl.int8)


@triton.jit
def _step(bits):
    """The scale of a row, from the bits of its abs-max: magnitudes order as their bits do."""
    absmax = bits.to(tl.float32, bitcast=True)
    step = tl.div_rn(absmax, HALF_RANGE)
    return tl.where(step == 0.0, LEAST, step)


@triton.jit
def quantize_kernel(
    x_ptr, values_ptr, scales_ptr, length, x_stride, values_stride, BLOCK: tl.constexpr
):
    """One row: its abs-max, its scale, its int8 values, and zeros behind them."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    top = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, length, BLOCK):
        inside = start + at < length
        x = tl.load(x_ptr + row * x_stride + start + at, mask=inside, other=0.0).to(tl.float32)
        top = tl.maximum(top, x.to(tl.int32, bitcast=True) & MAGNITUDE)
    step = _step(tl.max(top, 0))
    tl.store(scales_ptr + row, step)
    for start in range(0, values_stride, BLOCK):
        inside = start + at < length
        x = tl.load(x_ptr + row * x_stride + start + at, mask=inside, other=0.0).to(tl.float32)
        values = tl.where(inside, _quantize(x, step), 0)
        place = values_ptr + row * values_stride + start + at
        tl.store(place, values, mask=start + at < values_stride)


@triton.jit
def rescale_kernel(
    product_ptr,
    scale_ptr,
    columns_ptr,
    bias_ptr,
    y_ptr,
    outer,
    product_stride,
    scale_stride: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A part of one row: product · its scale · the columns' scales + bias."""
    row = tl.program_id(1).to(tl.int64)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < outer
    product = tl.load(product_ptr + row * product_stride + at, mask=inside, other=0)
    y = product.to(tl.float32) * tl.load(scale_ptr + row * scale_stride)
    y = y * tl.load(columns_ptr + at, mask=inside, other=0.0)
    if HAS_BIAS:
        y = y + tl.load(bias_ptr + at, mask=inside, other=0.0)
    tl.store(y_ptr + row * outer + at, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _place(tile, rows, outer, ROWS: tl.constexpr, OUTER: tl.constexpr, GROUP: tl.constexpr):
    """Row block and column block of a tile, in an order in which neighbours share operands."""
    down, across = tl.cdiv(rows, ROWS), tl.cdiv(outer, OUTER)
    first = tile // (GROUP * across) * GROUP
    height = tl.minimum(down - first, GROUP)
    return first + tile % (GROUP * across) % height, tile % (GROUP * across) // height


@triton.jit
def _finish(
    total,
    i,
    j,
    scale_ptr,
    columns_ptr,
    bias_ptr,
    y_ptr,
    rows,
    outer,
    scale_stride: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    """Both scales and the bias, rounded once to the type of the result."""
    in_rows, in_outer = i < rows, j < outer
    scale = tl.load(scale_ptr + i * scale_stride, mask=in_rows, other=0.0)
    columns = tl.load(columns_ptr + j, mask=in_outer, other=0.0)
    y = total.to(tl.float32) * scale[:, None] * columns[None, :]
    if HAS_BIAS:
        y = y + tl.load(bias_ptr + j, mask=in_outer, other=0.0)[None, :]
    place = y_ptr + i.to(tl.int64)[:, None] * outer + j[None, :]
    tl.store(place, y.to(y_ptr.dtype.element_ty), mask=in_rows[:, None] & in_outer[None, :])


@triton.jit(do_not_specialize=["rows"])
def product_kernel(
    a_ptr,
    weight_ptr,
    scale_ptr,
    columns_ptr,
    bias_ptr,
    y_ptr,
    rows,
    outer,
    inner,
    a_stride,
    weight_stride,
    scale_stride: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ROWS: tl.constexpr,
    OUTER: tl.constexpr,
    INNER: tl.constexpr,
    GROUP: tl.constexpr,
):
    """One tile of a @ weightᵀ in int32, times both scales, plus bias.

    Both operands lie along the inner size, whose padded length is a multiple of 16.
    """
    block, part = _place(tl.program_id(0), rows, outer, ROWS, OUTER, GROUP)
    i = block * ROWS + tl.arange(0, ROWS)
    j = part * OUTER + tl.arange(0, OUTER)
    k = tl.arange(0, INNER)
    a_at = a_ptr + (i % rows).to(tl.int64)[:, None] * a_stride + k[None, :]
    weight_at = weight_ptr + (j % outer).to(tl.int64)[None, :] * weight_stride + k[:, None]
    total = tl.zeros((ROWS, OUTER), tl.int32)
    for start in range(0, inner, INNER):
        inside = k < inner - start
        a = tl.load(a_at + start, mask=inside[None, :], other=0)
        weight = tl.load(weight_at + start, mask=inside[:, None], other=0)
        total = tl.dot(a, weight, total, out_dtype=tl.int32)
    _finish(
        total, i, j, scale_ptr, columns_ptr, bias_ptr, y_ptr, rows, outer, scale_stride, HAS_BIAS
    )


@triton.jit(do_not_specialize=["rows"])
def bulk_product_kernel(
    a_blocks,
    weight_blocks,
    scale_ptr,
    columns_ptr,
    bias_ptr,
    y_ptr,
    rows,
    outer,
    inner,
    scale_stride: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ROWS: tl.constexpr,
    OUTER: tl.constexpr,
    INNER: tl.constexpr,
    GROUP: tl.constexpr,
    PROGRAMS: tl.constexpr,
):
    """The same, its operands as blocks by the bulk copy engine, tile after tile."""
    tiles = tl.cdiv(rows, ROWS) * tl.cdiv(outer, OUTER)
    for tile in tl.range(tl.program_id(0), tiles, PROGRAMS, flatten=True):
        block, part = _place(tile, rows, outer, ROWS, OUTER, GROUP)
        total = tl.zeros((ROWS, OUTER), tl.int32)
        for start in range(0, inner, INNER):
            a = a_blocks.load([block * ROWS, start])
            weight = weight_blocks.load([part * OUTER, start])
            total = tl.dot(a, weight.T, total, out_dtype=tl.int32)
        i = block * ROWS + tl.arange(0, ROWS)
        j = part * OUTER + tl.arange(0, OUTER)
        _finish(
            total,
            i,
            j,
            scale_ptr,
            columns_ptr,
            bias_ptr,
            y_ptr,
            rows,
            outer,
            scale_stride,
            HAS_BIAS,
        )


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """((rows, features) int8, (rows, 1) float32) of (rows, features) x in any float type.

    The int8 rows lie in a matrix padded with zeros, as a weight does.
    """
    x = x if x.stride(-1) == 1 else x.contiguous()
    rows, length = x.shape
    width = -(-length // 16) * 16
    values = torch.empty(rows, width, dtype=torch.int8, device=x.device)
    scales = torch.empty(rows, 1, device=x.device)
    block = min(ROW_VALUES, triton.next_power_of_2(max(16, width)))
    warps = 4 if block <= 4096 else 8
    quantize_kernel[(rows,)](
        x,
        values,
        scales,
        length,
        x.stride(0),
        width,
        block,
        num_warps=warps,
        enable_fp_fusion=False,
    )
    return values[:, :length], scales


def rescale(product: Tensor, scale, columns: Tensor, bias: Tensor | None, dtype) -> Tensor:
    """(rows, outer) product · scale · columns + bias, rounded once to `dtype`.

    Args:
        product: (rows, outer) int32, its rows as far apart as they like.
        scale: (rows, 1) or (1,) float32.
        columns: (outer,) float32; bias: (outer,) float32 or None.
    """
    rows, outer = product.shape
    y = torch.empty(rows, outer, dtype=dtype, device=product.device)
    block = min(4096, triton.next_power_of_2(outer))
    rescale_kernel[(triton.cdiv(outer, block), rows)](
        product,
        scale,
        columns,
        columns if bias is None else bias,
        y,
        outer,
        product.stride(0),
        0 if scale.numel() == 1 else 1,
        bias is not None,
        block,
        num_warps=8,
        enable_fp_fusion=False,
    )
    return y


def product(
    a: Tensor, weight: Tensor, scale, columns, bias, dtype, *, tile: Tile | None = None
) -> Tensor:
    """(rows, outer) a @ weightᵀ · scale · columns + bias; operands as `cuda_products` has them."""
    rows, (outer, inner) = len(a), weight.shape
    tile = tile or tile_for(rows)
    inner += -inner % 16  # behind the weight are zeros
    if a.stride(1) != 1 or a.stride(0) % 16 or a.stride(0) < inner:
        a = torch.nn.functional.pad(a, (0, inner - a.shape[1])).contiguous()
    y = torch.empty(rows, outer, dtype=dtype, device=a.device)
    tiles = triton.cdiv(rows, tile.rows) * triton.cdiv(outer, tile.outer)
    rest = scale, columns, columns if bias is None else bias, y, rows, outer, inner
    flags = 0 if scale.numel() == 1 else 1, bias is not None
    sizes = tile.rows, tile.outer, tile.inner, tile.group
    how = {"num_warps": tile.warps, "num_stages": tile.stages, "enable_fp_fusion": False}
    if tile.bulk:
        blocks = _blocks(a, (rows, inner), tile.rows, tile.inner)
        weights = _blocks(weight, (outer, inner), tile.outer, tile.inner)
        most = _multiprocessors(a.device)
        bulk_product_kernel[(min(tiles, most),)](
            blocks, weights, *rest, *flags, *sizes, most, **how
        )
    else:
        strides = a.stride(0), weight.stride(0)
        product_kernel[(tiles,)](a, weight, *rest, *strides, *flags, *sizes, **how)
    return y


def _blocks(x: Tensor, shape: tuple[int, int], rows: int, inner: int) -> TensorDescriptor:
    """An int8 operand as blocks for the bulk copy engine; what is beyond its shape is 0."""
    return TensorDescriptor(x, list(shape), [x.stride(0), 1], [rows, inner])


@cache
def _multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return 4  # in Triton's interpreter
    return torch.cuda.get_device_properties(device).multi_processor_count
