"""Variants of a model: quantized and saved by llmcompressor, and loaded on their runtime.

Compression is llmcompressor's own lifecycle (observers, scales, a checkpoint in the
compressed-tensors format). This module adds: static activation scales come from the calibration
file, so that no variant needs a forward pass of its own.

This module can also build the broken recipe this project began with: a control that must be
flagged. A report said that SmoothQuant W8A8 costs a 0.6 B model everything. What it had measured
was this. Known, from that report and its files:

- the weights were divided by the smoothing scales, and the activations never scaled, so that
  nothing cancels;
- the weights were rounded per tensor, 197 of them: all 196 Linears of the blocks and the tied head
  it claimed to keep, and so the embeddings;
- activations stayed float at run time, and the checkpoint holds dequantized weights.

Assumed here: scales by the paper's formula with each Linear's own weights, clamped to [1e-2, 1e2],
at the study file's places (the head, which is not calibrated, is rounded but not divided);
symmetric 8 bits whose ±127 reaches the largest weight.

A saved int8 checkpoint is loaded on INT8 Linears (`helpers.quantization.int8_linear`), its float
parts beside them, or handed to vLLM, or simulated. The float source is a variant too.
"""

import json
import logging
import os
import shutil
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType, MethodType, SimpleNamespace
from typing import Literal

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from helpers.core.architectures import HEAD
from helpers.core.errors import StudyError
from helpers.core.files import replace_folder
from helpers.core.processes import Bar, set_activity
from helpers.core.records import check_checksums, sha256_folder
from helpers.inference.vllm_client import VllmModel
from helpers.quantization import int8_cuda, int8_matmul
from helpers.quantization.calibration import linear_layers, quantized_linears, smoothing_groups
from helpers.quantization.int8_linear import (
    Int8Linear,
    fuse_gated_mlps_,
    stack_siblings_,
    unpack_stacks_,
)
from helpers.quantization.simulation import group_size
from helpers.quantization.smoothing import SmoothedGroup, smoothed_absmax, smoothing_scales
from helpers.runtime import devices
from helpers.runtime.devices import (
    every_expert_reads,
    pad,
    place_on_device,
    token_budget_batches,
    trim_heap,
    use_onednn,
)
from helpers.runtime.discovery import architecture, linear_experts
from helpers.sources.model_files import (
    TensorFiles,
    batch_tokens_for,
    check_model_safety,
    load_config,
)
from helpers.sources.models import (
    empty_model,
    load_generation_config_,
    load_model,
    load_tokenizer,
    model_folder,
    save_model,
)
from helpers.study.inputs import UNKNOWN_ORIGIN, checkpoint_folder, weight_files
from helpers.study.loading import Job
from helpers.study.schema import Numbers, Ruler, Runtime, Smooth, Variant

COPIED = (".json", ".jinja", ".txt", ".yaml")  # settings, tokenizer, chat template, recipe
CLAMP = (1e-2, 1e2)
# llmcompressor's own settings, with which W8A8 checkpoints are published.
GPTQ = {"block_size": 128, "dampening_frac": 0.01, "actorder": "static"}
BATCH_TOKENS = 2048  # of one pass of GPTQ, if the caller names no limit
ROUNDINGS = {"nearest": "", "mse": " (clipped to least squared error)", "gptq": " (GPTQ)"}


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


