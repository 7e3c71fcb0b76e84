"""Speed of the Linears of one job on this machine, measured in about two seconds.

    python -m helpers.cost.linear_speed demo '[[576, 1536], [1536, 576]]'

prints operations per second of the very Linears a study's jobs call, reading and writing, in
each arithmetic; numbers per second that a pass over memory rounds; and the processor seconds
that importing took what every job imports. As many such processes run side by side as jobs
will, since these share caches, memory and power. The fastest call counts, and processor time,
since other work comes and goes.
"""

import json
import sys
import time

import torch
import transformers.models.llama.modeling_llama  # noqa: F401 - as a job does
from torch import Tensor, nn

from helpers.cost.operations import READING, TOUCHED, WRITING
from helpers.quantization.int8_linear import Int8Linear
from helpers.runtime.devices import resolve_runtime
from helpers.runtime.linears import use_onednn
from helpers.study.loading import load_study

SECONDS = 2.0  # total time of all measurements
ROWS = {READING: 256, WRITING: 32}
PASSED = 2**22  # numbers rounded in one pass
MOST_OPERATIONS = 2e9  # of all measured Linears together, which bounds the time on slow machines


def measure_speeds(shapes: list[tuple[int, int]], *, device: str) -> dict[str, float]:
    """Operations (or numbers touched) per second by kind of work.

    A kind that the device does not have is left out.

    Args:
        shapes: (in_features, out_features) of Linears; the smallest ones are measured.
    """
    measured_shapes = _affordable(shapes or [(1024, 1024)])
    kinds = [(a, kind) for a in ("float32", "bfloat16", "int8") for kind in ROWS]
    seconds_each = SECONDS / (len(kinds) + 1)
    values = torch.rand(PASSED)
    speeds = {TOUCHED: PASSED / _seconds(lambda: values.div(0.01).round_(), seconds_each, "cpu")}
    for arithmetic, kind in kinds:
        try:
            speeds[f"{arithmetic} {kind}"] = _speed(
                measured_shapes, arithmetic, ROWS[kind], device, seconds_each
            )
        except (
            NotImplementedError,
            RuntimeError,
        ):  # the product is not available, or out of memory
            continue
    return speeds


def _affordable(shapes: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """The smallest shapes whose operations together stay below MOST_OPERATIONS; at least one."""
    chosen, weights = [], 0
    for inner, outer in sorted(shapes, key=lambda s: s[0] * s[1]):
        weights += inner * outer
        if not chosen or 2 * ROWS[READING] * weights <= MOST_OPERATIONS:
            chosen.append((inner, outer))
    return chosen


@torch.inference_mode()
def _speed(shapes: list, arithmetic: str, rows: int, device: str, seconds: float) -> float:
    linears = [_linear(*shape, arithmetic).to(device) for shape in shapes]
    dtype = torch.float32 if arithmetic == "int8" else getattr(torch, arithmetic)
    inputs = [torch.rand(rows, shape[0], device=device).to(dtype) for shape in shapes]

    def call() -> None:
        for linear, x in zip(linears, inputs, strict=True):
            linear(
                x.view_as(x)
            )  # a new tensor object, since quantized inputs are cached on the tensor

    operations = 2 * rows * sum(i * o for i, o in shapes)
    return operations / _seconds(call, seconds, device)


def _linear(inner: int, outer: int, arithmetic: str) -> nn.Module:
    if arithmetic == "int8":
        weight = torch.randint(-127, 128, (outer, inner), dtype=torch.int8)
        scale = torch.ones(outer, 1)
        return Int8Linear(weight, scale, None, activations="token_dynamic", input_scale=None)
    linear = nn.Linear(inner, outer, bias=False).to(getattr(torch, arithmetic))
    return use_onednn(linear)


def _seconds(call, limit: float, device: str) -> float:
    """Seconds of the fastest of as many calls as fit the limit, after one warm-up call."""
    call()
    _settle(device)
    start = now = time.perf_counter()
    shortest = float("inf")
    while now - start < limit or shortest == float("inf"):
        before = now
        call()
        _settle(device)
        now = time.perf_counter()
        shortest = min(shortest, now - before)
    return shortest


def _settle(device: str) -> Tensor | None:
    return None if device == "cpu" else getattr(torch, device).synchronize()


def main(study: str, shapes: str) -> None:
    """Print the measured speeds as JSON."""
    imported = time.process_time()
    runtime = resolve_runtime(load_study(study).runtime)
    torch.set_num_threads(runtime.threads)
    speeds = measure_speeds([tuple(shape) for shape in json.loads(shapes)], device=runtime.device)
    print(json.dumps({"speeds": speeds, "import_s": imported}))


if __name__ == "__main__":
    main(*sys.argv[1:])
