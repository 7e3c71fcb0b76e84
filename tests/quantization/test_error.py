"""Quantization error by Linear, against a smoothed model that is really built."""

import copy
import math
import re

import pytest
import torch

from helpers.core.errors import StudyError
from helpers.quantization.calibration import run_calibration
from helpers.quantization.simulation import decibels, sqnr_with_and_without
from helpers.quantization.smoothing import same_alpha, smooth_, smoothed_absmax
from helpers.sources.models import random_model
from helpers.study.schema import Smooth, Variant
from quantized_run import lived_in

TARGETS = ("attention_input", "mlp_input", "mlp_down")


def texts():
    generator = torch.Generator().manual_seed(8)
    return [torch.randint(3, 259, (n,), generator=generator).tolist() for n in (31, 12)]


@pytest.mark.parametrize("family", ["qwen2", "gemma3_text", "phi3", "opt", "qwen3_moe"])
@pytest.mark.parametrize("preset", ["w8a8", "o3"])
def test_the_curve_with_smoothing_is_that_of_the_smoothed_model(family, preset):
    """Made one Linear at a time from the scales, it must equal folding them for good."""
    model = lived_in(random_model(family, seed=6))
    absmax = {n: f.absmax for n, f in run_calibration(model, texts(), batch_tokens=64).items()}
    smooth = Smooth(alpha=0.5, targets=TARGETS)
    alphas = same_alpha(model.config, TARGETS, 0.5)
    plain, smoothing = Variant(preset=preset), Variant(preset=preset, smooth=smooth)
    curves = sqnr_with_and_without(model, texts(), smoothing, absmax, alphas)
    assert (
        curves["without smoothing"]
        == sqnr_with_and_without(model, texts(), plain, absmax, alphas)["without smoothing"]
    )
    smoothed = copy.deepcopy(model)
    done = smooth_(smoothed, absmax, TARGETS, alphas)
    limits = smoothed_absmax(absmax, done)
    expected = sqnr_with_and_without(smoothed, texts(), plain, limits, alphas)["without smoothing"]
    assert set(curves["with smoothing"]) == set(expected)
    for name, result in curves["with smoothing"].items():
        assert result == pytest.approx(expected[name], abs=0.2), name  # dB; ties may round apart
    assert curves["with smoothing"] != curves["without smoothing"]


def test_the_model_is_left_as_it_was():
    model = random_model("llama", seed=6)
    before = {n: p.clone() for n, p in model.named_parameters()}
    absmax = {n: f.absmax for n, f in run_calibration(model, texts(), batch_tokens=64).items()}
    smooth = Smooth(alpha=0.5, targets=TARGETS)
    alphas = same_alpha(model.config, TARGETS, 0.5)
    sqnr_with_and_without(model, texts(), Variant(preset="w8a8", smooth=smooth), absmax, alphas)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    assert not any(m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_no_number_is_not_free_of_noise(value):
    assert math.isnan(decibels(value, 1.0))
    assert math.isnan(decibels(1.0, value))
    assert decibels(100.0, 1.0) == pytest.approx(20.0)
    assert decibels(1.0, 0.0) == 200.0


def test_a_linear_whose_error_is_no_number_is_named():
    model = lived_in(random_model("qwen2", seed=6))
    absmax = {n: f.absmax for n, f in run_calibration(model, texts(), batch_tokens=64).items()}
    name = next(iter(absmax))
    model.get_submodule(name).weight.data[0, 0] = math.nan
    with pytest.raises(StudyError, match=rf"SQNR of {re.escape(name)} .*not a number"):
        sqnr_with_and_without(model, texts(), Variant(preset="w8a8"), absmax, {})
