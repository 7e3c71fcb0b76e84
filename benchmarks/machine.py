"""The machine and the versions a measurement was made with: what it can do, not its name."""

import os
import platform
import time
from importlib.metadata import version
from pathlib import Path

import torch

from helpers.study.records import package_versions

FEATURES = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16", "asimddp")
SHAPE = (2048, 576, 1536)  # rows, inner, outer


def describe(*, threads: int) -> dict:
    """Cores, architecture, the features that decide matrix products, memory, versions."""
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {
        "cores": os.cpu_count(),
        "threads": threads,
        "architecture": platform.machine(),
        "cpu_features": _features(),
        "memory_gb": round(pages / 1e9),
        "gemm_peak_gops": gemm_peak(),
        "versions": package_versions() | {"lm_eval": version("lm_eval")},
    }


def _features() -> list[str]:
    path = Path("/proc/cpuinfo")
    words = set(path.read_text().split()) if path.is_file() else set()
    return [name for name in FEATURES if name in words]


def gemm_peak() -> dict[str, int]:
    """Billions of operations a second of one matrix product, by kind."""
    rows, inner, outer = SHAPE
    a, b = torch.randn(rows, inner), torch.randn(inner, outer)
    kinds = {
        "float32": (torch.mm, a, b),
        "bfloat16": (torch.mm, a.bfloat16(), b.bfloat16()),
        "int8": (torch._int_mm, a.to(torch.int8), b.to(torch.int8)),
    }
    return {kind: _gops(*call) for kind, call in kinds.items()}


def _gops(product, a, b) -> int:
    rows, inner, outer = SHAPE
    best = float("inf")
    for _ in range(20):
        started = time.perf_counter()
        product(a, b)
        best = min(best, time.perf_counter() - started)
    return round(2 * rows * inner * outer / best / 1e9)
