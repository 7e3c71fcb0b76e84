"""Gates on the checkpoint's tensors, held against the source's and the calibration's files."""

import torch
from torch import Tensor

from helpers.core.gates import largest
from helpers.core.hashing import sha256_folder
from helpers.quantization.int8_linear import HALF_RANGE
from helpers.verification.checkpoint_files import Evidence
from helpers.verification.gate_decorator import gate, named

EPS32 = torch.finfo(torch.float32).eps
LEVELS = 127  # a row whose largest value is 127.5 steps reaches ±127 at least, however rounded
LOGARITHM = 32  # x^α = exp(α·ln x): |ln x| < 16 for x in [1e-5, 1e6], two such factors
SUFFIXES = ("weight_scale", "input_scale")


@gate("smoothing as declared")
def smoothing_gate(evidence: Evidence):
    """Every group was folded, by the paper's scales at the declared alpha.

    A recovered scale is a quotient of two norms of the dtype, one of them a rounded
    quotient: 2 eps. The scales were made in float32, where x^α loses up to |ln x| eps.
    What else reads the norm (a router), or leaves with it (a bias), has the same scales.
    """
    folded, worst, where, riders = 0, 0.0, [], []
    for group in evidence.groups:
        found, allowed = evidence.recovered_scales(group), _norm_rounding(evidence, group)
        if allowed is None:
            found, allowed = _row_scales(evidence, group)
        declared = evidence.declared_scales(group)
        error = ((found - declared).abs() / declared / allowed).max().item()
        folded += not bool((found == 1).all())
        if not error <= 1:  # NaN as well
            where.append(group.producer)
        worst = largest((worst, error))
        riders += _riders_off(evidence, group)
    expected = len(evidence.groups)
    return (
        not (where or riders) and folded == expected,
        f"{folded} of {expected} groups folded, {len(where)} with other scales than equation 4 "
        f"gives{named(where)}; largest deviation {worst:.2g} of what rounding allows; "
        f"{len(riders)} biases or routers off{named(riders)}",
        f"{expected} groups folded, each by the scales of equation 4 at "
        + (_in_words(evidence.alphas) if evidence.groups else "no place"),
    )


def _in_words(alphas: dict[str, float]) -> str:
    low, high = min(alphas.values()), max(alphas.values())
    return f"α = {low:g}" if low == high else f"its own α ({low:g} to {high:g})"


def _norm_rounding(evidence: Evidence, group) -> Tensor | None:
    """(features,) how far rounding may put a norm's quotient off; None for a Linear.

    A norm of (1 + w) is rounded as w, which close to -1 is coarse beside 1 + w.
    """
    factors = evidence.norm_factors(group)
    if factors is None:
        return None
    _, after = factors
    coarser = ((after - group.norm_offset) / after).abs().clamp(min=1)
    coarser = torch.where(torch.isfinite(coarser), coarser, 1.0)
    return 2 * torch.finfo(evidence.dtype).eps * coarser + LOGARITHM * EPS32


def _riders_off(evidence: Evidence, group) -> list[str]:
    """Tensors that a group's scales are folded into too and that do not have them.

    Rounded twice each: the scale to the dtype, and the product or quotient.
    """
    limit, off = 4 * torch.finfo(evidence.dtype).eps + LOGARITHM * EPS32, []
    scales, bias = evidence.recovered_scales(group), f"{group.producer}.bias"
    expected = {f"{n}.weight": evidence.source[f"{n}.weight"] * scales for n in group.readers}
    if bias in evidence.source:
        divided = evidence.source[bias].double()
        divided[-len(scales) :] /= scales
        expected[bias] = divided
    for key, tensor in expected.items():
        error = (evidence.saved[key].double() - tensor).abs()
        if not bool((error <= limit * tensor.abs()).all()):
            off.append(key)
    return off


def _row_scales(evidence: Evidence, group) -> tuple[Tensor, Tensor]:
    """What a Linear producer's rows were divided by, and how well the file can tell.

    The row w of the source (its columns smoothed) became v: s = ⟨w, w⟩ / ⟨w, v⟩. Rounding
    to the grid moved every v_j by half a step at most, so ⟨w, v⟩ by ‖w‖₁ / 2 steps. Of a
    fused producer the last rows are meant.
    """
    name, size = group.producer, len(evidence.declared_scales(group))
    columns, _ = evidence.folded[name]
    w = evidence.source[f"{name}.weight"].double() * (1 if columns is None else columns)
    saved, step = evidence.saved[f"{name}.weight"].double(), _step(evidence, name)
    along = (w * saved * (1 if step is None else step)).sum(1)
    found = w.square().sum(1) / along
    eps = torch.finfo(evidence.dtype).eps
    blur = 4 * eps + LOGARITHM * EPS32 + torch.zeros_like(found)
    if step is not None:
        blur = blur + w.abs().sum(1) * (step.flatten() / 2) / along.abs()
    return found[-size:], blur[-size:]


def _step(evidence: Evidence, name: str) -> Tensor | None:
    """(out_features or 1, 1) float64 step of a Linear stored as int8, else None."""
    scale = evidence.saved.get(f"{name}.weight_scale")
    return None if scale is None else scale.double().reshape(-1, 1)


