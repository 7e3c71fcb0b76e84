"""The machine and the versions a measurement was made with: what it can do, not its name."""

import os
import platform
from importlib.metadata import version

from helpers.core.records import package_versions
from helpers.cost.measurement import gemm_peaks
from helpers.runtime.devices import features


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
        "cpu_features": list(features()),
        "memory_gb": round(pages / 1e9),
        "gemm_peak_gops": {kind: round(peak / 1e9) for kind, peak in peaks.items() if peak},
        "versions": package_versions() | {"lm_eval": version("lm_eval")},
    }
