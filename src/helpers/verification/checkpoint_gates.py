"""Gates on the checkpoint's tensors, held against the source's and the calibration's files."""

import torch
from torch import Tensor

from helpers.core.gates import largest
from helpers.core.hashing import sha256_folder
from helpers.quantization.int8_linear import HALF_RANGE
from helpers.verification.checkpoint_files import CheckpointFiles
from helpers.verification.gate_decorator import examples, gate

EPS32 = torch.finfo(torch.float32).eps
LEVELS = 127  # a row with a maximum of 127.5 steps reaches at least ±127 after rounding
LOGARITHM = 32  # x^α = exp(α·ln x): |ln x| < 16 for x in [1e-5, 1e6], two such factors
SUFFIXES = ("weight_scale", "input_scale")


@gate("smoothing scales as declared")
def smoothing_gate(evidence: CheckpointFiles):
    """Every group was folded with the paper's scales at the declared alpha.

    A recovered scale is a quotient of two norms of the dtype, one of them a rounded quotient:
    2 eps. The scales were computed in float32, where x^α loses up to |ln x| eps. Other readers
    of the norm (a router) and the producer's bias must have the same scales.
    """
    folded, largest_error, wrong_groups, wrong_companions = 0, 0.0, [], []
    for group in evidence.groups:
        recovered, allowed = evidence.recovered_scales(group), _norm_rounding(evidence, group)
        if allowed is None:
            recovered, allowed = _row_scales(evidence, group)
        declared = evidence.declared_scales(group)
        error = ((recovered - declared).abs() / declared / allowed).max().item()
        folded += not bool((recovered == 1).all())
        if not error <= 1:  # NaN as well
            wrong_groups.append(group.producer)
        largest_error = largest((largest_error, error))
        wrong_companions += _wrong_companions(evidence, group)
    expected = len(evidence.groups)
    return (
        not (wrong_groups or wrong_companions) and folded == expected,
        f"{folded} of {expected} groups folded, {len(wrong_groups)} with other scales than "
        f"equation 4 gives{examples(wrong_groups)}; largest deviation {largest_error:.2g} of what "
        f"rounding allows; "
        f"{len(wrong_companions)} biases or routers off{examples(wrong_companions)}",
        f"{expected} groups folded, each by the scales of equation 4 at "
        + (_alpha_text(evidence.alphas) if evidence.groups else "no place"),
    )


def _alpha_text(alphas: dict[str, float]) -> str:
    low, high = min(alphas.values()), max(alphas.values())
    return f"α = {low:g}" if low == high else f"its own α ({low:g} to {high:g})"


def _norm_rounding(evidence: CheckpointFiles, group) -> Tensor | None:
    """(features,) relative rounding error of a norm's quotient; None for a Linear.

    A norm of (1 + w) stores w; close to -1, rounding w is coarse relative to 1 + w.
    """
    factors = evidence.norm_factors(group)
    if factors is None:
        return None
    _, after = factors
    coarser = ((after - group.norm_offset) / after).abs().clamp(min=1)
    coarser = torch.where(torch.isfinite(coarser), coarser, 1.0)
    return 2 * torch.finfo(evidence.dtype).eps * coarser + LOGARITHM * EPS32


def _wrong_companions(evidence: CheckpointFiles, group) -> list[str]:
    """Biases and routers of a group whose stored tensors lack the group's scales.

    Each is rounded twice: the scale to the dtype, then the product or quotient.
    """
    limit, wrong = 4 * torch.finfo(evidence.dtype).eps + LOGARITHM * EPS32, []
    scales, bias = evidence.recovered_scales(group), f"{group.producer}.bias"
    expected = {f"{n}.weight": evidence.source[f"{n}.weight"] * scales for n in group.readers}
    if bias in evidence.source:
        divided = evidence.source[bias].double()
        divided[-len(scales) :] /= scales
        expected[bias] = divided
    for key, tensor in expected.items():
        error = (evidence.saved[key].double() - tensor).abs()
        if not bool((error <= limit * tensor.abs()).all()):
            wrong.append(key)
    return wrong


def _row_scales(evidence: CheckpointFiles, group) -> tuple[Tensor, Tensor]:
    """(scales that a Linear producer's rows were divided by, their relative uncertainty).

    A row w of the source (its columns smoothed) became v: s = ⟨w, w⟩ / ⟨w, v⟩. Rounding to
    the grid moved every v_j by at most half a step, so ⟨w, v⟩ by at most ‖w‖₁ / 2 steps. A
    fused producer is divided in its last rows.
    """
    name, size = group.producer, len(evidence.declared_scales(group))
    columns, _ = evidence.folded[name]
    w = evidence.source[f"{name}.weight"].double() * (1 if columns is None else columns)
    saved, step = evidence.saved[f"{name}.weight"].double(), _step(evidence, name)
    projection = (w * saved * (1 if step is None else step)).sum(1)
    scales = w.square().sum(1) / projection
    eps = torch.finfo(evidence.dtype).eps
    uncertainty = 4 * eps + LOGARITHM * EPS32 + torch.zeros_like(scales)
    if step is not None:
        uncertainty = uncertainty + w.abs().sum(1) * (step.flatten() / 2) / projection.abs()
    return scales[-size:], uncertainty[-size:]


def _step(evidence: CheckpointFiles, name: str) -> Tensor | None:
    """(out_features or 1, 1) float64 step of a Linear stored as int8, else None."""
    scale = evidence.saved.get(f"{name}.weight_scale")
    return None if scale is None else scale.double().reshape(-1, 1)


