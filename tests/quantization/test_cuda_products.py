"""The CUDA ways of int8 products, on CPU tensors.

`torch._int_mm` is a stand-in that refuses what cuBLASLt refuses; the Triton kernels run in
Triton's interpreter where Triton is there, in a process of their own. What only a card can show
is in `benchmarks.gpu.parity`.
"""

import importlib.util
import os
import subprocess
import sys

import pytest
import torch

from helpers.quantization import int8_cuda

SHAPES = [
    (1, 8, 8),
    (16, 64, 24),
    (17, 64, 24),
    (40, 576, 192),
    (3, 8, 1536),
    (20, 7, 16),
    (20, 16, 13),
]
WORST = [(1, 1, 1), (3, 1025, 7), (0, 5, 3), (4, 14336, 6)]


@pytest.fixture
def cublas(monkeypatch):
    """`torch._int_mm` with cuBLASLt's demands; the sizes it was asked for are kept."""
    asked = []

    def strict(a, b):
        assert a.shape[0] > 16, "self.size(0) needs to be greater than 16"
        assert a.shape[1] % 8 == 0, "self.size(1) needs to be a multiple of 8"
        assert b.shape[1] % 8 == 0, "mat2.size(1) needs to be a multiple of 8"
        assert a.is_contiguous()
        assert b.t().is_contiguous(), "its fast kernels read both operands along the inner size"
        asked.append((*a.shape, b.shape[1]))
        return (a.double() @ b.double()).to(torch.int32)  # exact on any processor

    monkeypatch.setattr(torch, "_int_mm", strict)
    return asked


def operands(rows, inner, outer):
    generator = torch.Generator().manual_seed(rows + inner)
    both = torch.randint(-128, 128, (rows + outer, inner), generator=generator).to(torch.int8)
    return both[:rows], both[rows:]


@pytest.mark.parametrize("shape", SHAPES)
def test_the_product_is_padded_and_only_ours_is_returned(cublas, shape):
    a, weight = operands(*shape)
    (packed,) = int8_cuda.pack_cuda(weight)
    product = int8_cuda.multiply_cuda(a, packed)
    assert product.shape == (len(a), len(weight))
    assert torch.equal(product.long(), a.long() @ weight.long().t())
    rows, inner, outer = cublas[0]
    assert (rows, inner % 16, outer % 16) == (max(17, len(a)), 0, 0)


@pytest.mark.parametrize("shape", WORST)
def test_the_largest_sums_are_exact(cublas, shape):
    rows, inner, outer = shape
    a, weight = (torch.full((n, inner), -128, dtype=torch.int8) for n in (rows, outer))
    product = int8_cuda.multiply_cuda(a, *int8_cuda.pack_cuda(weight))
    assert torch.equal(product, torch.full((rows, outer), inner * 2**14, dtype=torch.int32))


def test_a_packed_weight_is_the_weight(cublas):
    weight = operands(1, 13, 5)[1]
    (packed,) = int8_cuda.pack_cuda(weight)
    assert torch.equal(packed, weight)
    padded = int8_cuda.padded_matrix(packed)
    assert padded.shape == (16, 16)
    assert int(padded.int().abs().sum()) == int(weight.int().abs().sum())


def test_the_stand_in_refuses_what_the_device_would(cublas):
    """Else the tests above would pass without any padding."""
    a, weight = operands(16, 64, 24)
    with pytest.raises(AssertionError, match="greater than 16"):
        torch._int_mm(a, weight.t())


def test_operands_that_are_not_contiguous_are_made_so(cublas):
    a, weight = operands(40, 64, 24)
    a, weight = a.t().contiguous().t(), weight.t().contiguous().t()
    product = int8_cuda.multiply_cuda(a, *int8_cuda.pack_cuda(weight))
    assert torch.equal(product.long(), a.long() @ weight.long().t())


def test_off_the_card_nothing_is_fused():
    assert not int8_cuda.uses_triton(torch.device("cpu"))


