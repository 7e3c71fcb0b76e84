"""Gates on recorded calls: Linears and norms computed what the tensors on disk imply.

The gates of a checkpoint look at a model that is loaded for them. Here it is the calls of the
evaluation itself: every call of every Linear in one row, a few calls in more of them. An
evaluation that goes on after a crash makes fewer calls, and its record has to be the same: a
gate that holds says so without counting them.
"""

from collections import Counter
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from helpers.core.architectures import HEAD
from helpers.core.records import Gate, largest
from helpers.evaluation.checks.recorded_calls import (
    DECODING,
    PACKED,
    SHARED_TEXT,
    CallRecorder,
    LinearCalls,
    LinearFiles,
)
from helpers.inference.vllm_client import is_served
from helpers.runtime.discovery import architecture, linear_names
from helpers.sources.model_files import load_config
from helpers.sources.models import model_folder
from helpers.study.loading import Job
from helpers.study.schema import is_ignored
from helpers.verification.checkpoint_files import source_token_ids, source_tokenizer

QUANTIZED, FLOAT = "quantized Linears in the evaluation", "float parts in the evaluation"
WHOLE = "every Linear read every token"
Measured = tuple[bool, str, str]


class NoCalls:
    """Replaces a recorder if calls cannot be recorded.

    Args:
        reason: why not, if that is a failure; empty for a model on another engine.
    """

    summary = "calls are not recorded"

    def __init__(self, reason: str = ""):
        self.reason = reason

    def record(self, _phase: str, ask: Callable, *args):
        return ask(*args)


def call_recorder(job: Job, model) -> CallRecorder | NoCalls:
    """The recorder of the calls of a job's variant, or its replacement."""
    if is_served(model):
        return NoCalls()
    try:
        config = load_config(model_folder(job.study, job.model, job.paths))
        linears = linear_names(config)
        experts = [n for n in linears if ".experts." in n] if architecture(config).experts else []
        norms = [norm.name for norm in architecture(config).norms]
        return CallRecorder(model, linear_files(job), linears, norms=norms, experts=experts)
    except Exception as error:  # the evaluation continues, and its gate fails
        return NoCalls(f"{type(error).__name__}: {' '.join(str(error).split())[:200]}")


def linear_files(job: Job) -> LinearFiles:
    """The files of the job's variant, with the scheme it declares."""
    source, recipe = model_folder(job.study, job.model, job.paths), job.recipe
    claim, runtime = recipe.claim, job.study.runtime
    changed = recipe.needs_checkpoint
    folder = job.paths.checkpoint(job.model, job.variant) if changed else source
    names = linear_names(load_config(source)) if claim.quantized else []
    kept_float = [n for n in names if is_ignored(n, claim.ignore)]
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
    """The gates on an evaluation's calls; none if another engine ran the model.

    Args:
        predictions: rows of every evaluation set.
        passages: rows of the shared text.
        resumed: ids of the items that an interrupted run had answered, by set.
    """
    if isinstance(calls, NoCalls):
        measured = f"could not be checked: {calls.reason}"
        return [Gate(WHOLE, False, measured, "can be checked")] if calls.reason else []
    new_predictions = {
        name: [row for row in rows if row["id"] not in resumed.get(name, set())]
        for name, rows in predictions.items()
    }
    gates = [guarded_gate(WHOLE, lambda: _every_token_check(job, calls, new_predictions, passages))]
    if calls.files.quantized:
        gates.append(guarded_gate(QUANTIZED, lambda: _quantized_check(calls)))
    return [*gates, guarded_gate(FLOAT, lambda: _float_check(job, calls))]


def guarded_gate(name: str, check: Callable[[], Measured]) -> Gate:
    """The gate of a check; an exception fails the gate and becomes its reason."""
    try:
        passed, measured, limit = check()
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        measured = f"could not be checked: {type(error).__name__}: {reason}"
        return Gate(name, False, measured, "can be checked")
    return Gate(name, bool(passed), measured, limit)


