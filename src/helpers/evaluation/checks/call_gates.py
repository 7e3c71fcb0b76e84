"""Gates on what a model computed while it was asked, against the tensors on disk.

The gates of a checkpoint look at a model that is loaded for them. Here it is the calls of the
evaluation itself: every call of every Linear in one row, a few calls in more of them. An
evaluation that goes on after a crash makes fewer calls, and its record has to be the same: a
gate that holds says so without counting them.
"""

from collections import Counter
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from helpers.core.architectures import HEAD, architecture, linear_names
from helpers.core.gates import Gate, largest
from helpers.evaluation.checks.float64_linears import LinearFiles
from helpers.evaluation.checks.recorded_calls import (
    DECODING,
    PACKED,
    SHARED_TEXT,
    CallRecorder,
    LinearCalls,
)
from helpers.inference.vllm_protocols import is_served
from helpers.sources.models import load_config, model_folder
from helpers.study.study_run import Job
from helpers.verification.source_tokenizer import own_tokenizer, own_tokens

QUANTIZED, FLOAT = "quantized Linears as evaluated", "float parts as evaluated"
WHOLE = "every token through every Linear"
Measured = tuple[bool, str, str]


class NoCalls:
    """Stands for a recorder where calls are not seen.

    Args:
        reason: why not, if that is a failure; a model that another engine runs has none.
    """

    summary = "calls are not recorded"

    def __init__(self, reason: str = ""):
        self.reason = reason

    def of(self, _phase: str, ask: Callable, *args):
        return ask(*args)


def call_recorder(job: Job, model) -> CallRecorder | NoCalls:
    """What records the calls of a job's variant."""
    if is_served(model):
        return NoCalls()
    try:
        config = load_config(model_folder(job.study, job.model, job.paths))
        linears = linear_names(config)
        experts = [n for n in linears if ".experts." in n] if architecture(config).experts else []
        return CallRecorder(model, linear_files(job), linears, experts=experts)
    except Exception as error:  # an evaluation goes on, and its gate fails
        return NoCalls(f"{type(error).__name__}: {' '.join(str(error).split())[:200]}")


def linear_files(job: Job) -> LinearFiles:
    """The files of the job's variant, and what it claims of them."""
    source, recipe = model_folder(job.study, job.model, job.paths), job.recipe
    claim, runtime = recipe.claim, job.study.runtime
    changed = recipe.changes_model
    folder = job.paths.checkpoint(job.model, job.variant) if changed else source
    names = linear_names(load_config(source)) if claim.quantized else []
    kept_float = [n for n in names if any(n == i or n.endswith("." + i) for i in claim.ignore)]
    return LinearFiles(
        folder,
        frozenset(names) - frozenset(kept_float),
        claim.scheme[1] if claim.quantized else None,
        getattr(torch, recipe.dtype or runtime.dtype),
        simulated=runtime.quantized == "reference",
    )


def call_gates(
    job: Job,
    calls: CallRecorder | NoCalls,
    predictions: Mapping[str, list[dict]],
    passages: list[dict],
    resumed: Mapping[str, set[str]],
) -> list[Gate]:
    """The gates on an evaluation's calls; none where they are not seen.

    Args:
        predictions: rows of every evaluation set.
        passages: rows of the shared text.
        resumed: ids of the items that an earlier run had answered, by set.
    """
    if isinstance(calls, NoCalls):
        measured = f"could not be checked: {calls.reason}"
        return [Gate(WHOLE, False, measured, "can be checked")] if calls.reason else []
    fresh = {
        name: [row for row in rows if row["id"] not in resumed.get(name, set())]
        for name, rows in predictions.items()
    }
    gates = [guarded(WHOLE, lambda: _whole(job, calls, fresh, passages))]
    if calls.files.quantized:
        gates.append(guarded(QUANTIZED, lambda: _quantized(calls)))
    return [*gates, guarded(FLOAT, lambda: _float(job, calls))]


