"""Quantizing and saving by llmcompressor, in the compressed-tensors format.

The lifecycle is llmcompressor's own (observers, scales, compressed checkpoint). What
this module adds: static activation scales come from the calibration file, so that no
variant needs a forward pass of its own.
"""

import logging
import os
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor, nn

from helpers.core.activity import set_activity
from helpers.core.errors import StudyError
from helpers.quantization.layer_groups import linear_layers, quantized_linears
from helpers.quantization.seed_recipe import apply_seed_recipe_
from helpers.quantization.smoothing import SmoothedGroup, smoothed_absmax
from helpers.sources.models import save_model
from helpers.study.schema_variants import Variant


def quantize_(model, variant: Variant, act_absmax: dict[str, Tensor]) -> list[str]:
    """Give every Linear of the scheme its int8 scales; return their names.

    The model then behaves as its checkpoint will (fake quantization).

    Args:
        model: the float model, smoothed already where the variant smooths.
        variant: its scheme and what it leaves alone.
        act_absmax: (in_features,) maxima of the inputs as they are now, by Linear name.

    Raises:
        StudyError: a Linear of a static scheme was not calibrated.
    """
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor.modifiers.quantization.calibration import observe, update_qparams

    targets = quantized_linears(model, variant.ignore)
    kept = sorted(set(linear_layers(model)) - set(targets))
    modifier = QuantizationModifier(config_groups={"group_0": scheme(variant)}, ignore=kept)
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
    """Inside, modules of a spread model have a plain forward, as compressed-tensors wants it.

    Afterwards the hooks bring inputs, and the scales made meanwhile, to each module's device.
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
    model, variant: Variant, act_absmax: dict[str, Tensor], done: list[SmoothedGroup]
) -> list[str]:
    """Quantize a smoothed model as the variant says; a float variant quantizes nothing."""
    set_activity("quantizing")
    if variant.recipe == "seed":
        return apply_seed_recipe_(model, act_absmax, variant.smooth)
    if not variant.quantized:
        return []
    return quantize_(model, variant, smoothed_absmax(act_absmax, done))


def describe(variant: Variant, alphas: dict[str, float]) -> str:
    """The recipe in one line, in words; `alphas` are those of its groups."""
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
        where = ", ".join(target.replace("_", " ") for target in variant.smooth.targets)
        done = "divided by the scales" if variant.recipe == "seed" else "smoothed"
        text += f"; {done} with {_alpha_in_words(variant, alphas)} at {where}"
    return text


def _alpha_in_words(variant: Variant, alphas: dict[str, float]) -> str:
    values = sorted(set(alphas.values()))
    asked = variant.smooth.alpha
    if isinstance(asked, float):
        return f"α = {asked:g}"
    if asked == "auto":
        return f"an α for each of {len(alphas)} groups, {values[0]:g} to {values[-1]:g}"
    return f"α = {values[0]:g}, the best of {', '.join(f'{a:g}' for a in asked)}"


def scheme(variant: Variant) -> dict:
    """The variant's scheme in compressed-tensors' words."""
    weights, activations = variant.scheme
    strategy, timing = activations.split("_")
    integers = {"num_bits": 8, "type": "int", "symmetric": True}
    return {
        "targets": ["Linear"],
        "weights": {**integers, "strategy": weights, "dynamic": False},
        "input_activations": {**integers, "strategy": strategy, "dynamic": timing == "dynamic"},
    }


def save_checkpoint(model, tokenizer, folder: Path) -> None:
    """Write the model as a checkpoint that transformers and vLLM load; replaces the folder."""
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
    """Keep llmcompressor's and compressed-tensors' lines out of the notebooks; errors stay.

    llmcompressor adds a handler of its own when it is first imported, and logs before that ends.
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
