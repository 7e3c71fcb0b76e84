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
from helpers.quantization.variants import load_variant, running_type
from helpers.sources.model_tensors import TensorFiles
from helpers.sources.models import model_folder
from helpers.study.study_run import Job
from helpers.verification.checkpoint_files import Evidence
from helpers.verification.gate_decorator import gate, named


def loaded_gates(job: Job, model) -> list[Gate]:
    """The gates on a model as it is about to be asked as the job's variant."""
    set_activity("checks on the loaded model")
    found = [running_gate((job, model)), files_gate((job, model))]
    return [*found, verified_gate(job)] if job.recipe.needs_checkpoint else found


@gate("the arithmetic announced")
def running_gate(asked):
    """Every Linear the variant claims in int8 is one in memory, no other is; floats by type."""
    job, model = asked
    evidence = Evidence(job, source_hash="")
    expected, linears = set(evidence.targets), evidence.linears
    found = {name for name in linears if is_int8(model.get_submodule(name))}
    missing, extra = sorted(expected - found), sorted(found - expected)
    due, dtype = running_type(job).dtype, str(model.dtype).removeprefix("torch.")
    return (
        found == expected and dtype == due,
        f"{len(found)} of {len(linears)} Linears in int8, floats in {dtype}; {len(missing)} "
        f"missing{named(missing)}, {len(extra)} too many{named(extra)}",
        f"{len(expected)} in int8, floats in {due}",
    )


def is_int8(linear: nn.Module) -> bool:
    """Whether a Linear computes in int8: on kernels of its own, or simulated by its scheme."""
    return type(linear) is not nn.Linear or hasattr(linear, "quantization_scheme")


@gate("the files announced")
def files_gate(asked):
    """Every tensor in memory is what the variant's own files hold.

    Float tensors are read from the files one at a time; of a quantized Linear, whose tensors
    each runtime keeps in its own way, they are those that loading gives once more.
    """
    job, model = asked
    again, found = _from_files(job), model.state_dict()
    head, table = f"{HEAD}.weight", model.get_input_embeddings().weight
    if head not in again and head in found and torch.equal(found[head].cpu(), table.cpu()):
        del found[head]  # it is the embeddings, and compared as those
    odd = sorted(found.keys() ^ again.keys())
    odd += [k for k in sorted(found.keys() & again.keys()) if not _same(found[k], again[k])]
    return (
        not odd,
        f"{len(odd)} of {len(again)} tensors differ{named(odd)}",
        f"none, from the files of {job.model}/{job.variant}",
    )


def _from_files(job: Job) -> Mapping[str, torch.Tensor]:
    """What the variant's files hold, under the names that the loaded model has."""
    folder = model_folder(job.study, job.model, job.paths)
    if job.recipe.needs_checkpoint:
        folder = job.paths.checkpoint(job.model, job.variant)
    files = TensorFiles(folder, dtype=getattr(torch, running_type(job).dtype))
    if not job.recipe.quantized:
        return files
    again = load_variant(job)[0].state_dict()
    of_linears = tuple(f"{name}." for name in Evidence(job, source_hash="").targets)
    floats = {name: files[name] for name in files if not name.startswith(of_linears)}
    return floats | {name: t for name, t in again.items() if name.startswith(of_linears)}


@gate("the checkpoint that was verified")
def verified_gate(job):
    """The checkpoint on disk is the one whose gates are on record, under this very name."""
    path = job.paths.variant(job.model, job.variant) / "verification.json"
    verified = read_json(path, made_by="02_quantization")
    now, then = sha256_folder(job.paths.checkpoint(job.model, job.variant)), verified["checkpoint"]
    of, due = f"{verified['model']}/{verified['variant']}", f"{job.model}/{job.variant}"
    return (
        (now, due) == (then, of),
        f"files {now[:12]}",
        f"files {then[:12]}, verified as {of}",
    )


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(one.cpu(), other.cpu())
