"""A saved int8 checkpoint on INT8 Linears (`int8_linear`), its float parts beside them."""

import json
from pathlib import Path

import torch
from torch import Tensor

from helpers.core.architectures import HEAD
from helpers.core.errors import StudyError
from helpers.quantization.int8_gated_mlp import fuse_gated_mlps_
from helpers.quantization.int8_linear import Int8Linear, stack_siblings_
from helpers.runtime.linears import use_onednn
from helpers.sources.model_tensors import TensorFiles
from helpers.sources.models import empty_model, load_config, load_generation_config_


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
