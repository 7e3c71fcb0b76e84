"""Gates on loaded models: outputs of the checkpoint, identity of the evaluated variant.

The checkpoint is loaded from disk as the evaluation loads it. The gates of `variant_gates` look at
a model that is loaded for them; a run that verifies one model and asks another (the float source,
another checkpoint, another float type) would pass them all. So the model that is asked is compared
with the files too.
"""

import copy
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from helpers.core.architectures import HEAD
from helpers.core.processes import set_activity
from helpers.core.records import Gate, examples, gate, largest, read_json, sha256_folder
from helpers.quantization.int8_linear import HALF_RANGE
from helpers.quantization.variants import load_variant, variant_runtime
from helpers.sources.model_files import TensorFiles
from helpers.sources.models import float32_runtime, load_model, model_folder
from helpers.study.loading import Job
from helpers.verification import rulers
from helpers.verification.checkpoint_files import (
    GPTQ_DAMPING,
    GPTQ_RMS,
    CheckpointFiles,
    RotatedFiles,
    capture_inputs,
    first_block_only,
    logits_of,
)

CHUNK_ROWS = 8192  # rows of a weight in one step
LOUDER = 2.0**8  # a power of two, so that scaling a token is exact


@gate("smoothing preserves the logits")
def function_gate(evidence: CheckpointFiles):
    """The float model that the files imply gives the source's logits.

    Its norms and float tensors are the stored ones. For an int8 weight it takes source ×
    scales, clamped to the half-step around the stored integer: a sound checkpoint implies
    source × scales itself. On a clipped grid the ends stand for all that lies beyond them. GPTQ
    moves weights further than half a step: there a row counts as source × scales if its error is
    within GPTQ's bound (the grid gate says which), and as it is stored if not.

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
        _perturb_by_rounding_(model, _rounded_in(evidence))
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


def _rounded_in(evidence: CheckpointFiles) -> Callable[[str], torch.dtype]:
    """The type in which a parameter was rounded, by its name.

    A smoothed weight that stays float is rounded to the checkpoint's dtype, in a variant that only
    smooths every weight.
    """
    quantized, smoothed = set(evidence.rounded_targets), evidence.folded
    rounded = {
        f"{n}.weight" for n in smoothed if n not in quantized and smoothed[n] != (None, None)
    }

    def dtype_of(key: str) -> torch.dtype:
        in_float32 = bool(quantized) and key not in rounded and not evidence.is_converted
        return torch.float32 if in_float32 else evidence.dtype

    return dtype_of


@torch.no_grad()
def _perturb_by_rounding_(model, rounded_in: Callable[[str], torch.dtype]) -> None:
    """Move every weight by the roundings of one Linear, up or down at random."""
    generator = torch.Generator().manual_seed(0)
    for key, parameter in model.named_parameters():
        sums = parameter.shape[-1] ** 0.5 * torch.finfo(torch.float32).eps
        size = torch.finfo(rounded_in(key)).eps + sums
        for rows in parameter.split(CHUNK_ROWS):  # the embeddings alone are a tenth of a model
            signs = torch.randint(0, 2, rows.shape, generator=generator, dtype=torch.int8) * 2 - 1
            rows.mul_(1 + size * signs.to(rows.device))


@torch.no_grad()
def _load_implied_weights_(model, evidence: CheckpointFiles) -> None:
    """Give the model the weights that the checkpoint's files imply, one at a time."""
    state, rounded = model.state_dict(), {f"{name}.weight" for name in evidence.rounded_targets}
    for key in {**dict.fromkeys(evidence.saved), **dict.fromkeys(sorted(rounded))}:
        if key in evidence.source and key in state:
            implied = _implied_weight(evidence, key) if key in rounded else None
            state[key].copy_((evidence.saved[key] if implied is None else implied).float())


