"""A gate on what is not a number fails, wherever among its numbers that stands."""

import math
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from helpers.core.records import largest
from helpers.evaluation.checks import numeric_gates, second_opinion
from helpers.evaluation.checks.numeric_gates import invariance_gate
from helpers.study.loading import load_study

PLACES = (0, 1, 2)


@pytest.mark.parametrize("place", PLACES)
def test_the_largest_of_some_is_no_number_if_one_is_none(place):
    values = [0.5, 2.0, 1.0]
    assert largest(values) == 2.0
    values[place] = math.nan
    assert math.isnan(largest(values))


@pytest.mark.parametrize("place", PLACES)
def test_weights_that_are_no_numbers(tmp_path, place):
    settings = SimpleNamespace(learning_rate=1e-3)
    weights = {name: torch.zeros(4) for name in "abc"}
    moved = {name: weight + 1e-3 for name, weight in weights.items()}
    folders = [tmp_path / name for name in ("start", "trained", "broken")]
    broken = moved | {"abc"[place]: torch.full((4,), math.nan)}
    for folder, tensors in zip(folders, (weights, moved, broken), strict=True):
        folder.mkdir()
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    start, trained, broken = folders
    ask = second_opinion.weights_gate
    assert ask(start, trained, settings, {"steps": 1}, dtype="float32").passed
    assert not ask(start, broken, settings, {"steps": 1}, dtype="float32").passed


@pytest.mark.parametrize("place", PLACES)
def test_log_probabilities_that_are_no_numbers(study_path, place):
    study = load_study(study_path)
    row = {"id": "a", "parsed": "A", "output": "A", "finish_reason": "scored", "status": "answered"}
    alone = row | {"logprobs": [-1.0, -2.0, -3.0]}
    among = row | {"logprobs": list(alone["logprobs"])}
    ask = lambda: invariance_gate(study, study.baseline, [among], [among], [alone])  # noqa: E731
    assert ask().passed
    among["logprobs"][place] = math.nan
    assert not ask().passed


@pytest.mark.parametrize("place", PLACES)
def test_losses_and_divergences_that_are_no_numbers(place):
    baseline = [{"id": str(i), "tokens": 10, "nll": 20.0, "kl": 0.1} for i in PLACES]
    read = [dict(row) for row in baseline]
    assert numeric_gates.same_reference_gate(read, baseline, dtype="float32").passed
    assert numeric_gates.differs_gate(read).passed
    for wrong in (math.nan, None):
        read[place] |= {"nll": wrong, "kl": wrong}
        assert not numeric_gates.same_reference_gate(read, baseline, dtype="float32").passed
        assert not numeric_gates.differs_gate(read).passed
