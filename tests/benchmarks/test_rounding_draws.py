"""What a KL of another engine is held to: our own draws of rounding noise."""

import numpy as np
import pytest
import torch
from benchmarks.rounding_draws import (
    MILLIONTH,
    off_by_a_millionth,
    prediction_interval,
    vllms_step,
)

from helpers.quantization.int8_linear import absmax_scale


class Embedded(torch.nn.Module):
    """A model that is nothing but its embeddings."""

    def __init__(self):
        super().__init__()
        self.embeddings = torch.nn.Embedding(5, 64)

    def get_input_embeddings(self):
        return self.embeddings


def test_embeddings_are_off_by_a_millionth_and_only_inside():
    model, ids = Embedded(), torch.arange(5)
    before = model.embeddings(ids)
    with off_by_a_millionth(model, seed=1):
        inside = model.embeddings(ids)
    ratio = (inside.double() / before.double() - 1).abs()
    assert ratio.min() >= 0.8 * MILLIONTH
    assert ratio.max() <= 1.2 * MILLIONTH
    assert torch.equal(model.embeddings(ids), before)


def test_other_seeds_are_other_draws():
    model, ids, found = Embedded(), torch.arange(5), []
    for seed in (1, 2, 1):
        with off_by_a_millionth(model, seed=seed):
            found.append(model.embeddings(ids))
    assert torch.equal(found[0], found[2])
    assert not torch.equal(found[0], found[1])


def test_vllms_step_holds_only_inside():
    absmax = torch.tensor([[254.0]])
    with vllms_step():
        assert absmax_scale(absmax).item() == 2
    assert absmax_scale(absmax).item() < 2


@pytest.mark.parametrize("confidence", [0.8, 0.95])
def test_one_more_draw_lies_within_as_often_as_it_says(confidence):
    chance, trials = np.random.default_rng(5), 4000
    drawn = np.exp(chance.normal(-3, 0.3, size=(trials, 9)))
    held = 0
    for row in drawn:
        low, high = prediction_interval(row[:8], confidence=confidence)
        held += low <= row[8] <= high
    sigma = (confidence * (1 - confidence) / trials) ** 0.5
    assert abs(held / trials - confidence) < 4 * sigma
