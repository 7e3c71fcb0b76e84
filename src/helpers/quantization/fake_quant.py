"""What int8 makes of a model, one Linear at a time: the quantized model is never built.

A Linear is smoothed and rounded when its input arrives, and forgotten when it has
answered, so that a choice or an explanation needs one copy of the weights. What counts is
the checkpoint, which llmcompressor makes; the tests hold the two together.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from helpers.quantization.int8_linear import HALF_RANGE, absmax_scale
from helpers.quantization.layer_groups import quantized_linears, smoothing_groups
from helpers.quantization.smoothing import group_scales
from helpers.runtime.linears import product
from helpers.study.schema_variants import Variant


@dataclass
class LinearScales:
    """Smoothing scales of one Linear: divisors of its inputs and of its last outputs."""

    inputs: Tensor | None = None
    outputs: Tensor | None = None


@dataclass(frozen=True)
class SmoothedLinear:
    """A Linear with smoothing applied, and one smoothed input.

    Attributes:
        x: (tokens, in_features) float32.
        weight: (out_features, in_features) float32.
        absmax: (in_features,) calibrated maxima of x, or None.
    """

    x: Tensor
    weight: Tensor
    absmax: Tensor | None

    def exact(self) -> Tensor:
        """(tokens, out_features) x @ Wᵀ."""
        return product(self.x, self.weight)

    def rounded(self, variant: Variant) -> Tensor:
        """(tokens, out_features) int8 output at the variant's granularities.

        For a float variant: per channel and per token.
        """
        weights, activations = variant.scheme or ("channel", "token_dynamic")
        magnitude = self.weight.abs()
        top = magnitude.amax(1, keepdim=True) if weights == "channel" else magnitude.amax()
        if activations == "token_dynamic":
            limit = self.x.abs().amax(1, keepdim=True)
        elif activations == "tensor_dynamic":
            limit = self.x.abs().amax()
        else:
            limit = self.absmax.max().to(self.x.device)
        return product(fake_quantize(self.x, limit), fake_quantize(self.weight, top))


def apply_smoothing(
    linear: nn.Linear, x: Tensor, absmax: Tensor | None, scales: LinearScales
) -> SmoothedLinear:
    """The Linear and its input, smoothed by the scales; neither original is changed.

    Args:
        x: (…, in_features).
        absmax: (in_features,) calibrated maxima of the input before smoothing.
    """
    x, weight = x.reshape(-1, linear.in_features).float(), linear.weight.float()
    if scales.inputs is not None:
        divisor = scales.inputs.to(x.device)
        x, weight = x / divisor, weight * divisor
        absmax = None if absmax is None else absmax.to(x.device) / divisor
    if scales.outputs is not None:
        weight = weight.clone()
        weight[-len(scales.outputs) :] /= scales.outputs.to(x.device)[:, None]
    return SmoothedLinear(x, weight, absmax)


def linear_scales(
    model, variant: Variant, act_absmax: dict[str, Tensor], alphas: dict[str, float]
) -> dict[str, LinearScales]:
    """Linear name to the scales that the variant's smoothing folds into it."""
    scales_by_name: dict[str, LinearScales] = {}
    for group in smoothing_groups(model.config, variant.smooth.targets):
        alpha = alphas[group.consumers[0]]
        scales = group_scales(model, group, act_absmax, alpha=alpha).float()
        for name in group.consumers:
            scales_by_name.setdefault(name, LinearScales()).inputs = scales
        scales_by_name.setdefault(group.producer, LinearScales()).outputs = scales
    return scales_by_name


@contextmanager
def simulated_quantization(
    model, variant: Variant, act_absmax: dict[str, Tensor], alphas: dict[str, float]
) -> Iterator[None]:
    """Inside, the float model computes as its variant would.

    Args:
        model: the float model, not smoothed; its weights stay as they are.
        act_absmax: Linear name to (in_features,) calibrated abs-max of its input.
        alphas: α of each group, by the name of its first consumer.
    """
    scales = linear_scales(model, variant, act_absmax, alphas) if variant.smooth else {}
    targets = quantized_linears(model, variant.ignore)
    own_forwards = {linear: vars(linear).get("forward") for linear in targets.values()}
    for name, linear in targets.items():
        of_linear = scales.get(name, LinearScales())
        linear.forward = partial(
            _simulated_forward, linear, variant, act_absmax.get(name), of_linear
        )
    try:
        yield
    finally:
        for linear, forward in own_forwards.items():
            del linear.forward
            if forward is not None:
                linear.forward = forward


def _simulated_forward(
    linear: nn.Linear, variant: Variant, absmax, scales: LinearScales, x: Tensor
) -> Tensor:
    """The Linear's int8 output with its output scales undone."""
    y = apply_smoothing(linear, x, absmax, scales).rounded(variant)
    if scales.outputs is not None:
        y[:, -len(scales.outputs) :] *= scales.outputs.to(y.device)
    if linear.bias is not None:
        y += linear.bias.float()
    return y.to(x.dtype).reshape(*x.shape[:-1], -1)


def fake_quantize(values: Tensor, absmax: Tensor) -> Tensor:
    """Values rounded to the int8 grid whose ±127.5 steps reach `absmax`, as floats."""
    scale = absmax_scale(absmax)
    return torch.div(values, scale).round_().clamp_(-HALF_RANGE - 0.5, HALF_RANGE - 0.5) * scale
