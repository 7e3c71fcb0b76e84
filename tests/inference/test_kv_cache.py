"""Keys and values in int8: the arithmetic, transformers with such a cache, and any company."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache

from helpers.core.errors import StudyError
from helpers.inference.packed_attention import int8_rounded
from helpers.inference.protocols import (
    OptionTokens,
    generate_greedy,
    keep_keys_and_values,
    option_loglikelihoods,
    prove_engine,
    read_alone,
)
from helpers.study.loading import load_study

LENGTHS = [1, 9, 33, 4, 20, 9]


def tokens(seed: int, length: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 259, (length,), generator=generator).tolist()


BEGINNING = tokens(99, 11)
PROMPTS = [BEGINNING + tokens(i, n) for i, n in enumerate(LENGTHS)]


def rounded_by_numpy(states: np.ndarray) -> np.ndarray:
    top = np.abs(states).max(-1, keepdims=True)
    step = np.where(top == 0, 1.0, top / 127)
    return np.rint(states / step) * step


class RoundedCache(DynamicCache):
    """transformers' own cache, which gives back what int8 would hold."""

    def update(self, key_states, value_states, *args, **options):
        rounded = (
            torch.from_numpy(rounded_by_numpy(states.numpy()))
            for states in (key_states, value_states)
        )
        return super().update(*rounded, *args, **options)


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 10**6), st.sampled_from([1e-6, 1.0, 300.0]))
def test_a_token_s_head_is_rounded_by_itself_to_within_half_a_step(seed, size):
    generator = torch.Generator().manual_seed(seed)
    states = size * torch.randn(1, 3, 5, 8, generator=generator, dtype=torch.float64)
    states[0, 1, 2] = 0
    kept = int8_rounded(states)
    np.testing.assert_allclose(kept.numpy(), rounded_by_numpy(states.numpy()), rtol=1e-12)
    step = states.abs().amax(-1, keepdim=True) / 127
    assert bool(((kept - states).abs() <= step / 2 * (1 + 1e-9)).all())
    assert len(torch.unique((kept[0, 0, 0] / step[0, 0, 0]).round())) <= 255
    assert torch.equal(int8_rounded(states[:, 1:2, 1:2]), kept[:, 1:2, 1:2])


@pytest.fixture
def endless(exact_model):
    """A float64 model without an end of text, its keys and values in int8."""
    exact_model.generation_config.eos_token_id = None
    prove_engine(exact_model)
    keep_keys_and_values(exact_model, "int8", at="variants.kv8")
    return exact_model


def generated(model, prompts, tokens=10**6, rows=64, cuts=None) -> list:
    limits = {"max_new_tokens": 12, "stop_tokens": set(), "batch_tokens": tokens}
    found = dict(generate_greedy(model, prompts, batch_rows=rows, cuts=cuts, **limits))
    return [found[i] for i in range(len(prompts))]


@torch.inference_mode()
def test_answers_are_those_of_transformers_with_such_a_cache(endless):
    ours = [answer.tokens for answer in generated(endless, PROMPTS)]
    plain = []
    for prompt, answer in zip(PROMPTS, ours, strict=True):
        ids = torch.tensor([prompt])
        options = {"attention_mask": torch.ones_like(ids), "do_sample": False}
        options |= {"pad_token_id": 0, "max_new_tokens": 12}
        written = endless.generate(ids, past_key_values=RoundedCache(), **options)
        assert written[0, len(prompt) :].tolist() == answer
        unrounded = endless.generate(ids, **options)
        plain.append(unrounded[0, len(prompt) :].tolist())
    keep_keys_and_values(endless, None, at="variants.noquant")
    assert [answer.tokens for answer in generated(endless, PROMPTS)] == plain


@torch.inference_mode()
def test_log_likelihoods_are_those_of_transformers_with_such_a_cache(endless):
    options = [tokens(7, 3), tokens(8, 5)]
    item = OptionTokens(PROMPTS[2], options)
    [(_, ours)] = option_loglikelihoods(endless, [item], batch_tokens=1024)
    for option, sum_of_ours in zip(options, ours, strict=True):
        ids = torch.tensor([PROMPTS[2] + option])
        logits = endless(ids, past_key_values=RoundedCache(), use_cache=True).logits[0]
        places = range(len(PROMPTS[2]) - 1, ids.shape[1] - 1)
        logprobs = logits.log_softmax(-1)
        theirs = sum(logprobs[p, t].item() for p, t in zip(places, option, strict=True))
        unrounded = endless(ids).logits[0].log_softmax(-1)
        float_sum = sum(unrounded[p, t].item() for p, t in zip(places, option, strict=True))
        assert float(sum_of_ours) == pytest.approx(theirs, abs=1e-5)
        assert abs(theirs - float_sum) > 1e-4  # the cache shows


@pytest.mark.parametrize(("limit", "rows"), [(40, 3), (90, 64)])
def test_company_changes_no_answer(model, limit, rows):
    prove_engine(model)
    keep_keys_and_values(model, "int8", at="variants.kv8")
    cuts = [(len(BEGINNING),)] * len(PROMPTS)
    alone = [generated(model, [p], cuts=cuts[:1])[0] for p in PROMPTS]
    assert generated(model, PROMPTS, limit, rows, cuts) == alone


def test_a_model_that_reads_in_its_own_way_is_refused(model):
    prove_engine(model)
    keep_keys_and_values(model, None, at="variants.noquant")
    model.packing_problem = "states differ"
    with pytest.raises(StudyError, match=r"variants\.kv8\.kv: the model is read by its own"):
        keep_keys_and_values(model, "int8", at="variants.kv8")
    model.kv_cache = "int8"
    with pytest.raises(StudyError, match="no int8 cache is simulated"):
        read_alone(model, 5)


@pytest.mark.parametrize(
    ("recipe", "runtime", "problem"),
    [
        ({"kv": "int4"}, {}, "kv = 'int4' is not"),
        ({"kv": "int8", "dtype": "bfloat16"}, {}, "belongs to a variant that changes no weights"),
        (
            {"kv": "int8", "recipe": "seed", "smooth": {"alpha": 0.5, "targets": ["mlp_input"]}},
            {},
            "kv = 'int8' is no part of recipe = 'seed'",
        ),
        ({"kv": "int8"}, {"quantized": "vllm"}, "is simulated by this project's engine alone"),
        ({"kv": "int8"}, {"dtype": "bfloat16"}, "kv = 'int8' can be checked in float32 alone"),
        ({"kv": "int8"}, {"dtype": "auto"}, "kv = 'int8' can be checked in float32 alone"),
    ],
)
def test_what_has_no_such_cache_is_refused_in_one_line(
    recipe, runtime, problem, study_settings, write_study
):
    study_settings["variants"]["kv8"] = recipe
    study_settings["runtime"] |= runtime
    with pytest.raises(StudyError) as refused:
        load_study(write_study(study_settings))
    assert any(problem in line for line in str(refused.value).splitlines())
