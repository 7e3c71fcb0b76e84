"""The machine and the versions a measurement was made with: what it can do, not its name."""

import os
import platform
from importlib.metadata import version
from pathlib import Path

from helpers.quantization.peaks import gemm_peaks
from helpers.study.records import package_versions

FEATURES = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16", "asimddp")


def describe(shapes: set[tuple[int, int]], *, rows: int, threads: int) -> dict:
    """Cores, architecture, the features that decide matrix products, memory, versions.

    Args:
        shapes: (in_features, out_features) of the model's Linears, for the best product.
        rows: tokens read at once.
        threads: how many are used.
    """
    peaks = gemm_peaks(sorted(shapes), rows=rows, threads=threads, device="cpu")
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {
        "cores": os.cpu_count(),
        "threads": threads,
        "architecture": platform.machine(),
        "cpu_features": features(),
        "memory_gb": round(pages / 1e9),
        "gemm_peak_gops": {kind: round(peak / 1e9) for kind, peak in peaks.items() if peak},
        "versions": package_versions() | {"lm_eval": version("lm_eval")},
    }


def features() -> list[str]:
    """Of the CPU, those that decide how fast matrices are multiplied."""
    path = Path("/proc/cpuinfo")
    words = set(path.read_text().split()) if path.is_file() else set()
    return [name for name in FEATURES if name in words]
