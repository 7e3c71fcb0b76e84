"""int8 × int8 → int32, on whatever device the operands lie.

`torch._int_mm` is torch's one integer product, and each device wants something of it:

- cpu: any shape.
- cuda (cuBLASLt): more than 16 rows, inner and outer sizes that are multiples of 8, and
  contiguous operands. Rows are padded with zeros; a Linear whose sizes are no multiples
  of 8 is computed in float64, which holds every sum of int8 products exactly, slowly.
- mps: it does not exist there; `helpers.sources.devices` has int8 simulated instead.
"""

import torch
from torch import Tensor

CUDA_ROWS = 17  # the fewest that cuBLASLt takes
CUDA_MULTIPLE = 8


def int8_matmul(a: Tensor, b: Tensor) -> Tensor:
    """a @ b in int32, exactly.

    Args:
        a: (rows, inner) int8.
        b: (inner, outer) int8, on the same device.

    Returns:
        (rows, outer) int32.

    Raises:
        NotImplementedError: the device has no such product.
    """
    match a.device.type:
        case "cpu":
            return torch._int_mm(a, b)
        case "cuda":
            return cuda_matmul(a, b)
    raise NotImplementedError(
        f"torch has no int8 product on {a.device.type}; set runtime.quantized to reference"
    )


def cuda_matmul(a: Tensor, b: Tensor) -> Tensor:
    """The product within what cuBLASLt takes; float64 where it takes no padding of rows."""
    if slow_on_cuda(*b.shape):
        return (a.double() @ b.double()).to(torch.int32)
    rows, missing = len(a), CUDA_ROWS - len(a)
    if missing > 0:
        a = torch.cat([a, a.new_zeros(missing, a.shape[1])])
    return torch._int_mm(a.contiguous(), b.contiguous())[:rows]


def slow_on_cuda(inner: int, outer: int) -> str | None:
    """Why a Linear of these sizes has no integer kernel on a CUDA device; None if it has."""
    odd = [size for size in (inner, outer) if size % CUDA_MULTIPLE or not size]
    if not odd:
        return None
    return f"{odd[0]} is no multiple of {CUDA_MULTIPLE}: computed exactly in float64"
