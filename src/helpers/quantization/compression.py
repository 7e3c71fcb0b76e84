"""Compression: quantizing and saving by llmcompressor, in the compressed-tensors format.

The lifecycle is llmcompressor's own (observers, scales, compressed checkpoint). What this module
adds: static activation scales come from the calibration file, so that no variant needs a forward
pass of its own.

It can also build the broken recipe this project began with: a control that must be flagged. A
report said that SmoothQuant W8A8 costs a 0.6 B model everything. What it had measured was this.
Known, from that report and its files:

- the weights were divided by the smoothing scales, and the activations never scaled, so that
  nothing cancels;
- the weights were rounded per tensor, 197 of them: all 196 Linears of the blocks and the tied head
  it claimed to keep, and so the embeddings;
- activations stayed float at run time, and the checkpoint holds dequantized weights.

Assumed here: scales by the paper's formula with each Linear's own weights, clamped to [1e-2, 1e2],
at the study file's places (the head, which is not calibrated, is rounded but not divided);
symmetric 8 bits whose ±127 reaches the largest weight.
"""

import logging
import os
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from helpers.core.errors import StudyError
from helpers.core.processes import set_activity
from helpers.quantization.calibration import linear_layers, quantized_linears, smoothing_groups
from helpers.quantization.smoothing import SmoothedGroup, smoothed_absmax, smoothing_scales
from helpers.sources.models import save_model
from helpers.study.schema import Smooth, Variant

CLAMP = (1e-2, 1e2)


@torch.no_grad()
def apply_seed_recipe_(model, act_absmax: dict[str, Tensor], smooth: Smooth) -> list[str]:
    """Apply the recipe to the model; return the names of the rounded Linears.

    Raises:
        StudyError: a Linear of a target is not in the calibration.
    """
    for group in smoothing_groups(model.config, smooth.targets):
        for name in group.consumers:
            if name not in act_absmax:
                raise StudyError(f"{name} is not in the calibration; run 01_calibration again")
            linear = model.get_submodule(name)
            weight_absmax = linear.weight.abs().amax(0)
            scales = smoothing_scales(
                act_absmax[name].to(weight_absmax.device), weight_absmax, alpha=smooth.alpha
            )
            linear.weight.div_(
                scales.clamp(*CLAMP).to(linear.weight)
            )  # correct would be to multiply
    linears = linear_layers(model)
    for linear in linears.values():
        _round_(linear)
    return list(linears)


def _round_(linear: nn.Linear) -> None:
    """Round weights to the int8 grid of the whole tensor; a tied weight changes its twin too."""
    step = linear.weight.abs().max().float() / 127
    grid = (linear.weight.float() / step).round().clamp(-127, 127)
    linear.weight.copy_((grid * step).to(linear.weight))


def quantize_(model, variant: Variant, act_absmax: dict[str, Tensor]) -> list[str]:
    """Attach int8 scales to every Linear that the variant quantizes; return their names.

    Afterwards the model computes as its checkpoint will (fake quantization).

    Args:
        model: the float model, already smoothed if the variant smooths.
        variant: its scheme and the names it ignores.
        act_absmax: (in_features,) maxima of the current inputs, by Linear name.

    Raises:
        StudyError: a Linear of a static scheme was not calibrated.
    """
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor.modifiers.quantization.calibration import observe, update_qparams

    targets = quantized_linears(model, variant.ignore)
    float_names = sorted(set(linear_layers(model)) - set(targets))
    modifier = QuantizationModifier(
        config_groups={"group_0": compression_scheme(variant)}, ignore=float_names
    )
    with _without_hooks(targets.values()):
        modifier.initialize_quantization(model)
    modifier.start_calibration(model)
    modules = list(targets.values())
    if variant.scheme[1] == "tensor_static":
        for name, module in targets.items():
            if name not in act_absmax:
                raise StudyError(f"{name} is not in the calibration; run 01_calibration again")
            module.input_observer(act_absmax[name].to(module.weight)[None])  # (1, in_features)
        update_qparams(modules, "input")
    observe(modules, "weight")
    update_qparams(modules, "weight")
    modifier.end_calibration(model)
    return list(targets)


