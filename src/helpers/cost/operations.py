"""Operations of a study, counted before it runs, and the speed of this machine at them.

    python -m helpers.cost.operations demo

prints the counts for every calibration, quantization and fine-tuning of a study, as JSON; those of
evaluations and of measuring cost are in `helpers.evaluation.stage`.

A token read by a model costs two operations for each weight of a Linear that multiplies it. That
is counted; attention, norms and activations are not: for texts of a few hundred tokens they are a
few percent of the operations. Counts depend on the study file and the models alone, never on the
machine. Answers are counted at their longest, since nobody knows where they end. Checks, probes
and the choice of α are counted with the job that makes them.

    python -m helpers.cost.operations demo '[[576, 1536], [1536, 576]]'

prints operations per second of these Linears, reading and writing, in each arithmetic; numbers per
second that a pass over memory rounds; and the processor seconds that importing took what every job
imports. It takes about two seconds. As many such processes run side by side as jobs will, since
these share caches, memory and power. The fastest call counts, and processor time, since other work
comes and goes.
"""

import json
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers.models.llama.modeling_llama  # noqa: F401 - as a job does
from torch import Tensor, nn

from helpers.core.architectures import HEAD
from helpers.core.errors import StudyError
from helpers.core.files import StudyPaths
from helpers.quantization import protection, simulation
from helpers.quantization.calibration import first_judging_item
from helpers.quantization.int8_linear import Int8Linear
from helpers.runtime.devices import resolve_runtime, token_budget_batches, use_onednn
from helpers.runtime.discovery import linear_names
from helpers.sources.chat import calibration_tokens, training_tokens
from helpers.sources.model_files import load_config
from helpers.sources.models import empty_model, load_tokenizer, model_folder
from helpers.sources.sampling import calibration_items, training_items
from helpers.study import stages
from helpers.study.loading import Job, load_study, study_file
from helpers.study.schema import MadeModel, Study, Variant
from helpers.verification.checkpoint_files import PROBE_TOKENS, PROBES

READING, WRITING = (
    "reading",
    "writing",
)  # products of many tokens (prefill) or of one token per answer (decode)
TOUCHED = (
    "weights touched"  # weights read by loading, hashing, rounding or comparing; not an operation
)
BACKWARD = 2  # gradients of inputs and of weights: each as many operations as the product
OPTIMIZER = 12  # passes over weight-sized tensors in one step of AdamW


@dataclass(frozen=True)
class Size:
    """Numbers of weights of a model, as operation counts need them.

    Attributes:
        linears: weights of all Linears but the head; in a mixture, of the experts that one
            token is routed to.
        head: weights of the head, tied to the embeddings or not.
        weights: all weights of the model, as they are loaded and saved.
        shapes: (in_features, out_features) of every Linear but the head.
    """

    linears: int
    head: int
    weights: int
    shapes: tuple[tuple[int, int], ...] = ()


def size_of(folder: Path) -> Size:
    """The size of a folder's model, from its configuration.

    Raises:
        StudyError: the configuration cannot be used.
    """
    config = load_config(folder)
    with torch.device("meta"):
        model = empty_model(config, dtype=torch.float32)
    linears = {n: model.get_submodule(n) for n in linear_names(config) if n != HEAD}
    routed_share = getattr(config, "num_experts_per_tok", 1) / getattr(config, "num_experts", 1)
    linear_weights = sum(
        round(m.weight.numel() * (routed_share if ".experts." in name else 1))
        for name, m in linears.items()
    )
    shapes = tuple((m.in_features, m.out_features) for m in linears.values())
    head = model.get_output_embeddings().weight.numel()
    return Size(linear_weights, head, sum(p.numel() for p in model.parameters()), shapes)


def folder_to_count(study: Study, model: str, paths: StudyPaths) -> Path:
    """The folder with a model's config and tokenizer; for a model made here its start's folder.

    Raises:
        StudyError: the model is not on this machine.
    """
    source = study.models[model]
    start = source.start if isinstance(source, MadeModel) else model
    return model_folder(study, start, paths)


def reading_operations(
    size: Size, arithmetic: str, tokens: int, *, head: int = 0, floats: str = ""
) -> Counter:
    """Operations of reading tokens.

    Args:
        arithmetic: the type the Linears multiply in.
        head: for how many of the tokens the head runs.
        floats: the type the head multiplies in; by default that of the Linears.
    """
    return _forward(size, tokens, head, f"{arithmetic} {READING}", f"{floats or arithmetic} ")


def writing_operations(size: Size, arithmetic: str, tokens: int, *, floats: str = "") -> Counter:
    """Operations of generating tokens: each is read and predicts the next."""
    return _forward(size, tokens, tokens, f"{arithmetic} {WRITING}", f"{floats or arithmetic} ")


