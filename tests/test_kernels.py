"""Integer products against plain integer arithmetic, under what each device demands.

No GPU is needed: the CUDA path runs on CPU tensors, over a stand-in for `torch._int_mm`
that refuses what cuBLASLt refuses.
"""

import pytest
import torch

from helpers.quantization import kernels

SHAPES = [(1, 8, 8), (16, 64, 24), (17, 64, 24), (40, 576, 192), (3, 8, 1536)]


def operands(rows, inner, outer):
    generator = torch.Generator().manual_seed(rows + inner)

    def draw(*shape):
        return torch.randint(-128, 128, shape, generator=generator).to(torch.int8)

    return draw(rows, inner), draw(inner, outer)


@pytest.fixture
def cublas(monkeypatch):
    """`torch._int_mm` with cuBLASLt's demands; what it was asked for is kept."""
    asked, real = [], torch._int_mm

    def strict(a, b):
        assert a.shape[0] > 16, "self.size(0) needs to be greater than 16"
        assert a.shape[1] % 8 == 0, "self.size(1) needs to be a multiple of 8"
        assert b.shape[1] % 8 == 0, "mat2.size(1) needs to be a multiple of 8"
        assert a.is_contiguous()
        assert b.is_contiguous()
        asked.append(a.shape[0])
        return real(a, b)

    monkeypatch.setattr(torch, "_int_mm", strict)
    return asked


@pytest.mark.parametrize("shape", [*SHAPES, (5, 7, 13)])
def test_the_cpu_product_is_exact(shape):
    a, b = operands(*shape)
    assert torch.equal(kernels.int8_matmul(a, b).long(), a.long() @ b.long())


@pytest.mark.parametrize("shape", SHAPES)
def test_the_cuda_product_pads_rows_and_returns_only_ours(cublas, shape):
    a, b = operands(*shape)
    found = kernels.cuda_matmul(a, b)
    assert torch.equal(found.long(), a.long() @ b.long())
    assert cublas == [max(17, len(a))]


@pytest.mark.parametrize("shape", [(20, 7, 16), (20, 16, 13)])
def test_sizes_cublas_does_not_take_are_exact_without_it(cublas, shape):
    a, b = operands(*shape)
    assert torch.equal(kernels.cuda_matmul(a, b).long(), a.long() @ b.long())
    assert cublas == []
    assert "is no multiple of 8" in kernels.slow_on_cuda(*b.shape)


def test_the_stand_in_refuses_what_the_device_would(cublas):
    """Else the tests above would pass without any padding."""
    a, b = operands(16, 64, 24)
    with pytest.raises(AssertionError, match="greater than 16"):
        torch._int_mm(a, b)


def test_operands_that_are_not_contiguous_are_made_so(cublas):
    a, b = operands(40, 64, 24)
    a, b = a.t().contiguous().t(), b.t().contiguous().t()
    assert torch.equal(kernels.cuda_matmul(a, b).long(), a.long() @ b.long())


def test_float64_holds_the_largest_sum():
    """2^14 a product, exact up to 2^53: far beyond any Linear's width."""
    a = torch.full((1, 999), -128, dtype=torch.int8)
    b = torch.full((999, 1), -128, dtype=torch.int8)
    assert kernels.cuda_matmul(a, b).item() == 999 * 2**14


def test_a_device_without_the_product_says_so():
    a, b = torch.zeros(2, 8, dtype=torch.int8, device="meta"), torch.zeros(8, 8, device="meta")
    with pytest.raises(NotImplementedError, match="no int8 product on meta; set"):
        kernels.int8_matmul(a, b)