def quantize_(
    model,
    variant: Variant,
    act_absmax: dict[str, Tensor],
    items: Sequence[list[int]] = (),
    *,
    batch_tokens: int = BATCH_TOKENS,
) -> list[str]:
    """Attach scales to every Linear that the variant quantizes; return their names.

    Afterwards the model computes as its checkpoint will (fake quantization). GPTQ replaces the
    weights by their rounded values too.

    Args:
        model: the float model, already smoothed if the variant smooths.
        variant: its scheme, its rounding and the names it ignores.
        act_absmax: (in_features,) maxima of the current inputs, by Linear name.
        items: token ids of the calibration items, which GPTQ reads.
        batch_tokens: the most rows × longest row of one of GPTQ's forward passes.

    Raises:
        StudyError: a Linear of a static scheme was not calibrated, or GPTQ has no items or no
            usable Hessian.
    """
    from llmcompressor.core import State
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor.modifiers.quantization.calibration import observe, update_qparams

    targets = quantized_linears(model, variant.ignore)
    linears = {n for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    float_names = sorted(linears - set(targets))
    by_gptq = variant.rounding == "gptq"
    scheme = compression_scheme(variant, [m.in_features for m in targets.values()])
    settings = {"config_groups": {"group_0": scheme}, "ignore": float_names}
    modifier = GPTQModifier(**settings, **GPTQ) if by_gptq else QuantizationModifier(**settings)
    with _without_hooks(targets.values()):
        modifier.on_initialize(State(model=model))
    modifier.start_calibration(model)
    modules = list(targets.values())
    if variant.scheme and variant.scheme[1] == "tensor_static":
        for name, module in targets.items():
            if name not in act_absmax:
                raise StudyError(f"{name} is not in the calibration; run 01_calibration again")
            module.input_observer(act_absmax[name].to(module.weight)[None])  # (1, in_features)
        update_qparams(modules, "input")
    if by_gptq:
        _round_by_gptq_(model, modifier, targets, items, batch_tokens=batch_tokens)
    elif scheme.get("weights"):
        observe(modules, "weight")
        update_qparams(modules, "weight")
    modifier.end_calibration(model)
    return list(targets)


@dataclass
class _BlockInputs:
    """What the decoder blocks read of one batch of items.

    Attributes:
        hidden: (rows, tokens, features) states that the next block reads.
        mask: (rows, tokens) bool, False for padding.
        arguments: the other arguments of each block.
    """

    hidden: Tensor
    mask: Tensor
    arguments: list[tuple[tuple, dict]]


@torch.no_grad()
def _round_by_gptq_(
    model,
    modifier,
    targets: dict[str, nn.Linear],
    items: Sequence[list[int]],
    *,
    batch_tokens: int,
) -> None:
    """Round the weights of the targets by llmcompressor's GPTQ, one decoder block at a time.

    Raises:
        StudyError: there are no items, or a Hessian has no Cholesky factor.
    """
    from llmcompressor.modifiers.utils.hooks import HooksMixin

    if not items:
        raise StudyError("rounding = 'gptq' reads the calibration items, and none were given")
    path = architecture(model.config).blocks
    budget = batch_tokens_for(model.config, list(map(len, items)), batch_tokens=batch_tokens)
    with HooksMixin.disable_hooks(), every_expert_reads(model):
        batches = _block_inputs(model, model.get_submodule(path), items, batch_tokens=budget)
        for index, block in enumerate(Bar(model.get_submodule(path), desc="GPTQ", unit="block")):
            linears = [m for n, m in targets.items() if n.startswith(f"{path}.{index}.")]
            with _accumulated_hessians(modifier, linears) as use_mask:
                for batch in batches:
                    use_mask(batch.mask)
                    _run_block(block, index, batch)
            modifier.on_sequential_epoch_end(None, None, linears)
            for batch in batches:
                batch.hidden = _run_block(block, index, batch)
            trim_heap()
    if failed := modifier._rtn_fallback_module_names:
        raise StudyError(
            f"GPTQ: the Hessian of {failed[0]} ({len(failed)} Linears) has no Cholesky factor; "
            "raise calibration.items, or use dtype float32"
        )


def _run_block(block: nn.Module, index: int, batch: _BlockInputs) -> Tensor:
    positional, named = batch.arguments[index]
    return block(batch.hidden, *positional, **named)


def _block_inputs(
    model, blocks: nn.ModuleList, items: Sequence[list[int]], *, batch_tokens: int
) -> list[_BlockInputs]:
    """The input of the first block and the other arguments of all blocks, batch by batch.

    The blocks are not computed: masks and positions do not depend on their answers.
    """
    batches: list[_BlockInputs] = []

    def record(hidden: Tensor, *positional, **named) -> Tensor:
        if not batches[-1].arguments:
            batches[-1].hidden = hidden
        batches[-1].arguments.append((positional, named))
        return hidden

    own_forwards = [vars(block).get("forward") for block in blocks]
    for block in blocks:
        block.forward = record
    try:
        for batch in token_budget_batches(list(map(len, items)), batch_tokens=batch_tokens):
            rows = [items[i] for i in batch]
            mask = pad([[1] * len(r) for r in rows], value=0, side="right", device=model.device)
            tokens = pad(rows, value=0, side="right", device=model.device)
            batches.append(_BlockInputs(tokens, mask.bool(), []))
            model.base_model(input_ids=tokens, attention_mask=mask, use_cache=False)
    finally:
        for block, forward in zip(blocks, own_forwards, strict=True):
            del block.forward
            if forward is not None:
                block.forward = forward
    return batches


@contextmanager
def _accumulated_hessians(modifier, linears: list[nn.Linear]) -> Iterator[Callable]:
    """Inside, GPTQ's Hessians of the Linears take in their inputs, without the padding.

    Yields:
        a function that takes the (rows, tokens) mask of the next pass.
    """
    current: dict[str, Tensor] = {}

    def observe(linear: nn.Linear, args: tuple) -> None:
        mask = current["mask"].to(args[0].device)
        x = args[0].reshape(*mask.shape, -1)  # some modules flatten rows and tokens
        modifier.calibrate_module(linear, (x[mask],), None)

    handles = [linear.register_forward_pre_hook(observe) for linear in linears]
    try:
        yield lambda mask: current.update(mask=mask)
    finally:
        for handle in handles:
            handle.remove()


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
    model,
    variant: Variant,
    act_absmax: dict[str, Tensor],
    smoothed: list[SmoothedGroup],
    items: Sequence[list[int]] = (),
    *,
    batch_tokens: int = BATCH_TOKENS,
) -> list[str]:
    """Quantize a smoothed model by the variant's scheme; return the names of its int8 Linears.

    A float variant has none. A checkpoint made elsewhere has its own, and the model stays float.

    Args:
        act_absmax: (in_features,) maxima of the inputs before smoothing, by Linear name.
        items, batch_tokens: as in `quantize_`.
    """
    set_activity("quantizing")
    if variant.made_elsewhere:
        return list(quantized_linears(model, variant.ignore))
    if variant.recipe == "seed":
        return apply_seed_recipe_(model, act_absmax, variant.smooth)
    if not variant.compressed:
        return []
    absmax = smoothed_absmax(act_absmax, smoothed)
    return quantize_(model, variant, absmax, items, batch_tokens=batch_tokens)


