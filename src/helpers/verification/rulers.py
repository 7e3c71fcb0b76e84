"""Rulers read from their files: packed and fp8 weights, rounding written out again, and gates.

A ruler (`helpers.study.schema.RULERS`) is made by llmcompressor and simulated by
compressed-tensors. Here its weights are unpacked without them, and the rule that rounds activations
is written out again; the checks on an evaluation (`helpers.evaluation.checks.recorded_calls`) read
both too.

Packed weights: `weight_packed` holds 32 / bits numbers in an int32, the first in the lowest bits,
each with 2^(bits-1) added. A step is a part's largest magnitude over 7.5 (int4), 127.5 (int8) or
448 (E4M3: 4 exponent and 3 mantissa bits), the part being a row, or a group of a row's columns.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from helpers.core.records import examples, gate, largest
from helpers.study.schema import Numbers
from helpers.verification.checkpoint_files import CheckpointFiles

PARTS = ("weight_packed", "weight_shape", "weight_scale")
USUAL_GROUP = 128
LARGEST_E4M3, MANTISSA, SMALLEST_SPACING = 448.0, 3, -9  # the last two as powers of two
LOUDER = 2.0**8  # a power of two, so that scaling a token is exact


def range_of(numbers: Numbers) -> float:
    """How many steps reach a part's largest magnitude."""
    return LARGEST_E4M3 if numbers.kind == "float" else 2 ** (numbers.bits - 1) - 0.5


def spacing(steps: Tensor, numbers: Numbers) -> Tensor:
    """The distance between neighbouring numbers of the grid around each value, in steps."""
    if numbers.kind == "int":
        return torch.ones_like(steps)
    _, exponent = torch.frexp(steps)  # steps = m · 2^exponent with 1/2 <= |m| < 1
    power = (exponent - 1 - MANTISSA).clamp(min=SMALLEST_SPACING)
    return torch.ldexp(torch.ones_like(steps), power)


def nearest(steps: Tensor, numbers: Numbers) -> Tensor:
    """The nearest numbers of the grid, the even one if two are equally near."""
    if numbers.kind == "int":
        half = 2 ** (numbers.bits - 1)
        return steps.round().clamp(-half, half - 1)
    steps = steps.clamp(-LARGEST_E4M3, LARGEST_E4M3)
    gap = spacing(steps, numbers)
    return (steps / gap).round() * gap


def activation_steps(x: Tensor, numbers: Numbers) -> Tensor:
    """(rows, 1) float32 step of each row of (rows, in_features) float32."""
    scale = x.abs().amax(1, keepdim=True) / range_of(numbers)
    return torch.where(scale == 0, torch.full_like(scale, torch.finfo(torch.float32).eps), scale)


