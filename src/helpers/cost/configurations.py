"""The ways a study's model can run: its baseline in both floats, and every quantized variant."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch

from helpers.core.architectures import HEAD, linear_names
from helpers.quantization.variants import arithmetic_record, load_variant, variant_digest
from helpers.sources.model_tensors import TensorFiles
from helpers.sources.models import bytes_by_part, load_config, model_folder
from helpers.study.schema_variants import speed_key, variant_per_scheme
from helpers.study.study_run import Job

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
        if not recipe.quantized and name != job.study.baseline:
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
        "helpers.cost.throughput",
        "helpers.cost.configurations",
        "helpers.cost.gemm_peak",
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
        rounds: results of each configuration and of `gemm_peak`, by name.
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