def rotate_(model, rotations: Sequence[str]) -> None:
    """Rotate a float model in place by llmcompressor's SpinQuant; its function stays.

    R1 turns the states between the blocks, R2 the values of each head. Both are Hadamard matrices
    with signs drawn from llmcompressor's fixed seed, and are multiplied into the weights before
    and behind them. Norms become ones, so the head gets weights apart from the embeddings.

    llmcompressor also subtracts each embedding's mean. Only a LayerNorm forgets the mean; here
    every norm is an RMSNorm, and the function would change (SmolLM2's by a KL of 0.008 nats per
    token), so that step is left out.

    Args:
        model: in float32 or float64, of one of the families in `helpers.study.schema.ROTATED`.
        rotations: `r1`, `r2` or both.
    """
    from llmcompressor.core import State
    from llmcompressor.modifiers.transform import SpinQuantModifier

    class Rotations(SpinQuantModifier):
        def _center_embeddings(self, model) -> None:
            pass

    set_activity("rotating")
    recipe = Rotations(rotations=list(rotations), transform_type=TRANSFORM)
    state = State(model=model)
    recipe.on_initialize(state)
    recipe.on_calibration_start(state, None)


# Exists for more sizes than `hadamard`; matrices of `random-matrix` are not orthogonal.
TRANSFORM: Literal["random-hadamard"] = "random-hadamard"
LARGEST_TABLE = 256  # of compressed-tensors' tables of Hadamard matrices, which it doubles


