"""Tiles of the Triton product that are tried."""

# Sizes of `int8_cuda.Tile`, the most promising first, by the most rows they are tried for.
TRIED = {
    16: (
        (16, 64, 256, 1, 4, 5, True),
        (16, 64, 256, 1, 4, 4),
        (16, 32, 512, 1, 4, 3),
    ),
    512: (
        (64, 64, 128, 8, 4, 5),
        (64, 128, 128, 8, 4, 4),
        (128, 256, 128, 8, 8, 3),
        (64, 128, 128, 8, 4, 5, True),
        (64, 128, 128, 8, 4, 4, True, True),
        (128, 256, 128, 8, 8, 3, True, True),
    ),
    2**31: (
        (128, 256, 128, 8, 8, 4, True),
        (128, 256, 128, 16, 8, 4, True),
        (128, 256, 128, 4, 8, 4, True),
        (256, 128, 128, 8, 8, 4, True),
        (128, 256, 128, 8, 8, 3, True),
        (128, 256, 128, 8, 8, 3, True, True),
        (128, 256, 128, 8, 8, 3),
    ),
}
# Values that a program of a quantization holds at once, and its warps.
QUANTIZED_BY = ((2048, 4), (2048, 8), (4096, 8), (4096, 16), (8192, 16), (16384, 32))


def tried_for(rows: int) -> tuple[tuple, ...]:
    """The tiles tried for so many rows."""
    return next(tiles for most, tiles in TRIED.items() if rows <= most)
