"""Gates on the model that an evaluation asks: is it the variant, in memory as on disk?

The gates of `variant_gates` look at the checkpoint. A run that verifies one model and asks
another (the float source, another checkpoint, another float type) passes them all.
"""

from collections.abc import Mapping

import torch
from torch import nn

from helpers.core.activity import set_activity
from helpers.core.architectures import HEAD
from helpers.core.gates import Gate
from helpers.core.hashing import sha256_folder
from helpers.core.records import read_json
from helpers.quantization.variants import load_variant, variant_runtime
from helpers.sources.model_tensors import TensorFiles
from helpers.sources.models import model_folder
from helpers.study.study_run import Job
from helpers.verification.checkpoint_files import CheckpointFiles
from helpers.verification.gate_decorator import examples, gate


def loaded_gates(job: Job, model) -> list[Gate]:
    """The gates on a loaded model, before it is evaluated as the job's variant."""
    set_activity("checks on the loaded model")
    gates = [memory_layers_gate((job, model)), memory_weights_gate((job, model))]
    return [*gates, verified_gate(job)] if job.recipe.needs_checkpoint else gates


@gate("quantized layers in memory")
def memory_layers_gate(loaded):
    """In memory, exactly the declared Linears are int8, and floats have the declared type."""
    job, model = loaded
    evidence = CheckpointFiles(job, source_hash="")
    expected, linears = set(evidence.targets), evidence.linears
    int8 = {name for name in linears if is_int8(model.get_submodule(name))}
    missing, extra = sorted(expected - int8), sorted(int8 - expected)
    declared_dtype, dtype = variant_runtime(job).dtype, str(model.dtype).removeprefix("torch.")
    return (
        int8 == expected and dtype == declared_dtype,
        f"{len(int8)} of {len(linears)} Linears in int8, floats in {dtype}; {len(missing)} "
        f"missing{examples(missing)}, {len(extra)} too many{examples(extra)}",
        f"{len(expected)} in int8, floats in {declared_dtype}",
    )


def is_int8(linear: nn.Module) -> bool:
    """Whether a Linear computes in int8, on its own kernels or simulated by its scheme."""
    return type(linear) is not nn.Linear or hasattr(linear, "quantization_scheme")


@gate("weights match the files")
def memory_weights_gate(loaded):
    """Every tensor in memory equals the variant's files.

    Float tensors are compared with the files one at a time. Each runtime stores the tensors of
    quantized Linears in its own layout, so these are compared with a second load.
    """
    job, model = loaded
    expected, in_memory = _expected_tensors(job), model.state_dict()
    head, table = f"{HEAD}.weight", model.get_input_embeddings().weight
    if (
        head not in expected
        and head in in_memory
        and torch.equal(in_memory[head].cpu(), table.cpu())
    ):
        del in_memory[head]  # it is tied, and compared as the embeddings
    differing = sorted(in_memory.keys() ^ expected.keys())
    differing += [
        k
        for k in sorted(in_memory.keys() & expected.keys())
        if not _is_equal(in_memory[k], expected[k])
    ]
    return (
        not differing,
        f"{len(differing)} of {len(expected)} tensors differ{examples(differing)}",
        f"none, from the files of {job.model}/{job.variant}",
    )


def _expected_tensors(job: Job) -> Mapping[str, torch.Tensor]:
    """The tensors of the variant's files, under the loaded model's names."""
    folder = model_folder(job.study, job.model, job.paths)
    if job.recipe.needs_checkpoint:
        folder = job.paths.checkpoint(job.model, job.variant)
    files = TensorFiles(folder, dtype=getattr(torch, variant_runtime(job).dtype))
    if not job.recipe.quantized:
        return files
    reloaded = load_variant(job)[0].state_dict()
    of_linears = tuple(f"{name}." for name in CheckpointFiles(job, source_hash="").targets)
    floats = {name: files[name] for name in files if not name.startswith(of_linears)}
    return floats | {name: t for name, t in reloaded.items() if name.startswith(of_linears)}


@gate("checkpoint is the verified one")
def verified_gate(job):
    """The checkpoint on disk is the one that was verified under the same model and variant."""
    path = job.paths.variant(job.model, job.variant) / "verification.json"
    verified = read_json(path, made_by="02_quantization")
    digest, verified_digest = (
        sha256_folder(job.paths.checkpoint(job.model, job.variant)),
        verified["checkpoint"],
    )
    verified_name, name = f"{verified['model']}/{verified['variant']}", f"{job.model}/{job.variant}"
    return (
        (digest, name) == (verified_digest, verified_name),
        f"files {digest[:12]}",
        f"files {verified_digest[:12]}, verified as {verified_name}",
    )


def _is_equal(first: torch.Tensor, second: torch.Tensor) -> bool:
    return first.dtype == second.dtype and torch.equal(first.cpu(), second.cpu())
