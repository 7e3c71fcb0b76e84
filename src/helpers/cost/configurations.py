"""The ways a study's model can run: its baseline in both floats, and every quantized variant."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch

from helpers.core.architectures import HEAD, linear_names
from helpers.quantization.variants import arithmetic, load_variant, variant_digest
from helpers.sources.model_tensors import TensorFiles
from helpers.sources.models import bytes_by_part, load_config, model_folder
from helpers.study.schema_variants import speed_key, variant_per_scheme
from helpers.study.study_run import Job

FLOATS = ("float32", "bfloat16")
PEAKS = "peaks"  # beside the ways, the bare matrix products


@dataclass(frozen=True)
class Way:
    """One way of running a model.

    Attributes:
        arithmetic: what its Linears multiply in.
        simulated: int8 is rounded to and multiplied as float.
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


def ways(job: Job) -> dict[str, Way]:
    """By name: the baseline in both floats, then the quantized variants as the study runs them."""
    baseline = replace(job, variant=job.study.baseline)
    floats = [_with_dtype(baseline, dtype) for dtype in FLOATS]
    measured = [v for v in job.study.variants if v not in left_out(job)]
    others = [replace(job, variant=v) for v in measured if v != job.study.baseline]
    found = [_way(each) for each in [*floats, *others]]
    return {way.name: way for way in found}


def left_out(job: Job) -> dict[str, str]:
    """Why, by variant, for those whose measurement would say nothing or cannot be made here."""
    found, measured = {}, variant_per_scheme(job.study.variants)
    for name, recipe in job.study.variants.items():
        if not recipe.quantized and name != job.study.baseline:
            found[name] = "runs in float as the baseline does"
        elif recipe.quantized and job.study.runtime.quantized == "vllm":
            found[name] = "is answered by vLLM, in a process that cannot be watched from here"
        elif recipe.quantized and name not in measured.values():
            found[name] = f"multiplies and scales as {measured[speed_key(recipe)]} does"
    return found


def _with_dtype(job: Job, dtype: str) -> Job:
    runtime = job.study.runtime.model_copy(update={"dtype": dtype})
    return replace(job, study=job.study.model_copy(update={"runtime": runtime}))


def _way(job: Job) -> Way:
    runtime, int8 = job.study.runtime, job.recipe.quantized
    real = int8 and runtime.quantized == "int8"
    return Way(
        variant=job.variant,
        dtype=runtime.dtype,
        arithmetic="int8" if real else runtime.dtype,
        simulated=int8 and not real,
        load=partial(load_variant, job),
    )


def file_bytes(job: Job, way: Way) -> dict[str, int]:
    """Bytes on disk by part of what a way is loaded from."""
    of_way = replace(job, variant=way.variant)
    if of_way.recipe.needs_checkpoint:
        return bytes_by_part(job.paths.checkpoint(job.model, way.variant))
    return bytes_by_part(model_folder(job.study, job.model, job.paths))


def digests(job: Job) -> dict[str, str]:
    """Content hash of the files of every variant."""
    return {v: variant_digest(replace(job, variant=v)) for v in job.study.variants}


def linear_shapes(job: Job) -> list[tuple[int, int]]:
    """(in_features, out_features) of every Linear of the source model but the head."""
    folder = model_folder(job.study, job.model, job.paths)
    files, names = TensorFiles(folder, dtype=None), linear_names(load_config(folder))
    found = [f"{name}.weight" for name in names if name != HEAD]
    return [files.shape(name)[::-1] for name in found if name in files]


def modules_of(job: Job) -> list[str]:
    """Modules that loading needs; imported beforehand, they are no part of a load time."""
    config = load_config(model_folder(job.study, job.model, job.paths))
    return [
        "helpers.cost.throughput",
        "helpers.cost.configurations",
        "helpers.cost.gemm_peak",
        "transformers.quantizers.quantizer_compressed_tensors",
        type(config).__module__.replace("configuration_", "modeling_"),
    ]


def account(job: Job, found: dict[str, Way], rounds: dict[str, list[dict]], work: dict) -> dict:
    """All that was measured, round by round, beside what each way is and takes on disk.

    Args:
        job: the model that was measured, on the runtime it was measured on.
        found: the ways by name.
        rounds: what each way and `gemm_peak` returned.
        work: what was read and written, in numbers.
    """
    peaks = rounds[PEAKS]
    return {
        "model": job.model,
        "baseline": job.study.baseline,
        "threads": job.study.runtime.threads,
        "device": job.runtime["device_name"],
        "memory": memory_is(job.study.runtime.device),
        "arithmetic": arithmetic(job),
        "work": work,
        "left_out": left_out(job),
        "peaks": {kind: [made[kind] for made in peaks] for kind in peaks[0]},
        "ways": [
            {"name": name, "variant": way.variant, "dtype": way.dtype}
            | {"arithmetic": way.arithmetic, "simulated": way.simulated}
            | {"file_bytes": file_bytes(job, way)}
            | {key: [made[key] for made in rounds[name]] for key in rounds[name][0]}
            for name, way in found.items()
        ],
    }


def memory_is(device: str) -> str:
    """What the peak of memory counts."""
    if device == "cuda":
        return "the most the device held for a process of its own"
    return "the most a process of its own held, less what it held before loading"


def all_cores(job: Job) -> Job:
    """The job on all the cores its process was given, since it runs alone."""
    runtime = job.study.runtime.model_copy(update={"threads": torch.get_num_threads()})
    return replace(job, study=job.study.model_copy(update={"runtime": runtime}))
