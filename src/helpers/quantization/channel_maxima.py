"""Ratio of the largest to the median channel maximum, for every Linear input.

Calibration records these numbers, and the report computes them from the calibrated maxima.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

WORST = 8  # Linears that are listed as the worst; the record holds all of them


class ChannelMaxima(NamedTuple):
    """The channels of one Linear's input, by their abs-max over the calibration tokens.

    Attributes:
        channel: index of the largest channel.
        ratio: largest / median; None if the median is 0.
    """

    channel: int
    largest: float
    median: float
    ratio: float | None


def channel_maxima(absmax: np.ndarray) -> ChannelMaxima:
    """The largest and the median channel of (in_features,) abs-max, and their ratio."""
    largest, median = float(absmax.max()), float(np.median(absmax))
    return ChannelMaxima(
        int(absmax.argmax()), largest, median, largest / median if median > 0 else None
    )


def layer_maxima(absmax: dict[str, np.ndarray]) -> list[dict]:
    """One row a Linear, in the order given: `name`, `layer` for display, and its maxima."""
    return [
        {"name": name, "layer": name.removeprefix("model.layers.")}
        | channel_maxima(values)._asdict()
        for name, values in absmax.items()
    ]


def by_ratio(rows: Sequence[dict]) -> list[dict]:
    """The rows of `layer_maxima`, the largest ratio first.

    Rows without a ratio come last, the largest channel first.
    """
    return sorted(rows, key=lambda r: (r["ratio"] is None, -(r["ratio"] or r["largest"])))