def _implied_weight(evidence: CheckpointFiles, key: str) -> Tensor | None:
    """(out_features, in_features) float64 of one target; None if it is not int8 on disk."""
    name = key.removesuffix(".weight")
    if evidence.claim.ruler:
        low, high = rulers.bounds_of(evidence, name, 2 * torch.finfo(evidence.dtype).eps)
        return evidence.smoothed_weight(name).clamp(low, high)
    q = evidence.saved[key]
    step = evidence.saved.get(f"{name}.weight_scale")
    if q.dtype != torch.int8 or step is None:
        return None
    step, weight = step.double().reshape(-1, 1), evidence.smoothed_weight(name)
    slack = 256 * torch.finfo(evidence.dtype).eps  # as in the grid gate
    rounding = evidence.rounding_of(name)
    if rounding == "gptq":
        within_bound = evidence.errors_of_rows(name, weight, step) <= GPTQ_RMS + slack
        return torch.where(within_bound[:, None], weight, q.double() * step)
    low, high = (q.double() - 0.5 - slack) * step, (q.double() + 0.5 + slack) * step
    if rounding == "mse":
        low, high = low.masked_fill(q == -128, -torch.inf), high.masked_fill(q == 127, torch.inf)
    return weight.clamp(low, high)


@gate("rotation keeps the function")
def same_function_gate(evidence: RotatedFiles):
    """The rotated model gives its start's logits on a few real texts, both read in float32.

    The limit is measured as in `function_gate`: four times the change of the start's own logits
    if every weight moves by one rounding of the type in which the model is saved.
    """
    runtime = float32_runtime(evidence.runtime)
    model = load_model(evidence.start, runtime)
    expected = logits_of(model, evidence.tokens)
    _perturb_by_rounding_(model, lambda _key: evidence.dtype)
    limit = 4 * _largest_difference(logits_of(model, evidence.tokens), expected)
    del model
    logits = logits_of(load_model(evidence.folder, runtime), evidence.tokens)
    measured = _largest_difference(logits, expected)
    return (
        measured <= limit,  # False for NaN as well
        f"largest logit change {measured:.2e}, KL {_mean_kl(logits, expected):.1e} nats per token",
        f"at most {limit:.2e}",
    )


def _mean_kl(logits: list[Tensor], expected: list[Tensor]) -> float:
    """Mean KL(expected ‖ logits) over all tokens, in nats."""
    logp, logq = (torch.cat(rows).double().log_softmax(-1) for rows in (expected, logits))
    return (logp.exp() * (logp - logq)).sum(-1).mean().item()


MOST_OUTSIDE = 0.01  # share of residuals; columns with almost equal diagonals may be exchanged


@gate("weights rounded by GPTQ")
def gptq_gate(evidence: CheckpointFiles):
    """In the first block, the stored weights are those that GPTQ gives on the calibration's items.

    GPTQ visits the columns by falling diagonal of H = XᵀX, X the smoothed inputs of all items, and
    subtracts from a column what makes up for the errors e (in steps) of those before it. With
    R Rᵀ = H + λI in that order, R upper triangular, it rounds (eR)_j / R_jj to within half a step
    (arXiv:2210.17323). That holds for its own order, its own H and λ alone: nearest weights, the
    Hessian of other items, or columns left in GPTQ's order exceed it in many places. Weights at
    the ends of the grid are left out. The first block reads float inputs, which are computed here
    by the source, one item at a time.

    The weights that were rounded are known to the dtype's rounding; four standard deviations of
    its effect are allowed.
    """
    names = _one_of_each_kind(evidence)
    hessians = _input_hessians(evidence, names)
    outside, total, wrong, ratios = 0, 0, [], []
    for name in names:
        step = evidence.saved[f"{name}.weight_scale"].double().reshape(-1, 1)
        beyond, inside, ratio = _gptq_residuals(evidence, name, step, hessians[name])
        outside, total = outside + beyond, total + inside
        ratios.append(ratio)
        if not beyond <= MOST_OUTSIDE * inside:
            wrong.append(name)
    return (
        not wrong and bool(names),
        f"of {len(names)} Linears of the first block, {len(wrong)} are not GPTQ's"
        f"{examples(wrong)}: {outside} of {total} residuals exceed half a step; squared output "
        f"error {min(ratios):.2f} to {max(ratios):.2f} of that of rounding to nearest",
        f"none; at most {MOST_OUTSIDE:.0%} of a Linear's residuals",
    )


def _one_of_each_kind(evidence: CheckpointFiles) -> list[str]:
    """The first target of every kind (`q_proj`, …) of the first block."""
    in_block = [n for n in evidence.targets if n.startswith(f"{evidence.blocks}.0.")]
    return list({name.rpartition(".")[2]: name for name in reversed(in_block)}.values())[::-1]