def _every_token_check(job: Job, calls: CallRecorder, fresh, passages) -> Measured:
    """The decoder read every token that the answers need, and each Linear processed them all."""
    miscounted = [
        name
        for name, linear in calls.linears.items()
        if name != HEAD and name not in calls.experts
        if (linear.calls, linear.rows) != (calls.passes, calls.tokens)
    ]
    expected = _fewest_tokens(job, fresh, passages)
    if getattr(calls.model, "cache_problem", ""):  # each token is read with all before it
        expected[PACKED] += expected.pop(DECODING)
    read = {kind: calls.tokens[kind] for kind in expected}
    missing = [kind for kind in expected if read[kind] < expected[kind]]
    extra = read[SHARED_TEXT] != expected[SHARED_TEXT]
    passed = not (miscounted or missing or extra or calls.errors)
    measured = f"all {len(calls.linears)} Linears in every pass; every token was read"
    if not passed:
        tokens = ", ".join(
            f"{read[kind]:,} of {n:,} tokens in {kind}" for kind, n in expected.items()
        )
        example = f" ({miscounted[0]})" if miscounted else ""
        measured = f"{tokens}; {len(miscounted)} Linears were called for others{example}"
        measured += f"; {calls.errors[0]}" if calls.errors else ""
    return passed, measured, "every Linear for every token, as many as the answers need"


def _fewest_tokens(job: Job, fresh: Mapping[str, list[dict]], passages) -> dict[str, int]:
    """The least number of tokens that these answers require, by kind of pass."""
    packed = decoding = 0
    for name, rows in fresh.items():
        if job.study.evaluation.datasets[name].ask.protocol == "generate":
            packed += len(rows)  # of golds and foils the last token is predicted and not read
            for row in rows:
                form, foils = row.get("gold_form_tokens", 0), [row.get("foil_tokens") or 0]
                sizes = [form + n for n in [*row.get("gold_tokens", ()), *foils] if n]
                packed += sum(n - 1 for n in sizes)
            decoding += sum(max(0, row["output_tokens"] - 1) for row in rows)
        else:  # the last token of an option is predicted and not read
            options = [len(row.get("logprobs", [])) or row["output_tokens"] for row in rows]
            packed += sum(
                1 + row["output_tokens"] - n for row, n in zip(rows, options, strict=True)
            )
    special_tokens = source_token_ids(source_tokenizer(job), "a text", plain=True)[
        1
    ]  # all but one are read and not predicted
    shared = sum(row["tokens"] + max(0, special_tokens - 1) for row in passages)
    return {PACKED: packed, DECODING: decoding, SHARED_TEXT: shared}


def _quantized_check(calls: CallRecorder) -> Measured:
    """Every call returns the integer product of the stored weights at the declared granularity."""
    linears = [calls.linears[name] for name in sorted(calls.files.quantized)]
    arithmetic = sum((linear.arithmetic for linear in linears), Counter())
    total = sum(sum(linear.calls.values()) for linear in linears)
    number, worst, worst_name = _worst_linear_call(calls, linears)
    granularity = calls.files.activations.replace("_", " ")
    passed = arithmetic["announced"] == total > 0 and worst <= 1
    measured = f"every call of {len(linears)} Linears is int8, {granularity}"
    if not passed:
        measured = (
            f"{total:,} calls of {len(linears)} Linears: {arithmetic['announced']:,} int8 "
            f"{granularity}, {arithmetic['float']:,} float, {arithmetic['neither']:,} neither; of "
            f"{number:,} calls kept, the furthest{worst_name} is {worst:.2g} roundings off"
        )
    return passed, measured, "every call the integer product of the files, but for rounding"