@gate("weights on the declared grid")
def grid_gate(evidence: CheckpointFiles):
    """int8 weights lie within half a step of source × scales, and each row uses the whole grid.

    The quotient of at most 128 steps carries four roundings of the dtype (s, the product, the
    step, the quotient): 2 eps. A row whose maximum is below 127 has fewer than 8 bits, or the
    scale of another row.
    """
    granularity = evidence.claim.scheme[0]
    limit = 0.5 + 128 * (2 * torch.finfo(evidence.dtype).eps + LOGARITHM * EPS32)
    off_weights, unused_grid, malformed, largest_error = [], [], [], 0.0
    for name in evidence.targets:
        q, step = evidence.saved[f"{name}.weight"], _step(evidence, name)
        if q.dtype != torch.int8 or step is None or len(step) != _steps(q, granularity):
            malformed.append(name)
            continue
        if not (torch.isfinite(step).all() and (step > 0).all()):
            malformed.append(name)
            continue
        weight = evidence.smoothed_weight(name)
        error = (q.double() - weight / step).abs().max().item()
        largest_error = largest((largest_error, error))
        if not error <= limit:
            off_weights.append(name)
        parts = q if granularity == "channel" else q.reshape(1, -1)
        zero = weight.reshape(len(parts), -1).abs().amax(1) == 0
        if not ((parts.int().abs().amax(1) >= LEVELS) | zero).all():
            unused_grid.append(name)
    return (
        not (off_weights or unused_grid or malformed),
        f"of {len(evidence.targets)} Linears {len(malformed)} are not int8 with positive steps per "
        f"{granularity}{examples(malformed)}, {len(off_weights)} are off their float weights"
        f"{examples(off_weights)}, {len(unused_grid)} do not use the whole grid"
        f"{examples(unused_grid)}; largest error {largest_error:.4g} steps",
        f"none, none, none; at most {limit:.4g} steps",
    )


def _steps(q: Tensor, granularity: str) -> int:
    return q.shape[0] if granularity == "channel" else 1


@gate("smoothed float weights")
def float_weights_gate(evidence: CheckpointFiles):
    """In a variant that only smooths, every weight equals the source's times the scales.

    Two roundings of the dtype each for columns and rows, two for the scales themselves.
    """
    limit = 4 * torch.finfo(evidence.dtype).eps + LOGARITHM * EPS32
    smoothed = [n for n, scales in evidence.folded.items() if scales != (None, None)]
    wrong = []
    for name in smoothed:
        expected = evidence.smoothed_weight(name)
        error = (evidence.saved[f"{name}.weight"].double() - expected).abs()
        if not bool((error <= limit * expected.abs()).all()):
            wrong.append(name)
    return (
        not wrong,
        f"{len(wrong)} of {len(smoothed)} smoothed Linears are off{examples(wrong)}",
        f"none by more than {limit:.1e} of each weight",
    )


@gate("static scales from the calibration")
def static_gate(evidence: CheckpointFiles):
    """A static input scale is the layer's own calibrated maximum after smoothing, over 127.5.

    Three roundings of the dtype (s, the smoothed maximum, the scale) and those inside s.
    """
    limit = 3 * torch.finfo(evidence.dtype).eps + LOGARITHM * EPS32
    wrong = []
    for name in evidence.targets:
        columns, _ = evidence.folded[name]
        absmax = evidence.absmax[name].double()
        expected = (absmax if columns is None else absmax / columns).max() / HALF_RANGE
        stored = evidence.saved.get(f"{name}.input_scale", torch.tensor(float("nan"))).double()
        if stored.numel() != 1 or not abs(stored.item() / expected.item() - 1) <= limit:
            wrong.append(name)
    return (
        not wrong,
        f"{len(wrong)} of {len(evidence.targets)} input scales are not their layer's"
        f"{examples(wrong)}",
        f"none by more than {limit:.1e}",
    )


@gate("all other tensors unchanged")
def unchanged_gate(evidence: CheckpointFiles):
    """Head, embeddings, other norms, biases and ignored layers equal the source's bit for bit.

    Other gates check the tensors that smoothing changes (its norms, scaled float Linears).
    """
    changed_by_design = {f"{n}.weight" for n in evidence.targets}
    changed_by_design |= {f"{g.producer}.weight" for g in evidence.groups}
    changed_by_design |= {f"{g.producer}.bias" for g in evidence.groups}
    changed_by_design |= {f"{n}.weight" for n, s in evidence.folded.items() if s != (None, None)}
    unchanged_keys = [k for k in evidence.source if k not in changed_by_design]
    scales = {f"{n}.{suffix}" for n in evidence.targets for suffix in SUFFIXES}
    unexpected = set(evidence.source) ^ (set(evidence.saved) - scales)
    differing = [
        k for k in unchanged_keys if k in evidence.saved and not _is_unchanged(evidence, k)
    ]
    return (
        not (unexpected or differing),
        f"{len(differing)} of {len(unchanged_keys)} kept tensors differ{examples(differing)}, "
        f"{len(unexpected)} are "
        f"missing or new{examples(sorted(unexpected))}",
        "none differ, none are missing or new",
    )


def _is_unchanged(evidence: CheckpointFiles, key: str) -> bool:
    saved, expected = evidence.saved[key], evidence.source[key]
    return saved.dtype == expected.dtype and torch.equal(saved, expected)


@gate("source model unchanged")
def source_gate(evidence: CheckpointFiles):
    """The source's files are unchanged since calibration and since the start of the run."""
    now = sha256_folder(evidence.source_folder)
    calibrated = evidence.calibration_record["inputs"].get("model", "unknown")
    return (
        now == evidence.source_hash == calibrated,
        f"files {now[:12]} after the run",
        f"files {evidence.source_hash[:12]} before it, {calibrated[:12]} at calibration",
    )
