"""The INT8 Linear against exact integer arithmetic, at the edges too."""

import pytest
import torch

from helpers.quantization.int8_linear import Int8Linear, absmax_scale, quantize_activations

KINDS = ["token_dynamic", "tensor_dynamic", "tensor_static"]


def make(kind, out_features=24, in_features=40, *, bias=True, seed=0):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randint(-128, 128, (out_features, in_features), generator=generator)
    return Int8Linear(
        weight.to(torch.int8),
        torch.rand(out_features, 1, generator=generator) * 0.01 + 1e-4,
        torch.randn(out_features, generator=generator) if bias else None,
        activations=kind,
        input_scale=torch.tensor([0.02]) if kind == "tensor_static" else None,
    )


def reference(linear, x):
    """The same in float64 and int64: no kernel involved."""
    rows = x.reshape(-1, linear.in_features).float()
    if linear.activations == "token_dynamic":
        scale = rows.abs().amax(1, keepdim=True) / 127.5
    elif linear.activations == "tensor_dynamic":
        scale = (rows.abs().max() / 127.5).reshape(1, 1)
    else:
        scale = linear.input_scale.reshape(1, 1)
    scale = torch.where(scale == 0, torch.finfo(torch.float32).eps, scale)
    q = (rows / scale).round().clamp(-128, 127).long()
    y = (q @ linear.weight_t.long()).double() * scale.double() * linear.weight_scale.double()
    y = y if linear.bias is None else y + linear.bias.double()
    return y.reshape(*x.shape[:-1], -1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(1, 40), (3, 40), (2, 7, 40), (17, 40), (64, 40)])
def test_equals_exact_integer_arithmetic(kind, shape):
    linear, x = make(kind), torch.randn(*shape)
    expected = reference(linear, x)
    torch.testing.assert_close(linear(x).double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("out_features", "in_features"), [(1, 8), (7, 13), (33, 129), (8, 576)])
def test_odd_shapes(kind, out_features, in_features):
    linear, x = make(kind, out_features, in_features), torch.randn(5, in_features)
    torch.testing.assert_close(linear(x).double(), reference(linear, x), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_an_empty_batch_stays_empty(kind):
    assert make(kind)(torch.zeros(0, 40)).shape == (0, 24)
    assert make(kind)(torch.zeros(2, 0, 40)).shape == (2, 0, 24)


@pytest.mark.parametrize("kind", KINDS)
def test_zero_rows_give_the_bias(kind):
    linear = make(kind)
    x = torch.zeros(3, 40)
    torch.testing.assert_close(linear(x), linear.bias.expand(3, -1))
    x[1] = torch.randn(40)
    torch.testing.assert_close(linear(x)[0], linear.bias)


@pytest.mark.parametrize("kind", ["token_dynamic", "tensor_dynamic"])
def test_extreme_outliers_do_not_overflow(kind):
    linear, x = make(kind, bias=False), torch.randn(4, 40)
    x[2, 5] = 3e6
    torch.testing.assert_close(linear(x).double(), reference(linear, x), rtol=1e-5, atol=1e-2)


def test_a_tokens_answer_does_not_depend_on_its_neighbours():
    linear, x = make("token_dynamic"), torch.randn(6, 40)
    together = linear(x)
    x[1:] *= 1000
    assert torch.equal(linear(x)[0], together[0])
    assert torch.equal(linear(x[:1])[0], together[0])


def test_static_activations_clip_at_the_calibrated_range():
    linear = make("tensor_static", bias=False)
    limit = 0.02 * 127
    over, at = torch.full((1, 40), 50.0), torch.full((1, 40), limit)
    torch.testing.assert_close(linear(over), linear(at))


def test_quantized_activations_use_the_whole_range():
    x = torch.linspace(-3, 3, 101)[None]
    q = quantize_activations(x, absmax_scale(x.abs().amax(-1, keepdim=True)))
    assert q.min() == -128
    assert q.max() == 127


def test_weights_are_held_once_in_one_byte():
    linear = make("token_dynamic", bias=False)
    held = sum(b.numel() * b.element_size() for b in linear.buffers())
    assert held == 24 * 40 + 24 * 4  # int8 weights and one float32 scale a row
    assert list(linear.parameters()) == []


def test_float_weights_are_refused():
    with pytest.raises(ValueError, match=r"needs torch\.int8"):
        Int8Linear(
            torch.ones(2, 2), torch.ones(2), None, activations="token_dynamic", input_scale=None
        )


def test_a_static_layer_without_scale_is_refused():
    weight = torch.ones(2, 2, dtype=torch.int8)
    with pytest.raises(ValueError, match="do not fit"):
        Int8Linear(weight, torch.ones(2), None, activations="tensor_static", input_scale=None)