def _float_check(job: Job, calls: CallRecorder) -> Measured:
    """Norms, head and float Linears agree with float64 on the stored tensors within rounding."""
    linears = [c for name, c in calls.linears.items() if name not in calls.files.quantized]
    total = sum(sum(linear.calls.values()) for linear in linears)
    arithmetic = sum((linear.arithmetic for linear in linears), Counter())
    number, worst, worst_name = _worst_linear_call(calls, linears)
    norms, worst_norm, worst_norm_name = _worst_norm_call(job, calls)
    dtype = str(calls.files.dtype).removeprefix("torch.")
    uncalled = [c.name for c in [*linears, *calls.norms.values()] if not c.calls]
    uncalled = [name for name in uncalled if name not in calls.experts]
    passed = arithmetic["announced"] == total and largest((worst, worst_norm)) <= 1 and not uncalled
    measured = f"every call of {len(linears)} float Linears and {len(calls.norms)} norms in {dtype}"
    if not passed:
        measured = (
            f"{arithmetic['announced']:,} of {total:,} calls of {len(linears)} float Linears in "
            f"{dtype}; of {number:,} calls kept, the furthest{worst_name} is {worst:.2g} roundings "
            f"off; of {norms:,} calls of norms, the furthest{worst_norm_name} is "
            f"{worst_norm:.2g} off"
        )
        measured += f"; {uncalled[0]} was never called" if uncalled else ""
    return passed, measured, "every call what float64 makes of the files, but for rounding"


def _worst_linear_call(calls: CallRecorder, linears: list[LinearCalls]) -> tuple[int, float, str]:
    """(calls compared, largest difference as a multiple of the allowed one, name of its Linear)."""
    number, worst, worst_name = 0, 0.0, ""
    for linear in linears:
        recorded = [call for pair in linear.kept.values() for call in pair]
        if not recorded:
            continue
        file = calls.files.linear(linear.name, linear.columns)
        tops = [call.absmax for call in recorded if call.absmax is not None]
        products = file.products(
            torch.cat([call.x for call in recorded]), torch.cat(tops) if tops else None
        )
        y = torch.cat([call.y for call in recorded]).double()
        ratio = _largest_ratio(y, products.exact, products.allowed)
        number += len(recorded)
        if not ratio <= worst:
            worst, worst_name = ratio, f" ({linear.name})"
    return number, worst, worst_name


def _largest_ratio(y: Tensor, exact: Tensor, allowed: Tensor) -> float:
    """The largest difference as a multiple of the allowed one; infinite if one is not finite."""
    ratios = (y - exact).abs() / allowed.clamp(min=1e-300)
    return float(ratios.nan_to_num(nan=torch.inf).max())


def _worst_norm_call(job: Job, calls: CallRecorder) -> tuple[int, float, str]:
    """(calls compared, largest difference as a multiple of the allowed one, name of its norm)."""
    config = load_config(model_folder(job.study, job.model, job.paths))
    number, worst, worst_name = 0, 0.0, ""
    for name, norm in calls.norms.items():
        recorded = [call for pair in norm.kept.values() for call in pair]
        if not recorded:
            continue
        x = torch.cat([call.x for call in recorded]).double()
        y = torch.cat([call.y for call in recorded]).double()
        exact, size = exact_norm(x, calls.files, name, config)
        eps = torch.finfo(calls.files.dtype).eps
        ratio = _largest_ratio(y, exact, 4 * eps * size + 8 * 2.0**-23 * size)
        number += len(recorded)
        if not ratio <= worst:
            worst, worst_name = ratio, f" ({name})"
    return number, worst, worst_name


def exact_norm(x: Tensor, files: LinearFiles, name: str, config) -> tuple[Tensor, Tensor]:
    """((rows, features) float64 output of a norm, magnitude that scales its rounding)."""
    tensors = files.tensors
    norm = next(norm for norm in architecture(config).norms if norm.name == name)
    weight = tensors[f"{name}.weight"].to(files.dtype).double() + norm.offset
    bias = torch.zeros_like(weight)
    if f"{name}.bias" in tensors:
        bias = tensors[f"{name}.bias"].to(files.dtype).double()
    if not norm.centred:
        exact = weight * x * (x.square().mean(-1, keepdim=True) + norm.eps).rsqrt()
        return exact + bias, exact.abs() + bias.abs()
    spread = (x.var(-1, keepdim=True, unbiased=False) + norm.eps).rsqrt()
    centred = (x - x.mean(-1, keepdim=True)) * spread * weight
    size = (x.abs() + x.abs().mean(-1, keepdim=True)) * spread * weight.abs() + bias.abs()
    return centred + bias, size