def guarded(name: str, check: Callable[[], Measured]) -> Gate:
    """The gate of a check; one that cannot be made does not hold, for the reason it gives."""
    try:
        passed, measured, limit = check()
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        measured = f"could not be checked: {type(error).__name__}: {reason}"
        return Gate(name, False, measured, "can be checked")
    return Gate(name, bool(passed), measured, limit)


def _whole(job: Job, calls: CallRecorder, fresh, passages) -> Measured:
    """The decoder read what was asked, and each of its Linears was called for all of that."""
    odd = [
        name
        for name, linear in calls.linears.items()
        if name != HEAD and name not in calls.experts
        if (linear.calls, linear.rows) != (calls.passes, calls.tokens)
    ]
    due = _fewest_tokens(job, fresh, passages)
    read = {kind: calls.tokens[kind] for kind in due}
    lacking = [kind for kind in due if read[kind] < due[kind]]
    extra = read[SHARED_TEXT] != due[SHARED_TEXT]
    passed = not (odd or lacking or extra or calls.errors)
    measured = f"all {len(calls.linears)} Linears in every pass; every token was read"
    if not passed:
        tokens = ", ".join(f"{read[kind]:,} of {n:,} tokens in {kind}" for kind, n in due.items())
        example = f" ({odd[0]})" if odd else ""
        measured = f"{tokens}; {len(odd)} Linears were called for others{example}"
        measured += f"; {calls.errors[0]}" if calls.errors else ""
    return passed, measured, "every Linear for every token, as many as the answers need"


def _fewest_tokens(job: Job, fresh: Mapping[str, list[dict]], passages) -> dict[str, int]:
    """How many tokens have to be read for these answers, whatever is shared among them."""
    packed = decoding = 0
    for name, rows in fresh.items():
        if job.study.evaluation.datasets[name].ask.protocol == "generate":
            packed += len(rows)  # of golds and foils the last token is predicted and not read
            packed += sum(n - 1 for row in rows for n in row.get("gold_tokens", ()))
            packed += sum(row["foil_tokens"] - 1 for row in rows if row.get("foil_tokens"))
            decoding += sum(max(0, row["output_tokens"] - 1) for row in rows)
        else:  # the last token of an option is predicted and not read
            options = [len(row.get("logprobs", [])) or row["output_tokens"] for row in rows]
            packed += sum(
                1 + row["output_tokens"] - n for row, n in zip(rows, options, strict=True)
            )
    before = own_tokens(own_tokenizer(job), "a text", plain=True)[
        1
    ]  # all but one are read and not predicted
    shared = sum(row["tokens"] + max(0, before - 1) for row in passages)
    return {PACKED: packed, DECODING: decoding, SHARED_TEXT: shared}


def _quantized(calls: CallRecorder) -> Measured:
    """Every call is the integer product of the files, at the declared granularity."""
    chosen = [calls.linears[name] for name in sorted(calls.files.quantized)]
    arithmetic = sum((linear.arithmetic for linear in chosen), Counter())
    total = sum(sum(linear.calls.values()) for linear in chosen)
    number, worst, where = _kept_calls(calls, chosen)
    granularity = calls.files.activations.replace("_", " ")
    passed = arithmetic["announced"] == total > 0 and worst <= 1
    measured = f"every call of {len(chosen)} Linears is int8, {granularity}"
    if not passed:
        measured = (
            f"{total:,} calls of {len(chosen)} Linears: {arithmetic['announced']:,} int8 "
            f"{granularity}, {arithmetic['float']:,} float, {arithmetic['neither']:,} neither; of "
            f"{number:,} calls kept, the furthest{where} is {worst:.2g} roundings off"
        )
    return passed, measured, "every call the integer product of the files, but for rounding"


