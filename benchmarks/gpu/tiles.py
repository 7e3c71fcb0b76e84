"""Tiles of the Triton product that are tried."""

# Sizes of `product_choice.Tile`, the most promising first, by the most rows they are tried for.
TRIED = {
    16: (
        (16, 64, 256, 1, 4, 5, True),
        (16, 32, 512, 1, 4, 4, True),
        (16, 32, 256, 1, 4, 4),
        (16, 64, 256, 1, 4, 4),
        (16, 32, 512, 1, 4, 3),
        (16, 64, 128, 1, 4, 6),
        (16, 16, 512, 1, 4, 4),
        (16, 32, 256, 1, 2, 6),
    ),
    512: (
        (128, 128, 128, 8, 8, 4, True),
        (64, 128, 128, 8, 4, 5, True),
        (128, 64, 128, 8, 4, 5, True),
        (128, 128, 128, 8, 8, 4),
        (64, 128, 128, 8, 4, 4),
        (128, 64, 128, 8, 4, 4),
        (64, 64, 256, 8, 4, 3),
        (64, 64, 128, 8, 4, 5),
        (128, 256, 128, 8, 8, 3),
    ),
    2**31: (
        (128, 256, 128, 8, 8, 3, True),
        (128, 128, 128, 8, 4, 4, True),
        (128, 256, 128, 8, 8, 4, True),
        (256, 128, 128, 8, 8, 3, True),
        (128, 128, 128, 8, 8, 4, True),
        (128, 256, 128, 8, 8, 3),
        (128, 256, 128, 8, 8, 4),
        (256, 128, 128, 8, 8, 3),
        (128, 128, 128, 8, 4, 4),
        (128, 128, 128, 8, 8, 4),
    ),
}


def tried_for(rows: int) -> tuple[tuple, ...]:
    """The tiles tried for so many rows."""
    return next(tiles for most, tiles in TRIED.items() if rows <= most)
