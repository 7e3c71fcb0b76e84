"""What a quantized model answers does not depend, to the bit, on what is read beside it.

A last bit is enough to tip a value over a rounding edge, and a few layers make another
answer of that (NOTES.md); so nothing less than equality is asked.
"""

import pytest
import torch

from helpers.evaluation.generation import generate_greedy
from helpers.evaluation.loglikelihood import OptionTokens, option_loglikelihoods
from helpers.quantization.int8 import load_int8

LENGTHS = [1, 9, 33, 4, 20, 9, 57, 12]
LIMITS = [(1, 1), (40, 3), (90, 64), (10**6, 64)]


def tokens(seed: int, length: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 259, (length,), generator=generator).tolist()


FIRST = tokens(99, 21)
PROMPTS = [FIRST + tokens(i, n) for i, n in enumerate(LENGTHS)]


@pytest.fixture(scope="module", params=["rtn_w8a8", "o1", "o2", "o3"])
def int8_model(request, sound_runs):
    torch.set_num_threads(2)
    run = sound_runs("qwen3", request.param)
    with run.outputs():
        folder = run.job.paths.checkpoint(run.job.model, run.job.variant)
        yield load_int8(folder, dtype=torch.float32, device="cpu")
    torch.set_num_threads(1)


def generated(model, prompts, limits, cuts) -> list:
    limits = dict(zip(("batch_tokens", "batch_rows"), limits, strict=True))
    ends = {"max_new_tokens": 12, "stop_tokens": set()}
    found = dict(generate_greedy(model, prompts, cuts=cuts, **ends, **limits))
    return [found[i] for i in range(len(prompts))]


def whole(model) -> bool:
    """One scale a tensor: a text is then read in one piece."""
    return model.scale_scope != "token"


@pytest.mark.parametrize("limits", LIMITS[1:])
def test_generation(int8_model, limits):
    cuts = [() if whole(int8_model) else (len(FIRST),)] * len(PROMPTS)
    alone = [generated(int8_model, [p], (10**6, 16), cuts[:1])[0] for p in PROMPTS]
    assert generated(int8_model, PROMPTS, limits, cuts) == alone


@pytest.mark.parametrize("limits", LIMITS)
def test_log_likelihood(int8_model, limits):
    cut = () if whole(int8_model) else (len(FIRST),)
    items = [
        OptionTokens(p, [tokens(70 + i, 1 + i % 4), tokens(80 + i, 3)], cut)
        for i, p in enumerate(PROMPTS)
    ]
    alone = [
        next(iter(option_loglikelihoods(int8_model, [item], batch_tokens=1)))[1] for item in items
    ]
    order = [3, 0, 7, 5, 2, 6, 4, 1]
    turned = [items[i] for i in order]
    found = dict(option_loglikelihoods(int8_model, turned, batch_tokens=limits[0]))
    assert [found[order.index(i)] for i in range(len(items))] == alone
