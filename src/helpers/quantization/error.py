"""How much of each Linear's output survives int8: signal-to-quantization-noise ratio.

Every Linear is looked at alone, on its real float inputs: errors do not accumulate from
layer to layer, so a bad layer is seen where it is.
"""

import copy

import torch
from torch import Tensor, nn

from helpers.quantization.int8 import HALF_RANGE, absmax_scale
from helpers.quantization.layer_groups import quantized_linears
from helpers.quantization.smoothing import smooth_, smoothed_absmax
from helpers.study.schema import Variant


def sqnr_with_and_without(
    model, items: list[list[int]], variant: Variant, act_absmax: dict[str, Tensor]
) -> dict[str, dict[str, float]]:
    """SQNR by Linear of the model as it is and, if the variant smooths, as smoothed.

    A float variant is looked at as if it were quantized per channel and per token. The
    model is not changed.
    """
    scheme = variant.scheme or ("channel", "token_dynamic")
    recipe = Variant(weights=scheme[0], activations=scheme[1], ignore=variant.ignore)
    curves = {"without smoothing": linear_sqnr(model, items, recipe, static_absmax=act_absmax)}
    if variant.smooth and not variant.recipe:
        copied = copy.deepcopy(model)
        done = smooth_(copied, act_absmax, variant.smooth)
        limits = smoothed_absmax(act_absmax, done)
        curves["with smoothing"] = linear_sqnr(copied, items, recipe, static_absmax=limits)
    return curves


@torch.inference_mode()
def linear_sqnr(
    model, items: list[list[int]], variant: Variant, *, static_absmax: dict[str, Tensor]
) -> dict[str, float]:
    """SQNR in dB of each Linear's output under the variant's scheme, by name.

    Args:
        model: a float model, smoothed or not.
        items: token ids; each is read alone.
        variant: its scheme decides the granularities.
        static_absmax: calibrated maxima of this model's inputs, for static activations.
    """
    signal: dict[str, float] = {}
    noise: dict[str, float] = {}

    def hook(name: str):
        def observe(module: nn.Linear, args: tuple, output: Tensor) -> None:
            x = args[0].reshape(-1, module.in_features)
            approximate = _quantized_output(x, module.weight, variant, static_absmax.get(name))
            exact = output.reshape(-1, module.out_features).float()
            if module.bias is not None:
                exact = exact - module.bias.float()
            signal[name] = signal.get(name, 0.0) + exact.square().sum().item()
            noise[name] = noise.get(name, 0.0) + (exact - approximate).square().sum().item()

        return observe

    targets = quantized_linears(model, variant.ignore)
    handles = [m.register_forward_hook(hook(n)) for n, m in targets.items()]
    try:
        for tokens in items:
            ids = torch.tensor([tokens], device=model.device)
            model.base_model(input_ids=ids, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return {name: decibels(signal[name], noise[name]) for name in targets}


def decibels(signal: float, noise: float) -> float:
    """10·log10(signal / noise); 200 dB stands for no noise at all."""
    if noise == 0.0:
        return 200.0
    return min(200.0, 10.0 * torch.tensor(signal / noise).log10().item())


def _quantized_output(x: Tensor, weight: Tensor, variant: Variant, absmax: Tensor | None) -> Tensor:
    """(tokens, out_features) what int8 makes of x @ Wᵀ at the variant's granularities."""
    weights, activations = variant.scheme
    w = weight.float()
    w = fake_quantize(w, w.abs().amax(1, keepdim=True) if weights == "channel" else w.abs().amax())
    x = x.float()
    if activations == "token_dynamic":
        limit = x.abs().amax(1, keepdim=True)
    else:
        limit = x.abs().amax() if activations == "tensor_dynamic" else absmax.max().to(x.device)
    return fake_quantize(x, limit) @ w.T


def fake_quantize(values: Tensor, absmax: Tensor) -> Tensor:
    """Values rounded to the int8 grid whose ±127.5 steps reach `absmax`, as floats."""
    scale = absmax_scale(absmax)
    return (values / scale).round().clamp(-HALF_RANGE - 0.5, HALF_RANGE - 0.5) * scale
