"""A variant of a model, ready to be asked: the float source, or its checkpoint on a runtime."""

from pathlib import Path
from types import MethodType

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from helpers.core.checksums import check_checksums
from helpers.core.errors import StudyError
from helpers.core.hashing import sha256_folder
from helpers.inference.vllm_client import VllmModel
from helpers.quantization import int8_cuda, int8_matmul, int8_passes
from helpers.quantization.int8_checkpoint import declared_activations, load_int8
from helpers.quantization.int8_linear import unpack_stacks_
from helpers.runtime import processors
from helpers.runtime.devices import place_on_device
from helpers.runtime.linears import use_onednn
from helpers.runtime.moe_experts import linear_experts
from helpers.sources.models import load_config, load_model, load_tokenizer, model_folder
from helpers.study.schema import Runtime
from helpers.study.study_run import Job


def load_variant(job: Job):
    """(model, tokenizer) of the job's model and variant.

    Raises:
        StudyError: the checkpoint is not there yet.
    """
    runtime = running_type(job)
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
    return load_as(load, folder, runtime), tokenizer


def load_as(load, folder: Path, runtime: Runtime):
    """A quantized checkpoint by one of the two ways of loading it, where the study runs it."""
    start = "cpu" if runtime.device_map else runtime.device  # whence it is spread
    model = load(folder, dtype=getattr(torch, runtime.dtype), device=start)
    if runtime.device_map:
        unpack_stacks_(model)
    return place_on_device(model, runtime)


def running_type(job: Job) -> Runtime:
    """The study's runtime, in the variant's own float type where it names one."""
    runtime = job.study.runtime
    return runtime.model_copy(update={"dtype": job.recipe.dtype or runtime.dtype})


def arithmetic(job: Job) -> dict[str, str]:
    """How this machine multiplies what the study runs on it, for records.

    No answer depends on the way in which int8 is multiplied; bfloat16 and training do depend on
    whether the processor has units for them.
    """
    if job.study.runtime.device == "cuda":
        capability = torch.cuda.get_device_capability(0)
        return {
            "compute_capability": ".".join(map(str, capability)),
            "int8_products": int8_cuda.way(0),
        }
    if job.study.runtime.device != "cpu":
        return {}
    units = "bfloat16" if processors.has_bfloat16_units() else "float32, rounded to bfloat16 once"
    return {
        "processor": processors.processor_class(),
        "int8_units": "yes" if processors.has_int8_units() else "no",
        "int8_products": int8_matmul.cpu_way().name,
        "int8_passes": "fused" if int8_passes.available() else "torch's",
        "bfloat16_products": units,
    }


def variant_digest(job: Job) -> str:
    """Content hash of the files the variant is loaded from.

    Raises:
        StudyError: a file is not what its stage wrote.
    """
    if job.recipe.needs_checkpoint:
        check_checksums(job.paths.quantization(job.model, job.variant), made_by="02_quantization")
        return sha256_folder(job.paths.checkpoint(job.model, job.variant))
    return sha256_folder(model_folder(job.study, job.model, job.paths))


def load_reference(folder, *, dtype: torch.dtype, device: str):
    """The checkpoint as transformers and compressed-tensors load it: int8 is simulated.

    The weights are unpacked by a hook on the whole model's first forward pass. The
    evaluation calls the decoder alone, where no hook is, so one token is read here.
    """
    from compressed_tensors.offload import remove_dispatch

    with linear_experts(load_config(folder)):
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, local_files_only=True, trust_remote_code=False
        )
    model = model.to(device).eval()
    with torch.no_grad():
        model(torch.zeros(1, 1, dtype=torch.long, device=device))
    remove_dispatch(model)  # else it computes where it was loaded, wherever it is put later
    for module in model.modules():
        if isinstance(module, nn.Linear) and hasattr(module, "quantization_scheme"):
            module.simulated = module.forward
            module.forward = MethodType(_one_text, module)
    model.scale_scope = "pass" if declared_activations(folder) == "tensor_dynamic" else "token"
    return use_onednn(model)  # the head; what is simulated has a forward of its own


def _one_text(module: nn.Module, x: Tensor) -> Tensor:
    """The simulated Linear, with a batch dimension for a (tokens, features) input.

    compressed-tensors makes one scale a token of (batch, token, feature) inputs only; of
    the flattened ones that experts and some MLPs get it makes one scale of all tokens.
    """
    return module.simulated(x[None])[0] if x.ndim == 2 else module.simulated(x)
