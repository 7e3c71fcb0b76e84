"""Part 1: what the card is and what it can do at best."""

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version

import torch

from benchmarks.gpu.part import Part
from benchmarks.gpu.timing import device_seconds

PACKAGES = ("torch", "triton", "transformers", "accelerate", "compressed-tensors", "llmcompressor")
SQUARE, SQUARE_DRY = 8192, 128
COPIED_BYTES = 2**32


def run(part: Part) -> None:
    """Report versions, the card's name, and its peak rates."""
    part.note("versions", {"python": platform.python_version(), **_versions()})
    part.note("card", _card(part.device))
    if part.device == "cuda":
        from helpers.quantization.int8_cuda import triton_unavailable_reason

        part.note("no_fused_kernels_because", triton_unavailable_reason(torch.device("cuda", 0)))
        bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        part.note("float_type", "bfloat16" if bf16 else "float32: the card has no bfloat16")
    part.note("copy_bytes_a_second", _copy(part))
    for name in ("bfloat16", "int8", "int8, weight across", "float32"):
        if part.over(need=2):
            return
        part.note(f"{name}, operations a second", _product(part, name))


def _versions() -> dict:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found | {"cuda": torch.version.cuda, "driver": _driver()}


def _driver() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return None


def _card(device: str) -> dict:
    if device != "cuda":
        return {"name": "CPU (dry mode)", "cores": os.cpu_count()}
    properties = torch.cuda.get_device_properties(0)
    return {
        "name": properties.name,
        "capability": ".".join(map(str, torch.cuda.get_device_capability(0))),
        "memory_bytes": properties.total_memory,
        "multiprocessors": properties.multi_processor_count,
        "l2_bytes": getattr(properties, "L2_cache_size", None),
        "cards": torch.cuda.device_count(),
    }


def _copy(part: Part) -> float:
    size = 2**20 if part.dry else COPIED_BYTES
    source = torch.randint(0, 100, (size,), dtype=torch.uint8, device=part.device)
    target = torch.empty_like(source)
    seconds = device_seconds([lambda: target.copy_(source)], part.device)
    return 2 * size / seconds


def _product(part: Part, name: str) -> float | str:
    """Operations a second of a square product on random operands, as Linears hold them."""
    size, device = SQUARE_DRY if part.dry else SQUARE, part.device
    draw = torch.randint(-127, 128, (2, size, size), device=device, dtype=torch.int8)
    try:
        if name.startswith("int8"):
            left, weight = draw[0], draw[1]
            right = weight.t().contiguous() if "across" in name else weight.t()
            seconds = device_seconds([lambda: torch._int_mm(left, right)], device)
        else:
            left, weight = draw.to(getattr(torch, name)) / 64
            seconds = device_seconds([lambda: left @ weight.t()], device)
    except RuntimeError as error:
        return str(error)[:200]
    return 2 * size**3 / seconds
