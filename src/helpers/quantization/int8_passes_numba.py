"""The loops of `int8_matmul`, compiled by numba into functions that C can call.

Each function takes one pointer to a job: an array of int64 that holds a ticket counter, the
number of rows, their length, how many rows a ticket stands for, and the addresses of the
operands. Every thread that is given the job draws tickets until the rows are used up. Float32
operations stand in the order in which torch does them, and none is contracted, so that both
give the same bits.
"""

import numpy as np
from llvmlite import ir
from numba import carray, cfunc, njit, types
from numba.extending import intrinsic

JOB = 11  # int64 numbers: ticket, rows, length, step, addresses, strides
float32, int8, int32, int64 = np.float32, np.int8, np.int32, np.int64

MAGNITUDE = int32(0x7FFFFFFF)  # all bits of a float32 but its sign
HALF_RANGE = float32(127.5)
SMALLEST_SCALE = np.finfo(np.float32).eps


@intrinsic
def bits_of(_typing, x):
    """The bits of a float32 as int32."""
    cast = lambda _c, b, _s, args: b.bitcast(args[0], ir.IntType(32))  # noqa: E731
    return types.int32(types.float32), cast


@intrinsic
def float_of(_typing, x):
    """The float32 of such bits."""
    cast = lambda _c, b, _s, args: b.bitcast(args[0], ir.FloatType())  # noqa: E731
    return types.float32(types.int32), cast


@intrinsic
def round_half_even(_typing, x):
    """x rounded to an integer, half to even."""

    def call(_context, builder, _signature, args):
        rint = builder.module.declare_intrinsic("llvm.rint", [ir.FloatType()])
        return builder.call(rint, args)

    return types.float32(types.float32), call


@intrinsic
def fma(_typing, x, y, z):
    """x · y + z, rounded once."""
    signature = types.float32(types.float32, types.float32, types.float32)
    return signature, lambda _context, builder, _signature, args: builder.fma(*args)


@intrinsic
def pointer_to(_typing, number):
    """The pointer to an address."""
    cast = lambda _c, b, _s, args: b.inttoptr(args[0], ir.IntType(8).as_pointer())  # noqa: E731
    return types.voidptr(types.int64), cast


@intrinsic
def draw_ticket(_typing, job, step):
    """The ticket counter of a job before `step` is added to it; no two threads see the same."""

    def add(_context, builder, _signature, args):
        counter = builder.bitcast(args[0], ir.IntType(64).as_pointer())
        return builder.atomic_rmw("add", counter, args[1], "monotonic")

    return types.int64(types.voidptr, types.int64), add


inlined = njit(error_model="numpy", inline="always")
compiled = cfunc(types.void(types.voidptr), error_model="numpy", cache=True)


@inlined
def _absmax(row):
    """The largest |x| of a row: magnitudes order like their bits, a NaN above all numbers."""
    top = int32(0)
    for j in range(row.shape[0]):
        top = max(top, bits_of(row[j]) & MAGNITUDE)
    return float_of(top)


@inlined
def _scale(absmax):
    scale = absmax / HALF_RANGE
    return SMALLEST_SCALE if scale == float32(0) else scale


@inlined
def _quantize(row, scale, values):
    for j in range(row.shape[0]):
        steps = round_half_even(row[j] / scale)
        values[j] = int8(int32(min(max(steps, float32(-128)), float32(127))))


@compiled
def quantize_rows_loop(data):
    """x → int8 values, one scale a row."""
    job = carray(data, (JOB,), int64)
    rows, length, step = job[1], job[2], job[3]
    x = carray(pointer_to(job[4]), (rows, length), float32)
    values = carray(pointer_to(job[5]), (rows, length), int8)
    scales = carray(pointer_to(job[6]), (rows,), float32)
    begin = draw_ticket(data, step)
    while begin < rows:
        for i in range(begin, min(rows, begin + step)):
            scales[i] = _scale(_absmax(x[i]))
            _quantize(x[i], scales[i], values[i])
        begin = draw_ticket(data, step)


@compiled
def quantize_with_scales_loop(data):
    """x, one scale a row → int8 values."""
    job = carray(data, (JOB,), int64)
    rows, length, step = job[1], job[2], job[3]
    x = carray(pointer_to(job[4]), (rows, length), float32)
    scales = carray(pointer_to(job[5]), (rows,), float32)
    values = carray(pointer_to(job[6]), (rows, length), int8)
    begin = draw_ticket(data, step)
    while begin < rows:
        for i in range(begin, min(rows, begin + step)):
            _quantize(x[i], scales[i], values[i])
        begin = draw_ticket(data, step)


