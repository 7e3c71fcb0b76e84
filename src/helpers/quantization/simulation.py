"""Simulated int8, one Linear at a time: its SQNR, its effect on next tokens, and the choice of α.

The quantized model is never built: a Linear is smoothed and rounded when its input arrives, and
forgotten when it has answered, so that a choice or an explanation needs one copy of the weights.
What counts is the checkpoint, which llmcompressor makes; the tests hold the two together.

SQNR, the signal-to-quantization-noise ratio of a Linear's output, is taken on its real float
inputs: errors do not accumulate from layer to layer, so a bad layer is seen where it is. How far a
model's next-token distributions are from the float model's is measured on a few texts, also with
some Linears left float.

α is a number, the best of a grid, or one for each group of Linears, chosen with weights rounded to
nearest. All work from the one calibration pass. The choice is made on the last tenth of the
calibration items, with maxima over the others; evaluation items have no say. A grid is judged by
how far next-token distributions move, `auto` by the squared error of each group's own outputs. The
scales of the checkpoint then come from the maxima over all items.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from types import MappingProxyType

import torch
from torch import Tensor, nn

from helpers.core.errors import StudyError
from helpers.core.processes import Bar
from helpers.quantization.calibration import (
    quantized_linears,
    smoothing_groups,
)
from helpers.quantization.int8_linear import HALF_RANGE, absmax_scale
from helpers.quantization.smoothing import (
    LinearScales,
    group_scales,
    linear_scales,
    same_alpha,
)
from helpers.runtime.devices import (
    every_expert_reads,
    pad,
    product,
    simulated_by_onednn,
    token_budget_batches,
)
from helpers.runtime.discovery import architecture, head_logits
from helpers.sources.model_files import TensorFiles, batch_tokens_for
from helpers.study.schema import Numbers, Smooth, Variant


@dataclass(frozen=True)
class SmoothedLinear:
    """A Linear with smoothing applied, and one smoothed input.

    Attributes:
        x: (tokens, in_features) float32.
        weight: (out_features, in_features) float32.
        absmax: (in_features,) calibrated maxima of x, or None.
        given: (out_features, in_features) float32 weights to multiply with, not to be rounded here:
            a checkpoint's, or the float ones; None to round `weight`.
        group: input features of one scale of a ruler's grouped weights.
    """

    x: Tensor
    weight: Tensor
    absmax: Tensor | None
    given: Tensor | None = None
    group: int = 0

    def exact(self) -> Tensor:
        """(tokens, out_features) x @ Wᵀ."""
        return product(self.x, self.weight)

    def rounded(self, variant: Variant) -> Tensor:
        """(tokens, out_features) output at the variant's granularities, in int8 or as a ruler.

        For a float variant: int8 per channel and per token. Weights are rounded to nearest if none
        are given.
        """
        if variant.ruler:
            of_weights, of_activations = variant.ruler
            x = fake_round(self.x, of_activations) if of_activations else self.x
            weight = fake_round(self.weight, of_weights, self.group) if of_weights else self.weight
            return product(x, weight)
        weights, activations = variant.scheme or ("channel", "token_dynamic")
        if activations == "token_dynamic":
            limit = self.x.abs().amax(1, keepdim=True)
        elif activations == "tensor_dynamic":
            limit = self.x.abs().amax()
        else:
            limit = self.absmax.max().to(self.x.device)
        if self.given is not None:
            return product(fake_quantize(self.x, limit), self.given)
        magnitude = self.weight.abs()
        top = magnitude.amax(1, keepdim=True) if weights == "channel" else magnitude.amax()
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


def scales_in_files(model, checkpoint: TensorFiles) -> dict[str, LinearScales]:
    """Linear name to the smoothing scales that the files of a checkpoint show.

    A norm was divided by what is left of it. The rows of a Linear were if their steps say so and
    the weights that read them are far nearer with these scales than without.

    Args:
        model: the float model, not smoothed.
        checkpoint: files of int8 Linears, and with a norm wherever the model has one.
    """
    found: dict[str, LinearScales] = {}
    targets = dict.fromkeys(p.target for p in architecture(model.config).places if p.producer)
    for group in smoothing_groups(model.config, tuple(targets)):
        producer, first = (model.get_submodule(n) for n in (group.producer, group.consumers[0]))
        before = producer.weight.detach().cpu().double()
        if before.ndim == 1:
            after = checkpoint[f"{group.producer}.weight"].double()
            quotient = (before + group.norm_offset) / (after + group.norm_offset)
            scales = torch.where(before == after, 1.0, quotient)
        else:
            steps = [
                checkpoint.get(f"{n}.weight_scale") for n in (group.producer, *group.consumers)
            ]
            if any(step is None for step in steps) or steps[0].numel() == 1:
                continue
            inputs = found.get(group.producer, LinearScales()).inputs
            smoothed = before if inputs is None else before * inputs
            scales = smoothed.abs().amax(1) / HALF_RANGE / steps[0].double().flatten()
            scales = scales[-first.in_features :]
            weight = first.weight.detach().cpu().double()
            stored = _stored_weight(checkpoint, group.consumers[0])
            if 2 * (stored - weight * scales).norm() > (stored - weight).norm():
                continue
            found.setdefault(group.producer, LinearScales()).outputs = scales.float()
        if not torch.equal(scales, torch.ones_like(scales)):
            for name in group.consumers:
                found.setdefault(name, LinearScales()).inputs = scales.float()
    return found


def simulated_quantization(
    model,
    variant: Variant,
    act_absmax: dict[str, Tensor],
    alphas: dict[str, float],
    *,
    float_weights: bool = False,
) -> AbstractContextManager[None]:
    """Inside, the float model computes as its variant would, with weights rounded to nearest.

    Args:
        model: the float model, not smoothed; its weights stay as they are.
        act_absmax: Linear name to (in_features,) calibrated abs-max of its input.
        alphas: α of each group, by the name of its first consumer.
        float_weights: round the activations alone.
    """
    scales = linear_scales(model, variant, act_absmax, alphas)
    targets = quantized_linears(model, variant.ignore)
    return simulated_linears(targets, variant, act_absmax, scales, float_weights=float_weights)


def simulated_linears(
    linears: Mapping[str, nn.Linear],
    variant: Variant,
    act_absmax: dict[str, Tensor],
    scales: Mapping[str, LinearScales],
    *,
    float_weights: bool = False,
) -> AbstractContextManager[None]:
    forwards: dict[nn.Module, Callable] = {}
    for name, linear in linears.items():
        of_linear = scales.get(name, LinearScales())
        forwards[linear] = partial(
            _simulated_forward, linear, variant, act_absmax.get(name), of_linear, float_weights
        )
    return _computing(forwards)


@contextmanager
def _computing(forwards: Mapping[nn.Module, Callable]) -> Iterator[None]:
    """Inside, modules have other forwards."""
    own_forwards = {module: vars(module).get("forward") for module in forwards}
    for module, forward in forwards.items():
        module.forward = forward
    try:
        yield
    finally:
        for module, forward in own_forwards.items():
            del module.forward
            if forward is not None:
                module.forward = forward


def _simulated_forward(
    linear: nn.Linear,
    variant: Variant,
    absmax,
    scales: LinearScales,
    float_weights: bool,
    x: Tensor,
) -> Tensor:
    """The Linear's int8 output with its output scales undone."""
    smoothed = apply_smoothing(linear, x, absmax, scales)
    if float_weights:
        smoothed = replace(smoothed, given=smoothed.weight)
    y = smoothed.rounded(variant)
    if scales.outputs is not None:
        y[:, -len(scales.outputs) :] *= scales.outputs.to(y.device)
    if linear.bias is not None:
        y += linear.bias.float()
    return y.to(x.dtype).reshape(*x.shape[:-1], -1)


