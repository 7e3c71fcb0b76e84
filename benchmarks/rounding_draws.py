"""How far apart two draws of a quantized model's rounding noise lie.

A last bit tips a value over a rounding edge, and after a few layers every rounding is
drawn anew (NOTES.md). Here a model reads the same texts again and again, its input
embeddings off by a millionth in other channels each time. Another engine that computes
the same is one draw more, so its KL has to lie where one more draw would.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from scipy.stats import t as student_t

from helpers.quantization import int8_linear

MILLIONTH = 1e-6  # a few roundings of float32
VLLM_HALF_RANGE = 127.0  # of the 255 levels that its dynamic step makes of an abs-max


@contextmanager
def off_by_a_millionth(model, *, seed: int) -> Iterator[None]:
    """Inside, every channel of the model's input embeddings is perturbed, up or down at random."""
    embeddings = model.get_input_embeddings()
    generator = torch.Generator().manual_seed(seed)
    signs = torch.randint(0, 2, (embeddings.embedding_dim,), generator=generator) * 2 - 1
    factor = 1 + MILLIONTH * signs
    handle = embeddings.register_forward_hook(lambda _module, _args, out: out * factor.to(out))
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def vllms_step() -> Iterator[None]:
    """Inside, dynamic scales are abs-max / 127 as in vLLM; static ones come from the file."""
    ours = int8_linear.HALF_RANGE, int8_linear.uses_fused_passes
    int8_linear.HALF_RANGE = VLLM_HALF_RANGE
    int8_linear.uses_fused_passes = lambda _x: False  # the compiled passes know our step only
    try:
        yield
    finally:
        int8_linear.HALF_RANGE, int8_linear.uses_fused_passes = ours


def prediction_interval(draws: Sequence[float], *, confidence: float) -> tuple[float, float]:
    """Interval for one more draw, by Student's t on logarithms.

    Args:
        draws: two positive figures at least, of equal standing.
        confidence: with which the next one lies within.
    """
    logs = np.log(draws)
    size = len(logs)
    reach = student_t.ppf((1 + confidence) / 2, size - 1) * logs.std(ddof=1) * (1 + 1 / size) ** 0.5
    return float(np.exp(logs.mean() - reach)), float(np.exp(logs.mean() + reach))
