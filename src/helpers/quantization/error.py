"""How much of each Linear's output survives int8: signal-to-quantization-noise ratio.

Every Linear is looked at alone, on its real float inputs: errors do not accumulate from
layer to layer, so a bad layer is seen where it is. The smoothed model is never built:
its Linears are made one at a time, from the scales, while the float model reads.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from helpers.quantization.int8 import HALF_RANGE, absmax_scale
from helpers.quantization.layer_groups import quantized_linears, smoothing_groups
from helpers.quantization.smoothing import group_scales
from helpers.sources.experts import every_expert_reads
from helpers.study.schema import Variant


@dataclass
class Scales:
    """What smoothing does to one Linear: its inputs are divided, its last outputs too."""

    inputs: Tensor | None = None
    outputs: Tensor | None = None


@dataclass
class Sums:
    """Squared signal and noise by Linear."""

    signal: dict[str, float] = field(default_factory=dict)
    noise: dict[str, float] = field(default_factory=dict)

    def add(self, name: str, exact: Tensor, approximate: Tensor) -> None:
        square = (exact - approximate).square().sum().item()
        self.signal[name] = self.signal.get(name, 0.0) + exact.square().sum().item()
        self.noise[name] = self.noise.get(name, 0.0) + square

    def decibels(self) -> dict[str, float]:
        return {name: decibels(self.signal[name], self.noise[name]) for name in self.signal}


@torch.inference_mode()
def sqnr_with_and_without(
    model,
    items: list[list[int]],
    variant: Variant,
    act_absmax: dict[str, Tensor],
    alphas: dict[str, float],
) -> dict[str, dict[str, float]]:
    """SQNR in dB by Linear of the model as it is and, if the variant smooths, as smoothed.

    A float variant is looked at as if it were quantized per channel and per token. The
    model is not changed.

    Args:
        model: the float model, not smoothed.
        items: token ids; each is read alone, in a mixture by every expert.
        variant: its scheme decides the granularities, its targets where scales go.
        act_absmax: Linear name to (in_features,) calibrated abs-max of its input.
        alphas: α of each group, by the name of its first consumer.
    """
    smooths = variant.smooth and not variant.recipe
    scales = linear_scales(model, variant, act_absmax, alphas) if smooths else {}
    curves = {"without smoothing": Sums()}
    if smooths:
        curves["with smoothing"] = Sums()
    targets = quantized_linears(model, variant.ignore)

    def hook(name: str):
        def observe(module: nn.Linear, args: tuple) -> None:
            x, limit = args[0].reshape(-1, module.in_features).float(), act_absmax.get(name)
            for label, sums in curves.items():
                done = scales.get(name, Scales()) if label == "with smoothing" else Scales()
                sums.add(name, *_outputs(x, module.weight.float(), variant, limit, done))

        return observe

    handles = [m.register_forward_pre_hook(hook(n)) for n, m in targets.items()]
    try:
        with every_expert_reads(model):
            for tokens in items:
                ids = torch.tensor([tokens], device=model.device)
                model.base_model(input_ids=ids, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return {label: sums.decibels() for label, sums in curves.items()}


def linear_scales(
    model, variant: Variant, act_absmax: dict[str, Tensor], alphas: dict[str, float]
) -> dict[str, Scales]:
    """Linear name to the scales that the variant's smoothing would fold into it."""
    found: dict[str, Scales] = {}
    for group in smoothing_groups(model.config, variant.smooth.targets):
        alpha = alphas[group.consumers[0]]
        scales = group_scales(model, group, act_absmax, alpha=alpha).float()
        for name in group.consumers:
            found.setdefault(name, Scales()).inputs = scales
        found.setdefault(group.producer, Scales()).outputs = scales
    return found


def group_error(
    x: Tensor, linear: nn.Linear, variant: Variant, absmax: Tensor, scales: Scales
) -> float:
    """Squared error of one Linear's int8 output, as smoothed by the scales.

    Args:
        x: (tokens, in_features) float inputs.
        absmax: (in_features,) calibrated maxima of the input.
    """
    exact, approximate = _outputs(x, linear.weight.float(), variant, absmax, scales)
    return (exact - approximate).square().sum().item()


def decibels(signal: float, noise: float) -> float:
    """10·log10(signal / noise); 200 dB stands for no noise at all."""
    if noise == 0.0:
        return 200.0
    return min(200.0, 10.0 * torch.tensor(signal / noise).log10().item())


def _outputs(
    x: Tensor, weight: Tensor, variant: Variant, absmax: Tensor | None, scales: Scales
) -> tuple[Tensor, Tensor]:
    """(tokens, out_features) x @ Wᵀ of the smoothed Linear, exact and as int8 has it."""
    if scales.inputs is not None:
        divisor = scales.inputs.to(x.device)
        x, weight = x / divisor, weight * divisor
        absmax = None if absmax is None else absmax.to(x.device) / divisor
    if scales.outputs is not None:
        weight = weight.clone()
        weight[-len(scales.outputs) :] /= scales.outputs.to(x.device)[:, None]
    return x @ weight.T, _quantized_output(x, weight, variant, absmax)


def _quantized_output(x: Tensor, w: Tensor, variant: Variant, absmax: Tensor | None) -> Tensor:
    """(tokens, out_features) what int8 makes of x @ Wᵀ at the variant's granularities."""
    weights, activations = variant.scheme or ("channel", "token_dynamic")
    w = fake_quantize(w, w.abs().amax(1, keepdim=True) if weights == "channel" else w.abs().amax())
    if activations == "token_dynamic":
        limit = x.abs().amax(1, keepdim=True)
    else:
        limit = x.abs().amax() if activations == "tensor_dynamic" else absmax.max().to(x.device)
    return fake_quantize(x, limit) @ w.T


def fake_quantize(values: Tensor, absmax: Tensor) -> Tensor:
    """Values rounded to the int8 grid whose ±127.5 steps reach `absmax`, as floats."""
    scale = absmax_scale(absmax)
    return (values / scale).round().clamp(-HALF_RANGE - 0.5, HALF_RANGE - 0.5) * scale
