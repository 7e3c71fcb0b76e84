"""Integer products on a CPU against plain integer arithmetic (CUDA's: test_cuda_products)."""

import dataclasses

import pytest
import torch

from helpers.quantization import int8_matmul
from helpers.runtime import devices

SHAPES = [(1, 8, 8), (16, 64, 24), (17, 64, 24), (40, 576, 192), (3, 8, 1536)]


def operands(rows, inner, outer):
    generator = torch.Generator().manual_seed(rows + inner)

    def draw(*shape):
        return torch.randint(-128, 128, shape, generator=generator).to(torch.int8)

    return draw(rows, inner), draw(inner, outer)


WORST = [(1, 1, 1), (2, 1023, 5), (3, 1024, 8), (3, 1025, 7), (2, 2049, 3), (4, 14336, 6)]


def suited(way) -> bool:
    """Whether this processor has what a way asks for."""
    return not way.features or bool(set(way.features) & set(devices.features()))


@pytest.fixture(params=int8_matmul.CPU_PRODUCTS)
def way(request, monkeypatch):
    """Each way in turn, as the one that the process uses."""
    cpu_product = int8_matmul.CPU_PRODUCTS[request.param]
    if not suited(cpu_product):
        pytest.skip(f"this processor has none of {', '.join(cpu_product.features)}")
    monkeypatch.setattr(int8_matmul, "cpu_product", lambda: cpu_product)
    return cpu_product


@pytest.mark.parametrize("shape", [*SHAPES, (5, 7, 13), *WORST])
def test_every_way_gives_the_whole_numbers_of_float64(way, shape):
    a, b = operands(*shape)
    expected = a.long() @ b.long()
    product = int8_matmul.multiply(a, int8_matmul.pack(b.t()))
    assert torch.equal(product.float(), expected.float())  # int32 rounded once
    if product.dtype == torch.int32:
        assert torch.equal(product.long(), expected)


@pytest.mark.parametrize("inner", [1, 7, 1024, 1025, 2048, 2049, 14336])
def test_every_way_holds_the_largest_sums(way, inner):
    for left, right in ((-128, -128), (-128, 127), (127, 127)):
        a, weight = (
            torch.full((n, inner), value, dtype=torch.int8) for n, value in ((3, left), (5, right))
        )
        product = int8_matmul.multiply(a, int8_matmul.pack(weight)).float()
        assert torch.equal(product, torch.full((3, 5), float(left * right * inner)).float())


def test_every_way_gives_the_weight_back(way):
    _, b = operands(1, 130, 24)
    assert torch.equal(int8_matmul.unpack(int8_matmul.pack(b.t())), b)


def test_no_rows_give_no_rows(way):
    _, b = operands(1, 64, 24)
    if way is not int8_matmul.TILES:  # an INT8 Linear answers an empty input by itself
        assert int8_matmul.multiply(
            torch.zeros(0, 64, dtype=torch.int8), int8_matmul.pack(b.t())
        ).shape == (
            0,
            24,
        )


def test_a_way_that_saturates_is_never_taken(monkeypatch):
    """What uint8 × int8 does below AVX-512 VNNI: sums of two products are kept to 16 bits."""

    def saturating(a, weight):
        pairs = (a.int()[:, None] + 128) * weight.int()[None]
        pairs = torch.cat([pairs, pairs.new_zeros(*pairs.shape[:2], pairs.shape[2] % 2)], dim=2)
        pairs = pairs.unflatten(2, (-1, 2)).sum(3)
        return pairs.clamp(-(2**15), 2**15 - 1).sum(2) - 128 * weight.int().sum(1)

    broken = dataclasses.replace(int8_matmul.UINT8, pack=lambda w: (w,), multiply=saturating)
    assert not int8_matmul.is_exact(broken)
    monkeypatch.setattr(int8_matmul, "CPU_PRODUCTS", {broken.name: broken})
    monkeypatch.setattr(devices, "features", lambda: int8_matmul.UINT8.features)
    assert int8_matmul.cpu_product.__wrapped__() is int8_matmul.BLOCKS


def test_a_processor_without_int8_units_multiplies_in_float32(monkeypatch):
    monkeypatch.setattr(devices, "features", lambda: ("avx2",))
    assert int8_matmul.cpu_product.__wrapped__() is int8_matmul.BLOCKS


def test_a_block_holds_every_partial_sum():
    assert int8_matmul.BLOCK * 128 * 128 <= 2**24


def test_a_device_without_the_product_says_so():
    a = torch.zeros(2, 8, dtype=torch.int8, device="meta")
    b = torch.zeros(8, 8, dtype=torch.int8, device="meta")
    with pytest.raises(NotImplementedError, match="no int8 product on meta; set"):
        int8_matmul.multiply(a, int8_matmul.pack(b.t()))