def fake_quantize(values: Tensor, absmax: Tensor) -> Tensor:
    """Values rounded to the int8 grid whose ±127.5 steps reach `absmax`, as floats."""
    scale = absmax_scale(absmax)
    return torch.div(values, scale).round_().clamp_(-HALF_RANGE - 0.5, HALF_RANGE - 0.5) * scale


GROUP_SIZES = (128, 64, 32, 16, 8, 4, 2, 1)  # 128 is usual; every width has to be a multiple
LARGEST_E4M3 = 448.0


def group_size(widths: Iterable[int]) -> int:
    """The largest usual size of a group that divides every width (in_features)."""
    sizes = set(widths)
    return next(size for size in GROUP_SIZES if all(width % size == 0 for width in sizes))


def fake_round(values: Tensor, numbers: Numbers, group: int = 0) -> Tensor:
    """Values rounded to nearest as a ruler rounds them, with one scale for a row or a group.

    Args:
        values: (rows, features) float32.
        group: features of one scale, if the granularity is `group`.
    """
    parts = values.unflatten(1, (-1, group)) if numbers.granularity == "group" else values
    limit = parts.abs().amax(-1, keepdim=True)
    if numbers.kind == "float":
        scale = torch.where(limit == 0, torch.ones_like(limit), limit / LARGEST_E4M3)
        steps = (parts / scale).clamp(-LARGEST_E4M3, LARGEST_E4M3)
        rounded = steps.to(torch.float8_e4m3fn).to(values.dtype) * scale
    else:
        half = 2 ** (numbers.bits - 1)  # of the levels: ±(half - 1/2) steps reach the limit
        scale = torch.where(limit == 0, torch.ones_like(limit), limit / (half - 0.5))
        rounded = (parts / scale).round().clamp(-half, half - 1) * scale
    return rounded.reshape(values.shape)