def has_hadamard_matrix(size: int) -> bool:
    """Whether compressed-tensors has a Hadamard matrix of a size: 2^k, or 2^k times a table's."""
    odd = size // (size & -size)
    return odd == 1 or (size % 4 == 0 and 4 * odd <= LARGEST_TABLE)


def describe_recipe(
    variant: Variant,
    alphas: dict[str, float],
    protected: Mapping = MappingProxyType({}),
    *,
    smooth: Smooth | None = None,
) -> str:
    """The recipe as one sentence.

    Args:
        alphas: those of its groups.
        smooth: its smoothing after the choice of optional targets; its own if it has none.
        protected: the record of the Linears that `protect` chose; empty without.
    """
    if variant.recipe == "seed":
        text = "the seed recipe (a control, broken on purpose): dequantized int8 weights per "
        text += "tensor, head included, float activations"
    elif variant.quantized:
        weights, activations = variant.scheme
        rounding = "" if variant.made_elsewhere else ROUNDINGS[variant.rounding]
        text = f"int8 weights per {weights}{rounding}, "
        text += f"int8 activations per {activations.replace('_', ', ')}"
        kept = list(variant.ignore)
        if protected:
            share = 100 * protected["chosen_bytes"] / protected["bytes"]
            chosen, all_linears = len(protected["chosen"]), len(protected["linears"])
            kept.append(f"{chosen} of {all_linears} Linears chosen for {share:.2f} % of the bytes")
        text += f"; kept float: {', '.join(kept) or 'nothing'}"
        text += f"; {UNKNOWN_ORIGIN}" if variant.made_elsewhere else ""
    elif variant.ruler:
        text = _describe_ruler(variant.ruler)
        text += f", simulated; kept float: {', '.join(variant.ignore)}"
    else:
        text = "float weights and activations"
    if variant.smooth:
        places = _in_words((smooth or variant.smooth).targets)
        if variant.smooth.optional:
            places += f" ({_in_words(variant.smooth.optional)} by choice)"
        action = "divided by the scales" if variant.recipe == "seed" else "smoothed"
        text += f"; {action} with {_describe_alpha(variant, alphas)} at {places}"
    return text + (f"; calibration {variant.calibration}" if variant.calibration else "")


def _in_words(targets: Iterable[str]) -> str:
    return ", ".join(target.replace("_", " ") for target in targets)


def _describe_ruler(ruler: Ruler) -> str:
    """As `int4 weights per group, float activations`."""
    parts = {"weights": ruler.weights, "activations": ruler.activations}
    return ", ".join(
        f"{numbers_name(numbers)} {part} per {numbers.granularity}" if numbers else f"float {part}"
        for part, numbers in parts.items()
    )


def numbers_name(numbers: Numbers) -> str:
    """`int8`, `int4` or `fp8` (E4M3)."""
    return f"{'fp' if numbers.kind == 'float' else 'int'}{numbers.bits}"


def _describe_alpha(variant: Variant, alphas: dict[str, float]) -> str:
    values = sorted(set(alphas.values()))
    declared = variant.smooth.alpha
    if isinstance(declared, float):
        return f"α = {declared:g}"
    if declared == "auto":
        return f"an α for each of {len(alphas)} groups, {values[0]:g} to {values[-1]:g}"
    return f"α = {values[0]:g}, the best of {', '.join(f'{a:g}' for a in declared)}"


