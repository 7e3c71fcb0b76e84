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
from helpers.inference.packed_attention import packed
from helpers.inference.packed_rows import Segment, read
from helpers.runtime.allocator import set_malloc_thresholds
from helpers.sources.chat_conversations import calibration_tokens
from helpers.sources.sampling import calibration_items
from helpers.study.schema import Study

PROMPTS, PROMPT_TOKENS = 32, 8
NEW_TOKENS = 9  # the first comes with reading the prompt: 8 steps are timed
ROUNDS = 2  # each of everything, one after the other
WARM_TOKENS = 32
ROW_TOKENS = 1024  # at most; longer rows read no faster and take longer to measure


@dataclass(frozen=True)
class Workload:
    """What is read and what is answered, as token ids.

    Attributes:
        texts: read in one row.
        prompts: answered side by side.
        new_tokens: of each answer, none of which ends earlier.
    """

    texts: list[list[int]]
    prompts: list[list[int]]
    new_tokens: int

    @property
    def row_tokens(self) -> int:
        return sum(map(len, self.texts))


def workload(study: Study, tokenizer) -> Workload:
    """The calibration texts, as many as fill one row as evaluation reads it; the last is cut."""
    adapter, budget = study.calibration.adapter, min(ROW_TOKENS, study.evaluation.batch.tokens)
    drawn = [calibration_tokens(tokenizer, i, adapter) for i in calibration_items(study)]
    texts: list[list[int]] = []
    while missing := budget - sum(map(len, texts)):
        texts.append(drawn[len(texts) % len(drawn)][:missing])
    flat = [token for text in drawn for token in text]
    starts = [i * PROMPT_TOKENS % max(1, len(flat) - PROMPT_TOKENS) for i in range(PROMPTS)]
    return Workload(texts, [flat[s : s + PROMPT_TOKENS] for s in starts], NEW_TOKENS)


@dataclass
class Linears:
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
def watched_linears(model) -> Iterator[Linears]:
    """Inside, the model's Linears are counted and timed; the head is none of them."""
    found = Linears()
    modules = [model.get_submodule(n) for n in linear_names(model.config) if n != HEAD]
    hooks = [m.register_forward_pre_hook(found.begin) for m in modules]
    hooks += [m.register_forward_hook(found.end) for m in modules]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def measure(load: Callable[[], tuple], work: Workload, *, threads: int) -> dict:
    """One round: load a model, read, write. Meant for a process that does nothing else.

    Args:
        load: returns (model, tokenizer).
        work: the same for all that is compared.
        threads: how many cores to use.

    Returns:
        `load_s` until a first short text is read, since files are read when first used;
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
    alone = getattr(model, "scale_scope", "token") == "pass"  # evaluated one text at a time
    rows = 1 if alone else len(prompts)
    with packed(model):
        read(model, [Segment(texts[0][:WARM_TOKENS])])
        _settle(model)
        load_s = time.perf_counter() - started
        passes = [[Segment(t)] for t in texts] if alone else [[Segment(t) for t in texts]]
        with watched_linears(model) as linears:
            started = time.perf_counter()
            for segments in passes:
                read(model, segments)
            _settle(model)
            prefill_s = time.perf_counter() - started
    made, decode_s = _written(model, prompts[:rows], work.new_tokens)
    on_cpu = model.device.type == "cpu"
    return {
        "load_s": load_s,
        "prefill_s": prefill_s,
        "linears_s": linears.seconds if on_cpu else None,
        "linear_operations": linears.operations,
        "decode_s": decode_s,
        "decode_tokens": made,
        "linear_bytes": _linear_bytes(model),
        "peak_memory_bytes": _peak_bytes() - before,
    }


def _written(model, prompts: list[list[int]], new_tokens: int) -> tuple[int, float]:
    """(tokens written after the first ones, seconds they took); no answer ends before the cap."""
    first, last, made = 0.0, 0.0, 0

    def watch(tokens: list[int]) -> bool:
        nonlocal first, last, made
        last = time.perf_counter()
        if len(tokens) == 1:
            first = last
        else:
            made += 1
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
    return made, last - first


def _linear_bytes(model) -> int:
    """Bytes of everything the Linears hold, the head left out."""
    modules = [model.get_submodule(n) for n in linear_names(model.config) if n != HEAD]
    packed = sum(module.held_bytes() for module in modules if hasattr(module, "held_bytes"))
    plain = [module for module in modules if not hasattr(module, "held_bytes")]
    held = {t.data_ptr(): t.nbytes for module in plain for t in _tensors(module)}
    return packed + sum(held.values())


def _tensors(module) -> list[torch.Tensor]:
    return [*module.parameters(), *module.buffers()]


def _peak_bytes() -> int:
    """The most this process has held: of the device's memory, or else resident."""
    if torch.cuda.is_available():
        return sum(torch.cuda.max_memory_allocated(i) for i in range(torch.cuda.device_count()))
    return peak_memory_bytes()


def _settle(model) -> None:
    """Wait until what was queued is done."""
    if model.device.type == "cuda":
        torch.cuda.synchronize()
    elif model.device.type == "mps":
        torch.mps.synchronize()


def as_plain(work: Workload) -> dict:
    """The workload's sizes, for the record."""
    return {
        "prefill_tokens": work.row_tokens,
        "texts": len(work.texts),
        "prompts": len(work.prompts),
        "prompt_tokens": len(work.prompts[0]),
        "steps": work.new_tokens - 1,
    }
