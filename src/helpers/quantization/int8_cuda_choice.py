"""Which way a fused int8 product goes on a card: a tile of the Triton product, or cuBLASLt.

The fastest way depends on the card, the sizes and the type of the result. So a process tries the
candidates once for every shape of weight and class of rows, on the first operands that come. A
tile that does not fit the card, or whose bits are not those of cuBLASLt and one pass after it, is
left out; all ways give the same bits, so a choice changes time alone.
"""

from collections.abc import Callable
from dataclasses import astuple, dataclass
from functools import cache

import torch
from torch import Tensor

BULK_CAPABILITY = (9, 0)  # the first with a bulk copy engine


@dataclass(frozen=True)
class Tile:
    """Tile size and launch options of a Triton product.

    Attributes:
        rows, outer, inner: of the blocks.
        group: row blocks that share their weights in the cache.
        warps, stages: of the program and of its pipeline.
        bulk: the bulk copy engine (compute capability 9.0) loads operands, and each program
            computes several tiles.
        stores: that engine stores the results too.
    """

    rows: int
    outer: int
    inner: int
    group: int
    warps: int
    stages: int
    bulk: bool = False
    stores: bool = False

    def sizes(self) -> tuple:
        """Its fields, in order."""
        return astuple(self)


# (most rows of the class, its candidates). `make gpu-check` times these and others.
CANDIDATES = (
    (
        16,
        (
            Tile(16, 64, 256, 1, 4, 4),
            Tile(16, 32, 512, 1, 4, 3),
            Tile(16, 64, 256, 1, 4, 5, bulk=True),
        ),
    ),
    (64, (Tile(64, 64, 128, 1, 4, 4),)),
    (
        512,
        (
            Tile(64, 64, 128, 8, 4, 5),
            Tile(64, 128, 128, 8, 4, 4),
            Tile(128, 256, 128, 8, 8, 3),
        ),
    ),
    (
        2**31,
        (
            Tile(128, 256, 128, 8, 8, 3),
            Tile(128, 256, 128, 8, 8, 4, bulk=True),
            Tile(128, 256, 128, 8, 8, 3, bulk=True),
            Tile(128, 256, 128, 8, 8, 3, bulk=True, stores=True),
        ),
    ),
)
FEWEST_WEIGHTS = 2**18  # with fewer weights, timing costs more than it gains
FEW_ROWS = 16  # cuBLASLt needs more rows than this
MOST_ROWS = 4096  # rows of the timed operands
CALLS, ROUNDS = 8, 3
LAUNCHED_ROWS = 64  # up to here launching takes longer than the work, so launch time is included
AHEAD = 2**22  # cycles (2 ms) for which the card waits while CALLS are launched
MOST_TIME_SHARE = 0.97  # a candidate must take less than this share of the best time so far

_chosen: dict[tuple, Tile | None] = {}


def candidate_tiles(rows: int) -> tuple[int, tuple[Tile, ...]]:
    """(most rows of the size class of `rows`, candidate tiles of that class)."""
    return next(each for each in CANDIDATES if rows <= each[0])


def plain_tile(rows: int) -> Tile:
    """A tile that fits any card with int8 units."""
    return next(tile for tile in candidate_tiles(rows)[1] if not tile.bulk)


def choose_tile(
    product: Callable[..., Tensor], around_cublas: Callable[..., Tensor], *operands
) -> Tile | None:
    """The tile of the fastest product for such operands; None if cuBLASLt is the fastest.

    Args:
        product: the Triton product; its tile is a keyword argument.
        around_cublas: the product by cuBLASLt with one pass after it.
        operands: a, weight, scale, columns, bias and dtype, as `int8_cuda` has them.
    """
    a, weight, scale, _, bias, dtype = operands
    if weight.numel() < FEWEST_WEIGHTS or not a.is_cuda:
        return plain_tile(len(a)) if len(a) <= FEW_ROWS else None
    most, tiles = candidate_tiles(len(a))
    key = a.device, most, *weight.shape, dtype, bias is None, scale.numel() == 1
    if key not in _chosen:
        if torch.cuda.is_current_stream_capturing():  # timing is not possible during capture
            return None
        _chosen[key] = _fastest_tile(product, around_cublas, _limit_rows(operands), tiles)
    return _chosen[key]


def chosen_tiles() -> list[dict]:
    """The choices of this process, for a report."""
    return [
        {"rows up to": key[1], "outer": key[2], "inner": key[3], "type": str(key[4])[6:]}
        | {"tile": "cuBLASLt and one pass" if tile is None else str(tile.sizes())}
        for key, tile in _chosen.items()
    ]


def _limit_rows(operands: tuple) -> tuple:
    a, weight, scale, *rest = operands
    scale = scale if scale.numel() == 1 else scale[:MOST_ROWS]
    return a[:MOST_ROWS], weight, scale, *rest


def _fastest_tile(product, around_cublas, operands: tuple, tiles: tuple[Tile, ...]) -> Tile | None:
    expected = around_cublas(*operands)
    wait_cycles = 0 if len(expected) <= LAUNCHED_ROWS else AHEAD
    fastest, shortest = None, _seconds(lambda: around_cublas(*operands), wait_cycles)
    for tile in tiles:
        if tile.bulk and not _has_bulk_copies(expected.device):
            continue
        by_tile = lambda tile=tile: product(*operands, tile=tile)  # noqa: E731
        try:
            is_exact = torch.equal(by_tile(), expected)
        except Exception:  # any type: the tile does not fit the card, or does not compile
            continue
        if not is_exact:
            continue
        seconds = _seconds(by_tile, wait_cycles)
        if seconds < MOST_TIME_SHARE * shortest:
            fastest, shortest = tile, seconds
    return fastest


def _seconds(call: Callable[[], Tensor], wait_cycles: int) -> float:
    """Seconds per call of several consecutive calls.

    Args:
        wait_cycles: cycles for which the card waits while the calls are launched; with 0, launch
            time is included.
    """
    durations = []
    for _ in range(ROUNDS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        if wait_cycles:
            torch.cuda._sleep(wait_cycles)
        start.record()
        for _ in range(CALLS):
            call()
        end.record()
        end.synchronize()
        durations.append(start.elapsed_time(end) / 1000 / CALLS)
    return min(durations)


@cache
def _has_bulk_copies(device: torch.device) -> bool:
    """Whether a device has a bulk copy engine."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= BULK_CAPABILITY