def compression_scheme(variant: Variant, widths: Iterable[int] = ()) -> dict:
    """The variant's scheme as a compressed-tensors configuration.

    Args:
        widths: in_features of the Linears, which the groups of a ruler have to divide.
    """
    if variant.ruler:
        return {"targets": ["Linear"]} | _ruler_scheme(variant.ruler, widths)
    weights, activations = variant.scheme
    strategy, timing = activations.split("_")
    integers = {"num_bits": 8, "type": "int", "symmetric": True}
    observer = {"observer": "memoryless_mse"} if variant.rounding == "mse" else {}
    return {
        "targets": ["Linear"],
        "weights": {**integers, "strategy": weights, "dynamic": False} | observer,
        "input_activations": {**integers, "strategy": strategy, "dynamic": timing == "dynamic"},
    }


def _ruler_scheme(ruler: Ruler, widths: Iterable[int]) -> dict:
    scheme = {}
    for part, numbers in (("weights", ruler.weights), ("input_activations", ruler.activations)):
        if numbers:
            scheme[part] = {
                "num_bits": numbers.bits,
                "type": numbers.kind,
                "symmetric": True,
                "strategy": numbers.granularity,
                "dynamic": part == "input_activations",
            }
            if numbers.granularity == "group":
                scheme[part]["group_size"] = group_size(widths)
    return scheme


def save_checkpoint(model, tokenizer, folder: Path) -> None:
    """Write a checkpoint that transformers and vLLM can load; replaces the folder."""
    set_activity("saving the checkpoint")
    from llmcompressor.transformers.compression.compressed_tensors_utils import (
        modify_save_pretrained,
    )

    if any(hasattr(module, "quantization_scheme") for module in model.modules()):
        modify_save_pretrained(model)
        with _head_as_configured(model):
            save_model(model, tokenizer, folder, save_compressed=True)
    else:
        save_model(model, tokenizer, folder)


def write_checkpoint(job: Job, model, tokenizer) -> None:
    """Write the job's checkpoint: the quantized model, or a copy of one made elsewhere."""
    folder = job.paths.checkpoint(job.model, job.variant)
    if job.recipe.made_elsewhere:
        copy_checkpoint(checkpoint_folder(job.recipe, job.model), folder)
    else:
        save_checkpoint(model, tokenizer, folder)


def copy_checkpoint(given: Path, folder: Path) -> None:
    """Copy what is read of a checkpoint made elsewhere; replaces the folder.

    These are its weights, settings, tokenizer, chat template and recipe; links lead to copies.

    Raises:
        StudyError: loading it would run code of its own.
    """
    set_activity("copying the checkpoint")
    check_model_safety(given)
    names = [path.name for path in weight_files(given)]
    names += [p.name for p in given.iterdir() if p.name.endswith(COPIED) and p.is_file()]

    def fill(temporary: Path) -> None:
        for name in names:
            shutil.copyfile(given / name, temporary / name)

    replace_folder(folder, fill)


@contextmanager
def _head_as_configured(model) -> Iterator[None]:
    """Inside, llmcompressor saves a head of its own even if it equals the embeddings.

    So does the head of a rotated model whose last norm was all ones.
    """
    from llmcompressor.transformers.compression import compressed_tensors_utils as saving

    tie = saving._retie_embeddings
    if not model.config.tie_word_embeddings:
        saving._retie_embeddings = lambda _model: None
    try:
        yield
    finally:
        saving._retie_embeddings = tie


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
    from compressed_tensors.transform.factory import base

    for module in (dispatch, apply):  # their progress bars ignore TQDM_DISABLE
        module.tqdm = lambda items, **_: items
    base.tqdm = SimpleNamespace(tqdm=dispatch.tqdm)
    logger.remove()
    logger.add(lambda line: logging.getLogger("llmcompressor").warning(line), level="ERROR")
    warnings.filterwarnings("ignore", message="Attempting to save a model with offloaded modules")


