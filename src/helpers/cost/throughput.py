"""How fast one model reads and writes, and what it holds meanwhile.

Measured on what evaluation itself does: reading is one packed row of the study's own
texts, writing a full batch of slots. Writing is timed from the first tokens on, so that
reading the prompts is not counted twice. Time inside Linears is taken on CPUs only: on
other devices work is queued, and waiting for each Linear would change what is measured.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from transformers.utils.logging import disable_progress_bar

from helpers.core.architectures import HEAD, linear_names
from helpers.core.records import peak_memory_bytes
from helpers.inference.generation import generate_greedy
from helpers.inference.packed_attention import use_packed_attention
from helpers.inference.packed_rows import Segment, read
from helpers.runtime.allocator import set_malloc_thresholds
from helpers.sources.chat_conversations import calibration_tokens
from helpers.sources.sampling import calibration_items
from helpers.study.schema import Study

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
    rows = 1 if one_text_a_pass else len(prompts)
    with use_packed_attention(model):
        read(model, [Segment(texts[0][:WARM_TOKENS])])
        _synchronize(model)
        load_s = time.perf_counter() - started
        passes = [[Segment(t)] for t in texts] if one_text_a_pass else [[Segment(t) for t in texts]]
        with time_linears(model) as linears:
            started = time.perf_counter()
            for segments in passes:
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
