"""The worst channel before and after smoothing is what smoothing really makes of it."""

import copy

import numpy as np
import pytest
import torch

from helpers.quantization import calibration, smoothing
from helpers.quantization.simulation import sqnr_with_and_without
from helpers.quantization.smoothing import same_alpha, smooth_variant_
from helpers.report import figures
from helpers.study.schema import Smooth, Variant
from quantized_run import lived_in

TARGETS = ("attention_input", "mlp_input")
LOUD = 7  # a channel that every norm makes loud
VARIANT = Variant(preset="w8a8", smooth=Smooth(alpha=0.6, targets=TARGETS))


@pytest.fixture
def loud(model):
    """A model one channel of whose norms stands out, and the maxima of its inputs."""
    lived_in(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("post_attention_layernorm.weight"):
                parameter[LOUD] *= 30
    tokens = [[5, 6, 7, 8, 11], [9, 10, 11]]
    statistics = calibration.run_calibration(model, tokens, batch_tokens=64)
    return model, {name: found.absmax for name, found in statistics.items()}, tokens


def worst_of(loud, variant=VARIANT):
    model, absmax, _ = loud
    alphas = same_alpha(model.config, TARGETS, variant.smooth.alpha) if variant.smooth else {}
    return smoothing.worst_of_variant(model, absmax, variant, alphas), alphas


def inputs_of(model, linear: str, tokens) -> torch.Tensor:
    """(tokens, in_features) what a Linear is given, with hooks of this test's own."""
    seen = []
    hook = model.get_submodule(linear).register_forward_pre_hook(lambda _, a: seen.append(a[0]))
    with torch.no_grad():
        for each in tokens:
            model(torch.tensor([each]))
    hook.remove()
    return torch.cat([x.flatten(0, -2) for x in seen])


def test_it_is_what_the_smoothed_model_computes(loud):
    """Folded into the model, s makes its inputs and weights what was announced."""
    model, absmax, tokens = loud
    worst, alphas = worst_of(loud)
    assert worst.channel == LOUD
    smoothed = copy.deepcopy(model)
    smooth_variant_(smoothed, absmax, VARIANT, alphas)
    linear = worst.group.consumers[0]
    after = inputs_of(smoothed, linear, tokens).abs().amax(0)
    np.testing.assert_allclose(worst.act_after, after.numpy(), rtol=1e-4)
    weights = [smoothed.get_submodule(n).weight.abs().amax(0) for n in worst.group.consumers]
    largest = torch.stack(weights).amax(0).detach().numpy()
    np.testing.assert_allclose(worst.weight_after, largest, rtol=1e-5)


def test_equation_4_holds_for_the_numbers_that_are_shown(loud):
    worst, _ = worst_of(loud)
    act, weight = worst.act_absmax[LOUD], worst.weight_absmax[LOUD]
    assert worst.wanted_scale == pytest.approx(act**0.6 / weight**0.4, rel=1e-5)
    text = figures.equation_4(worst).data
    for number in (act, weight, worst.wanted_scale, act / worst.scales[LOUD]):
        assert f"{number:.4g}" in text


def test_no_other_channel_stands_out_more(loud):
    worst, _ = worst_of(loud)
    model, absmax, _ = loud
    names = same_alpha(model.config, TARGETS, 0.5)
    ratios = {n: (absmax[n].max() / np.median(absmax[n].numpy())).item() for n in names}
    assert max(ratios, key=ratios.get) == worst.group.consumers[0]


@pytest.mark.parametrize(
    "variant",
    [Variant(preset="w8a8"), Variant(recipe="seed", smooth=Smooth(alpha=0.5, targets=TARGETS))],
    ids=["rounding", "a recipe of its own"],
)
def test_a_variant_that_does_not_smooth_changes_nothing(loud, variant):
    worst, _ = worst_of(loud, variant)
    np.testing.assert_array_equal(worst.act_after, worst.act_absmax)
    np.testing.assert_array_equal(worst.weight_after, worst.weight_absmax)
    assert "does not smooth" in figures.equation_4(worst).data


def test_the_histograms_count_every_value_before_and_after(loud):
    """Watched during the SQNR pass, whose figures they leave as they are."""
    model, absmax, tokens = loud
    worst, alphas = worst_of(loud)
    alone = sqnr_with_and_without(model, tokens, VARIANT, absmax, alphas)
    watched = smoothing.SmoothingHistograms(model, worst)
    assert sqnr_with_and_without(model, tokens, VARIANT, absmax, alphas) == alone
    counts = watched.end()
    linear = worst.group.consumers[0]
    x = inputs_of(model, linear, tokens).abs().numpy()
    weights = [model.get_submodule(n).weight.abs().detach() for n in worst.group.consumers]
    w = torch.cat(weights).numpy()
    edges = 2.0 ** np.array(calibration.LOG2_EDGES)
    for name, pair in (("activations", (x, x / worst.scales)), ("weights", (w, w * worst.scales))):
        for found, values in zip(counts[name], pair, strict=True):
            expected, _ = np.histogram(np.clip(values, edges[0], edges[-1] * 0.999), edges)
            assert sum(found) == values.size
            np.testing.assert_allclose(found, expected, atol=1)  # a value at an edge
    assert not model.get_submodule(linear)._forward_pre_hooks


@pytest.mark.parametrize(
    ("alpha", "shown"), [(0.7, 0.7), ((0.3, 0.5, 0.9), 0.5), ((0.3, 0.8), 0.3), ("auto", 0.5)]
)
def test_a_calibration_shows_the_studys_alpha(study, alpha, shown):
    smooth = Smooth(alpha=alpha, targets=("mlp_input",))
    variants = {"noquant": Variant(), "own": Variant(preset="w8a8", smooth=smooth)}
    found = smoothing.study_smoothing(study.model_copy(update={"variants": variants}))
    assert (found.alpha, found.targets) == (shown, ("mlp_input",))
    nothing = study.model_copy(update={"variants": {"noquant": Variant()}})
    assert smoothing.study_smoothing(nothing) == smoothing.PAPER