def load_int8(folder: Path, *, dtype: torch.dtype, device: str):
    """Load a saved checkpoint with INT8 Linears; float parts have `dtype`.

    Raises:
        StudyError: it is not an int8 checkpoint in the compressed-tensors format.
    """
    tensors = read_checkpoint_tensors(folder)
    config = load_config(folder)
    activations = declared_activations(folder)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.tie_word_embeddings = f"{HEAD}.weight" not in tensors
    model = empty_model(
        config, dtype=dtype
    )  # the file fills every tensor; `_load_float_parts_` checks that
    for name in [k.removesuffix(".weight_scale") for k in tensors if k.endswith(".weight_scale")]:
        linear = Int8Linear(
            tensors.pop(f"{name}.weight"),
            tensors.pop(f"{name}.weight_scale"),
            tensors.pop(f"{name}.bias", None),
            activations=activations,
            input_scale=tensors.pop(f"{name}.input_scale", None),
        )
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, linear)
    _load_float_parts_(model, tensors)
    stack_siblings_(model)
    fuse_gated_mlps_(model.to(device))
    load_generation_config_(model, folder)
    model.scale_scope = "text" if activations == "tensor_dynamic" else "token"
    return use_onednn(model).eval()


def _load_float_parts_(model, tensors: dict[str, Tensor]) -> None:
    int8_names = {n for n, m in model.named_modules() if isinstance(m, Int8Linear)}
    expected = {k for k in model.state_dict() if k.rpartition(".")[0] not in int8_names}
    if model.config.tie_word_embeddings:
        expected.discard(f"{HEAD}.weight")
    if expected != set(tensors):
        differing = sorted(expected ^ set(tensors))
        raise StudyError(
            f"the checkpoint and its architecture differ in {differing[0]} "
            f"({len(differing)} in all)"
        )
    model.load_state_dict(tensors, strict=False)
    model.tie_weights()


def read_checkpoint_tensors(folder: Path) -> dict[str, Tensor]:
    """The checkpoint's tensors, one copy of each; a tied head is missing."""
    return TensorFiles(folder, dtype=None).load_all()


def declared_activations(folder: Path) -> str:
    """The activation granularity a checkpoint's config declares, in the study's words.

    Raises:
        StudyError: it is not 8-bit symmetric integer activations of a known granularity.
    """
    config = json.loads((Path(folder) / "config.json").read_text("utf-8"))
    groups = config.get("quantization_config", {}).get("config_groups", {})
    if len(groups) != 1:
        raise StudyError(
            f"{Path(folder).name}: {len(groups)} quantization groups; one is supported"
        )
    inputs = next(iter(groups.values()))["input_activations"]
    granularity = f"{inputs['strategy']}_{'dynamic' if inputs['dynamic'] else 'static'}"
    supported = ("token_dynamic", "tensor_dynamic", "tensor_static")
    if granularity not in supported or inputs["num_bits"] != 8 or not inputs["symmetric"]:
        raise StudyError(
            f"{Path(folder).name}: activations are {granularity}, not one of {supported} in 8 bits"
        )
    return granularity


def _scales_a_pass(folder: Path) -> bool:
    """Whether one scale of activations is computed for all tokens of a forward pass."""
    config = json.loads((Path(folder) / "config.json").read_text("utf-8"))
    groups = config["quantization_config"]["config_groups"].values()
    inputs = [group.get("input_activations") or {} for group in groups]
    return any(i.get("dynamic") and i["strategy"] == "tensor" for i in inputs)


def load_variant(job: Job):
    """(model, tokenizer) of the job's model and variant.

    Raises:
        StudyError: the checkpoint does not exist yet.
    """
    runtime = variant_runtime(job)
    source = model_folder(job.study, job.model, job.paths)
    tokenizer = load_tokenizer(source, enable_thinking=job.study.enable_thinking)
    if not job.recipe.needs_checkpoint:
        return load_model(source, runtime), tokenizer
    folder = job.paths.checkpoint(job.model, job.variant)
    if not folder.is_dir():
        raise StudyError(f"{job.model}/{job.variant} has no checkpoint; run 02_quantization first")
    if not job.recipe.compressed:
        return load_model(folder, runtime), tokenizer
    if runtime.quantized == "vllm":
        return VllmModel(folder, runtime, seed=job.study.seed), tokenizer
    load = load_int8 if runtime.quantized == "int8" else load_reference
    return load_quantized(load, folder, runtime), tokenizer