ITEMS = 4  # calibration items that are read; every Linear computes five times on each


@dataclass
class SquaredSums:
    """Squared signal and noise by Linear."""

    signal: dict[str, float] = field(default_factory=dict)
    noise: dict[str, float] = field(default_factory=dict)

    def add(self, name: str, smoothed: SmoothedLinear, variant: Variant) -> None:
        exact = smoothed.exact()
        noise = (exact - smoothed.rounded(variant)).square().sum().item()
        self.signal[name] = self.signal.get(name, 0.0) + exact.square().sum().item()
        self.noise[name] = self.noise.get(name, 0.0) + noise

    def decibels(self) -> dict[str, float]:
        return {name: decibels(self.signal[name], self.noise[name]) for name in self.signal}


def sqnr_with_and_without(
    model,
    items: list[list[int]],
    variant: Variant,
    act_absmax: dict[str, Tensor],
    alphas: dict[str, float],
) -> dict[str, dict[str, float]]:
    """SQNR in dB by Linear, without smoothing and, if the variant smooths, with smoothing.

    Weights are rounded to nearest, whatever the variant's rounding. For a float variant, the SQNR
    of int8 per channel and per token. The model is not changed.

    Args:
        model: the float model, not smoothed.
        items: token ids; each is read alone, in a mixture by every expert.
        variant: gives the granularities and the smoothing targets.
        act_absmax: Linear name to (in_features,) calibrated abs-max of its input.
        alphas: α of each group, by the name of its first consumer.

    Raises:
        StudyError: a Linear's output or error is not finite.
    """
    scales: dict[str, dict[str, LinearScales]] = {"without smoothing": {}}
    if variant.smooth and not variant.recipe:
        scales["with smoothing"] = linear_scales(model, variant, act_absmax, alphas)
    return _sqnr(model, items, variant, act_absmax, scales)


def sqnr_as_stored(
    load_model: Callable[[], nn.Module],
    items: list[list[int]],
    variant: Variant,
    act_absmax: dict[str, Tensor],
    alphas: dict[str, float],
    checkpoint: Path,
) -> dict[str, dict[str, float]]:
    """SQNR in dB by Linear with the weights that a checkpoint holds; empty if they are nearest.

    Of a checkpoint made elsewhere the rounding is not known, and its scales are in its norms.

    Args and raises: as `sqnr_with_and_without`; the float model is loaded if it is needed, and the
    checkpoint is read one Linear at a time.
    """
    known_as_nearest = variant.rounding == "nearest" and not variant.made_elsewhere
    if not variant.quantized or known_as_nearest:
        return {}
    model, files = load_model(), TensorFiles(checkpoint, dtype=None)
    scales = linear_scales(model, variant, act_absmax, alphas)
    if variant.made_elsewhere:
        scales = scales_in_files(model, files)
    label = "weights as stored"
    stored = {label: files}
    return _sqnr(model, items, variant, act_absmax, {label: scales}, stored)


