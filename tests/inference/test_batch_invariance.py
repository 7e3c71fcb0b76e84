"""What a model answers does not depend, to the bit, on what is read beside it.

A last bit is enough to tip a value over a rounding edge, and a few layers make another
answer of that (NOTES.md); so nothing less than equality is asked.
"""

import pytest
import torch

from helpers.inference.packed_attention import KVCache, Segment
from helpers.inference.protocols import OptionTokens, generate_greedy, option_loglikelihoods
from helpers.quantization.variants import load_int8
from helpers.runtime.devices import FEWEST_ROWS
from helpers.sources.models import load_model

FLOAT = "float32"
LENGTHS = [1, 9, 33, 4, 20, 9, 57, 12]
LIMITS = [(1, 1), (40, 3), (90, 64), (10**6, 64)]


def tokens(seed: int, length: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 259, (length,), generator=generator).tolist()


FIRST = tokens(99, 21)
PROMPTS = [FIRST + tokens(i, n) for i, n in enumerate(LENGTHS)]


@pytest.fixture(scope="module", params=[FLOAT, "rtn_w8a8", "o1", "o2", "o3"])
def model(request, sound_runs):
    torch.set_num_threads(2)
    run = sound_runs("qwen3", "o1" if request.param == FLOAT else request.param)
    with run.outputs():
        folder = run.job.paths.checkpoint(run.job.model, run.job.variant)
        if request.param == FLOAT:
            yield load_model(run.root / "source", run.job.study.runtime)
        else:
            yield load_int8(folder, dtype=torch.float32, device="cpu")
    torch.set_num_threads(1)


def generated(model, prompts, limits, cuts) -> list:
    limits = dict(zip(("batch_tokens", "batch_rows"), limits, strict=True))
    ends = {"max_new_tokens": 12, "stop_tokens": set()}
    generated = dict(generate_greedy(model, prompts, cuts=cuts, **ends, **limits))
    return [generated[i] for i in range(len(prompts))]


def whole(model) -> bool:
    """One scale a tensor: a text is then read in one piece."""
    return getattr(model, "scale_scope", "token") != "token"


@pytest.mark.parametrize("limits", LIMITS[1:])
def test_generation(model, limits):
    cuts = [() if whole(model) else (len(FIRST),)] * len(PROMPTS)
    alone = [generated(model, [p], (10**6, 16), cuts[:1])[0] for p in PROMPTS]
    assert generated(model, PROMPTS, limits, cuts) == alone


OPTIONS = [[tokens(50 + i, 5), tokens(70 + i, 1), tokens(90 + i, n)] for i, n in enumerate(LENGTHS)]


@pytest.mark.parametrize(
    "limits", [LIMITS[1], *(pytest.param(x, marks=pytest.mark.long) for x in LIMITS[2:])]
)
def test_what_is_read_after_a_prompt(model, limits):
    """Alike alone and in company; what is written is what it was without."""
    if whole(model):
        pytest.skip("read apart from what is written, as options are")
    limits = dict(zip(("batch_tokens", "batch_rows"), limits, strict=True))
    ends = {"max_new_tokens": 12, "stop_tokens": set()}
    cuts = [(len(FIRST),)] * len(PROMPTS)
    found = dict(generate_greedy(model, PROMPTS, cuts=cuts, options=OPTIONS, **ends, **limits))
    for i, p in enumerate(PROMPTS):
        one = {"batch_tokens": 10**6, "batch_rows": 16, "cuts": cuts[:1], **ends}
        [(_, alone)] = generate_greedy(model, [p], options=[OPTIONS[i]], **one)
        [(_, without)] = generate_greedy(model, [p], **one)
        assert found[i] == alone
        assert (alone.tokens, len(alone.loglikelihoods)) == (without.tokens, len(OPTIONS[i]))


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("own", [9, 300, 571, 790])
@pytest.mark.parametrize("beside", [0, 16, 100, 700])
@pytest.mark.parametrize("dim", [16, 64])
def test_a_slot_beside_longer_ones(threads, own, beside, dim):
    """The newest token of one answer, its slot as wide as the longest answer beside it."""

    def mixed(lengths: list[int]):
        slots = KVCache(FEWEST_ROWS, max(lengths) + 1, (drawn(99, 5),))
        for slot, length in enumerate(lengths):
            slots.fill(slot, [drawn(slot, length)])
        slots.step(len(lengths), FEWEST_ROWS - len(lengths), "cpu")
        query, key, value = newest
        return slots.attend(0, query, key, value, scaling=dim**-0.5, window=None)[:, :, 0]

    def drawn(seed: int, length: int) -> Segment:
        generator = torch.Generator().manual_seed(seed)
        memory = torch.randn(2, 1, 2, length, dim, generator=generator)
        return Segment([0] * length, memory={0: tuple(memory)})

    generator = torch.Generator().manual_seed(7)
    newest = [torch.randn(1, n, FEWEST_ROWS, dim, generator=generator) for n in (4, 2, 2)]
    torch.set_num_threads(threads)
    result = mixed([own, own + beside, 5])
    torch.set_num_threads(1)
    assert torch.equal(result, mixed([own]))


@pytest.mark.parametrize("shared", [1, 5, 37, 131, 301])
@pytest.mark.parametrize("shape", [(1, 1, 16), (4, 4, 16), (4, 2, 32), (9, 3, 64)])
def test_what_all_answers_share_among_few_and_many(shared, shape):
    """The newest token of the first slots, by how many slots read the same beginning."""
    heads, groups, dim = shape

    def drawn(seed: int, length: int) -> Segment:
        generator = torch.Generator().manual_seed(seed)
        memory = torch.randn(2, 1, groups, length, dim, generator=generator)
        return Segment([0] * length, memory={0: tuple(memory)})

    def mixed(rows: int):
        slots = KVCache(64, 20, (drawn(99, shared),))
        for slot in range(rows):
            slots.fill(slot, [drawn(slot, 9)])
        slots.step(rows, 0, "cpu")
        query, key, value = (x[:, :, :rows] for x in newest)
        attended = slots.attend(0, query, key, value, scaling=dim**-0.5, window=None)
        return attended[:, :, :FEWEST_ROWS]

    generator = torch.Generator().manual_seed(7)
    newest = [torch.randn(1, n, 64, dim, generator=generator) for n in (heads, groups, groups)]
    many = mixed(64)
    for rows in (16, 17, 24, 40):
        assert torch.equal(mixed(rows), many), rows


@pytest.mark.parametrize("limits", LIMITS)
def test_log_likelihood(model, limits):
    cut = () if whole(model) else (len(FIRST),)
    items = [
        OptionTokens(p, [tokens(70 + i, 1 + i % 4), tokens(80 + i, 3)], cut)
        for i, p in enumerate(PROMPTS)
    ]
    alone = [next(iter(option_loglikelihoods(model, [item], batch_tokens=1)))[1] for item in items]
    order = [3, 0, 7, 5, 2, 6, 4, 1]
    turned = [items[i] for i in order]
    scores = dict(option_loglikelihoods(model, turned, batch_tokens=limits[0]))
    assert [scores[order.index(i)] for i in range(len(items))] == alone
