"""Devices, processors and memory: where a job computes, settled on this machine once.

`auto` takes the best device there is and the dtype that suits it. What was settled, and why it is
not what a reader would expect, goes into the job's record.

`PROCESSOR=avx2 make …` restricts torch, oneDNN and numba by their own variables (Makefile), and
this module by STUDY_PROCESSOR, so that any machine can stand in for one without AVX-512;
`PROCESSOR=vnni` for one with AVX-512 VNNI and bfloat16, and without AMX.

The C library (glibc) is told how much freed memory to keep. Freed tensors of a few megabytes lie
between small ones that last, and such pages are kept: 1.9 GiB after one quantization of 0.6 B
weights, held by the process and by no one in it. And what lies freed at the end is returned at
once and taken back page by page for the next layer, over and over: a tenth of the time of an int8
evaluation (NOTES.md).
"""

import ctypes
import gc
import os
import platform
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from itertools import groupby
from pathlib import Path

import torch

from helpers.core.errors import StudyError
from helpers.study.loading import Job
from helpers.study.schema import Runtime

FEATURES = ("avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8")
FEATURES += ("asimddp", "i8mm", "bf16")  # ARM's
RESTRICTIONS = {
    "avx2": ("avx2",),
    "vnni": ("avx2", "avx512f", "avx512_vnni", "avx512_bf16"),
}


def features() -> tuple[str, ...]:
    """The instruction sets for matrix products that this process may use."""
    allowed = RESTRICTIONS.get(restriction(), FEATURES)
    return tuple(name for name in _cpu_features() if name in allowed)


def restriction() -> str:
    """The restriction of this run, a key of RESTRICTIONS; empty if there is none.

    Raises:
        StudyError: STUDY_PROCESSOR is set to another value.
    """
    setting = os.environ.get("STUDY_PROCESSOR", "")
    if setting and setting not in RESTRICTIONS:
        raise StudyError(
            f"PROCESSOR = {setting!r} is not one of {', '.join(RESTRICTIONS)}; leave it out"
        )
    return setting


@cache
def _cpu_features() -> tuple[str, ...]:
    path = Path("/proc/cpuinfo")
    words = set(path.read_text("utf-8").split()) if path.is_file() else set()
    return tuple(name for name in FEATURES if name in words)


def has_int8_units() -> bool:
    """Whether torch multiplies int8 faster than float32 here, which takes AVX-512 VNNI."""
    return "avx512_vnni" in features()


def has_bfloat16_units() -> bool:
    """Whether the processor has bfloat16 instructions; emulation is slower than float32."""
    return bool({"avx512_bf16", "amx_bf16", "bf16"} & set(features()))


def processor_name() -> str:
    """The CPU's model name, or its architecture."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text("utf-8").splitlines() if path.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    own = names[0] if names else platform.processor() or platform.machine()
    return f"{own} (kept to {restriction()})" if restriction() else own


def processor_class() -> str:
    """The processor's class by its int8 instructions."""
    own = features()
    if "amx_int8" in own:
        return "AMX"
    if "avx512_vnni" in own:
        return "AVX-512 VNNI"
    if "avx512f" in own:
        return "AVX-512"
    return "AVX2" if "avx2" in own else platform.machine()


M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # as malloc.h numbers them
SPARE_BYTES = 2**27  # kept for later allocations
LARGE_BYTES = 2**25  # larger blocks are mapped separately and returned at once


def release_memory() -> None:
    """Collect garbage and return freed pages to the system."""
    gc.collect()
    trim_heap()


