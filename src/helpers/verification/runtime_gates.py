"""Gates on what the checkpoint computes, loaded from disk as the evaluation loads it."""

import copy

import torch
from torch import Tensor

from helpers.core.gates import largest
from helpers.quantization.int8_linear import HALF_RANGE
from helpers.verification.checkpoint_files import Evidence
from helpers.verification.gate_decorator import gate, named
from helpers.verification.hooks import logits_of

CHUNK_ROWS = 8192  # of a weight at a time
LOUDER = 2.0**8  # a power of two, so that scaling a token by it rounds nothing


@gate("smoothing keeps the function")
def function_gate(evidence: Evidence):
    """The float model that the files imply answers as the source does.

    Its norms and float tensors are those on disk. Where a weight is int8, it is source ×
    scales, moved into the half-step around the stored integer if it is not there: a
    sound checkpoint implies source × scales itself.

    The limit is measured, since depth and outliers decide how roundings grow: the
    source's own logits move by so much when every weight is off by what rounding may
    cause: one eps (two roundings) of the dtype that the smoothed weights are kept in, and
    √K of float32 in a sum of K products. Four times that, since one draw of the signs is
    not the worst. Both models compute in float32, and source × scales is made anew, so
    that the dtype is the checkpoint's only where float weights are read from it.
    """
    model = evidence.source_model.float()
    try:
        expected = logits_of(model, evidence.probes)
        _shake_(model, torch.float32 if evidence.claim.quantized else evidence.dtype)
        limit = 4 * _distance(logits_of(model, evidence.probes), expected)
        _imply_(model, evidence)
        measured = _distance(logits_of(model, evidence.probes), expected)
    finally:
        evidence.let_go()  # it is no longer the source
    return (
        measured <= limit,  # False for NaN as well
        f"largest logit change {measured:.2e}",
        f"at most {limit:.2e}",
    )


def _distance(found: list[Tensor], expected: list[Tensor]) -> float:
    return (
        torch.stack([(a - b).abs().max() for a, b in zip(found, expected, strict=True)])
        .max()
        .item()
    )


@torch.no_grad()
def _shake_(model, dtype: torch.dtype) -> None:
    """Put every weight off by the roundings of one Linear, up or down."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        size = torch.finfo(dtype).eps + parameter.shape[-1] ** 0.5 * torch.finfo(torch.float32).eps
        for rows in parameter.split(CHUNK_ROWS):  # the embeddings alone are a tenth of a model
            signs = torch.randint(0, 2, rows.shape, generator=generator, dtype=torch.int8) * 2 - 1
            rows.mul_(1 + size * signs.to(rows.device))


@torch.no_grad()
def _imply_(model, evidence: Evidence) -> None:
    """Give the model the weights that the checkpoint's files imply, one at a time."""
    state, targets = model.state_dict(), {f"{name}.weight" for name in evidence.targets}
    for key in evidence.saved:
        if key in evidence.source and key in state:
            made = _implied(evidence, key) if key in targets else None
            state[key].copy_((evidence.saved[key] if made is None else made).float())


def _implied(evidence: Evidence, key: str) -> Tensor | None:
    """(out_features, in_features) float64 of one target; None if it is not int8 on disk."""
    name, q = key.removesuffix(".weight"), evidence.saved[key]
    step = evidence.saved.get(f"{name}.weight_scale")
    if q.dtype != torch.int8 or step is None:
        return None
    step = step.double().reshape(-1, 1)
    slack = 0.5 + 256 * torch.finfo(evidence.dtype).eps  # as in the grid gate
    low, high = (q.double() - slack) * step, (q.double() + slack) * step
    return evidence.smoothed_weight(name).clamp(low, high)


@gate("int8 activations at run time")
@torch.inference_mode()
def activations_gate(evidence: Evidence):
    """Every quantized Linear multiplies int8 activations, at the declared granularity.

    On its real input, in the shape the model gives it (an expert and a flattened MLP get no
    batch dimension), each is held against exact integer arithmetic on the tensors on disk,
    and against the product with float activations, which it must not be. One token is then
    made 256 times louder: with one scale a token no other answer may change; with one
    dynamic scale they all do; with a static one the token is clipped.
    """
    model, inputs, declared = evidence.running_model, evidence.captured, evidence.claim.scheme[1]
    stored = [n for n in evidence.targets if n in evidence.stored_int8]
    lacking = len(evidence.targets) - len(stored)
    off, like_float, seen = [], [], {"float": lacking} if lacking else {}
    for name in stored:
        x, layer = _proof_of(evidence, inputs[name], model.get_submodule(name))
        exact, unrounded, allowed = _products(evidence, name, x)
        found = _rows(layer(x)).cpu().double()
        if not bool(((found - exact).abs() <= allowed).all()):
            off.append(name)
        if (found - unrounded).norm() < (found - exact).norm():
            like_float.append(name)
        kind = "float" if like_float[-1:] == [name] else observed_granularity(layer, x)
        seen[kind] = seen.get(kind, 0) + 1
    observed = ", ".join(f"{n} {k.replace('_', ' ')}" for k, n in sorted(seen.items()))
    return (
        not (off or like_float) and set(seen) == {declared},
        f"of {len(inputs)} Linears observed: {observed}; {len(off)} off the int8 product"
        f"{named(off)}, {len(like_float)} nearer to float activations{named(like_float)}",
        f"all {declared.replace('_', ' ')}, on the int8 product to float32 rounding",
    )