def _input_hessians(evidence: CheckpointFiles, names: list[str]) -> dict[str, Tensor]:
    """(in_features, in_features) float64 XᵀX of each Linear's smoothed input over all items."""
    model, hessians = evidence.source_model, {}
    with first_block_only(model):
        for tokens in evidence.tokens:
            for name, x in capture_inputs(model, names, tokens).items():
                rows = _rows(x).float()
                product = (rows.T @ rows).double().cpu()
                hessians[name] = hessians.get(name, 0) + product
    for name, (columns, _) in evidence.folded.items():
        if name in hessians and columns is not None:
            hessians[name] = hessians[name] / columns / columns[:, None]
    return hessians


def _gptq_residuals(
    evidence: CheckpointFiles, name: str, step: Tensor, hessian: Tensor
) -> tuple[int, int, float]:
    """(residuals beyond half a step, all that count, squared output error / that of nearest)."""
    q = evidence.saved[f"{name}.weight"]
    steps = evidence.smoothed_weight(name) / step
    dead = hessian.diagonal() == 0
    steps[:, dead] = 0  # GPTQ removes weights that no item reads
    error, nearest = q.double() - steps, steps.round().clamp(-128, 127) - steps
    ratio = ((error @ hessian) * error).sum() / ((nearest @ hessian) * nearest).sum()
    order = hessian.diagonal().argsort(descending=True)
    damped = hessian + torch.diag(dead.double())
    damped = damped + GPTQ_DAMPING * damped.diagonal().mean() * torch.eye(len(damped))
    damped = damped[order][:, order].flip(0, 1)
    factor = torch.linalg.cholesky(damped).flip(0, 1)  # upper: factor @ factor.T is H + λI
    residuals = (error[:, order] @ factor) / factor.diagonal()
    relative = 2 * torch.finfo(evidence.dtype).eps + 32 * torch.finfo(torch.float32).eps
    uncertainty = (relative * steps[:, order]).square() @ factor.square()
    allowed = 0.5 + 4 * uncertainty.sqrt() / factor.diagonal()
    counted = (q > -128) & (q < 127)
    counted = counted[:, order]
    beyond = ~(residuals.abs() <= allowed) & counted
    return int(beyond.sum()), int(counted.sum()), ratio.item()


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
    roundings (NOTES.md). compressed-tensors finds a token's scale in inputs of three dimensions; of
    four (multi-head latent attention) it would give a whole text one scale.
    """
    inputs, fast = evidence.captured, evidence.int8_model
    answers = {n: _rows(fast.get_submodule(n)(x)).cpu() for n, x in inputs.items()}
    del fast
    reference, wrong, worst = evidence.reference_model, [], 0.0
    for name, x in inputs.items():
        texts = x if x.ndim < 4 else x.reshape(1, -1, x.shape[-1])
        expected = _rows(reference.get_submodule(name)(texts)).cpu().double()
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


def loaded_gates(job: Job, model) -> list[Gate]:
    """The gates on a loaded model, before it is evaluated as the job's variant."""
    set_activity("checks on the loaded model")
    gates = [memory_layers_gate((job, model)), memory_weights_gate((job, model))]
    return [*gates, verified_gate(job)] if job.recipe.needs_checkpoint else gates


@gate("quantized layers in memory")
def memory_layers_gate(loaded):
    """In memory, exactly the declared Linears are quantized; floats have the declared type."""
    job, model = loaded
    evidence = CheckpointFiles(job, source_hash="")
    expected, linears = set(evidence.targets), evidence.linears
    int8 = {name for name in linears if is_int8(model.get_submodule(name))}
    missing, extra = sorted(expected - int8), sorted(int8 - expected)
    how = "quantized by a ruler" if job.recipe.ruler else "in int8"
    declared_dtype, dtype = variant_runtime(job).dtype, str(model.dtype).removeprefix("torch.")
    return (
        int8 == expected and dtype == declared_dtype,
        f"{len(int8)} of {len(linears)} Linears {how}, floats in {dtype}; {len(missing)} "
        f"missing{examples(missing)}, {len(extra)} too many{examples(extra)}",
        f"{len(expected)} {how}, floats in {declared_dtype}",
    )


def is_int8(linear: nn.Module) -> bool:
    """Whether a Linear is quantized, on its own kernels or simulated by its scheme."""
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
    if not job.recipe.compressed:
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
