"""The models that the gates run, one in memory at a time.

A check then needs little more memory than the model it checks.
"""

from collections.abc import Callable
from dataclasses import replace

from helpers.quantization.int8_checkpoint import load_int8
from helpers.quantization.variants import load_quantized, load_reference, load_variant
from helpers.runtime.allocator import release_memory
from helpers.sources.models import load_model, model_folder
from helpers.study.study_run import Job


class ModelSlot:
    """A job's source and checkpoint as models; loading one frees the other.

    Args:
        job: names the model and the variant.
    """

    def __init__(self, job: Job):
        self.job = job
        self.source_folder = model_folder(job.study, job.model, job.paths)
        self.folder = job.paths.checkpoint(job.model, job.variant)
        self._slot: tuple[str, object] = ("", None)

    @property
    def source_model(self):
        """The source, loaded from its files; a caller that changes it must call `release`."""
        runtime = self.job.study.runtime
        return self._load_once("source", lambda: load_model(self.source_folder, runtime))

    @property
    def running_model(self):
        """The checkpoint, loaded as the evaluation loads it."""
        kind = self.job.study.runtime.quantized if self.job.recipe.quantized else "float"
        return self._load_once(kind, lambda: load_variant(self.job)[0])

    @property
    def int8_model(self):
        """The checkpoint on INT8 kernels."""
        runtime = self.job.study.runtime
        return self._load_once("int8", lambda: load_quantized(load_int8, self.folder, runtime))

    @property
    def reference_model(self):
        """The checkpoint as compressed-tensors simulates it."""
        runtime = self.job.study.runtime
        return self._load_once(
            "reference", lambda: load_quantized(load_reference, self.folder, runtime)
        )

    def _load_once(self, name: str, load: Callable):
        if self._slot[0] != name:
            self.release()
            self._slot = (name, load())
        return self._slot[1]

    def release(self) -> None:
        """Free the loaded model; the next access loads one again."""
        self._slot = ("", None)
        release_memory()


def with_own_kernels(job: Job) -> Job:
    """The job on this project's own int8 kernels, whose Linears the gates can access.

    If a study runs on vLLM, its checkpoints are still verified here; `make serve-check`
    compares vLLM's Linears with the same products.
    """
    if job.study.runtime.quantized != "vllm":
        return job
    runtime = job.study.runtime.model_copy(update={"quantized": "int8"})
    return replace(job, study=job.study.model_copy(update={"runtime": runtime}))
