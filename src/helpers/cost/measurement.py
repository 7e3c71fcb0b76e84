"""Measuring cost: configurations of a model, how fast each reads and writes, and its memory.

A configuration is the baseline in a float type, or a quantized variant. It is measured on what
evaluation itself does: reading is one packed row of the study's own texts, writing a full batch of
slots. Writing is timed from the first tokens on, so that reading the prompts is not counted twice.
Time inside Linears is taken on CPUs only: on other devices work is queued, and waiting for each
Linear would change what is measured.

The limit that no model can cross is what the machine multiplies per second at best: square
products that suit the machine, and the very products of the model's Linears, in every arithmetic
that a variant can use. The best of all shapes and libraries counts, since a limit is asked for and
not an average.

The stage that 03_cost runs is here too, from its opening to its record.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from transformers.utils.logging import disable_progress_bar

from helpers.core.architectures import HEAD
from helpers.core.processes import interleaved_rounds
from helpers.core.records import peak_memory_bytes
from helpers.inference.packed_attention import Segment, read, use_packed_attention
from helpers.inference.protocols import generate_greedy, hidden_states, prove_engine
from helpers.quantization import int8_matmul
from helpers.quantization.variants import arithmetic_record, load_variant, variant_digest
from helpers.runtime.devices import has_bfloat16_units, prepare, product, set_malloc_thresholds
from helpers.runtime.discovery import linear_names
from helpers.sources.chat import calibration_tokens
from helpers.sources.model_files import TensorFiles, load_config
from helpers.sources.models import Stage, begin_record, bytes_by_part, load_tokenizer, model_folder
from helpers.sources.sampling import calibration_items
from helpers.study.loading import Job, open_job
from helpers.study.schema import Study, speed_key, variant_per_scheme

FLOATS = ("float32", "bfloat16")
PEAKS = "peaks"  # the bare matrix products, measured beside the configurations


@dataclass(frozen=True)
class Configuration:
    """One way to run a model: a variant at a float type.

    Attributes:
        arithmetic: the type its Linears multiply in.
        simulated: whether int8 is only simulated: rounded to, and multiplied as float.
        load: returns (model, tokenizer).
    """

    variant: str
    dtype: str
    arithmetic: str
    simulated: bool
    load: Callable[[], tuple]

    @property
    def name(self) -> str:
        return f"{self.variant} {self.dtype}"


def measured_configurations(job: Job) -> dict[str, Configuration]:
    """The configurations by name: the baseline in both floats, then the quantized variants."""
    baseline = replace(job, variant=job.study.baseline)
    floats = [_with_dtype(baseline, dtype) for dtype in FLOATS]
    measured_variants = [v for v in job.study.variants if v not in skipped_variants(job)]
    quantized = [replace(job, variant=v) for v in measured_variants if v != job.study.baseline]
    configurations = map(_configuration, [*floats, *quantized])
    return {configuration.name: configuration for configuration in configurations}


def skipped_variants(job: Job) -> dict[str, str]:
    """The reason for each variant that is not measured: redundant, or not measurable here."""
    reasons, representatives = {}, variant_per_scheme(job.study.variants)
    for name, recipe in job.study.variants.items():
        if recipe.ruler:
            reasons[name] = "is a ruler, simulated in float"
        elif not recipe.quantized and name != job.study.baseline:
            reasons[name] = "runs in float as the baseline does"
        elif recipe.quantized and job.study.runtime.quantized == "vllm":
            reasons[name] = "is answered by vLLM, in a process that cannot be watched from here"
        elif recipe.quantized and name not in representatives.values():
            reasons[name] = f"multiplies and scales as {representatives[speed_key(recipe)]} does"
    return reasons


def _with_dtype(job: Job, dtype: str) -> Job:
    runtime = job.study.runtime.model_copy(update={"dtype": dtype})
    return replace(job, study=job.study.model_copy(update={"runtime": runtime}))


def _configuration(job: Job) -> Configuration:
    runtime, int8 = job.study.runtime, job.recipe.quantized
    on_int8_kernels = int8 and runtime.quantized == "int8"
    return Configuration(
        variant=job.variant,
        dtype=runtime.dtype,
        arithmetic="int8" if on_int8_kernels else runtime.dtype,
        simulated=int8 and not on_int8_kernels,
        load=partial(load_variant, job),
    )


def file_bytes(job: Job, configuration: Configuration) -> dict[str, int]:
    """Bytes on disk, by part, of the files a configuration is loaded from."""
    variant_job = replace(job, variant=configuration.variant)
    if variant_job.recipe.needs_checkpoint:
        return bytes_by_part(job.paths.checkpoint(job.model, configuration.variant))
    return bytes_by_part(model_folder(job.study, job.model, job.paths))


def variant_digests(job: Job) -> dict[str, str]:
    """Content hash of the files of every variant."""
    return {v: variant_digest(replace(job, variant=v)) for v in job.study.variants}


def linear_shapes(job: Job) -> list[tuple[int, int]]:
    """(in_features, out_features) of every Linear of the source model but the head."""
    folder = model_folder(job.study, job.model, job.paths)
    files, names = TensorFiles(folder, dtype=None), linear_names(load_config(folder))
    weight_names = [f"{name}.weight" for name in names if name != HEAD]
    return [files.shape(name)[::-1] for name in weight_names if name in files]


def modules_to_preload(job: Job) -> list[str]:
    """Modules to import before measuring, so that load times do not include the imports."""
    config = load_config(model_folder(job.study, job.model, job.paths))
    return [
        "helpers.cost.measurement",
        "helpers.cost.measurement",
        "helpers.cost.measurement",
        "transformers.quantizers.quantizer_compressed_tensors",
        type(config).__module__.replace("configuration_", "modeling_"),
    ]


def cost_report(
    job: Job, by_name: dict[str, Configuration], rounds: dict[str, list[dict]], work: dict
) -> dict:
    """The content of `cost.json`: every configuration with its files and its measured rounds.

    Args:
        job: the model that was measured, on the runtime it was measured on.
        by_name: the configurations.
        rounds: results of each configuration and of `measurement`, by name.
        work: sizes of the workload.
    """
    gemm_rounds = rounds[PEAKS]
    return {
        "model": job.model,
        "baseline": job.study.baseline,
        "threads": job.study.runtime.threads,
        "device": job.runtime["device_name"],
        "memory": memory_label(job.study.runtime.device),
        "arithmetic": arithmetic_record(job),
        "work": work,
        "left_out": skipped_variants(job),
        "peaks": {kind: [round_[kind] for round_ in gemm_rounds] for kind in gemm_rounds[0]},
        "ways": [
            {"name": name, "variant": configuration.variant, "dtype": configuration.dtype}
            | {"arithmetic": configuration.arithmetic, "simulated": configuration.simulated}
            | {"file_bytes": file_bytes(job, configuration)}
            | {key: [round_[key] for round_ in rounds[name]] for key in rounds[name][0]}
            for name, configuration in by_name.items()
        ],
    }


def memory_label(device: str) -> str:
    """The meaning of the peak memory, in words."""
    if device == "cuda":
        return "the most the device held for a process of its own"
    return "the most a process of its own held, less what it held before loading"


def all_cores(job: Job) -> Job:
    """The job with all cores of its process, since it runs alone."""
    runtime = job.study.runtime.model_copy(update={"threads": torch.get_num_threads()})
    return replace(job, study=job.study.model_copy(update={"runtime": runtime}))


SQUARE = 2048
SECONDS_A_SHAPE = 0.06
FEWEST = 2
ARITHMETICS = ("float32", "bfloat16", "int8")


def gemm_peaks(
    shapes: Sequence[tuple[int, int]], *, rows: int, threads: int, device: str
) -> dict[str, float | None]:
    """Operations per second of the best matrix product, by arithmetic; None where it has none.

    Args:
        shapes: (in_features, out_features) of the model's Linears.
        rows: of the left operand, as many as evaluation reads tokens at once.
        threads: how many cores to use.
        device: where to multiply.
    """
    torch.set_num_threads(threads)
    sizes = [(SQUARE, SQUARE, SQUARE), *((rows, *shape) for shape in dict.fromkeys(shapes))]
    return {kind: _best(sizes, kind, device) for kind in ARITHMETICS}


def _best(sizes: list[tuple[int, int, int]], kind: str, device: str) -> float | None:
    try:
        return max(_operations_a_second(*size, kind, device) for size in sizes)
    except NotImplementedError:  # `int8_matmul.multiply` on a device without the product
        return None


def _operations_a_second(rows: int, inner: int, outer: int, kind: str, device: str) -> float:
    dtype = getattr(torch, kind)
    left, right = (
        torch.randint(-100, 100, shape, device=device).to(dtype)
        for shape in ((rows, inner), (inner, outer))
    )
    if kind == "int8":
        packed = int8_matmul.pack(right.t().contiguous())
        seconds = _shortest(partial(int8_matmul.multiply, left, packed), device)
    else:
        right = right.t().contiguous().t()  # the memory layout of nn.Linear's weight
        seconds = min(_shortest(partial(f, left, right), device) for f in _products(kind))
    return 2 * rows * inner * outer / seconds


def _products(kind: str) -> list[Callable[[Tensor, Tensor], Tensor]]:
    """The functions that multiply two matrices in torch here."""
    if kind == "bfloat16" and not has_bfloat16_units():
        return [_linear_product]  # torch's bfloat16 emulation takes seconds per product
    return [torch.matmul, _linear_product]


@torch.inference_mode()
def _linear_product(left: Tensor, right: Tensor) -> Tensor:
    return product(left, right.t())


def _shortest(multiply: Callable, device: str) -> float:
    """Seconds of the fastest of several runs, after one warm-up run."""
    multiply()
    shortest, start, runs = float("inf"), time.perf_counter(), 0
    while runs < FEWEST or time.perf_counter() - start < SECONDS_A_SHAPE:
        _settle(device)
        call_start = time.perf_counter()
        multiply()
        _settle(device)
        shortest, runs = min(shortest, time.perf_counter() - call_start), runs + 1
    return shortest


def _settle(device: str) -> None:
    if device != "cpu":
        getattr(torch, device).synchronize()


PROMPTS, PROMPT_TOKENS = 32, 8
NEW_TOKENS = 9  # prefill produces the first token, so 8 decode steps are timed
ROUNDS = 2  # rounds in which every configuration is measured
WARM_TOKENS = 32
ROW_TOKENS = 1024  # the most; longer rows are no faster per token


@dataclass(frozen=True)
class Workload:
    """Texts to read and prompts to answer, as token ids.

    Attributes:
        texts: read together in one row.
        prompts: answered in one batch.
        new_tokens: tokens of each answer; no answer ends earlier.
    """

    texts: list[list[int]]
    prompts: list[list[int]]
    new_tokens: int

    @property
    def row_tokens(self) -> int:
        return sum(map(len, self.texts))


def workload(study: Study, tokenizer) -> Workload:
    """As many calibration texts as fill one row of the evaluation; the last one is cut."""
    adapter, budget = study.calibration.adapter, min(ROW_TOKENS, study.evaluation.batch.tokens)
    drawn_texts = [calibration_tokens(tokenizer, i, adapter) for i in calibration_items(study)]
    texts: list[list[int]] = []
    while missing := budget - sum(map(len, texts)):
        texts.append(drawn_texts[len(texts) % len(drawn_texts)][:missing])
    all_tokens = [token for text in drawn_texts for token in text]
    starts = [i * PROMPT_TOKENS % max(1, len(all_tokens) - PROMPT_TOKENS) for i in range(PROMPTS)]
    return Workload(texts, [all_tokens[s : s + PROMPT_TOKENS] for s in starts], NEW_TOKENS)


@dataclass
class LinearTotals:
    """Multiplications and additions inside Linears, and the seconds they took."""

    operations: int = 0
    seconds: float = 0.0
    _started: float = field(default=0.0, repr=False)

    def begin(self, _module, _given) -> None:
        self._started = time.perf_counter()

    def end(self, module, given, _made) -> None:
        self.seconds += time.perf_counter() - self._started
        rows = given[0].numel() // module.in_features
        self.operations += 2 * rows * module.in_features * module.out_features


@contextmanager
def time_linears(model) -> Iterator[LinearTotals]:
    """Inside, the operations and the time of the model's Linears are summed, without the head."""
    totals = LinearTotals()
    modules = [model.get_submodule(n) for n in linear_names(model.config) if n != HEAD]
    hooks = [m.register_forward_pre_hook(totals.begin) for m in modules]
    hooks += [m.register_forward_hook(totals.end) for m in modules]
    try:
        yield totals
    finally:
        for hook in hooks:
            hook.remove()


