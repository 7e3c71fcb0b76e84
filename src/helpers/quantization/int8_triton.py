"""Triton kernels around int8 products on a card, and their launches.

Each kernel does in one pass over memory what torch does in several, in torch's order of float32
operations: a division is IEEE's, nothing is contracted to a fused multiply-add, rounding is half
to even. Imported only where Triton is there (`int8_cuda`).
"""

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from helpers.quantization.int8_cuda import Tile, launch

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


ROW_VALUES = 16384  # the most values of a row in one program
# Many rows wider than ONE_PIECE are read twice in parts, the second time from the cache. In one
# piece they need so many registers that too few programs run at once.
ONE_PIECE, PART, MANY_ROWS = 4096, 2048, 512
VALUES_A_WARP, MOST_WARPS = 512, 32


def launch_quantize_rows(
    x: Tensor, *, block: int | None = None, warps: int | None = None
) -> tuple[Tensor, Tensor]:
    """((rows, features) int8, (rows, 1) float32) of (rows, features) x in any float type.

    The int8 rows lie in a matrix padded with zeros, as a weight does.

    Args:
        block: values that a program holds at once, a power of 2; it changes time alone.
        warps: of a program.
    """
    x = x if x.stride(-1) == 1 else x.contiguous()
    rows, length = x.shape
    width = -(-length // 16) * 16
    values = torch.empty(rows, width, dtype=torch.int8, device=x.device)
    scales = torch.empty(rows, 1, device=x.device)
    if block is None:
        block, warps = _block_and_warps(rows, width)
    arguments = x, values, scales, length, x.stride(0), width, block
    key = x.dtype, x.device, *arguments[3:], warps
    launch(quantize_kernel, rows, key, arguments, num_warps=warps)
    return values[:, :length], scales


@cache
def _block_and_warps(rows: int, width: int) -> tuple[int, int]:
    """(values of a row that a program holds at once, warps of a program)."""
    block = min(ROW_VALUES, triton.next_power_of_2(max(16, width)))
    if block <= ONE_PIECE:
        return block, 4
    return (PART, 8) if rows > MANY_ROWS else (block, min(MOST_WARPS, block // VALUES_A_WARP))


def launch_rescale(product: Tensor, scale, columns: Tensor, bias: Tensor | None, dtype) -> Tensor:
    """(rows, outer) product · scale · columns + bias, rounded once to `dtype`.

    Args:
        product: (rows, outer) int32, with any row stride.
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


def launch_product(a: Tensor, weight: Tensor, scale, columns, bias, dtype, *, tile: Tile) -> Tensor:
    """(rows, outer) a @ weightᵀ · scale · columns + bias; operands as `int8_cuda` has them.

    Raises:
        triton.runtime.errors.OutOfResources: the tile does not fit the card.
    """
    rows, (outer, inner) = len(a), weight.shape
    inner += -inner % 16  # the weight is padded with zeros
    if a.stride(1) != 1 or a.stride(0) % 16 or a.stride(0) < inner:
        a = torch.nn.functional.pad(a, (0, inner - a.shape[1])).contiguous()
    y = torch.empty(rows, outer, dtype=dtype, device=a.device)
    tiles = triton.cdiv(rows, tile.rows) * triton.cdiv(outer, tile.outer)
    rest = scale, columns, columns if bias is None else bias, y, rows, outer, inner
    flags = 0 if scale.numel() == 1 else 1, bias is not None
    sizes = tile.rows, tile.outer, tile.inner, tile.group
    options = {"num_warps": tile.warps, "num_stages": tile.stages}
    if tile.bulk:
        blocks = _blocks(a, (rows, inner), tile.rows, tile.inner)
        weights = _blocks(weight, (outer, inner), tile.outer, tile.inner)
        output, programs = y, _multiprocessors(a.device)
        if stores := tile.stores and outer * y.element_size() % 16 == 0:
            output = TensorDescriptor(y, [rows, outer], [outer, 1], [tile.rows, tile.outer])
        rest = *rest[:3], output, *rest[4:]
        bulk_product_kernel[(min(tiles, programs),)](
            blocks,
            weights,
            *rest,
            *flags,
            *sizes,
            programs,
            stores,
            **options,
            enable_fp_fusion=False,
        )
    else:
        strides = a.stride(0), weight.stride(0)
        key = tile, dtype, a.device, outer, inner, *strides, *flags
        launch(product_kernel, tiles, key, (a, weight, *rest, *strides, *flags, *sizes), **options)
    return y


def _blocks(x: Tensor, shape: tuple[int, int], rows: int, inner: int) -> TensorDescriptor:
    """An int8 operand as blocks for the bulk copy engine; values beyond its shape are 0."""
    return TensorDescriptor(x, list(shape), [x.stride(0), 1], [rows, inner])


@cache
def _multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return 4  # in Triton's interpreter
    return torch.cuda.get_device_properties(device).multi_processor_count
