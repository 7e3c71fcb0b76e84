"""Part 2: int8 Linear by Linear, against float64 on the CPU and against the CPU's Linears."""

import torch
from torch import Tensor

from benchmarks.gpu.part import Part
from helpers.quantization import int8_cuda, int8_matmul
from helpers.quantization.int8_linear import Int8Linear, LinearStack

ROWS = (1, 2, 16, 17, 31, 256)
SHAPES = ((64, 48), (77, 13), (136, 40), (1000, 24), (4096, 1024), (3072, 1024))
ACTIVATIONS = ("token_dynamic", "tensor_dynamic", "tensor_static")


def run(part: Part) -> None:
    """Products, then whole Linears; the largest sums and sizes that need padding are among them."""
    if part.device == "cuda":
        part.note("proof", int8_cuda.self_checks(torch.device("cuda", 0)))
        part.note("way", int8_cuda.product_kind(0))
    part.note("products", _products(part))
    part.note("scales of numbers that torch divides", _scales(part))
    part.note("linears", [_linear(part, *case) for case in _cases(part) if not part.over()])
    part.note("linears alike", all(each["alike"] for each in part.found["linears"]))


def _products(part: Part) -> dict:
    """Numbers of tried and exact products, and the sizes of inexact ones."""
    generator, inexact, tried = torch.Generator().manual_seed(0), [], 0
    for inner, outer in SHAPES[: 3 if part.dry else None]:
        for rows in (0, *ROWS):
            both = torch.randint(-128, 128, (rows + outer, inner), generator=generator)
            both = both.to(torch.int8)
            for least in (False, True):
                operands = torch.full_like(both, -128) if least else both
                inexact += _off(part, operands[:rows], operands[rows:])
                tried += 1
    return {"made": tried, "exact": tried - len(inexact), "off": inexact[:20]}


def _off(part: Part, a: Tensor, weight: Tensor) -> list[str]:
    packed = int8_matmul.pack(weight.to(part.device))
    found = int8_matmul.multiply(a.to(part.device), packed).cpu().double()
    unpacked = torch.equal(int8_matmul.unpack(packed).cpu(), weight.t())
    exact = a.double() @ weight.double().t()
    if torch.equal(found, exact) and unpacked:
        return []
    return [f"{len(a)} x {weight.shape[1]} x {len(weight)}: off by {(found - exact).abs().max()}"]


def _scales(part: Part) -> dict:
    """Of 2^16 maxima divided by 127.5, how many a device gives as the CPU does, both ways."""
    absmax = torch.rand(2**16, generator=torch.Generator().manual_seed(1))
    there, expected = absmax.to(part.device), absmax / 127.5
    by_number = (there / 127.5).cpu() != expected
    by_tensor = (there / torch.full_like(there, 127.5)).cpu() != expected
    return {"by a number, off": int(by_number.sum()), "by a tensor, off": int(by_tensor.sum())}


def _cases(part: Part):
    for shape in SHAPES[: 2 if part.dry else None]:
        for dtype in ("float32", "bfloat16"):
            for activations in ACTIVATIONS:
                yield *shape, dtype, activations


def _linear(part: Part, inner: int, outer: int, dtype: str, activations: str) -> dict:
    """A stack of two Linears on the device and on the CPU: integers, scales, outputs."""
    generator = torch.Generator().manual_seed(inner + outer)
    x = torch.randn(37, inner, generator=generator) * torch.rand(inner, generator=generator) * 9
    x[3] = 0.0
    x = x.to(getattr(torch, dtype))
    here = _stack(inner, outer, activations)
    there = [linear.to(part.device) for linear in _stack(inner, outer, activations)]
    cpu_values, device_values = (
        here[0].quantized(x.clone()),
        there[0].quantized(x.clone().to(part.device)),
    )
    pairs = zip(cpu_values, device_values, strict=True)
    values, scales = (int((a.cpu() != b.cpu()).sum()) for a, b in pairs)
    outputs_of_both = [
        _answers(linears, x, device) for linears, device in ((here, "cpu"), (there, part.device))
    ]
    outputs = sum(int((a != b).sum()) for a, b in zip(*outputs_of_both, strict=True))
    case = {"inner": inner, "outer": outer, "dtype": dtype, "activations": activations}
    case |= {"values off": values, "scales off": scales, "outputs off": outputs}
    return case | {"alike": not (values or scales or outputs)}


def _answers(linears: list[Int8Linear], x: Tensor, device: str) -> list[Tensor]:
    x = x.to(device, copy=True)
    with torch.inference_mode():
        return [linear(x).cpu() for linear in linears]


def _stack(inner: int, outer: int, activations: str) -> list[Int8Linear]:
    """Two Linears with a bias that read one tensor, the same at every call."""
    generator = torch.Generator().manual_seed(inner * outer)
    static = torch.tensor([0.03]) if activations == "tensor_static" else None
    made = []
    for _ in range(2):
        weight = torch.randint(-128, 128, (outer, inner), generator=generator).to(torch.int8)
        scale = torch.rand(outer, 1, generator=generator) / 100
        bias = torch.randn(outer, generator=generator)
        made.append(Int8Linear(weight, scale, bias, activations=activations, input_scale=static))
    stack = LinearStack(made)
    for linear in made:
        linear.stack = stack
    return made
