"""A part of the check in a process of its own, with a hard end: a fork where that is possible.

Imports take longer than most parts. So this process loads what the parts need, and no call of
CUDA, and a part is a fork of it. A driver that was called before a fork does not work in the
fork; the first fork shows whether it does, and if not, every part is a new process.
"""

import contextlib
import gc
import importlib
import multiprocessing
import os
import subprocess
import sys
import traceback
from collections.abc import Callable

# llmcompressor is not among them: it calls CUDA when it is imported.
LOADED = (
    "torch",
    "transformers.generation.utils",
    "transformers.models.auto.modeling_auto",
    "transformers.models.llama.modeling_llama",
    "transformers.models.qwen3.modeling_qwen3",
    "compressed_tensors",
    "accelerate",
)
BY_NVML = "PYTORCH_NVML_BASED_CUDA_CHECK"  # torch asks for cards without calling CUDA
PROBE_S = 60


def load(parts: list[str]) -> list[str]:
    """Import the parts' modules; return those that failed, with the reason."""
    missing = []
    os.environ[BY_NVML] = "1"
    for name in (*LOADED, *(f"benchmarks.gpu.{part}" for part in parts)):
        try:
            importlib.import_module(name)
        except Exception as error:  # the parts that need it will say so, too
            missing.append(f"{name}: {type(error).__name__}: {str(error)[:200]}")
    del os.environ[BY_NVML]
    gc.freeze()  # pages that no collection touches stay shared
    return missing


def has_cuda() -> bool:
    """Whether torch sees a card, asked in a process of its own: this one stays without CUDA."""
    command = [sys.executable, "-c", "import torch; exit(not torch.cuda.is_available())"]
    return subprocess.run(command, check=False).returncode == 0


def forks_work(device: str) -> bool:
    """Whether a fork of this process can compute on a device."""
    if sys.platform != "linux":
        return False
    return device == "cpu" or forked(lambda: _compute(device), PROBE_S) is None


def _compute(device: str) -> None:
    import torch

    assert float(torch.ones(8, device=device).sum()) == 8.0


def forked(work: Callable[[], None], seconds: float) -> str | None:
    """Run a function in a fork; return how it failed, or None."""
    process = multiprocessing.get_context("fork").Process(target=_guarded, args=(work,))
    sys.stdout.flush()
    process.start()
    process.join(seconds)
    if process.is_alive():
        process.kill()
        process.join(10)
        return f"stopped after {seconds:.0f} s"
    return f"exit status {process.exitcode}" if process.exitcode else None


def _guarded(work: Callable[[], None]) -> None:
    try:
        work()
    except BaseException:
        traceback.print_exc()
        raise SystemExit(1) from None
    finally:
        with contextlib.suppress(OSError):
            sys.stdout.flush()


def run(command: list[str], seconds: float) -> str | None:
    """Run a command as a new process; return how it failed, or None."""
    try:
        done = subprocess.run(command, timeout=seconds)
    except subprocess.TimeoutExpired:
        return f"stopped after {seconds:.0f} s"
    return f"exit status {done.returncode}" if done.returncode else None