def measure(load: Callable[[], tuple], work: Workload, *, threads: int) -> dict:
    """One round: load a model, read, write. Run it in a process that does nothing else.

    Args:
        load: returns (model, tokenizer).
        work: the same for all configurations that are compared.
        threads: how many cores to use.

    Returns:
        `load_s` up to the end of a first short text, since files are read when first used;
        `prefill_s` of one row, `linears_s` of it in Linears (None off the CPU) and their
        `linear_operations`; `decode_s` and `decode_tokens`; `linear_bytes` held by the
        Linears; `peak_memory_bytes` over what the process held before loading.
    """
    set_malloc_thresholds()
    torch.set_num_threads(threads)
    disable_progress_bar()
    before, started = _peak_bytes(), time.perf_counter()
    model, _ = load()
    texts, prompts = work.texts, work.prompts
    one_text_a_pass = getattr(model, "scale_scope", "token") == "pass"  # each pass reads one text
    hidden_states(model, texts[0][:WARM_TOKENS])
    _synchronize(model)
    load_s = time.perf_counter() - started
    prove_engine(model)
    one_text_a_pass |= bool(model.packing_problem)
    rows = 1 if one_text_a_pass else len(prompts)
    passes = [[Segment(t)] for t in texts] if one_text_a_pass else [[Segment(t) for t in texts]]
    with ExitStack() as stack:
        if not model.packing_problem:
            stack.enter_context(use_packed_attention(model))
        linears = stack.enter_context(time_linears(model))
        started = time.perf_counter()
        for segments in passes:
            if model.packing_problem:
                hidden_states(model, segments[0].tokens)
            else:
                read(model, segments)
        _synchronize(model)
        prefill_s = time.perf_counter() - started
    decode_tokens, decode_s = _decode_rate(model, prompts[:rows], work.new_tokens)
    on_cpu = model.device.type == "cpu"
    return {
        "load_s": load_s,
        "prefill_s": prefill_s,
        "linears_s": linears.seconds if on_cpu else None,
        "linear_operations": linears.operations,
        "decode_s": decode_s,
        "decode_tokens": decode_tokens,
        "linear_bytes": _linear_bytes(model),
        "peak_memory_bytes": _peak_bytes() - before,
    }