@torch.inference_mode()
def _sqnr(
    model,
    items: list[list[int]],
    variant: Variant,
    act_absmax: dict[str, Tensor],
    scales_by_label: dict[str, dict[str, LinearScales]],
    stored_by_label: Mapping[str, TensorFiles] = MappingProxyType({}),
) -> dict[str, dict[str, float]]:
    sums = {label: SquaredSums() for label in scales_by_label}
    targets = quantized_linears(model, variant.ignore)
    group = group_size(linear.in_features for linear in targets.values())

    def hook(name: str):
        def observe(module: nn.Linear, args: tuple) -> None:
            for label, scales in scales_by_label.items():
                of_linear = scales.get(name, LinearScales())
                smoothed = apply_smoothing(module, args[0], act_absmax.get(name), of_linear)
                smoothed = replace(smoothed, group=group)
                if label in stored_by_label:
                    weight = _stored_weight(stored_by_label[label], name).to(smoothed.x)
                    smoothed = replace(smoothed, given=weight)
                sums[label].add(name, smoothed, variant)

        return observe

    handles = [m.register_forward_pre_hook(hook(n)) for n, m in targets.items()]
    try:
        with every_expert_reads(model):
            for tokens in Bar(items, desc="error of each Linear", unit="item"):
                ids = torch.tensor([tokens], device=model.device)
                model.base_model(input_ids=ids, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    curves = {label: of_label.decibels() for label, of_label in sums.items()}
    for label, values in curves.items():
        if undefined := [name for name, value in values.items() if math.isnan(value)]:
            raise StudyError(
                f"the output SQNR of {undefined[0]} ({label}) is not a number: its inputs, weights "
                f"or smoothing factors are not finite; {len(undefined)} Linears are like it"
            )
    return curves


def _stored_weight(checkpoint: TensorFiles, name: str) -> Tensor:
    """(out_features, in_features) float32 weight of one Linear of a checkpoint."""
    step = checkpoint[f"{name}.weight_scale"].float().reshape(-1, 1)
    return checkpoint[f"{name}.weight"].float() * step


def decibels(signal: float, noise: float) -> float:
    """10·log10(signal / noise), limited to 200 dB (no noise) and −200 dB (no signal).

    NaN if either is not a finite number.
    """
    if not (math.isfinite(signal) and math.isfinite(noise)):
        return math.nan
    if noise == 0.0:
        return 200.0
    ratio = signal / noise
    return min(200.0, 10.0 * math.log10(ratio)) if ratio else -200.0


HEAD_ROWS = 64  # tokens whose logits are in memory at once
BATCH_TOKENS = 2048  # of one pass, including padding
JUDGES = 3  # judging items that a probe reads, since it reads them once for every kind of Linear


class DivergenceProbe:
    """The float model's log-probabilities on a few texts.

    Args:
        model: the float model.
        texts: token ids.
        variant: the variant to compare; with `tensor_dynamic`, texts are read one at a time.
    """

    def __init__(self, model, texts: list[list[int]], variant: Variant):
        batched = not variant.scheme or variant.scheme[1] != "tensor_dynamic"
        budget = batch_tokens_for(model.config, list(map(len, texts)), batch_tokens=BATCH_TOKENS)
        self.texts, self.batch_tokens = texts, budget if batched else 1
        self.states: list[list[Tensor]] = []  # by batch: what each decoder block reads
        self.expected = list(self._logprobs(model))

    def keep_states(self, model) -> None:
        """Keep what the float model's blocks read, so that `divergence` can begin at any of them.

        Nothing is kept if a block reads more than the states that the one before it returns.
        """
        read: list[Tensor] = []
        blocks = _blocks(model)
        keep = lambda _module, args: read.append(args[0])  # noqa: E731
        handles = [block.register_forward_pre_hook(keep) for block in blocks]
        list(self._logprobs(model))
        for handle in handles:
            handle.remove()
        self.states = [read[i : i + len(blocks)] for i in range(0, len(read), len(blocks))]
        again = self._logprobs(model, first_block=len(blocks) - 1)
        if not all(map(torch.equal, again, self.expected)):
            self.states = []

    def divergence(self, model, *, first_block: int = 0) -> dict[str, float | None]:
        """KL(float ‖ model) in nats per token, and the share of tokens with the same top-1.

        The KL is None if it is not finite; the gates judge such a model.

        Args:
            first_block: the first decoder block that differs from the float model's.
        """
        kl, agreements, tokens = 0.0, 0, 0
        logprobs_of_model = self._logprobs(model, first_block=first_block)
        for expected, logprobs in zip(self.expected, logprobs_of_model, strict=True):
            kl += (expected.exp() * (expected - logprobs)).sum(dtype=torch.float64).item()
            agreements += int((expected.max(-1).indices == logprobs.max(-1).indices).sum())
            tokens += len(logprobs)
        mean_kl = kl / tokens if math.isfinite(kl) else None
        return {"kl": mean_kl, "top1_agreement": agreements / tokens}

    @torch.inference_mode()
    def _logprobs(self, model, *, first_block: int = 0) -> Iterator[Tensor]:
        """Yield (some tokens, vocabulary) log-probabilities of all texts, a few tokens at a time.

        Texts are batched if possible, since a simulated Linear rounds its weights at each call.
        """
        device = model.device
        lengths = list(map(len, self.texts))
        batches = token_budget_batches(lengths, batch_tokens=self.batch_tokens)
        for number, batch in enumerate(batches):
            tokens = pad([self.texts[i] for i in batch], value=0, side="right", device=device)
            mask = pad([[1] * lengths[i] for i in batch], value=0, side="right", device=device)
            skipped = _blocks(model)[:first_block] if self.states else []
            state = self.states[number][first_block] if skipped else None
            with _computing({block: lambda *_, x=state, **_named: x for block in skipped}):
                output = model.base_model(input_ids=tokens, attention_mask=mask, use_cache=False)
            for rows in output.last_hidden_state[mask.bool()].split(HEAD_ROWS):
                yield head_logits(model, rows).float().log_softmax(-1).cpu()


def _blocks(model) -> nn.ModuleList:
    return model.get_submodule(architecture(model.config).blocks)


def activations_alone(
    model,
    variant: Variant,
    act_absmax: dict[str, Tensor],
    alphas: dict[str, float],
    probe: DivergenceProbe,
) -> dict[str, float | None]:
    """The divergence if activations are rounded and weights are not; empty for a float variant.

    It is simulated on the float model, since a quantized one may have lost its float weights.

    Args:
        model: the float model, not smoothed; it is not changed.
        act_absmax, alphas: as in `simulated_quantization`.
    """
    if not variant.quantized:
        return {}
    with simulated_quantization(model, variant, act_absmax, alphas, float_weights=True):
        return probe.divergence(model)


def sensitivity_rows(
    model,
    targets: list[str],
    absmax: dict[str, Tensor],
    probe: DivergenceProbe,
    float_weight: Callable[[str], Tensor] | None = None,
    with_float_weights: dict | None = None,
) -> list[dict]:
    """The divergence of the quantized model, and with some of its Linears left float.

    The Linears left float are each kind in turn, and the two with the strongest input outlier. In
    the last rows every activation is float (the weights alone cost), then every weight.

    Args:
        model: quantized by `variants.quantize_`, not saved yet; unchanged afterwards.
        targets: names of its quantized Linears.
        absmax: Linear name to (in_features,) calibrated maxima of its input.
        float_weight: gives the weight of a Linear left float; needed after GPTQ, which replaces
            the model's weights.
        with_float_weights: the result of `activations_alone`.
    """
    groups = [("nothing", [])]
    for kind in dict.fromkeys(name.rpartition(".")[2] for name in targets):
        groups.append((f"every {kind}", [n for n in targets if n.endswith(f".{kind}")]))
    outlier_linears = sorted(targets, key=lambda n: -_channel_ratio(absmax[n]))[:2]
    groups.append((" and ".join(outlier_linears), outlier_linears))
    rows = []
    for label, names in Bar(groups, desc="leaving Linears float", unit="probe"):
        with _left_float(model, names, float_weight), simulated_by_onednn(model):
            rows.append({"float": label, "linears": len(names), **probe.divergence(model)})
    with _float_activations(model, targets), simulated_by_onednn(model):
        rows.append(
            {"float": "every activation", "linears": len(targets), **probe.divergence(model)}
        )
    if with_float_weights:
        rows.append({"float": "every weight", "linears": len(targets), **with_float_weights})
    return rows


@contextmanager
def _float_activations(model, names: list[str]) -> Iterator[None]:
    schemes = {model.get_submodule(n): model.get_submodule(n).quantization_scheme for n in names}
    for module, scheme in schemes.items():
        module.quantization_scheme = scheme.model_copy(update={"input_activations": None})
    try:
        yield
    finally:
        for module, scheme in schemes.items():
            module.quantization_scheme = scheme


def _channel_ratio(absmax: Tensor) -> float:
    """Ratio of the largest to the median channel."""
    return (absmax.max() / absmax.median().clamp(min=1e-12)).item()


@contextmanager
def _left_float(
    model, names: list[str], float_weight: Callable[[str], Tensor] | None
) -> Iterator[None]:
    modules = [model.get_submodule(name) for name in names]
    weights = [module.weight.data for module in modules]
    for name, module in zip(names, modules, strict=True):
        module.quantization_enabled = False
        if float_weight:
            module.weight.data = float_weight(name).to(module.weight)
    try:
        yield
    finally:
        for module, weight in zip(modules, weights, strict=True):
            module.quantization_enabled = True
            module.weight.data = weight


AUTO_ALPHAS = tuple(step / 10 for step in range(11))  # candidates of `auto` for each group


@dataclass(frozen=True)
class AlphaChoice:
    """α of every group, by its first consumer, and the measurements behind the choice.

    Attributes:
        recipe: the variant with the smoothing that was chosen.
        alphas: of the groups that are smoothed.
        curve: for a grid, each α with its KL and top-1 agreement on the judging items; with
            optional targets, each α twice, without and with them.
        errors: for `auto`, each group and α with the squared error of the group's outputs.
    """

    recipe: Variant
    alphas: dict[str, float]
    curve: list[dict] = field(default_factory=list)
    errors: list[dict] = field(default_factory=list)

    @property
    def record(self) -> dict:
        choice: dict = {"alphas": self.alphas, "curve": self.curve}
        if any("optional" in row for row in self.curve):
            smoothed = self.recipe.smooth.targets if self.recipe.smooth else ()
            choice["targets"] = list(smoothed)
        return choice | ({"errors": self.errors} if self.errors else {})


def choose_alphas(
    model, variant: Variant, fit_absmax: dict[str, Tensor], judges: list[list[int]]
) -> AlphaChoice:
    """The targets and the α of every group of a variant; empty if it does not smooth.

    Args:
        model: the float model; it is not changed.
        variant: its α is a number, a list or `auto`; some of its targets may be optional.
        fit_absmax: Linear name to (in_features,) maxima over the items that do not judge.
        judges: token ids of the judging items.

    Raises:
        StudyError: no α gives a finite KL (grid) or a finite error (`auto`).
    """
    smooth = variant.smooth
    if smooth is None:
        return AlphaChoice(variant, {})
    if not smooth.is_chosen:
        return AlphaChoice(variant, same_alpha(model.config, smooth.targets, smooth.alpha))
    if smooth.alpha == "auto":
        return _choose_per_group(model, variant, fit_absmax, judges)
    curve = _grid_curve(model, variant, fit_absmax, DivergenceProbe(model, judges, variant))
    losses = {(row["alpha"], row.get("optional", False)): row["kl"] for row in curve}
    alpha, optional = _choice_of_least_loss(losses, of="the quantized model's KL")
    smooth = smooth.folding(optional)
    return AlphaChoice(
        variant.smoothed_at(smooth), same_alpha(model.config, smooth.targets, alpha), curve
    )


def _choice_of_least_loss(
    losses: dict[tuple[float, bool], float | None], *, of: str
) -> tuple[float, bool]:
    """The α, and whether optional targets are folded into, with the least finite loss."""
    finite = {a: loss for a, loss in losses.items() if loss is not None and math.isfinite(loss)}
    if not finite:
        alphas = dict.fromkeys(str(alpha) for alpha, _ in losses)
        raise StudyError(
            f"smooth.alpha: {of} is finite at no α of {', '.join(alphas)}; "
            "use dtype float32 or mend the model"
        )
    return min(finite, key=finite.__getitem__)


def grid_of(smooth: Smooth) -> list[tuple[Smooth, float]]:
    """What the KL chooses from: targets, without and with the optional ones, and α; or nothing."""
    if smooth.alpha == "auto" or not smooth.is_chosen:
        return []
    alphas = smooth.alpha if isinstance(smooth.alpha, tuple) else (smooth.alpha,)
    return list(itertools.product(smooth.alternatives, alphas))


def _grid_curve(
    model, variant: Variant, absmax: dict[str, Tensor], probe: DivergenceProbe
) -> list[dict]:
    """KL and top-1 agreement of the quantized model at every place of the grid."""
    declared, rows = variant.smooth, []
    for smooth, alpha in Bar(grid_of(declared), desc="choosing α", unit="value"):
        alphas = same_alpha(model.config, smooth.targets, alpha)
        optional = {"optional": smooth.targets != declared.targets} if declared.optional else {}
        with simulated_quantization(model, variant.smoothed_at(smooth), absmax, alphas):
            rows.append({"alpha": alpha, **optional, **probe.divergence(model)})
    return rows


@torch.inference_mode()
def _choose_per_group(
    model, variant: Variant, absmax: dict[str, Tensor], judges: list[list[int]]
) -> AlphaChoice:
    """For every group the α with the least squared error of its own int8 outputs."""
    groups = {g.consumers[0]: g for g in smoothing_groups(model.config, variant.smooth.targets)}
    errors: dict[str, dict[float, float]] = {
        name: dict.fromkeys(AUTO_ALPHAS, 0.0) for name in groups
    }

    def hook(name: str):
        def observe(_module, args: tuple) -> None:
            for alpha in AUTO_ALPHAS:
                scales = group_scales(model, groups[name], absmax, alpha=alpha).float()
                for consumer in groups[name].consumers:
                    linear, limit = model.get_submodule(consumer), absmax[consumer]
                    smoothed = apply_smoothing(linear, args[0], limit, LinearScales(inputs=scales))
                    error = smoothed.exact() - smoothed.rounded(variant)
                    errors[name][alpha] += error.square().sum().item()

        return observe

    handles = [model.get_submodule(n).register_forward_pre_hook(hook(n)) for n in groups]
    try:
        with every_expert_reads(model):
            for tokens in Bar(judges, desc="choosing α", unit="item"):
                ids = torch.tensor([tokens], device=model.device)
                model.base_model(input_ids=ids, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    chosen = {
        name: _choice_of_least_loss(
            {(alpha, False): error for alpha, error in curve_of_group.items()},
            of=f"the quantization error of {name}",
        )[0]
        for name, curve_of_group in errors.items()
    }
    record_rows = [
        {"group": name, "alpha": alpha, "error": error if math.isfinite(error) else None}
        for name, curve_of_group in errors.items()
        for alpha, error in curve_of_group.items()
    ]
    return AlphaChoice(variant, chosen, errors=record_rows)