def trim_heap() -> None:
    """Return freed pages to the system if the C library can (glibc); else do nothing."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def set_malloc_thresholds() -> None:
    """Make malloc keep SPARE_BYTES of freed memory and map large blocks separately (glibc)."""
    set_option = getattr(ctypes.CDLL(None), "mallopt", None)
    if set_option is not None:
        set_option(M_MMAP_THRESHOLD, LARGE_BYTES)
        set_option(M_TRIM_THRESHOLD, SPARE_BYTES)


def exclude_imports_from_gc() -> None:
    """Exclude the objects that exist now, mostly of libraries, from garbage collection.

    Only the first call in a process does so, since models are freed later. A collection took a
    third of a second before.
    """
    if not gc.get_freeze_count():
        gc.freeze()


NO_BFLOAT16 = (
    "the processor has no bfloat16 units: bfloat16 operands are multiplied in float32 and rounded "
    "once, and training does not cast"
)
NO_INT8 = {"mps": "torch has no int8 product there, so int8 is simulated (quantized: reference)"}


def prepare(job: Job) -> Job:
    """The job with its runtime resolved on this machine; sets threads and seeds.

    Raises:
        StudyError: the study names a device that this machine lacks.
    """
    requested = job.study.runtime
    runtime = resolve_runtime(requested)
    set_malloc_thresholds()
    exclude_imports_from_gc()
    torch.set_num_threads(runtime.threads)
    torch.manual_seed(job.study.seed)
    study = job.study.model_copy(update={"runtime": runtime})
    return replace(job, study=study, runtime=describe_runtime(runtime, requested))


def resolve_runtime(runtime: Runtime) -> Runtime:
    """The runtime with `auto` replaced: an available device, its dtype and kernel.

    Raises:
        StudyError: the study names a device that this machine lacks.
    """
    device = best_device() if runtime.device == "auto" else runtime.device
    if not is_available(device):
        raise StudyError(
            f"runtime.device = {device!r} but this machine has none; use 'auto' or 'cpu'"
        )
    dtype = best_dtype(device) if runtime.dtype == "auto" else runtime.dtype
    device_map = runtime.device_map if device == "cuda" and torch.cuda.device_count() > 1 else None
    quantized = "reference" if device in NO_INT8 else runtime.quantized
    changes = {"device": device, "dtype": dtype, "device_map": device_map, "quantized": quantized}
    return runtime.model_copy(update=changes)


def best_device() -> str:
    """cuda, else mps, else cpu."""
    return next(device for device in ("cuda", "mps", "cpu") if is_available(device))


def is_available(device: str) -> bool:
    """Whether this machine has a device of a kind: cuda, mps or cpu."""
    match device:
        case "cuda":
            return torch.cuda.is_available()
        case "mps":
            return torch.backends.mps.is_available()
    return device == "cpu"


def best_dtype(device: str) -> str:
    """bfloat16 on a GPU that has it, else float32."""
    if device == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    if device == "mps":
        try:
            torch.ones(1, dtype=torch.bfloat16, device="mps") + 1
        except (TypeError, RuntimeError):  # systems before macOS 14
            return "float32"
        return "bfloat16"
    return "float32"


def describe_runtime(runtime: Runtime, requested: Runtime) -> dict:
    """The runtime for the record: the device's name, and every difference from the request.

    Args:
        runtime: as resolved.
        requested: as in the study file.
    """
    notes = []
    if runtime.quantized != requested.quantized:
        notes.append(f"{runtime.device}: {NO_INT8[runtime.device]}")
    if requested.device_map and not runtime.device_map:
        notes.append("one device: device_map has nothing to spread over")
    if runtime.device == "cpu" and not has_bfloat16_units():
        notes.append(NO_BFLOAT16)
    settings = runtime.model_dump(exclude={"cost"})
    return {**settings, "device_name": device_name(runtime.device), "notes": notes}


def device_name(device: str) -> str:
    """The model name of the processor or of the cards."""
    if device == "cuda":
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        return ", ".join(names)
    return processor_name()


def place_on_device(model, runtime: Runtime):
    """The model on its device, or split over all GPUs if the study sets `device_map`.

    The decoder and the head, which this project calls separately, return their output on the
    device of their input, as an unsplit model does.
    """
    if not runtime.device_map:
        return model.to(runtime.device)
    from accelerate import dispatch_model, infer_auto_device_map
    from accelerate.utils import get_balanced_memory

    split_options = {"no_split_module_classes": list(model._no_split_modules or ())}
    device_map = infer_auto_device_map(
        model, max_memory=get_balanced_memory(model, **split_options), **split_options
    )
    model = dispatch_model(model, device_map=device_map, force_hooks=True)
    return return_to_input_device(model)


def modules_by_device(model) -> dict[str, dict[str, str]]:
    """The modules of a split model by device, for its record; {} for an unsplit model.

    Consecutive layers are named by the first and the last.
    """
    names: dict[str, list[str]] = {}
    for name, device in getattr(model, "hf_device_map", {}).items():
        place = f"cuda:{device}" if isinstance(device, int) else str(device)
        names.setdefault(place, []).append(name)
    if len(names) < 2:
        return {}
    return {"modules": {place: ", ".join(_merged_ranges(each)) for place, each in names.items()}}


def _merged_ranges(names: list[str]) -> Iterator[str]:
    """The names, `layers.1` and `layers.2` and `layers.3` as `layers.1-3`."""
    numbered = [(name, *name.rpartition(".")[::2]) for name in names]
    for _, entries in groupby(enumerate(numbered), key=_range_key):
        entries = [entry for _, entry in entries]
        first, last = entries[0][0], entries[-1][2]
        yield first if len(entries) == 1 else f"{first}-{last}"


def _range_key(place: tuple[int, tuple[str, str, str]]) -> tuple[str, int | None]:
    """A key that only names with consecutive numbers share."""
    index, (name, parent, number) = place
    return (parent, int(number) - index) if number.isdecimal() else (name, None)


def return_to_input_device(model):
    """The model, whose decoder and head now return their output on the device of their input."""
    for part in (model.base_model, model.get_output_embeddings()):
        part.register_forward_hook(_to_input_device, with_kwargs=True)
    return model


def _to_input_device(_module, args: tuple, kwargs: dict, output):
    """Move the output to the device of the first input tensor."""
    from accelerate.utils import send_to_device

    tensors = (x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor))
    return send_to_device(output, next(tensors).device)