def _decode_rate(model, prompts: list[list[int]], new_tokens: int) -> tuple[int, float]:
    """(tokens decoded after the first of each answer, seconds); no answer ends before the cap."""
    first_time, last_time, later_tokens = 0.0, 0.0, 0

    def watch(tokens: list[int]) -> bool:
        nonlocal first_time, last_time, later_tokens
        last_time = time.perf_counter()
        if len(tokens) == 1:
            first_time = last_time
        else:
            later_tokens += 1
        return False

    answers = generate_greedy(
        model,
        prompts,
        max_new_tokens=new_tokens,
        stop_tokens=set(),
        batch_tokens=sum(map(len, prompts)),
        batch_rows=len(prompts),
        complete=watch,
    )
    for _ in answers:
        pass
    return later_tokens, last_time - first_time


def _linear_bytes(model) -> int:
    """Bytes in memory of all Linears but the head."""
    modules = [model.get_submodule(n) for n in linear_names(model.config) if n != HEAD]
    packed_bytes = sum(module.held_bytes() for module in modules if hasattr(module, "held_bytes"))
    unpacked = [module for module in modules if not hasattr(module, "held_bytes")]
    unpacked_bytes = {t.data_ptr(): t.nbytes for module in unpacked for t in _tensors(module)}
    return packed_bytes + sum(unpacked_bytes.values())


