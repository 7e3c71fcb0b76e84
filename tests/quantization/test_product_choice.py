"""Which way of a fused product a card takes, with ways and clocks that are stand-ins."""

import pytest
import torch

from helpers.quantization import int8_cuda
from helpers.quantization.int8_cuda import Tile

ROOMY = Tile(128, 256, 128, 8, 8, 4)
FITS = Tile(64, 64, 128, 8, 4, 3)
BULK = Tile(64, 64, 128, 8, 4, 3, bulk=True)


class OutOfRoom(Exception):
    """As Triton's, which is no RuntimeError."""


def around_cublas():
    return torch.arange(6.0).reshape(2, 3)


@pytest.fixture
def measured(monkeypatch):
    """The choice among tiles, given what each takes and what is wrong with it."""

    def choose(tiles, seconds, *, too_large=(), wrong=(), bulk=True):
        def product(*, tile):
            if tile in too_large:
                raise OutOfRoom("shared memory")
            return around_cublas() + (tile in wrong)

        def clock(call, _ahead):
            try:
                return seconds[call.__defaults__[0]]
            except TypeError:  # cuBLASLt's call has no tile
                return seconds[None]

        monkeypatch.setattr(int8_cuda, "_seconds", clock)
        monkeypatch.setattr(int8_cuda, "_has_bulk_copies", lambda device: bulk)
        return int8_cuda._fastest_tile(product, around_cublas, (), tiles)

    return choose


def test_the_fastest_is_taken(measured):
    seconds = {None: 3.0, ROOMY: 1.0, FITS: 2.0}
    assert measured((FITS, ROOMY), seconds) == ROOMY
    assert measured((ROOMY, FITS), seconds) == ROOMY


def test_cublaslt_is_taken_where_no_tile_is_faster(measured):
    assert measured((ROOMY, FITS), {None: 1.0, ROOMY: 1.0, FITS: 2.0}) is None


def test_a_tile_that_does_not_fit_the_card_is_left_out(measured):
    seconds = {None: 3.0, ROOMY: 1.0, FITS: 2.0}
    assert measured((ROOMY, FITS), seconds, too_large={ROOMY}) == FITS
    assert measured((ROOMY,), seconds, too_large={ROOMY}) is None


def test_a_tile_whose_bits_differ_is_left_out(measured):
    assert measured((ROOMY, FITS), {None: 3.0, ROOMY: 1.0, FITS: 2.0}, wrong={ROOMY}) == FITS


def test_a_card_without_the_copy_engine_does_not_try_it(measured):
    seconds = {None: 3.0, BULK: 1.0, FITS: 2.0}
    assert measured((BULK, FITS), seconds) == BULK
    assert measured((BULK, FITS), seconds, bulk=False) == FITS


@pytest.mark.parametrize("rows", [1, 16, 17, 64, 65, 512, 513, 4096, 10**6])
def test_every_number_of_rows_has_a_plain_tile(rows):
    assert not int8_cuda.plain_tile(rows).bulk
    assert int8_cuda.candidate_tiles(rows)[0] >= rows


def test_many_rows_are_tried_in_part():
    a, weight = torch.ones(5000, 4), torch.ones(3, 4)
    tried = int8_cuda._limit_rows((a, weight, torch.ones(5000, 1), None, None, None))
    assert (len(tried[0]), len(tried[2])) == (int8_cuda.MOST_ROWS,) * 2
    one = int8_cuda._limit_rows((a, weight, torch.ones(1), None, None, None))
    assert one[2].numel() == 1


def test_small_products_are_not_tried():
    """Nothing is called; few rows are multiplied in one kernel, since cuBLASLt needs more."""
    weight = torch.ones(8, 16)

    def choose(rows):
        operands = torch.ones(rows, 16), weight, torch.ones(rows, 1), None, None, torch.float32
        return int8_cuda.choose_tile(None, None, *operands)

    assert choose(5) == int8_cuda.plain_tile(5)
    assert choose(40) is None
