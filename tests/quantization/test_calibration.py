"""Calibration: exact maxima over real tokens only, whatever the batches."""

import numpy as np
import pytest
import torch

from helpers.core.errors import StudyError
from helpers.quantization import calibration


@pytest.fixture
def items():
    generator = torch.Generator().manual_seed(2)
    return [torch.randint(3, 259, (n,), generator=generator).tolist() for n in (30, 4, 17, 9, 25)]


def alone(model, items):
    """Abs-max of every Linear's input with each item read alone, unpadded."""
    seen: dict[str, torch.Tensor] = {}

    def hook(name):
        def observe(_module, args):
            top = args[0].abs().flatten(0, -2).amax(0)
            seen[name] = torch.maximum(seen[name], top) if name in seen else top

        return observe

    handles = [
        module.register_forward_pre_hook(hook(name))
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and name != "lm_head"
    ]
    with torch.inference_mode():
        for item in items:
            model.base_model(torch.tensor([item]))
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("batch_tokens", [64, 100, 10_000])
def test_padding_never_enters_a_statistic(model, items, batch_tokens):
    statistics = calibration.run_calibration(model, items, batch_tokens=batch_tokens)
    expected = alone(model, items)
    assert set(statistics) == set(expected)
    for name, absmax in expected.items():
        torch.testing.assert_close(statistics[name].absmax, absmax, rtol=1e-4, atol=1e-5)
        assert statistics[name].tokens == sum(map(len, items))


def test_the_check_would_see_padding(model, items, monkeypatch):
    """The same comparison fails when the mask is ignored: the test above can fail."""
    real = calibration._input_hooks

    def unmasked(model, mask, owners, fit, statistics):
        full = torch.ones_like(mask)
        owners = torch.zeros(mask.numel(), dtype=torch.long)
        return real(model, full, owners, owners == 0, statistics)

    monkeypatch.setattr(calibration, "_input_hooks", unmasked)
    found = calibration.run_calibration(model, items, batch_tokens=10_000)
    assert next(iter(found.values())).tokens > sum(map(len, items))


def test_every_linear_but_the_head_is_seen(model, items):
    statistics = calibration.run_calibration(model, items, batch_tokens=64)
    linears = [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)]
    assert set(statistics) == set(linears) - {"lm_head"}
    assert len(statistics) == 7 * model.config.num_hidden_layers


def test_the_model_is_left_as_it_was(model, items):
    before = {n: p.clone() for n, p in model.named_parameters()}
    calibration.run_calibration(model, items, batch_tokens=64)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_the_loudest_item_is_named(model, items):
    name = "model.layers.1.mlp.down_proj"
    statistics = calibration.run_calibration(model, items, batch_tokens=64)
    peaks = [alone(model, [item])[name].max().item() for item in items]
    assert statistics[name].argmax_item == int(np.argmax(peaks))


def test_saved_statistics_come_back(model, items, tmp_path):
    statistics = calibration.run_calibration(model, items, batch_tokens=64)
    calibration.save_calibration(tmp_path / "a.safetensors", statistics)
    loaded = calibration.load_absmax(tmp_path / "a.safetensors")
    assert set(loaded) == set(statistics)
    assert all(torch.equal(loaded[n], statistics[n].absmax) for n in statistics)


def test_a_histogram_counts_every_value_once():
    values = torch.tensor([0.0, 2.0**-20, 1.0, 1.5, 2.0, 3000.0, 1e9])
    counts = calibration.log2_histogram(values)
    assert counts.sum() == len(values)
    edges = list(calibration.LOG2_EDGES)
    assert counts[edges.index(0)] == 2  # 1.0 and 1.5
    assert counts[0] == 2  # what lies below the lowest edge
    assert counts[-1] == 1  # what lies above the highest


def test_a_broken_activation_is_refused(model, items):
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight[0, 0] = float("nan")
    with pytest.raises(StudyError, match="not finite"):
        calibration.run_calibration(model, items, batch_tokens=64)


def test_a_missing_file_names_the_notebook(tmp_path):
    with pytest.raises(StudyError, match="run 01_calibration"):
        calibration.load_absmax(tmp_path / "none.safetensors")


def test_long_items_are_refused_not_cut():
    with pytest.raises(StudyError, match="max_tokens = 3 but an item has 5"):
        calibration.check_item_lengths([[1, 2], [1, 2, 3, 4, 5]], max_tokens=3)
