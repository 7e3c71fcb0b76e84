"""The models that the gates run, one in memory at a time.

A check then needs little more memory than the model it checks.
"""

from collections.abc import Callable
from dataclasses import replace

from helpers.quantization.int8_checkpoint import load_int8
from helpers.quantization.variants import load_as, load_reference, load_variant
from helpers.runtime.allocator import release_memory
from helpers.sources.models import load_model, model_folder
from helpers.study.study_run import Job


class HeldModels:
    """A job's source and its checkpoint as models; asking for one frees the other.

    Args:
        job: the model and variant at hand.
    """

    def __init__(self, job: Job):
        self.job = job
        self.source_folder = model_folder(job.study, job.model, job.paths)
        self.folder = job.paths.checkpoint(job.model, job.variant)
        self._held: tuple[str, object] = ("", None)

    @property
    def source_model(self):
        """The source, loaded from its files; who changes it lets it go."""
        runtime = self.job.study.runtime
        return self._hold("source", lambda: load_model(self.source_folder, runtime))

    @property
    def running_model(self):
        """The checkpoint, loaded as the evaluation loads it."""
        kind = self.job.study.runtime.quantized if self.job.recipe.quantized else "float"
        return self._hold(kind, lambda: load_variant(self.job)[0])

    @property
    def int8_model(self):
        """The checkpoint on INT8 kernels."""
        runtime = self.job.study.runtime
        return self._hold("int8", lambda: load_as(load_int8, self.folder, runtime))

    @property
    def reference_model(self):
        """The checkpoint as compressed-tensors simulates it."""
        runtime = self.job.study.runtime
        return self._hold("reference", lambda: load_as(load_reference, self.folder, runtime))

    def _hold(self, name: str, load: Callable):
        if self._held[0] != name:
            self.let_go()
            self._held = (name, load())
        return self._held[1]

    def let_go(self) -> None:
        """Free the model at hand; the next to ask for one has it loaded anew."""
        self._held = ("", None)
        release_memory()


def on_own_kernels(job: Job) -> Job:
    """The job on this project's own int8 kernels, where its Linears can be looked into.

    A study that is evaluated on vLLM has its checkpoints proved here; `make serve-check`
    holds vLLM's Linears to the same products.
    """
    if job.study.runtime.quantized != "vllm":
        return job
    runtime = job.study.runtime.model_copy(update={"quantized": "int8"})
    return replace(job, study=job.study.model_copy(update={"runtime": runtime}))
