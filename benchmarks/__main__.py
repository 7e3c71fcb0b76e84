"""Runs the comparisons one after the other and writes the account of them."""

import argparse
import os
import tempfile
import time
from pathlib import Path

os.environ |= {"TQDM_DISABLE": "1", "TRANSFORMERS_VERBOSITY": "error", "HF_HUB_OFFLINE": "1"}
os.environ["LLM_COMPRESSOR_LOG_LEVEL"] = "ERROR"

import torch

from benchmarks import (
    account,
    answering,
    evaluating,
    machine,
    processors,
    quantizing,
    scoring,
    simulation,
)
from benchmarks.material import Material
from helpers.core.files import outputs_root
from helpers.runtime.devices import set_malloc_thresholds

COMPARISONS = {
    "scoring": scoring.compare,
    "answering": answering.compare,
    "simulation": simulation.compare,
    "evaluating": evaluating.compare,
    "quantizing": quantizing.compare,
    "growth": evaluating.growth,
    "processors": processors.compare,
}
ROUNDS = 2
QUICK_ITEMS = 10


def main() -> None:
    """Run the requested measurements; write outputs/bench, quick runs beside it."""
    parser = argparse.ArgumentParser(prog="make bench", description=__doc__)
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_ITEMS} items a set, to try")
    parser.add_argument("--only", nargs="+", choices=COMPARISONS, default=list(COMPARISONS))
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=f"of each comparison ({ROUNDS})")
    given = parser.parse_args()
    set_malloc_thresholds()
    torch.set_num_threads(given.threads)
    started, rows = time.monotonic(), []
    with tempfile.TemporaryDirectory() as scratch:
        most = QUICK_ITEMS if given.quick else 10**6
        material = Material(given.threads, most, given.rounds, Path(scratch))
        described = machine.describe(
            material.linear_shapes,
            rows=material.study.evaluation.batch.tokens,
            threads=given.threads,
        )
        for name in given.only:
            print(f"{name}:", flush=True)
            rows += COMPARISONS[name](material)
    whole = not given.quick and given.only == list(COMPARISONS)
    if not rows:
        return
    folder = outputs_root() / ("bench" if whole else "bench-try")
    account.write(folder, described, rows, took_s=time.monotonic() - started)
    print(f"written: {folder.name}/report.md")


if __name__ == "__main__":
    main()