def _forward(size: Size, tokens: int, head: int, kind: str, floats: str) -> Counter:
    counts = Counter({kind: 2 * size.linears * tokens})
    counts[floats + kind.rpartition(" ")[2]] += 2 * size.head * head
    return counts


def weight_passes(size: Size, times: int) -> Counter:
    """Passes over all weights of a model: numbers read, not operations."""
    return Counter({TOUCHED: size.weights * times})


def without_weight_passes(counts: Counter) -> dict[str, int]:
    """Operations by arithmetic, without passes over weights: for a record."""
    by_arithmetic: Counter = Counter()
    for kind, number in counts.items():
        if kind != TOUCHED:
            by_arithmetic[kind.partition(" ")[0]] += number
    return dict(sorted(by_arithmetic.items()))


def finetuning_operations(job: Job, tokenizer, *, stage: str) -> dict[str, int]:
    """Operations of a fine-tuning job by arithmetic, for its record."""
    assert stage == "finetuning", stage  # others count in modules that fine-tuning does not need
    size = size_of(folder_to_count(job.study, job.model, job.paths))
    return without_weight_passes(count_finetuning(job.study, job.model, size, tokenizer))


def count_finetuning(study: Study, model: str, size: Size, tokenizer) -> Counter:
    """Counts of fine-tuning one model: its epochs, and the held-out loss twice."""
    settings = study.models[model].finetune
    examples, heldout = training_items(study, model)
    batch_items = settings.batch_items
    tokens, answers = _padded([training_tokens(tokenizer, i) for i in examples], batch_items)
    arithmetic = "bfloat16" if settings.autocast == "bfloat16" else "float32"
    one_epoch = reading_operations(size, arithmetic, tokens, head=answers)
    counts = Counter({k: settings.epochs * (1 + BACKWARD) * n for k, n in one_epoch.items()})
    tokens, answers = _padded([training_tokens(tokenizer, i) for i in heldout], batch_items)
    steps = settings.epochs * -(-len(examples) // batch_items)
    return (
        counts
        + reading_operations(size, "float32", 2 * tokens, head=2 * answers)
        + weight_passes(size, OPTIMIZER * steps + 6)  # plus loading, hashing and saving
    )


def count_rotation(study: Study, size: Size, tokenizer) -> Counter:
    """Counts of rotating one model: two readings of a few texts, and passes over its weights."""
    tokens = sum(map(len, _tokens(study, tokenizer, "", 1)[: simulation.ITEMS]))
    reading = reading_operations(size, "float32", 2 * tokens, head=2 * tokens)
    return reading + weight_passes(size, ROTATION)


def _padded(examples: list[tuple[list[int], list[int]]], batch_items: int) -> tuple[int, int]:
    """(tokens with padding, in batches of similar length; tokens of the answers)."""
    lengths = sorted(len(prompt) + len(answer) - 1 for prompt, answer in examples)
    batches = [lengths[i : i + batch_items] for i in range(0, len(lengths), batch_items)]
    return sum(len(b) * b[-1] for b in batches), sum(len(answer) for _, answer in examples)


LOOKS = 13  # rows of `sensitivity_rows`
CANDIDATES = 11  # α of `auto`
ROTATION = 40  # passes over a model's weights: folding, products in float64, saving, hashing
KEPT = 25  # passes over a checkpoint's weights: quantize, save, hash, load, compare
SIMULATED = 4  # passes over all weights to round them for one simulated forward pass
COLUMN_PASSES = 140  # of GPTQ over a weight: half of its block of 128 columns, and its rounding


def count_calibration(
    study: Study, size: Size, tokenizer, name: str = "", *, draw: int = 1
) -> Counter:
    """One pass over the items of a calibration, and the longest once more for its figure."""
    lengths = list(map(len, _tokens(study, tokenizer, name, draw)))
    budget = study.calibration_called(name).batch_tokens
    batches = token_budget_batches(lengths, batch_tokens=budget)
    padded = sum(len(b) * max(lengths[i] for i in b) for b in batches)
    return reading_operations(size, _dtype(study), padded + max(lengths)) + weight_passes(size, 4)


def count_quantization(
    study: Study, variant: Variant, size: Size, tokenizer, *, draw: int = 1
) -> Counter:
    """The choice of α, the SQNR of each Linear, the sensitivity analysis, and the checks."""
    tokens = _tokens(study, tokenizer, variant.calibration or "", draw)
    dtype = _dtype(study)
    judge_lengths = list(map(len, tokens[first_judging_item(len(tokens)) :]))
    probe_tokens, judge_tokens = sum(judge_lengths[: simulation.JUDGES]), sum(judge_lengths)
    curves = 2 if variant.smooth and not variant.recipe else 1
    sqnr_tokens = sum(map(len, tokens[: simulation.ITEMS]))
    counts = reading_operations(size, dtype, sqnr_tokens * (1 + 2 * curves)) + reading_operations(
        size, dtype, probe_tokens, head=probe_tokens
    )
    weight_roundings = 2 * curves * min(simulation.ITEMS, len(tokens))
    smooth = variant.smooth
    if smooth and (tries := len(simulation.grid_of(smooth))):
        read = judge_tokens * (1 + tries)
        counts += reading_operations(size, dtype, read, head=read)
        weight_roundings += tries
    elif smooth and smooth.alpha == "auto":
        counts += reading_operations(size, dtype, judge_tokens * (1 + 2 * CANDIDATES))
        weight_roundings += 2 * CANDIDATES * len(judge_lengths)
    if variant.quantized and not variant.made_elsewhere:
        counts += reading_operations(size, dtype, probe_tokens * LOOKS, head=probe_tokens * LOOKS)
        weight_roundings += LOOKS
    if variant.protect:
        counts += _protection_operations(size, dtype, probe_tokens, tokens)
        weight_roundings += 1 + protection.RANDOM_SETS
    if variant.rounding == "gptq":
        counts += _gptq_operations(size, dtype, sum(map(len, tokens)))
    # The SQNR of the stored weights.
    if variant.made_elsewhere or (variant.quantized and variant.rounding != "nearest"):
        counts += reading_operations(size, dtype, 3 * sqnr_tokens)
        weight_roundings += 1
    gate_tokens = PROBES * PROBE_TOKENS
    counts += reading_operations(size, "float32", 3 * gate_tokens, head=3 * gate_tokens)
    counts += reading_operations(size, dtype, 5 * gate_tokens, head=2 * gate_tokens)
    return counts + weight_passes(size, KEPT + SIMULATED * weight_roundings)


def _protection_operations(
    size: Size, dtype: str, probe_tokens: int, tokens: list[list[int]]
) -> Counter:
    """The choice of Linears left float: each alone, from its block on, and the random choices."""
    alone, sets = probe_tokens * len(size.shapes), protection.RANDOM_SETS + 3
    fit = tokens[: first_judging_item(len(tokens))]
    others = sets * sum(map(len, fit[: protection.OTHERS]))
    return reading_operations(size, dtype, alone // 2 + others, head=alone + others)


def _gptq_operations(size: Size, dtype: str, tokens: int) -> Counter:
    """GPTQ: two passes over the calibration items, the Hessians, and the columns' updates."""
    counts = reading_operations(size, dtype, 2 * tokens)
    hessians = sum(2 * inner**2 * tokens + 2 * inner**3 for inner, _ in size.shapes)
    updates = sum(inner**2 * outer for inner, outer in size.shapes)
    counts[f"float32 {READING}"] += hessians + updates
    return counts + weight_passes(size, COLUMN_PASSES)


def count_run(study: Study, run: stages.Run, size: Size, tokenizer) -> Counter:
    """Counts of one job of fine-tuning, rotation, calibration or quantization."""
    match run.stage:
        case "finetuning":
            return count_finetuning(study, run.model, size, tokenizer)
        case "rotation":
            return count_rotation(study, size, tokenizer)
        case "calibration":
            return count_calibration(study, size, tokenizer, run.variant, draw=run.draw)
    variant = study.variants[run.variant]
    return count_quantization(study, variant, size, tokenizer, draw=run.draw)


def quantization_stage_operations(job: Job, tokenizer, *, stage: str) -> dict[str, int]:
    """Operations of a rotation, calibration or quantization job by arithmetic, for its record."""
    size = size_of(folder_to_count(job.study, job.model, job.paths))
    run = stages.run_of(job, stage)
    return without_weight_passes(count_run(job.study, run, size, tokenizer))


def _dtype(study: Study) -> str:
    return "float32" if study.runtime.dtype == "auto" else study.runtime.dtype


def _tokens(study: Study, tokenizer, calibration: str, draw: int) -> list[list[int]]:
    items = calibration_items(study, calibration, draw=draw)
    adapter = study.calibration_called(calibration).adapter
    return [calibration_tokens(tokenizer, item, adapter) for item in items]


def print_counts(study_name: str) -> None:
    """Print the counts of a study's jobs, the reasons for missing counts, and Linear shapes."""
    study, paths = load_study(study_name), StudyPaths(study_file(study_name).stem)
    stages_here = ("finetuning", "rotation", "calibration", "quantization")
    jobs, shapes, uncounted = {}, [], {}
    runs = [run for run in stages.runs(study) if run.stage in stages_here]
    for model in study.models:
        try:
            folder = folder_to_count(study, model, paths)
            size = size_of(folder)
            tokenizer = load_tokenizer(folder, enable_thinking=study.enable_thinking)
            model_runs = [run for run in runs if run.model == model]
            jobs |= {run.name: count_run(study, run, size, tokenizer) for run in model_runs}
            shapes += size.shapes
        except StudyError as error:
            uncounted[model] = str(error)
    report = {"jobs": jobs, "uncounted": uncounted, "shapes": sorted(set(shapes))}
    print(json.dumps(report))


SECONDS = 2.0  # total time of all measurements
ROWS = {READING: 256, WRITING: 32}
PASSED = 2**22  # numbers rounded in one pass
MOST_OPERATIONS = 2e9  # of all measured Linears together, which bounds the time on slow machines


def measure_speeds(shapes: list[tuple[int, int]], *, device: str) -> dict[str, float]:
    """Operations (or numbers touched) per second by kind of work.

    A kind that the device does not have is left out.

    Args:
        shapes: (in_features, out_features) of Linears; the smallest ones are measured.
    """
    measured_shapes = _affordable(shapes or [(1024, 1024)])
    kinds = [(a, kind) for a in ("float32", "bfloat16", "int8") for kind in ROWS]
    seconds_each = SECONDS / (len(kinds) + 1)
    values = torch.rand(PASSED)
    speeds = {TOUCHED: PASSED / _seconds(lambda: values.div(0.01).round_(), seconds_each, "cpu")}
    for arithmetic, kind in kinds:
        try:
            speeds[f"{arithmetic} {kind}"] = _speed(
                measured_shapes, arithmetic, ROWS[kind], device, seconds_each
            )
        except (
            NotImplementedError,
            RuntimeError,
        ):  # the product is not available, or out of memory
            continue
    return speeds


def _affordable(shapes: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """The smallest shapes whose operations together stay below MOST_OPERATIONS; at least one."""
    chosen, weights = [], 0
    for inner, outer in sorted(shapes, key=lambda s: s[0] * s[1]):
        weights += inner * outer
        if not chosen or 2 * ROWS[READING] * weights <= MOST_OPERATIONS:
            chosen.append((inner, outer))
    return chosen


@torch.inference_mode()
def _speed(shapes: list, arithmetic: str, rows: int, device: str, seconds: float) -> float:
    linears = [_linear(*shape, arithmetic).to(device) for shape in shapes]
    dtype = torch.float32 if arithmetic == "int8" else getattr(torch, arithmetic)
    inputs = [torch.rand(rows, shape[0], device=device).to(dtype) for shape in shapes]

    def call() -> None:
        for linear, x in zip(linears, inputs, strict=True):
            linear(
                x.view_as(x)
            )  # a new tensor object, since quantized inputs are cached on the tensor

    operations = 2 * rows * sum(i * o for i, o in shapes)
    return operations / _seconds(call, seconds, device)


def _linear(inner: int, outer: int, arithmetic: str) -> nn.Module:
    if arithmetic == "int8":
        weight = torch.randint(-127, 128, (outer, inner), dtype=torch.int8)
        scale = torch.ones(outer, 1)
        return Int8Linear(weight, scale, None, activations="token_dynamic", input_scale=None)
    linear = nn.Linear(inner, outer, bias=False).to(getattr(torch, arithmetic))
    return use_onednn(linear)


def _seconds(call, limit: float, device: str) -> float:
    """Seconds of the fastest of as many calls as fit the limit, after one warm-up call."""
    call()
    _settle(device)
    start = now = time.perf_counter()
    shortest = float("inf")
    while now - start < limit or shortest == float("inf"):
        before = now
        call()
        _settle(device)
        now = time.perf_counter()
        shortest = min(shortest, now - before)
    return shortest


def _settle(device: str) -> Tensor | None:
    return None if device == "cpu" else getattr(torch, device).synchronize()


def print_speeds(study: str, shapes: str) -> None:
    """Print the measured speeds as JSON."""
    imported = time.process_time()
    runtime = resolve_runtime(load_study(study).runtime)
    torch.set_num_threads(runtime.threads)
    speeds = measure_speeds([tuple(shape) for shape in json.loads(shapes)], device=runtime.device)
    print(json.dumps({"speeds": speeds, "import_s": imported}))


def main(study_name: str, shapes: str | None = None) -> None:
    """Print a study's counts or, of some shapes of Linears (JSON), the measured speeds."""
    if shapes is None:
        print_counts(study_name)
    else:
        print_speeds(study_name, shapes)


if __name__ == "__main__":
    main(*sys.argv[1:])
