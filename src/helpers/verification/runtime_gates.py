"""Gates on what the checkpoint computes, loaded from disk as the evaluation loads it."""

import copy

import torch
from torch import Tensor

from helpers.core.gates import largest
from helpers.quantization.int8_linear import HALF_RANGE
from helpers.verification.checkpoint_files import CheckpointFiles
from helpers.verification.gate_decorator import examples, gate
from helpers.verification.hooks import logits_of

CHUNK_ROWS = 8192  # rows of a weight in one step
LOUDER = 2.0**8  # a power of two, so that scaling a token is exact


@gate("smoothing preserves the logits")
def function_gate(evidence: CheckpointFiles):
    """The float model that the files imply gives the source's logits.

    Its norms and float tensors are the stored ones. For an int8 weight it takes source ×
    scales, clamped to the half-step around the stored integer: a sound checkpoint implies
    source × scales itself.

    The limit is measured, since depth and outliers decide how roundings grow. It is the change
    of the source's own logits if every weight is perturbed by its rounding: one eps (two
    roundings) of the dtype of the smoothed weights, and √K of float32's in a sum of K
    products. The limit is four times that, since one draw of the signs is not the worst. Both
    models compute in float32, and source × scales is computed here, so the checkpoint's dtype
    matters only for float weights that are read from it.
    """
    model = evidence.source_model.float()
    try:
        expected = logits_of(model, evidence.probes)
        _perturb_by_rounding_(model, torch.float32 if evidence.claim.quantized else evidence.dtype)
        limit = 4 * _largest_difference(logits_of(model, evidence.probes), expected)
        _load_implied_weights_(model, evidence)
        measured = _largest_difference(logits_of(model, evidence.probes), expected)
    finally:
        evidence.release()  # its weights were changed
    return (
        measured <= limit,  # False for NaN as well
        f"largest logit change {measured:.2e}",
        f"at most {limit:.2e}",
    )


def _largest_difference(logits: list[Tensor], expected: list[Tensor]) -> float:
    return (
        torch.stack([(a - b).abs().max() for a, b in zip(logits, expected, strict=True)])
        .max()
        .item()
    )


@torch.no_grad()
def _perturb_by_rounding_(model, dtype: torch.dtype) -> None:
    """Move every weight by the roundings of one Linear, up or down at random."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        size = torch.finfo(dtype).eps + parameter.shape[-1] ** 0.5 * torch.finfo(torch.float32).eps
        for rows in parameter.split(CHUNK_ROWS):  # the embeddings alone are a tenth of a model
            signs = torch.randint(0, 2, rows.shape, generator=generator, dtype=torch.int8) * 2 - 1
            rows.mul_(1 + size * signs.to(rows.device))


@torch.no_grad()
def _load_implied_weights_(model, evidence: CheckpointFiles) -> None:
    """Give the model the weights that the checkpoint's files imply, one at a time."""
    state, targets = model.state_dict(), {f"{name}.weight" for name in evidence.targets}
    for key in evidence.saved:
        if key in evidence.source and key in state:
            implied = _implied_weight(evidence, key) if key in targets else None
            state[key].copy_((evidence.saved[key] if implied is None else implied).float())


def _implied_weight(evidence: CheckpointFiles, key: str) -> Tensor | None:
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
def activations_gate(evidence: CheckpointFiles):
    """Every quantized Linear multiplies int8 activations at the declared granularity.

    Each gets its real input in its original shape (experts and flattened MLPs have no batch
    dimension). Its output must match exact integer arithmetic on the stored tensors, and must
    not match the product with float activations. Then one token is scaled by 256: with one
    scale per token no other output changes; with one dynamic scale all outputs change; with a
    static scale the token is clipped.
    """
    model, inputs, declared = evidence.running_model, evidence.captured, evidence.claim.scheme[1]
    stored = [n for n in evidence.targets if n in evidence.stored_int8]
    missing = len(evidence.targets) - len(stored)
    wrong, like_float, kinds = [], [], {"float": missing} if missing else {}
    for name in stored:
        x, layer = _exact_layer(evidence, inputs[name], model.get_submodule(name))
        exact, unrounded, allowed = _expected_products(evidence, name, x)
        output = _rows(layer(x)).cpu().double()
        if not bool(((output - exact).abs() <= allowed).all()):
            wrong.append(name)
        if (output - unrounded).norm() < (output - exact).norm():
            like_float.append(name)
        kind = "float" if like_float[-1:] == [name] else observed_granularity(layer, x)
        kinds[kind] = kinds.get(kind, 0) + 1
    observed = ", ".join(f"{n} {k.replace('_', ' ')}" for k, n in sorted(kinds.items()))
    return (
        not (wrong or like_float) and set(kinds) == {declared},
        f"of {len(inputs)} Linears observed: {observed}; {len(wrong)} off the int8 product"
        f"{examples(wrong)}, {len(like_float)} nearer to float activations{examples(like_float)}",
        f"all {declared.replace('_', ' ')}, on the int8 product to float32 rounding",
    )