@compiled
def rescale_integers_loop(data):
    """int32 product, scale of each row, scale of each column → float32, in the product's place."""
    job = carray(data, (JOB,), int64)
    rows, length, step = job[1], job[2], job[3]
    product = carray(pointer_to(job[4]), (rows, length), int32)
    scales = carray(pointer_to(job[5]), (rows,), float32)
    columns = carray(pointer_to(job[6]), (length,), float32)
    begin = draw_ticket(data, step)
    while begin < rows:
        for i in range(begin, min(rows, begin + step)):
            scale = scales[i]
            for j in range(length):
                product[i, j] = bits_of(float32(product[i, j]) * scale * columns[j])
        begin = draw_ticket(data, step)


@compiled
def rescale_floats_loop(data):
    """float32 product, scale of each row, scale of each column → float32, in its place."""
    job = carray(data, (JOB,), int64)
    rows, length, step = job[1], job[2], job[3]
    product = carray(pointer_to(job[4]), (rows, length), float32)
    scales = carray(pointer_to(job[5]), (rows,), float32)
    columns = carray(pointer_to(job[6]), (length,), float32)
    begin = draw_ticket(data, step)
    while begin < rows:
        for i in range(begin, min(rows, begin + step)):
            scale = scales[i]
            for j in range(length):
                product[i, j] = product[i, j] * scale * columns[j]
        begin = draw_ticket(data, step)


# exp of a float32 as SLEEF computes it (expf, 1.0 ULP), which torch uses for whole vectors:
# x = q · ln 2 + s, a polynomial of s, times 2^q in two steps.
LOG2_E = float32(1.4426950408889634)
LN2_HIGH, LN2_LOW = float32(0.693145751953125), float32(1.428606765330187045e-06)
C5, C4, C3 = (
    float32(0.000198527617612853646),
    float32(0.00139304355252534151),
    float32(0.00833336077630519867),
)
C2, C1, C0 = float32(0.0416664853692054749), float32(0.16666667163372039795), float32(0.5)
LARGEST, SMALLEST = float32(100.0), float32(-104.0)  # beyond: infinity, and 0


@inlined
def _power_of_two(exponent):
    return float_of((exponent + int32(127)) << int32(23))


@inlined
def _exp(x):
    q = round_half_even(x * LOG2_E)
    s = fma(q, -LN2_LOW, fma(q, -LN2_HIGH, x))
    u = fma(fma(fma(fma(fma(C5, s, C4), s, C3), s, C2), s, C1), s, C0)
    u = float32(1) + fma(s * s, u, s)
    exponent = int32(min(max(q, float32(-300)), float32(300)))
    half = exponent >> int32(1)
    u = u * _power_of_two(half) * _power_of_two(exponent - half)
    u = float32(0) if x < SMALLEST else u
    return float32(np.inf) if x > LARGEST else u


@compiled
def gated_silu_loop(data):
    """gate, up → SiLU(gate) · up as float32, as int8 values, and one scale a row."""
    job = carray(data, (JOB,), int64)
    rows, length, step = job[1], job[2], job[3]
    gate = carray(
        pointer_to(job[4]), (rows, job[9]), float32
    )  # the first `length` values of each row are used
    up = carray(pointer_to(job[5]), (rows, job[10]), float32)
    mixed = carray(pointer_to(job[6]), (rows, length), float32)
    values = carray(pointer_to(job[7]), (rows, length), int8)
    scales = carray(pointer_to(job[8]), (rows,), float32)
    begin = draw_ticket(data, step)
    while begin < rows:
        for i in range(begin, min(rows, begin + step)):
            for j in range(length):
                g = gate[i, j]
                mixed[i, j] = g / (float32(1) + _exp(-g)) * up[i, j]
            scales[i] = _scale(_absmax(mixed[i]))
            _quantize(mixed[i], scales[i], values[i])
        begin = draw_ticket(data, step)


PASSES = {
    "quantize_rows": quantize_rows_loop.address,
    "quantize_with_scales": quantize_with_scales_loop.address,
    "rescale_integers": rescale_integers_loop.address,
    "rescale_floats": rescale_floats_loop.address,
    "gated_silu": gated_silu_loop.address,
}