def _tensors(module) -> list[torch.Tensor]:
    return [*module.parameters(), *module.buffers()]


def _peak_bytes() -> int:
    """Peak bytes of this process: allocated on its devices, or else resident."""
    if torch.cuda.is_available():
        return sum(torch.cuda.max_memory_allocated(i) for i in range(torch.cuda.device_count()))
    return peak_memory_bytes()


def _synchronize(model) -> None:
    """Wait until the device has finished the queued work."""
    if model.device.type == "cuda":
        torch.cuda.synchronize()
    elif model.device.type == "mps":
        torch.mps.synchronize()


def workload_sizes(work: Workload) -> dict:
    """The sizes of the workload, for the record."""
    return {
        "prefill_tokens": work.row_tokens,
        "texts": len(work.texts),
        "prompts": len(work.prompts),
        "prompt_tokens": len(work.prompts[0]),
        "steps": work.new_tokens - 1,
    }


@dataclass(frozen=True, kw_only=True)
class CostStage(Stage):
    """The cost of one model in all the ways it can run.

    Attributes:
        ways: by name, the baseline in both floats and the quantized variants.
        work: what every way reads and writes.
    """

    ways: dict[str, Configuration]
    work: Workload

    def measure(self) -> dict:
        """Every way in turns, each in processes of its own, beside the bare matrix product.

        Returns:
            The account of `helpers.cost.measurement`.

        Raises:
            StudyError: a process died.
        """
        rounds = interleaved_rounds(
            self._tasks(),
            rounds=ROUNDS,
            preload=modules_to_preload(self.job),
        )
        return cost_report(self.job, self.ways, rounds, workload_sizes(self.work))

    def _tasks(self) -> dict[str, Callable[[], dict]]:
        """One round of each way by its name, and of the matrix product."""
        threads = self.study.runtime.threads
        one_round = partial(measure, work=self.work, threads=threads)
        peaks = partial(
            gemm_peaks,
            linear_shapes(self.job),
            threads=threads,
            rows=self.work.row_tokens,
            device=self.study.runtime.device,
        )
        tasks = {name: partial(one_round, way.load) for name, way in self.ways.items()}
        return tasks | {PEAKS: peaks}


def open_cost(
    study: str | Path, *, model: str, count: Callable[[Job], dict[str, int]]
) -> CostStage:
    """Open the stage on all cores; its record names the files of every variant.

    Args:
        study: a study's name in params/, or the path of its YAML file.
        count: the operations of the stage, by arithmetic.

    Raises:
        StudyError: the study file is wrong, a checkpoint is missing or damaged, or another
            process runs the stage.
    """
    job = prepare(all_cores(open_job(study, model=model)))
    record = begin_record("cost", job)
    record.inputs.update(variant_digests(job))
    folder = model_folder(job.study, model, job.paths)
    tokenizer = load_tokenizer(folder, enable_thinking=job.study.enable_thinking)
    record.add_operations(count(job))
    return CostStage(
        job=job,
        record=record,
        tokenizer=tokenizer,
        ways=measured_configurations(job),
        work=workload(job.study, tokenizer),
    )