def load_quantized(load, folder: Path, runtime: Runtime):
    """Load a quantized checkpoint with `load_int8` or `load_reference` on the study's devices."""
    start = "cpu" if runtime.device_map else runtime.device  # it is distributed afterwards
    model = load(folder, dtype=getattr(torch, runtime.dtype), device=start)
    if runtime.device_map:
        unpack_stacks_(model)
    return place_on_device(model, runtime)


def variant_runtime(job: Job) -> Runtime:
    """The study's runtime with the variant's own float type, if it has one.

    A ruler is simulated, whatever other variants run on.
    """
    runtime, recipe = job.study.runtime, job.recipe
    own: dict = {"dtype": recipe.dtype or runtime.dtype}
    return runtime.model_copy(update=own | ({"quantized": "reference"} if recipe.ruler else {}))


def arithmetic_record(job: Job) -> dict[str, str]:
    """This machine's arithmetic units and products, for records.

    No answer depends on the int8 product; bfloat16 and training depend on whether the processor
    has units for bfloat16.
    """
    if job.study.runtime.device == "cuda":
        capability = torch.cuda.get_device_capability(0)
        return {
            "compute_capability": ".".join(map(str, capability)),
            "int8_products": int8_cuda.product_kind(0),
        }
    if job.study.runtime.device != "cpu":
        return {}
    units = "bfloat16" if devices.has_bfloat16_units() else "float32, rounded to bfloat16 once"
    return {
        "processor": devices.processor_class(),
        "int8_units": "yes" if devices.has_int8_units() else "no",
        "int8_products": int8_matmul.cpu_product().name,
        "int8_passes": "fused" if int8_matmul.are_available() else "torch's",
        "bfloat16_products": units,
    }


def variant_digest(job: Job) -> str:
    """Content hash of the files the variant is loaded from.

    Raises:
        StudyError: a file differs from the one its stage wrote.
    """
    if job.recipe.needs_checkpoint:
        check_checksums(job.paths.quantization(job.model, job.variant), made_by="02_quantization")
        return sha256_folder(job.paths.checkpoint(job.model, job.variant))
    return sha256_folder(model_folder(job.study, job.model, job.paths))


def load_reference(folder, *, dtype: torch.dtype, device: str):
    """Load the checkpoint with transformers and compressed-tensors, which simulate int8.

    A hook on the whole model unpacks the weights in the first forward pass. The evaluation calls
    only the decoder, which has no such hook, so one token is read here.
    """
    from compressed_tensors.offload import remove_dispatch

    with linear_experts(load_config(folder)):
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, local_files_only=True, trust_remote_code=False
        )
    model = model.to(device).eval()
    with torch.no_grad():
        model(torch.zeros(1, 1, dtype=torch.long, device=device))
    remove_dispatch(model)  # otherwise it keeps computing on the device it was loaded on
    for module in model.modules():
        if isinstance(module, nn.Linear) and hasattr(module, "quantization_scheme"):
            module.simulated = module.forward
            module.forward = MethodType(_forward_rows, module)
    model.scale_scope = "pass" if _scales_a_pass(folder) else "token"
    return use_onednn(model)  # only the head: simulated Linears have their own forward


def _forward_rows(module: nn.Module, x: Tensor) -> Tensor:
    """Forward of a simulated Linear that adds a batch dimension to a (tokens, features) input.

    compressed-tensors computes one scale per token only for (batch, token, feature) inputs; for
    the flattened inputs of experts and some MLPs it would compute one scale for all tokens.
    """
    return module.simulated(x[None])[0] if x.ndim == 2 else module.simulated(x)