@contextmanager
def _without_hooks(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Inside, modules of a distributed model have a plain forward, which compressed-tensors needs.

    Afterwards the hooks move inputs and the new scales to each module's device.
    """
    from accelerate.hooks import add_hook_to_module, remove_hook_from_module

    hooks = {module: module._hf_hook for module in modules if hasattr(module, "_hf_hook")}
    for module in hooks:
        remove_hook_from_module(module)
    try:
        yield
    finally:
        for module, hook in hooks.items():
            add_hook_to_module(module, hook)


def quantize_variant_(
    model, variant: Variant, act_absmax: dict[str, Tensor], smoothed: list[SmoothedGroup]
) -> list[str]:
    """Quantize a smoothed model by the variant's scheme; a float variant quantizes nothing."""
    set_activity("quantizing")
    if variant.recipe == "seed":
        return apply_seed_recipe_(model, act_absmax, variant.smooth)
    if not variant.quantized:
        return []
    return quantize_(model, variant, smoothed_absmax(act_absmax, smoothed))


def describe_recipe(variant: Variant, alphas: dict[str, float]) -> str:
    """The recipe as one sentence; `alphas` are those of its groups."""
    if variant.recipe == "seed":
        text = "the seed recipe (a control, broken on purpose): dequantized int8 weights per "
        text += "tensor, head included, float activations"
    elif variant.quantized:
        weights, activations = variant.scheme
        text = f"int8 weights per {weights}, int8 activations per {activations.replace('_', ', ')}"
        text += f"; kept float: {', '.join(variant.ignore) or 'nothing'}"
    else:
        text = "float weights and activations"
    if variant.smooth:
        places = ", ".join(target.replace("_", " ") for target in variant.smooth.targets)
        action = "divided by the scales" if variant.recipe == "seed" else "smoothed"
        text += f"; {action} with {_describe_alpha(variant, alphas)} at {places}"
    return text


def _describe_alpha(variant: Variant, alphas: dict[str, float]) -> str:
    values = sorted(set(alphas.values()))
    declared = variant.smooth.alpha
    if isinstance(declared, float):
        return f"α = {declared:g}"
    if declared == "auto":
        return f"an α for each of {len(alphas)} groups, {values[0]:g} to {values[-1]:g}"
    return f"α = {values[0]:g}, the best of {', '.join(f'{a:g}' for a in declared)}"


def compression_scheme(variant: Variant) -> dict:
    """The variant's scheme as a compressed-tensors configuration."""
    weights, activations = variant.scheme
    strategy, timing = activations.split("_")
    integers = {"num_bits": 8, "type": "int", "symmetric": True}
    return {
        "targets": ["Linear"],
        "weights": {**integers, "strategy": weights, "dynamic": False},
        "input_activations": {**integers, "strategy": strategy, "dynamic": timing == "dynamic"},
    }


def save_checkpoint(model, tokenizer, folder: Path) -> None:
    """Write a checkpoint that transformers and vLLM can load; replaces the folder."""
    set_activity("saving the checkpoint")
    from llmcompressor.transformers.compression.compressed_tensors_utils import (
        modify_save_pretrained,
    )

    if any(hasattr(module, "quantization_scheme") for module in model.modules()):
        modify_save_pretrained(model)
        save_model(model, tokenizer, folder, save_compressed=True)
    else:
        save_model(model, tokenizer, folder)


def quiet_llmcompressor() -> None:
    """Silence llmcompressor and compressed-tensors in notebooks, except for errors.

    llmcompressor adds its own log handler on first import, and logs during the import.
    """
    from loguru import logger

    logger.remove()
    os.environ["LLM_COMPRESSOR_LOG_LEVEL"] = "ERROR"
    import llmcompressor  # noqa: F401
    from compressed_tensors.offload import dispatch
    from compressed_tensors.quantization.lifecycle import apply

    for module in (dispatch, apply):  # their progress bars ignore TQDM_DISABLE
        module.tqdm = lambda items, **_: items
    logger.remove()
    logger.add(lambda line: logging.getLogger("llmcompressor").warning(line), level="ERROR")
    warnings.filterwarnings("ignore", message="Attempting to save a model with offloaded modules")
