"""Tiles of the Triton product that are tried, and their compilation side by side."""

import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures import TimeoutError as TooSlow

# Sizes of `triton_kernels.Tile`, the most promising first, by the most rows they are tried for.
TRIED = {
    16: (
        (16, 32, 256, 1, 4, 4),
        (16, 64, 256, 1, 4, 4),
        (16, 32, 512, 1, 4, 3),
        (16, 64, 128, 1, 4, 6),
        (16, 16, 512, 1, 4, 4),
        (16, 128, 128, 1, 4, 4),
        (16, 32, 256, 1, 2, 6),
    ),
    512: (
        (128, 128, 128, 8, 8, 4),
        (64, 128, 128, 8, 4, 4),
        (128, 64, 128, 8, 4, 4),
        (64, 64, 256, 8, 4, 3),
        (64, 64, 128, 8, 4, 5),
        (128, 256, 128, 8, 8, 3),
    ),
    2**31: (
        (128, 256, 128, 8, 8, 3),
        (128, 256, 128, 8, 8, 4),
        (256, 128, 128, 8, 8, 3),
        (128, 128, 128, 8, 4, 4),
        (128, 128, 128, 8, 8, 4),
        (128, 256, 64, 8, 8, 4),
        (64, 256, 128, 8, 4, 4),
        (128, 128, 256, 8, 8, 3),
    ),
}
WORKERS, WAIT_S = 8, 45


def tried_for(rows: int) -> tuple[tuple, ...]:
    """The tiles tried for so many rows."""
    return next(tiles for most, tiles in TRIED.items() if rows <= most)


def compile_all() -> dict[str, str]:
    """Compile every tile into Triton's cache, several at a time; the errors by tile."""
    tiles, errors = list(dict.fromkeys(t for each in TRIED.values() for t in each)), {}
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(WORKERS, os.cpu_count() or 1), mp_context=context) as pool:
        jobs = {tile: pool.submit(compiled, tile) for tile in tiles}
        for tile, job in jobs.items():
            try:
                job.result(timeout=WAIT_S)
            except TooSlow:
                errors[str(tile)] = "not compiled in time"
            except Exception as error:  # a tile that does not fit the card
                errors[str(tile)] = f"{type(error).__name__}: {str(error)[:120]}"
    return errors


def compiled(tile: tuple) -> None:
    """Compile one tile by multiplying with it."""
    import torch

    from helpers.quantization import cuda_products, triton_kernels

    a = torch.zeros(32, 1024, dtype=torch.int8, device="cuda")
    (weight,) = cuda_products.pack(torch.zeros(512, 1024, dtype=torch.int8, device="cuda"))
    scales = torch.ones(32, 1, device="cuda"), torch.ones(512, device="cuda")
    for dtype in (torch.bfloat16, torch.float32):
        triton_kernels.product(a, weight, *scales, None, dtype, tile=triton_kernels.Tile(*tile))
    torch.cuda.synchronize()
