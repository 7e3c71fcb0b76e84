"""Pictures are kept with a palette: smaller, and to the eye the same."""

import base64
import io

import numpy as np
import pytest

from helpers.report import figures
from helpers.workflow.cli import reduce_palette


def encoded(figure) -> str:
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=110)
    return base64.b64encode(stream.getvalue()).decode()


def pixels(png: str) -> np.ndarray:
    """(height, width, 3) of a base64 PNG on white, 0–255."""
    from PIL import Image

    picture = Image.open(io.BytesIO(base64.b64decode(png))).convert("RGBA")
    white = Image.new("RGBA", picture.size, "white")
    return np.asarray(Image.alpha_composite(white, picture).convert("RGB"), dtype=int)


@pytest.mark.parametrize("kind", ["surface", "lines"])
def test_a_figure_shrinks_and_looks_the_same(kind):
    rng = np.random.default_rng(3)
    if kind == "surface":
        figure = figures.outlier_surface(rng.uniform(0, 1, (40, 64)), title="|x|", channels=64)
    else:
        losses = list(rng.uniform(1, 2, 60))
        figure = figures.loss_curve(losses, losses, title="The loss falls")
    before = encoded(figure)
    after = reduce_palette(before)
    assert len(after) < 0.6 * len(before)
    difference = np.abs(pixels(before) - pixels(after))
    assert difference.shape == pixels(before).shape
    assert difference.mean() < 1
    assert reduce_palette(before) == after  # the same bytes again


def test_what_cannot_be_made_smaller_stays():
    from PIL import Image

    stream = io.BytesIO()
    Image.new("P", (1, 1)).save(stream, "PNG", optimize=True)
    tiny = base64.b64encode(stream.getvalue()).decode()
    assert len(reduce_palette(tiny)) <= len(tiny)
