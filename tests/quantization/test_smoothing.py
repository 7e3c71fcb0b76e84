"""Smoothing: the paper's formula, a fold that cancels, and llmcompressor's own modifier."""

import pytest
import torch

from helpers.core.errors import StudyError
from helpers.quantization.calibration import run_calibration, smoothing_groups
from helpers.quantization.smoothing import (
    fold_scales_,
    same_alpha,
    smooth_,
    smoothed_absmax,
    smoothing_scales,
)

NORMS = ("attention_input", "mlp_input")


@pytest.fixture
def items():
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, 259, (n,), generator=generator).tolist() for n in (9, 23, 14, 5)]


@pytest.fixture
def absmax(model, items):
    statistics = run_calibration(model, items, batch_tokens=64)
    return {name: of_input.absmax for name, of_input in statistics.items()}


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 0.85, 1.0])
def test_scales_are_the_papers_formula(alpha):
    """Equation 4, written out in plain Python."""
    act, weight = [0.5, 8.0, 120.0, 3.0], [0.25, 0.1, 0.9, 2.0]
    expected = [a**alpha / w ** (1 - alpha) for a, w in zip(act, weight, strict=True)]
    scales = smoothing_scales(torch.tensor(act), torch.tensor(weight), alpha=alpha)
    torch.testing.assert_close(scales, torch.tensor(expected))


def test_alpha_moves_all_difficulty_one_way():
    act, weight = torch.tensor([4.0, 100.0]), torch.tensor([0.5, 0.2])
    to_weights = smoothing_scales(act, weight, alpha=1.0)
    torch.testing.assert_close(act / to_weights, torch.ones(2))
    to_activations = smoothing_scales(act, weight, alpha=0.0)
    torch.testing.assert_close(weight * to_activations, torch.ones(2))


@pytest.mark.parametrize("alpha", [-0.1, 1.7, float("nan")])
def test_alpha_outside_its_range_is_refused(alpha):
    with pytest.raises(ValueError, match=r"alpha = .* is outside \[0, 1\]"):
        smoothing_scales(torch.ones(2), torch.ones(2), alpha=alpha)


def test_dead_channels_keep_scales_finite():
    scales = smoothing_scales(torch.tensor([0.0, 1.0]), torch.tensor([1.0, 0.0]), alpha=0.5)
    assert torch.isfinite(scales).all()
    assert (scales > 0).all()


def test_folding_scales_keeps_outputs():
    """diag(s)^-1 and diag(s) cancel: smoothing alone must not change Y."""
    torch.manual_seed(3)
    norm = torch.nn.RMSNorm(16).double()
    linears = [torch.nn.Linear(16, n, bias=n == 5).double() for n in (5, 8)]
    x, scales = torch.randn(7, 16).double(), torch.rand(16) + 0.1
    expected = [linear(norm(x)) for linear in linears]
    fold_scales_(norm, linears, scales, norm_offset=0)
    torch.testing.assert_close([linear(norm(x)) for linear in linears], expected)


@pytest.mark.parametrize("bad", [0.0, -1.0, float("nan"), float("inf")])
def test_bad_scales_are_refused_before_anything_changes(bad):
    norm, linear = torch.nn.RMSNorm(2), torch.nn.Linear(2, 2)
    before = linear.weight.clone()
    with pytest.raises(ValueError, match="positive and finite"):
        fold_scales_(norm, [linear], torch.tensor([1.0, bad]), norm_offset=0)
    assert torch.equal(linear.weight, before)


@pytest.mark.parametrize("targets", [NORMS, (*NORMS, "mlp_down")])
def test_smoothing_keeps_the_models_function(exact_model, items, targets):
    absmax = {
        name: statistics.absmax
        for name, statistics in run_calibration(exact_model, items, batch_tokens=64).items()
    }
    ids = torch.tensor([items[1]])
    expected = exact_model(ids).logits
    smoothed = smooth_(exact_model, absmax, targets, same_alpha(exact_model.config, targets, 0.5))
    assert len(smoothed) == len(targets) * exact_model.config.num_hidden_layers
    assert not any((s.scales == 1).all() for s in smoothed)
    torch.testing.assert_close(exact_model(ids).logits, expected, rtol=1e-4, atol=1e-5)


def test_calibrated_maxima_after_smoothing_are_those_of_the_smoothed_model(model, items, absmax):
    """Dividing the statistics by s must equal calibrating the smoothed model anew."""
    targets = (*NORMS, "mlp_down")
    smoothed = smooth_(model, absmax, targets, same_alpha(model.config, targets, 0.6))
    predicted = smoothed_absmax(absmax, smoothed)
    measured = run_calibration(model, items, batch_tokens=64)
    for name, expected in predicted.items():
        torch.testing.assert_close(measured[name].absmax, expected, rtol=1e-3, atol=1e-5)


def test_value_to_output_smoothing_is_refused_under_grouped_query_attention(model):
    with pytest.raises(StudyError, match=r"attention_output.* 2 and 4"):
        smoothing_groups(model.config, ("attention_output",))


def test_agrees_with_llmcompressors_modifier(model, tokenizer, items, tmp_path):
    """Same formula, other statistics: theirs are max - min for max|x|, 2 max|w| for max|w|.

    At alpha = 0.5 that is the paper's formula with half the range in place of the abs-max;
    given half the range, our scales must make the very same model. Items go in one by
    one, unpadded, since llmcompressor's hooks count padding.
    """
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier

    model.save_pretrained(tmp_path)
    theirs, ours = type(model).from_pretrained(tmp_path), model
    rows = Dataset.from_list([{"input_ids": i, "attention_mask": [1] * len(i)} for i in items])
    mappings = [
        [["re:.*q_proj", "re:.*k_proj", "re:.*v_proj"], "re:.*input_layernorm"],
        [["re:.*gate_proj", "re:.*up_proj"], "re:.*post_attention_layernorm"],
    ]
    oneshot(
        model=theirs,
        processor=tokenizer,
        dataset=rows,
        recipe=SmoothQuantModifier(smoothing_strength=0.5, mappings=mappings),
        num_calibration_samples=len(items),
        max_seq_length=64,
        pipeline="basic",
    )
    half_ranges = {name: r / 2 for name, r in _input_ranges(ours, items).items()}
    smooth_(ours, half_ranges, NORMS, same_alpha(ours.config, NORMS, 0.5))
    expected = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter, expected[name], rtol=1e-4, atol=1e-6, msg=name)


def _input_ranges(model, items):
    """Linear name to per-channel max - min of its input over all tokens of all items."""
    seen: dict[str, list[torch.Tensor]] = {}
    handles = [
        module.register_forward_pre_hook(
            lambda _m, args, name=name: seen.setdefault(name, []).append(args[0][0])
        )
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
    ]
    with torch.inference_mode():
        for item in items:
            model(torch.tensor([item]))
    for handle in handles:
        handle.remove()
    return {n: torch.cat(x).amax(0) - torch.cat(x).amin(0) for n, x in seen.items()}
