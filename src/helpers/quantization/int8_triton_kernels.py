"""Triton kernels around int8 products on a card: quantized rows, rescaled products.

Each does in one pass over memory what torch does in several, in torch's order of float32
operations: a division is IEEE's, nothing is contracted to a fused multiply-add, rounding is
half to even. `int8_triton_passes` launches them. Imported only where Triton is there.
"""

import torch
import triton
import triton.language as tl

MAGNITUDE = tl.constexpr(0x7FFFFFFF)  # all bits of a float32 but its sign
HALF_RANGE = tl.constexpr(127.5)
LEAST = tl.constexpr(torch.finfo(torch.float32).eps)
# Added and taken off again, it rounds a float32 below 2²² to an integer, half to even.
ROUNDER = tl.constexpr(1.5 * 2**23)


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
def _rescaled(
    total,
    i,
    j,
    scale_ptr,
    columns_ptr,
    bias_ptr,
    rows,
    outer,
    scale_stride: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    """Both scales and the bias, in float32."""
    in_outer = j < outer
    scale = tl.load(scale_ptr + i * scale_stride, mask=i < rows, other=0.0)
    columns = tl.load(columns_ptr + j, mask=in_outer, other=0.0)
    y = total.to(tl.float32) * scale[:, None] * columns[None, :]
    if HAS_BIAS:
        y = y + tl.load(bias_ptr + j, mask=in_outer, other=0.0)[None, :]
    return y


@triton.jit
def _store(y, i, j, y_ptr, rows, outer):
    """A tile of the result, rounded once to its type."""
    place = y_ptr + i.to(tl.int64)[:, None] * outer + j[None, :]
    inside = (i < rows)[:, None] & (j < outer)[None, :]
    tl.store(place, y.to(y_ptr.dtype.element_ty), mask=inside)


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
    y = _rescaled(
        total, i, j, scale_ptr, columns_ptr, bias_ptr, rows, outer, scale_stride, HAS_BIAS
    )
    _store(y, i, j, y_ptr, rows, outer)


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
    STORES: tl.constexpr,
):
    """The same for several tiles per program, with operands loaded by the bulk copy engine.

    With `STORES`, `y_ptr` is a block descriptor too: a tile is stored while the next is computed.
    """
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
        y = _rescaled(
            total, i, j, scale_ptr, columns_ptr, bias_ptr, rows, outer, scale_stride, HAS_BIAS
        )
        if STORES:
            y_ptr.store([block * ROWS, part * OUTER], y.to(y_ptr.dtype))
        else:
            _store(y, i, j, y_ptr, rows, outer)