def _float(job: Job, calls: CallRecorder) -> Measured:
    """Norms, head and float Linears compute what float64 makes of the files, but for rounding."""
    chosen = [c for name, c in calls.linears.items() if name not in calls.files.quantized]
    total = sum(sum(linear.calls.values()) for linear in chosen)
    arithmetic = sum((linear.arithmetic for linear in chosen), Counter())
    number, worst, where = _kept_calls(calls, chosen)
    norms, worst_norm, at = _kept_norms(job, calls)
    dtype = str(calls.files.dtype).removeprefix("torch.")
    unseen = [c.name for c in [*chosen, *calls.norms.values()] if not c.calls]
    unseen = [name for name in unseen if name not in calls.experts]
    passed = arithmetic["announced"] == total and largest((worst, worst_norm)) <= 1 and not unseen
    measured = f"every call of {len(chosen)} float Linears and {len(calls.norms)} norms in {dtype}"
    if not passed:
        measured = (
            f"{arithmetic['announced']:,} of {total:,} calls of {len(chosen)} float Linears in "
            f"{dtype}; of {number:,} calls kept, the furthest{where} is {worst:.2g} roundings "
            f"off; of {norms:,} calls of norms, the furthest{at} is {worst_norm:.2g} off"
        )
        measured += f"; {unseen[0]} was never called" if unseen else ""
    return passed, measured, "every call what float64 makes of the files, but for rounding"


def _kept_calls(calls: CallRecorder, chosen: list[LinearCalls]) -> tuple[int, float, str]:
    """(calls kept, largest difference in parts of what is allowed, of which Linear)."""
    number, worst, where = 0, 0.0, ""
    for linear in chosen:
        kept = [call for pair in linear.kept.values() for call in pair]
        if not kept:
            continue
        file = calls.files.of(linear.name, linear.columns)
        tops = [call.absmax for call in kept if call.absmax is not None]
        products = file.products(
            torch.cat([call.x for call in kept]), torch.cat(tops) if tops else None
        )
        y = torch.cat([call.y for call in kept]).double()
        ratio = _ratio(y, products.exact, products.allowed)
        number += len(kept)
        if not ratio <= worst:
            worst, where = ratio, f" ({linear.name})"
    return number, worst, where


def _ratio(y: Tensor, exact: Tensor, allowed: Tensor) -> float:
    """The largest difference in parts of what is allowed; infinite where one is not finite."""
    ratios = (y - exact).abs() / allowed.clamp(min=1e-300)
    return float(ratios.nan_to_num(nan=torch.inf).max())


def _kept_norms(job: Job, calls: CallRecorder) -> tuple[int, float, str]:
    """(calls of norms kept, largest difference in parts of what is allowed, of which norm)."""
    config = load_config(model_folder(job.study, job.model, job.paths))
    number, worst, where = 0, 0.0, ""
    for name, norm in calls.norms.items():
        kept = [call for pair in norm.kept.values() for call in pair]
        if not kept:
            continue
        x = torch.cat([call.x for call in kept]).double()
        y = torch.cat([call.y for call in kept]).double()
        exact, size = normalized(x, calls.files, name, config)
        eps = torch.finfo(calls.files.dtype).eps
        ratio = _ratio(y, exact, 4 * eps * size + 8 * 2.0**-23 * size)
        number += len(kept)
        if not ratio <= worst:
            worst, where = ratio, f" ({name})"
    return number, worst, where


def normalized(x: Tensor, files: LinearFiles, name: str, config) -> tuple[Tensor, Tensor]:
    """((rows, features) float64 of a norm's own formula, magnitude that its roundings go by)."""
    tensors = files.tensors
    weight = tensors[f"{name}.weight"].to(files.dtype).double()
    weight = weight + architecture(config).norm_offset
    if (eps := getattr(config, "rms_norm_eps", None)) is not None:
        exact = weight * x * (x.square().mean(-1, keepdim=True) + eps).rsqrt()
        return exact, exact.abs()
    bias = tensors[f"{name}.bias"].to(files.dtype).double()
    spread = (x.var(-1, keepdim=True, unbiased=False) + 1e-5).rsqrt()
    centred = (x - x.mean(-1, keepdim=True)) * spread * weight
    size = (x.abs() + x.abs().mean(-1, keepdim=True)) * spread * weight.abs() + bias.abs()
    return centred + bias, size