def test_a_proof_that_fails_or_breaks_leaves_torchs_passes(monkeypatch):
    monkeypatch.setattr(int8_cuda, "triton_unavailable_reason", lambda device: None)
    for checks in ({"a": lambda: True, "b": lambda: False}, {"a": lambda: 1 / 0}):
        monkeypatch.setattr(int8_cuda, "_check_functions", lambda device, given=checks: given)
        assert int8_cuda.product_kind.__wrapped__(0) == int8_cuda.CUBLAS_PRODUCT
    monkeypatch.setattr(int8_cuda, "_check_functions", lambda device: {"a": lambda: True})
    assert int8_cuda.product_kind.__wrapped__(0) == int8_cuda.TRITON_PRODUCT


def test_a_proof_does_not_depend_on_where_its_caller_makes_tensors(monkeypatch):
    monkeypatch.setattr(int8_cuda, "triton_unavailable_reason", lambda device: None)
    made_on = lambda: torch.empty(1).device.type == "cpu"  # noqa: E731
    monkeypatch.setattr(int8_cuda, "_check_functions", lambda device: {"made on": made_on})
    with torch.device("meta"):
        assert int8_cuda.self_checks(torch.device("cpu")) == {"made on": True}


def test_an_old_card_says_what_it_does_instead(monkeypatch):
    monkeypatch.setattr(int8_cuda, "find_spec", lambda name: object())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    reason = int8_cuda.triton_unavailable_reason(torch.device("cuda", 0))
    assert reason == "compute capability below 8.0: torch's passes around cuBLASLt"
    assert int8_cuda.self_checks(torch.device("cuda", 0)) == {}


INTERPRETED = """
import torch
from helpers.quantization import int8_cuda
# The interpreter cuts float32 down to bfloat16 and loses its smallest numbers; a card does not.
skipped = {"values and scales of bfloat16", "both scales and a bias"}
for name, check in int8_cuda._check_functions(torch.device("cpu")).items():
    assert name in skipped or check(), name
# The product that a card would choose from, as `rescaled_product` reaches it.
for rows in (5, 40):
    a, weight = torch.randint(-128, 128, (rows, 77)), torch.randint(-128, 128, (13, 77))
    packed = int8_cuda.pack_cuda(weight.to(torch.int8))[0]
    given = a.to(torch.int8), packed, torch.ones(rows, 1), torch.ones(13), None, torch.float32
    assert torch.equal(int8_cuda.rescaled_product(*given), (a @ weight.t()).float())
# Blocks of the bulk copy engine, results that leave by it, sizes that no block divides.
passes, Tile = int8_cuda._triton(), int8_cuda.int8_cuda_choice.Tile
a, weight = torch.randint(-128, 128, (37, 200)), torch.randint(-128, 128, (52, 200))
packed = int8_cuda.pack_cuda(weight.to(torch.int8))[0]
scale, columns, bias = torch.rand(37, 1), torch.rand(52), torch.randn(52)
given = a.to(torch.int8), packed, scale, columns, bias, torch.float32
expected = (a @ weight.t()).float() * scale * columns + bias
for stores in (False, True):
    tile = Tile(16, 32, 64, 2, 4, 3, bulk=True, stores=stores)
    assert torch.equal(passes.launch_product(*given, tile=tile), expected), stores
# A row in one piece and in parts, of every size that is taken anywhere.
x = torch.randn(3, 4400) * torch.tensor([[1.0], [1e-30], [1e30]])
whole = passes.launch_quantize_rows(x, block=8192, warps=16)
for rows, width in ((1, 4400), (4096, 4400)):
    block, warps = passes._block_and_warps(rows, width)
    assert all(map(torch.equal, whole, passes.launch_quantize_rows(x, block=block, warps=warps)))
assert passes._block_and_warps(1, 4400)[0] > 4400 > passes._block_and_warps(4096, 4400)[0]
"""


@pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="Triton is not installed")
def test_the_triton_kernels_are_exact_in_the_interpreter():
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    subprocess.run([sys.executable, "-c", INTERPRETED], check=True, env=environment)
