"""Every family is evaluated as transformers itself would: windows, positions, experts and all.

The tiny models look back 24 tokens where their family has windows, and the texts here are
longer than that.
"""

import pytest
import torch

from helpers.inference.perplexity import passage_rows, read_passages
from helpers.inference.protocols import OptionTokens, generate_greedy, option_loglikelihoods
from helpers.quantization.variants import load_int8
from helpers.sources.models import FAMILIES, WINDOW, random_model
from quantized_run import lived_in

LENGTHS = (3, 31, 57, 40, 9)
NEW_TOKENS = 12


def tokens(seed: int, length: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 259, (length,), generator=generator).tolist()


PROMPTS = [tokens(i, n) for i, n in enumerate(LENGTHS)]
ITEMS = [OptionTokens(p, [tokens(50 + i, 1 + i), tokens(60, 4)]) for i, p in enumerate(PROMPTS)]


@pytest.fixture(params=sorted(FAMILIES))
def family(request) -> str:
    return request.param


@pytest.fixture
def exact(family):
    """In float64, so that nearly equal logits do not decide."""
    torch.set_num_threads(1)
    model = lived_in(random_model(family, seed=9)).double()
    model.generation_config.eos_token_id = None
    return model


def log_likelihoods(model, items, batch_tokens: int):
    found = dict(option_loglikelihoods(model, items, batch_tokens=batch_tokens))
    return [found[i] for i in range(len(items))]


def answers(model, prompts, *, rows: int):
    limits = {"batch_tokens": 64, "batch_rows": rows}
    made = generate_greedy(model, prompts, max_new_tokens=NEW_TOKENS, stop_tokens=set(), **limits)
    found = dict(made)
    return [found[i].tokens for i in range(len(prompts))]


@torch.inference_mode()
def plain_logprob(model, context: list[int], option: list[int]) -> float:
    """One whole forward pass for one option."""
    logprobs = model(torch.tensor([context + option])).logits[0].log_softmax(-1)
    at = len(context) - 1
    return sum(logprobs[at + i, token].item() for i, token in enumerate(option))


def test_log_likelihoods_are_those_of_plain_passes(exact):
    found = log_likelihoods(exact, ITEMS, batch_tokens=128)
    for item, sums in zip(ITEMS, found, strict=True):
        expected = [plain_logprob(exact, item.context, option) for option in item.options]
        assert sums == pytest.approx(expected, abs=1e-3)


@torch.inference_mode()
def test_answers_are_those_of_generate(exact):
    expected = [
        exact.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            pad_token_id=0,
        )[0, len(prompt) :].tolist()
        for prompt in PROMPTS
    ]
    assert answers(exact, PROMPTS, rows=3) == expected
    assert len({tuple(answer) for answer in expected}) > 1


@torch.inference_mode()
def test_shared_text_is_read_as_by_a_plain_pass(exact):
    states = read_passages(exact, PROMPTS, batch_tokens=128)
    rows = passage_rows(["a", "b", "c", "d", "e"], PROMPTS, states, None)
    for passage, row in zip(PROMPTS, rows, strict=True):
        expected = -plain_logprob(exact, passage[:1], passage[1:])
        assert row["nll"] == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("family", ["mistral", "gemma3_text", "phi3"])
def test_the_window_matters(family):
    """Or the parities above would hold for an engine that knows no windows."""
    near = lived_in(random_model(family, seed=9))
    far = lived_in(random_model(family, seed=9, sliding_window=1000))
    long, short = tokens(1, WINDOW + 20), tokens(1, WINDOW - 4)
    assert plain_logprob(near, short, [7]) == pytest.approx(plain_logprob(far, short, [7]))
    assert plain_logprob(near, long, [7]) != pytest.approx(plain_logprob(far, long, [7]), abs=1e-3)


@pytest.mark.parametrize("variant", ["w8a8_down", "o2"])
@pytest.mark.parametrize("family", ["qwen3_moe", "gemma3_text", "opt"])
def test_int8_answers_do_not_depend_on_company(sound_runs, family, variant):
    """To the bit: few tokens of many may reach an expert, and windows end where they do."""
    torch.set_num_threads(1)
    model = load_int8(sound_runs(family, variant).checkpoint, dtype=torch.float32, device="cpu")
    alone = [log_likelihoods(model, [item], batch_tokens=1)[0] for item in ITEMS]
    assert log_likelihoods(model, ITEMS, batch_tokens=10**4) == alone
    assert answers(model, PROMPTS, rows=16) == [answers(model, [p], rows=16)[0] for p in PROMPTS]
