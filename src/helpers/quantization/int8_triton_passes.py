"""Launches of the Triton kernels: quantized rows, rescaled products, products by tile.

Imported only where Triton is there (`int8_cuda`).
"""

from functools import cache

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from helpers.quantization.int8_cuda_choice import Tile
from helpers.quantization.int8_triton_kernels import (
    bulk_product_kernel,
    product_kernel,
    quantize_kernel,
    rescale_kernel,
)
from helpers.quantization.int8_triton_launcher import launch

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
