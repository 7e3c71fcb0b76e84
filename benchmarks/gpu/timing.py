"""Seconds of work on a device: median of replays of a captured graph, or of plain calls."""

import statistics
import time
from collections.abc import Callable, Sequence

import torch

WARM, REPLAYS = 2, 7
CALLS = 12  # at least so many in a graph
CPU_S = 0.02


def device_seconds(calls: Sequence[Callable], device: str) -> float:
    """Seconds of one call without the time to launch it.

    Args:
        calls: equal work on different operands, so that no cache holds them all.
    """
    if device != "cuda":
        return _wall(calls, CPU_S)
    repeats = -(-CALLS // len(calls))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM):
            for call in calls:
                call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(repeats):
            for call in calls:
                call()
    seconds = _between_events(graph.replay, REPLAYS)
    del graph
    return seconds / (repeats * len(calls))


def eager_seconds(calls: Sequence[Callable], device: str) -> float:
    """Seconds per call for consecutive eager launches."""
    if device != "cuda":
        return _wall(calls, CPU_S)
    repeats = -(-CALLS // len(calls))

    def loop() -> None:
        for _ in range(repeats):
            for call in calls:
                call()

    loop()
    torch.cuda.synchronize()
    return _between_events(loop, 3) / (repeats * len(calls))


def _between_events(work: Callable, times: int) -> float:
    work()
    found = []
    for _ in range(times):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        end.record()
        end.synchronize()
        found.append(start.elapsed_time(end) / 1000)
    return statistics.median(found)


def _wall(calls: Sequence[Callable], limit: float) -> float:
    calls[0]()
    found, began = [], time.perf_counter()
    while not found or time.perf_counter() - began < limit:
        started = time.perf_counter()
        calls[len(found) % len(calls)]()
        found.append(time.perf_counter() - started)
    return statistics.median(found)
