"""Where a job computes: what the study file leaves open is settled on this machine, once.

`auto` takes the best device there is and the dtype that suits it. What was settled, and
why it is not what a reader would expect, goes into the job's record.
"""

from collections.abc import Iterator
from dataclasses import replace
from itertools import groupby

import torch

from helpers.core.errors import StudyError
from helpers.runtime import processors
from helpers.runtime.allocator import exclude_imports_from_gc, set_malloc_thresholds
from helpers.study.schema import Runtime
from helpers.study.study_run import Job

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
    if runtime.device == "cpu" and not processors.has_bfloat16_units():
        notes.append(NO_BFLOAT16)
    settings = runtime.model_dump(exclude={"cost"})
    return {**settings, "device_name": device_name(runtime.device), "notes": notes}


def device_name(device: str) -> str:
    """The model name of the processor or of the cards."""
    if device == "cuda":
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        return ", ".join(names)
    return processors.processor_name()


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