@dataclass(frozen=True)
class StoredWeight:
    """A rounded weight as its file holds it.

    Attributes:
        levels: (out_features, in_features) float64 numbers of the grid.
        steps: (out_features, parts) float64 steps; a part has in_features / parts columns.
    """

    levels: Tensor
    steps: Tensor

    @property
    def step(self) -> Tensor:
        """(out_features, in_features) float64 step of every weight."""
        return self.steps.repeat_interleave(self.levels.shape[1] // self.steps.shape[1], dim=1)

    @property
    def values(self) -> Tensor:
        """(out_features, in_features) float64 weights."""
        return self.levels * self.step


def stored_weight(tensors: Mapping[str, Tensor], name: str, numbers: Numbers) -> StoredWeight:
    """The weight of a Linear.

    Args:
        tensors: of the checkpoint, by name.

    Raises:
        KeyError: a tensor of the Linear is missing.
        TypeError: it is stored in another format.
    """
    steps = tensors[f"{name}.weight_scale"].double()
    steps = steps.reshape(len(steps), -1)
    if numbers.kind == "float":
        weight = tensors[f"{name}.weight"]
        if weight.dtype != torch.float8_e4m3fn:
            raise TypeError(f"{name} is {weight.dtype} on disk and claimed to be fp8")
        return StoredWeight(weight.double(), steps)
    packed, (_, width) = tensors[f"{name}.weight_packed"], tensors[f"{name}.weight_shape"].tolist()
    if packed.dtype != torch.int32:
        raise TypeError(f"{name} is {packed.dtype} on disk and claimed to be packed in int32")
    words, mask = packed.long() & 0xFFFFFFFF, 2**numbers.bits - 1
    parts = [(words >> shift) & mask for shift in range(0, 32, numbers.bits)]
    levels = torch.stack(parts, dim=-1).flatten(1)[:, :width] - 2 ** (numbers.bits - 1)
    return StoredWeight(levels.double(), steps)


def weight_of(evidence: CheckpointFiles, name: str) -> StoredWeight:
    """The stored weight of a target of the job's ruler."""
    return stored_weight(evidence.saved, name, evidence.claim.ruler.weights)


def bounds_of(evidence: CheckpointFiles, name: str, slack: float) -> tuple[Tensor, Tensor]:
    """(lowest, highest) float64 weight that a stored weight stands for, half a gap to each side.

    Args:
        slack: relative uncertainty of a weight in steps.
    """
    stored, numbers = weight_of(evidence, name), evidence.claim.ruler.weights
    half = spacing(stored.levels, numbers) / 2 + slack * range_of(numbers)
    return (stored.levels - half) * stored.step, (stored.levels + half) * stored.step


@gate("ruler's weights on the declared grid")
def weights_gate(evidence: CheckpointFiles):
    """No number of the grid is nearer to source × scales than the stored one; the grid is used.

    The step of a row or a group is its largest magnitude over the grid's range. A weight in steps
    carries four roundings of the dtype (s, the product, the step, the quotient): 2 eps, and those
    inside s.
    """
    numbers = evidence.claim.ruler.weights
    relative = 2 * torch.finfo(evidence.dtype).eps + 32 * torch.finfo(torch.float32).eps
    limit, worst, off, unused = 2 * relative * range_of(numbers), 0.0, [], []
    for name in evidence.targets:
        stored, weight = weight_of(evidence, name), evidence.smoothed_weight(name)
        steps = weight / stored.step
        excess = (steps - stored.levels).abs() - (steps - nearest(steps, numbers)).abs()
        error = excess.max().nan_to_num(math.inf).item()
        worst = largest((worst, error))
        if not error <= limit:
            off.append(name)
        tops = weight.unflatten(1, (stored.steps.shape[1], -1)).abs().amax(2)
        share = stored.steps * range_of(numbers) / tops
        if not bool((((share - 1).abs() <= relative) | (tops == 0)).all()):
            unused.append(name)
    return (
        not (off or unused),
        f"of {len(evidence.targets)} Linears {len(off)} have weights with a nearer number on the "
        f"grid{examples(off)}, {len(unused)} do not use the whole grid{examples(unused)}; at most "
        f"{worst:.2g} steps nearer",
        f"none, none; {limit:.2g} steps",
    )


@gate("ruler's layers as declared")
def layers_gate(evidence: CheckpointFiles):
    """The declared Linears are stored in the declared format, and no other one is."""
    weights, targets = evidence.claim.ruler.weights, set(evidence.targets)
    packed = weights is not None and weights.kind == "int"
    stored = {
        name.rpartition(".")[0]
        for name in evidence.saved
        if name.endswith(".weight_packed") or _is_fp8(evidence, name)
    }
    expected = targets if weights else set()
    scaled = {n.rpartition(".")[0] for n in evidence.saved if n.endswith(".weight_scale")}
    kept = {n for n in targets if packed and f"{n}.weight" in evidence.saved}
    wrong = sorted((stored ^ expected) | (scaled ^ expected) | kept)
    return (
        not wrong,
        f"{len(stored)} of {len(evidence.linears)} Linears are rounded on disk; {len(wrong)} are "
        f"not as declared{examples(wrong)}",
        f"{len(expected)}, by name",
    )


def _is_fp8(evidence: CheckpointFiles, name: str) -> bool:
    return evidence.saved.stored_dtype(name) == torch.float8_e4m3fn


@gate("ruler's metadata match the tensors")
def metadata_gate(evidence: CheckpointFiles):
    """Numbers, granularities, groups and kept Linears agree in config, tensors and study file."""
    config = json.loads((evidence.folder / "config.json").read_text("utf-8"))
    described, problems = config.get("quantization_config", {}), []
    groups = list(described.get("config_groups", {}).values())
    if len(groups) != 1:
        problems.append(f"{len(groups)} quantization groups")
    ruler = evidence.claim.ruler
    widths = [evidence.source.shape(f"{name}.weight")[1] for name in evidence.targets]
    group = math.gcd(USUAL_GROUP, *widths)
    for part, numbers in (("weights", ruler.weights), ("input_activations", ruler.activations)):
        declared = _description(numbers, group, dynamic=part == "input_activations")
        found = [_described(one.get(part)) for one in groups]
        problems += [f"{part}: {words}" for words in found if words != declared]
    kept = set(evidence.linears) - set(evidence.targets)
    if set(described.get("ignore", ())) != kept:
        problems.append("other Linears are ignored than the study file keeps")
    if ruler.weights:
        for name, width in zip(evidence.targets, widths, strict=True):
            parts = width // group if ruler.weights.granularity == "group" else 1
            rows = evidence.source.shape(f"{name}.weight")[0]
            shape = tuple(evidence.saved.shape(f"{name}.weight_scale"))
            if shape != (rows, parts):
                problems.append(f"{name} has steps of shape {shape}, not {(rows, parts)}")
    return (
        not problems,
        "; ".join(problems[:3]) or "config and tensors as the study file",
        f"study file: weights {_description(ruler.weights, group, dynamic=False)}, activations "
        f"{_description(ruler.activations, group, dynamic=True)}, {len(evidence.targets)} Linears",
    )


def _description(numbers: Numbers | None, group: int, *, dynamic: bool) -> str:
    if numbers is None:
        return "float"
    of = f" of {group}" if numbers.granularity == "group" else ""
    timing = "dynamic" if dynamic else "static"
    return f"{numbers.kind}{numbers.bits} per {numbers.granularity}{of}, {timing}, symmetric"


def _described(part: dict | None) -> str:
    if not part:
        return "float"
    of = f" of {part['group_size']}" if part["strategy"] == "group" else ""
    timing = "dynamic" if part["dynamic"] else "static"
    symmetry = "symmetric" if part["symmetric"] else "asymmetric"
    return f"{part['type']}{part['num_bits']} per {part['strategy']}{of}, {timing}, {symmetry}"


@gate("ruler's arithmetic at run time")
@torch.inference_mode()
def arithmetic_gate(evidence: CheckpointFiles):
    """Every declared Linear multiplies the stored weights with activations rounded as declared.

    Each gets its real input. Its output must match float64 on the stored tensors, and if
    activations are rounded it must be nearer to that than to the product of float activations.
    Then one token is 256 times as large: with one scale for a token, nothing else changes.
    """
    model, inputs, ruler = evidence.running_model, evidence.captured, evidence.claim.ruler
    wrong, like_float, spread = [], [], []
    for name in evidence.targets:
        x, layer = inputs[name], model.get_submodule(name)
        rows, output = x.reshape(-1, x.shape[-1]).float().cpu(), layer(x)
        weight = weight_of(evidence, name).values if ruler.weights else None
        weight = evidence.saved[f"{name}.weight"].double() if weight is None else weight
        bias = evidence.saved.get(f"{name}.bias", torch.zeros(len(weight))).double()
        rounded = rows.double()
        if ruler.activations:
            scale = activation_steps(rows, ruler.activations)
            rounded = (nearest(rows / scale, ruler.activations) * scale).double()
        exact, unrounded = rounded @ weight.T + bias, rows.double() @ weight.T + bias
        size = rounded.norm(dim=1, keepdim=True) * weight.norm(dim=1) + bias.abs()
        answered = output.reshape(-1, output.shape[-1]).cpu().double()
        if not bool(((answered - exact).abs() <= evidence.rounding(weight.shape[1]) * size).all()):
            wrong.append(name)
        if ruler.activations and (answered - unrounded).norm() < (answered - exact).norm():
            like_float.append(name)
        loud = int(rows.abs().amax(1).argmax())
        changed = x.clone()
        changed.view(-1, x.shape[-1])[loud] *= LOUDER
        others = torch.arange(len(rows)) != loud
        after = layer(changed).reshape(-1, output.shape[-1]).cpu().double()
        if not torch.equal(after[others], answered[others]):
            spread.append(name)
    return (
        not (wrong or like_float or spread) and bool(inputs),
        f"of {len(inputs)} Linears {len(wrong)} are off the product of the files{examples(wrong)}, "
        f"{len(like_float)} nearer to float activations{examples(like_float)}, {len(spread)} let "
        f"one token change others{examples(spread)}",
        "none, none, none",
    )
