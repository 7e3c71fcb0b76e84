"""Loading of variants: the float source, or a checkpoint on its runtime.

A saved int8 checkpoint is loaded on INT8 Linears (`int8_linear`), its float parts beside them, or
handed to vLLM, or simulated.
"""

import json
from pathlib import Path
from types import MethodType

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from helpers.core.architectures import HEAD
from helpers.core.errors import StudyError
from helpers.core.records import check_checksums, sha256_folder
from helpers.inference.vllm_client import VllmModel
from helpers.quantization import int8_cuda, int8_matmul
from helpers.quantization.int8_linear import (
    Int8Linear,
    fuse_gated_mlps_,
    stack_siblings_,
    unpack_stacks_,
)
from helpers.runtime import devices
from helpers.runtime.devices import place_on_device
from helpers.runtime.linears import linear_experts, use_onednn
from helpers.sources.model_files import TensorFiles, load_config
from helpers.sources.models import (
    empty_model,
    load_generation_config_,
    load_model,
    load_tokenizer,
    model_folder,
)
from helpers.study.loading import Job
from helpers.study.schema import Runtime


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
    if not job.recipe.quantized:
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
    """The study's runtime with the variant's own float type, if it has one."""
    runtime = job.study.runtime
    return runtime.model_copy(update={"dtype": job.recipe.dtype or runtime.dtype})


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
    model.scale_scope = "pass" if declared_activations(folder) == "tensor_dynamic" else "token"
    return use_onednn(model)  # only the head: simulated Linears have their own forward


def _forward_rows(module: nn.Module, x: Tensor) -> Tensor:
    """Forward of a simulated Linear that adds a batch dimension to a (tokens, features) input.

    compressed-tensors computes one scale per token only for (batch, token, feature) inputs; for
    the flattened inputs of experts and some MLPs it would compute one scale for all tokens.
    """
    return module.simulated(x[None])[0] if x.ndim == 2 else module.simulated(x)