@gate("weights on the declared grid")
def grid_gate(evidence: Evidence):
    """int8 within half a step of source × scales, each row (or tensor) using the whole grid.

    The quotient of at most 128 steps carries four roundings of the dtype (s, the
    product, the step, the quotient): 2 eps. A row that ends short of ±127 has fewer bits
    than it says, or the scale of another row.
    """
    granularity = evidence.claim.scheme[0]
    limit = 0.5 + 128 * (2 * torch.finfo(evidence.dtype).eps + LOGARITHM * EPS32)
    far, short, wrong, worst = [], [], [], 0.0
    for name in evidence.targets:
        q, step = evidence.saved[f"{name}.weight"], _step(evidence, name)
        if q.dtype != torch.int8 or step is None or len(step) != _steps(q, granularity):
            wrong.append(name)
            continue
        if not (torch.isfinite(step).all() and (step > 0).all()):
            wrong.append(name)
            continue
        weight = evidence.smoothed_weight(name)
        error = (q.double() - weight / step).abs().max().item()
        worst = largest((worst, error))
        if not error <= limit:
            far.append(name)
        parts = q if granularity == "channel" else q.reshape(1, -1)
        zero = weight.reshape(len(parts), -1).abs().amax(1) == 0
        if not ((parts.int().abs().amax(1) >= LEVELS) | zero).all():
            short.append(name)
    return (
        not (far or short or wrong),
        f"of {len(evidence.targets)} Linears {len(wrong)} are not int8 with positive steps per "
        f"{granularity}{named(wrong)}, {len(far)} are off their float weights{named(far)}, "
        f"{len(short)} do not use the whole grid{named(short)}; largest error {worst:.4g} steps",
        f"none, none, none; at most {limit:.4g} steps",
    )


def _steps(q: Tensor, granularity: str) -> int:
    return q.shape[0] if granularity == "channel" else 1


@gate("float weights times the scales")
def float_weights_gate(evidence: Evidence):
    """In a variant that only smooths, every Linear is the source's times the scales.

    Two roundings of the dtype for columns and rows each, two for what they were made of.
    """
    limit = 4 * torch.finfo(evidence.dtype).eps + LOGARITHM * EPS32
    touched = [n for n, scales in evidence.folded.items() if scales != (None, None)]
    off = []
    for name in touched:
        expected = evidence.smoothed_weight(name)
        error = (evidence.saved[f"{name}.weight"].double() - expected).abs()
        if not bool((error <= limit * expected.abs()).all()):
            off.append(name)
    return (
        not off,
        f"{len(off)} of {len(touched)} smoothed Linears are off{named(off)}",
        f"none by more than {limit:.1e} of each weight",
    )


@gate("static scales from the calibration")
def static_gate(evidence: Evidence):
    """A static scale is the layer's own calibrated maximum, after smoothing, over 127.5.

    Three roundings of the dtype (s, the smoothed maximum, the scale) and those of s.
    """
    limit = 3 * torch.finfo(evidence.dtype).eps + LOGARITHM * EPS32
    off = []
    for name in evidence.targets:
        columns, _ = evidence.folded[name]
        absmax = evidence.absmax[name].double()
        expected = (absmax if columns is None else absmax / columns).max() / HALF_RANGE
        found = evidence.saved.get(f"{name}.input_scale", torch.tensor(float("nan"))).double()
        if found.numel() != 1 or not abs(found.item() / expected.item() - 1) <= limit:
            off.append(name)
    return (
        not off,
        f"{len(off)} of {len(evidence.targets)} input scales are not their layer's{named(off)}",
        f"none by more than {limit:.1e}",
    )


@gate("everything else bit-identical")
def kept_gate(evidence: Evidence):
    """Head, embeddings, unused norms, biases, ignored layers: as in the source's files.

    What smoothing must change (its norms, the float Linears it scales) has its own gates.
    """
    changed_by_design = {f"{n}.weight" for n in evidence.targets}
    changed_by_design |= {f"{g.producer}.weight" for g in evidence.groups}
    changed_by_design |= {f"{g.producer}.bias" for g in evidence.groups}
    changed_by_design |= {f"{n}.weight" for n, s in evidence.folded.items() if s != (None, None)}
    kept = [k for k in evidence.source if k not in changed_by_design]
    scales = {f"{n}.{suffix}" for n in evidence.targets for suffix in SUFFIXES}
    odd = set(evidence.source) ^ (set(evidence.saved) - scales)
    differ = [k for k in kept if k in evidence.saved and not _same(evidence, k)]
    return (
        not (odd or differ),
        f"{len(differ)} of {len(kept)} kept tensors differ{named(differ)}, {len(odd)} are "
        f"missing or new{named(sorted(odd))}",
        "none differ, none are missing or new",
    )


def _same(evidence: Evidence, key: str) -> bool:
    found, expected = evidence.saved[key], evidence.source[key]
    return found.dtype == expected.dtype and torch.equal(found, expected)


@gate("source model untouched")
def source_gate(evidence: Evidence):
    """The source's files are what calibration read and what the run began with."""
    now = sha256_folder(evidence.source_folder)
    calibrated = evidence.calibration_record["inputs"].get("model", "unknown")
    return (
        now == evidence.source_hash == calibrated,
        f"files {now[:12]} after the run",
        f"files {evidence.source_hash[:12]} before it, {calibrated[:12]} at calibration",
    )