def _proof_of(evidence: Evidence, x: Tensor, layer) -> tuple[Tensor, torch.nn.Module]:
    """The input and the layer to prove int8 on.

    The simulation rounds its scales and values to the dtype, and in bfloat16 that is as
    coarse as int8 itself; the very same layer is therefore looked at in float32.
    """
    if evidence.job.study.runtime.quantized == "reference":
        return x.float(), copy.deepcopy(layer).float()
    return x, layer


def _products(evidence: Evidence, name: str, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Float64 (int8 product, product with float activations, allowed difference).

    From the tensors on disk. Cauchy–Schwarz bounds the sum of absolute products by the
    norms of its factors; rounding() says what part of it may be lost.
    """
    saved = evidence.saved
    weight = saved[f"{name}.weight"].double() * saved[f"{name}.weight_scale"].double().reshape(
        -1, 1
    )
    rows, kind = _rows(x).float().cpu(), evidence.claim.scheme[1]
    if kind == "tensor_static":
        scale = saved[f"{name}.input_scale"].float().reshape(1, 1)
    else:
        top = rows.abs().amax(1, keepdim=True)
        scale = (top if kind == "token_dynamic" else top.max().reshape(1, 1)) / HALF_RANGE
    q = (rows / torch.where(scale == 0, 1.0, scale)).round().clamp(-128, 127)
    bias = saved.get(f"{name}.bias", torch.zeros(len(weight))).double()
    rounded = q.double() * scale.double()
    size = rounded.norm(dim=1, keepdim=True) * weight.norm(dim=1) + bias.abs()
    allowed = evidence.rounding(weight.shape[1]) * size
    return rounded @ weight.T + bias, rows.double() @ weight.T + bias, allowed


def _rows(x: Tensor) -> Tensor:
    """(tokens, features), whatever stands before."""
    return x.view(-1, x.shape[-1])


@torch.inference_mode()
def observed_granularity(layer, x: Tensor) -> str:
    """What scaling one token does to a Linear's answers tells how it scales activations.

    Args:
        layer: the Linear as it runs.
        x: (…, tokens, in_features) a real input of two tokens or more.
    """
    loud = int(_rows(x).abs().amax(1).argmax())
    others = torch.arange(len(_rows(x))) != loud
    changed = x.clone()
    _rows(changed)[loud] *= LOUDER
    silent = _rows(layer(torch.zeros_like(x)))[loud]  # the bias
    before, after = _rows(layer(x)), _rows(layer(changed))
    if not torch.equal(before[others], after[others]):
        return "tensor_dynamic"
    expected = (before[loud] - silent).double() * LOUDER
    reached = (after[loud] - silent).double()
    if (reached - expected).norm() > 0.01 * expected.norm():
        return "tensor_static"
    return "token_dynamic"


@gate("reload gives the same logits")
def reload_gate(evidence: Evidence):
    """Loaded from disk twice, the checkpoint answers alike to the bit, and with numbers."""
    first = logits_of(evidence.running_model, evidence.probes)
    evidence.let_go()
    second = logits_of(evidence.running_model, evidence.probes)
    differ = sum(not torch.equal(a, b) for a, b in zip(first, second, strict=True))
    finite = all(bool(torch.isfinite(logits).all()) for logits in first)
    return (
        differ == 0 and finite,
        f"{differ} of {len(first)} texts differ, logits are {'' if finite else 'not '}finite",
        "none differ, logits are finite",
    )


@gate("int8 layers agree with the reference")
@torch.inference_mode()
def kernel_gate(evidence: Evidence):
    """The INT8 kernels and compressed-tensors' own forward, layer by layer on equal inputs.

    Whole models cannot be compared: one value tipped over a rounding edge redraws every
    later rounding (NOTES.md).
    """
    inputs, fast = evidence.captured, evidence.int8_model
    answers = {n: _rows(fast.get_submodule(n)(x)).cpu() for n, x in inputs.items()}
    del fast
    reference, off, worst = evidence.reference_model, [], 0.0
    for name, x in inputs.items():
        expected = _rows(reference.get_submodule(name)(x)).cpu().double()
        found = answers[name].double()
        *_, allowed = _products(evidence, name, x)
        error = ((found - expected).abs() / allowed.clamp(min=1e-30)).max().item()
        worst = largest((worst, error))
        if not error <= 2:  # both of them are rounded
            off.append(name)
    compared = len(inputs)
    return (
        not off and compared == len(evidence.targets),
        f"{compared} layers compared, {len(off)} differ{named(off)}; "
        f"largest difference {worst:.2g} roundings",
        f"{len(evidence.targets)} layers, at most 2 roundings",
    )
