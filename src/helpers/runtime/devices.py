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
    """The job with its runtime settled on this machine; threads and seeds are set.

    Raises:
        StudyError: the study asks for a device this machine lacks.
    """
    asked = job.study.runtime
    runtime = resolve_runtime(asked)
    set_malloc_thresholds()
    exclude_imports_from_gc()
    torch.set_num_threads(runtime.threads)
    torch.manual_seed(job.study.seed)
    study = job.study.model_copy(update={"runtime": runtime})
    return replace(job, study=study, runtime=describe_runtime(runtime, asked))


def resolve_runtime(runtime: Runtime) -> Runtime:
    """The runtime with nothing left open: a device that is there, a dtype, a kernel.

    Raises:
        StudyError: the study asks for a device this machine lacks.
    """
    device = best_device() if runtime.device == "auto" else runtime.device
    if not is_available(device):
        raise StudyError(
            f"runtime.device = {device!r} but this machine has none; use 'auto' or 'cpu'"
        )
    dtype = best_dtype(device) if runtime.dtype == "auto" else runtime.dtype
    spread = runtime.device_map if device == "cuda" and torch.cuda.device_count() > 1 else None
    quantized = "reference" if device in NO_INT8 else runtime.quantized
    changes = {"device": device, "dtype": dtype, "device_map": spread, "quantized": quantized}
    return runtime.model_copy(update=changes)


def best_device() -> str:
    """cuda, else mps, else cpu."""
    return next(device for device in ("cuda", "mps", "cpu") if is_available(device))


def is_available(device: str) -> bool:
    """Whether this machine can compute on a kind of device."""
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


def describe_runtime(runtime: Runtime, asked: Runtime) -> dict:
    """What was settled, for the record: the device by name, and what differs from what was asked.

    Args:
        runtime: as settled.
        asked: as the study file has it.
    """
    notes = []
    if runtime.quantized != asked.quantized:
        notes.append(f"{runtime.device}: {NO_INT8[runtime.device]}")
    if asked.device_map and not runtime.device_map:
        notes.append("one device: device_map has nothing to spread over")
    if runtime.device == "cpu" and not processors.has_bfloat16_units():
        notes.append(NO_BFLOAT16)
    told = runtime.model_dump(exclude={"cost"})
    return {**told, "device_name": device_name(runtime.device), "notes": notes}


def device_name(device: str) -> str:
    """The processor or card as it calls itself."""
    if device == "cuda":
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        return ", ".join(names)
    return processors.processor_name()


def place_on_device(model, runtime: Runtime):
    """The model on its device, or in parts on all GPUs where the study spreads it.

    What this project calls by itself (the decoder, the head) answers on the device it was
    asked on, as a model in one place does.
    """
    if not runtime.device_map:
        return model.to(runtime.device)
    from accelerate import dispatch_model, infer_auto_device_map
    from accelerate.utils import get_balanced_memory

    whole = {"no_split_module_classes": list(model._no_split_modules or ())}
    places = infer_auto_device_map(model, max_memory=get_balanced_memory(model, **whole), **whole)
    model = dispatch_model(model, device_map=places, force_hooks=True)
    return return_to_input_device(model)


def modules_by_device(model) -> dict[str, dict[str, str]]:
    """Which module of a spread model computes on which device, for its record; {} for a whole one.

    Layers that follow one another are named by the first and the last.
    """
    names: dict[str, list[str]] = {}
    for name, device in getattr(model, "hf_device_map", {}).items():
        place = f"cuda:{device}" if isinstance(device, int) else str(device)
        names.setdefault(place, []).append(name)
    if len(names) < 2:
        return {}
    return {"modules": {place: ", ".join(_runs(each)) for place, each in names.items()}}


def _runs(names: list[str]) -> Iterator[str]:
    """The names, `layers.1` and `layers.2` and `layers.3` as `layers.1-3`."""
    numbered = [(name, *name.rpartition(".")[::2]) for name in names]
    for _, run in groupby(enumerate(numbered), key=_sequence):
        run = [each for _, each in run]
        first, last = run[0][0], run[-1][2]
        yield first if len(run) == 1 else f"{first}-{last}"


def _sequence(place: tuple[int, tuple[str, str, str]]) -> tuple[str, int | None]:
    """The same for numbers that follow one another, and for nothing else."""
    index, (name, parent, number) = place
    return (parent, int(number) - index) if number.isdecimal() else (name, None)


def return_to_input_device(model):
    """Have the decoder and the head of a spread model answer on the device of their input."""
    for part in (model.base_model, model.get_output_embeddings()):
        part.register_forward_hook(_home, with_kwargs=True)
    return model


def _home(_module, args: tuple, kwargs: dict, output):
    """The output, on the device of the first tensor that was given."""
    from accelerate.utils import send_to_device

    given = (x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor))
    return send_to_device(output, next(given).device)