def _exact_layer(evidence: CheckpointFiles, x: Tensor, layer) -> tuple[Tensor, torch.nn.Module]:
    """The input and the layer on which to check int8 arithmetic.

    The simulation rounds its scales and values to the dtype. In bfloat16 that is as coarse as
    int8 itself, so a float32 copy of the same layer is checked.
    """
    if evidence.job.study.runtime.quantized == "reference":
        return x.float(), copy.deepcopy(layer).float()
    return x, layer


def _expected_products(
    evidence: CheckpointFiles, name: str, x: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Float64 (int8 product, product with float activations, allowed difference).

    Computed from the stored tensors. By Cauchy–Schwarz, the norms of the factors bound the
    sum of absolute products; rounding() gives the relative error allowed on it.
    """
    saved = evidence.saved
    weight = saved[f"{name}.weight"].double() * saved[f"{name}.weight_scale"].double().reshape(
        -1, 1
    )
    rows, granularity = _rows(x).float().cpu(), evidence.claim.scheme[1]
    if granularity == "tensor_static":
        scale = saved[f"{name}.input_scale"].float().reshape(1, 1)
    else:
        top = rows.abs().amax(1, keepdim=True)
        scale = (top if granularity == "token_dynamic" else top.max().reshape(1, 1)) / HALF_RANGE
    q = (rows / torch.where(scale == 0, 1.0, scale)).round().clamp(-128, 127)
    bias = saved.get(f"{name}.bias", torch.zeros(len(weight))).double()
    rounded = q.double() * scale.double()
    size = rounded.norm(dim=1, keepdim=True) * weight.norm(dim=1) + bias.abs()
    allowed = evidence.rounding(weight.shape[1]) * size
    return rounded @ weight.T + bias, rows.double() @ weight.T + bias, allowed


def _rows(x: Tensor) -> Tensor:
    """(tokens, features), with all leading dimensions flattened."""
    return x.view(-1, x.shape[-1])


@torch.inference_mode()
def observed_granularity(layer, x: Tensor) -> str:
    """The activation granularity of a Linear, observed by scaling one token of its input.

    Args:
        layer: the Linear as it runs.
        x: (…, tokens, in_features) a real input of at least two tokens.
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


@gate("reloaded logits identical")
def reload_gate(evidence: CheckpointFiles):
    """Loaded twice from disk, the checkpoint gives bit-identical and finite logits."""
    first = logits_of(evidence.running_model, evidence.probes)
    evidence.release()
    second = logits_of(evidence.running_model, evidence.probes)
    differ = sum(not torch.equal(a, b) for a, b in zip(first, second, strict=True))
    finite = all(bool(torch.isfinite(logits).all()) for logits in first)
    return (
        differ == 0 and finite,
        f"{differ} of {len(first)} texts differ, logits are {'' if finite else 'not '}finite",
        "none differ, logits are finite",
    )


@gate("int8 layers match the reference")
@torch.inference_mode()
def kernel_gate(evidence: CheckpointFiles):
    """The INT8 kernels agree with compressed-tensors' forward, layer by layer on equal inputs.

    Whole models cannot be compared: one value that rounds differently changes all later
    roundings (NOTES.md).
    """
    inputs, fast = evidence.captured, evidence.int8_model
    answers = {n: _rows(fast.get_submodule(n)(x)).cpu() for n, x in inputs.items()}
    del fast
    reference, wrong, worst = evidence.reference_model, [], 0.0
    for name, x in inputs.items():
        expected = _rows(reference.get_submodule(name)(x)).cpu().double()
        output = answers[name].double()
        *_, allowed = _expected_products(evidence, name, x)
        error = ((output - expected).abs() / allowed.clamp(min=1e-30)).max().item()
        worst = largest((worst, error))
        if not error <= 2:  # both outputs are rounded
            wrong.append(name)
    compared = len(inputs)
    return (
        not wrong and compared == len(evidence.targets),
        f"{compared} layers compared, {len(wrong)} differ{examples(wrong)}; "
        f"largest difference {worst:.2g} roundings",
        f"{len(evidence.targets)} layers, at most 2 roundings",
    )
