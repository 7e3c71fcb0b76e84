"""Gates: what must hold before a result about a variant counts.

A gate has a name, what was measured, the limit it was held to, and whether it held. What
a gate says of bits, scales and layers is read from the saved tensors, never from the
request. A failed gate does not stop a study; it makes the variant invalid.
"""

import math
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from helpers.quantization.int8 import declared_activations, read_tensors
from helpers.quantization.layer_groups import linear_layers, quantized_linears, smoothing_groups
from helpers.quantization.smoothing import SmoothedGroup
from helpers.study.schema import Variant


@dataclass(frozen=True)
class Gate:
    """One check: `measured` against `limit`, in words that can be read alone."""

    name: str
    passed: bool
    measured: str
    limit: str


@torch.inference_mode()
def logits_of(model, items: list[list[int]]) -> list[Tensor]:
    """Float32 logits of each item read alone: (tokens, vocabulary)."""
    found = []
    for tokens in items:
        ids = torch.tensor([tokens], device=model.device)
        hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state[0]
        found.append(model.get_output_embeddings()(hidden).float().cpu())
    return found


def function_gate(before: list[Tensor], after: list[Tensor], *, model) -> Gate:
    """Smoothing alone must not change what the float model computes.

    The limit is the rounding that its dtype may gather over the depth: each of the
    layers rounds a few sums, so √(8·layers) units in the last place of the largest logit,
    a hundred-fold, since activations are far larger than logits.
    """
    step = torch.finfo(model.dtype).eps
    largest = max(b.abs().max().item() for b in before)
    limit = 100 * step * math.sqrt(8 * model.config.num_hidden_layers) * largest
    pairs = zip(before, after, strict=True)
    measured = max((b - a).abs().max().item() for b, a in pairs)
    return Gate(
        "smoothing keeps the function",
        measured <= limit,  # False for NaN as well
        f"largest logit change {measured:.2e}",
        f"at most {limit:.2e}",
    )


def smoothing_gate(model, done: list[SmoothedGroup], variant: Variant) -> Gate:
    """Every group of every target was folded, and not with ones."""
    expected = len(smoothing_groups(model, variant.smooth.targets)) if variant.smooth else 0
    ones = sum(bool((s.scales == 1).all()) for s in done)
    return Gate(
        "smoothing happened where declared",
        len(done) == expected and ones == 0,
        f"{len(done)} groups folded, {ones} of them with scales of one",
        f"{expected} groups, none of them with scales of one",
    )


def smoothing_gates(
    before, after, model, done: list[SmoothedGroup], variant: Variant
) -> list[Gate]:
    """The gates on smoothing: it kept the function, and it happened where declared."""
    return [function_gate(before, after, model=model), smoothing_gate(model, done, variant)]


def snapshot(model) -> dict[str, Tensor]:
    """A copy of every parameter, by name, to hold the saved tensors against."""
    return {name: tensor.detach().cpu().clone() for name, tensor in model.state_dict().items()}


def checkpoint_gates(
    folder: Path, smoothed: dict[str, Tensor], variant: Variant, model
) -> list[Gate]:
    """Gates on the tensors as they lie on disk.

    Args:
        folder: the saved checkpoint.
        smoothed: float weights before quantization, by parameter name.
        variant: what the study file declares.
        model: the float model, for its architecture.
    """
    tensors = read_tensors(folder)
    if not variant.quantized:
        return [kept_gate(tensors, [], smoothed)]
    targets = list(quantized_linears(model, variant.ignore))
    return [
        census_gate(tensors, targets, linear_layers(model)),
        grid_gate(tensors, targets, smoothed, variant.scheme[0]),
        activation_gate(folder, tensors, targets, variant.scheme[1]),
        kept_gate(tensors, targets, smoothed),
    ]


def census_gate(tensors: dict[str, Tensor], targets: list[str], linears) -> Gate:
    """The Linears stored as int8 are exactly those the variant quantizes."""
    stored = {
        key.removesuffix(".weight")
        for key, tensor in tensors.items()
        if key.endswith(".weight") and tensor.dtype == torch.int8
    }
    return Gate(
        "layer census",
        stored == set(targets),
        f"{len(stored)} of {len(linears)} Linears are int8 on disk",
        f"{len(targets)}, by name",
    )


def grid_gate(
    tensors: dict[str, Tensor], targets: list[str], smoothed: dict[str, Tensor], granularity: str
) -> Gate:
    """Stored weights are within half a step of the float weights, on the declared grid."""
    worst, shapes, eps = 0.0, set(), 0.0
    for name in targets:
        scale = tensors.get(f"{name}.weight_scale")
        stored = tensors.get(f"{name}.weight")
        if scale is None or stored is None or stored.dtype != torch.int8:
            return Gate("weights on the grid", False, f"{name} is not int8 with a scale", "all are")
        per_channel = scale.numel() == stored.shape[0] and stored.shape[0] > 1
        shapes.add("channel" if per_channel else "tensor")
        eps = max(eps, torch.finfo(scale.dtype).eps)
        scale = scale.double().reshape(-1, 1)
        error = (stored.double() * scale - smoothed[f"{name}.weight"].double()).abs() / scale
        worst = max(worst, error.max().item())
    limit = 0.5 + 128 * eps  # a quotient of up to 128 steps is rounded once more
    return Gate(
        "weights on the grid",
        worst <= limit and shapes == {granularity},
        f"largest error {worst:.3f} steps, scales per {' and '.join(sorted(shapes))}",
        f"at most {limit:.3f} steps, scales per {granularity}",
    )


def activation_gate(
    folder: Path, tensors: dict[str, Tensor], targets: list[str], declared: str
) -> Gate:
    """The granularity of activations that the checkpoint carries is the declared one."""
    static = sum(f"{name}.input_scale" in tensors for name in targets)
    expected = len(targets) if declared == "tensor_static" else 0
    found = declared_activations(folder)
    return Gate(
        "activations declared in the checkpoint",
        found == declared and static == expected,
        f"{found.replace('_', ' ')}, {static} static scales",
        f"{declared.replace('_', ' ')}, {expected} static scales",
    )


def kept_gate(tensors: dict[str, Tensor], targets: list[str], smoothed: dict[str, Tensor]) -> Gate:
    """Everything that is not quantized is bit-identical to the float model."""
    quantized = {f"{name}.weight" for name in targets}
    kept = [key for key in tensors if key in smoothed and key not in quantized]
    changed = [key for key in kept if not torch.equal(tensors[key], smoothed[key])]
    example = f" ({changed[0]})" if changed else ""
    return Gate(
        "everything else bit-identical",
        not changed,
        f"{len(changed)} of {len(kept)} other tensors differ{example}",
        "none differ",
    )


def source_gate(before: str, after: str) -> Gate:
    """The source model's files are as they were when the job began."""
    return Gate(
        "source model untouched",
        before == after,
        f"files {after[:12]} after the run",
        f"files {before[:12]} as before it",
    )


def as_record(gates: list[Gate]) -> dict:
    """The gates as plain data, with the one answer: do all hold."""
    return {"passed": all(g.passed for g in gates), "gates": [asdict(g) for g in gates]}
