"""Greedy answers are those of transformers' own `generate`, in any company."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.inference.protocols import GeneratedAnswer, generate_greedy
from helpers.runtime.devices import pad, token_budget_batches

CAP = 14


def prompts(seed: int = 1) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    lengths = [1, 9, 33, 4, 20, 9]
    return [torch.randint(3, 259, (n,), generator=generator).tolist() for n in lengths]


PROMPTS = prompts()


def answers(model, asked=PROMPTS, *, stop=frozenset(), cap=CAP, tokens=10**6, rows=64, **more):
    ends = {"max_new_tokens": cap, "stop_tokens": set(stop)}
    limits = {"batch_tokens": tokens, "batch_rows": rows}
    generated = dict(generate_greedy(model, asked, **ends, **limits, **more))
    assert sorted(generated) == list(range(len(asked)))
    return [generated[i] for i in range(len(asked))]


@torch.inference_mode()
def reference(model, prompt: list[int], *, stop, cap=CAP) -> GeneratedAnswer:
    """transformers' greedy search on the prompt alone."""
    made = model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        do_sample=False,
        max_new_tokens=cap,
        eos_token_id=sorted(stop) or None,
        pad_token_id=0,
    )[0, len(prompt) :].tolist()
    if made[-1] in stop:
        return GeneratedAnswer(made[:-1], "stop")
    return GeneratedAnswer(made, "length")


@pytest.fixture
def endless(exact_model):
    """A model whose own settings name no end of text."""
    exact_model.generation_config.eos_token_id = None
    return exact_model


@pytest.fixture
def stop(endless) -> set[int]:
    """Tokens the model does say: at the start of one answer, in the middle of another."""
    free = answers(endless)
    return {free[1].tokens[0], free[2].tokens[6]}


def test_answers_are_those_of_transformers(endless):
    assert answers(endless) == [reference(endless, p, stop=set()) for p in PROMPTS]


def test_answers_with_stop_tokens_are_those_of_transformers(endless, stop):
    generated = answers(endless, stop=stop)
    assert generated == [reference(endless, p, stop=stop) for p in PROMPTS]
    assert {answer.finish_reason for answer in generated} >= {"stop"}
    assert generated[1] == GeneratedAnswer([], "stop")


def test_different_prompts_get_different_answers(endless):
    """Or the parities above would hold for a model that says one thing."""
    assert len({tuple(answer.tokens) for answer in answers(endless)}) > 1


@pytest.mark.parametrize("tokens", [1, 40, 10**6])
@pytest.mark.parametrize("rows", [1, 2, 5, 64])
def test_company_changes_no_answer(endless, stop, tokens, rows):
    """One slot to one for each; answers leave at different steps and others take their place."""
    alone = [answers(endless, [prompt], stop=stop)[0] for prompt in PROMPTS]
    assert answers(endless, stop=stop, tokens=tokens, rows=rows) == alone


def test_shared_beginnings_change_no_answer(endless, stop):
    first, more = PROMPTS[2], PROMPTS[4]
    asked = [first + more * (i % 2) + prompt for i, prompt in enumerate(PROMPTS)]
    cuts = [(len(first), len(first) + len(more) * (i % 2)) for i in range(len(asked))]
    expected = answers(endless, asked, stop=stop)
    for rows in (1, 3, 64):
        assert answers(endless, asked, stop=stop, rows=rows, tokens=90, cuts=cuts) == expected


def test_an_answer_ends_when_it_is_complete(endless):
    free = answers(endless)
    end = free[3].tokens[4]
    generated = answers(endless, complete=lambda tokens: tokens[-1] == end)
    for answer, whole in zip(generated, free, strict=True):
        place = whole.tokens.index(end) + 1 if end in whole.tokens else CAP
        reason = "answer" if end in whole.tokens else "length"
        assert answer == GeneratedAnswer(whole.tokens[:place], reason)


def test_order_changes_no_answer(endless, stop):
    generated = answers(endless, PROMPTS[::-1], stop=stop)
    assert generated == answers(endless, stop=stop)[::-1]


def test_an_answer_ends_before_its_stop_token(endless, stop):
    for answer, free in zip(answers(endless, stop=stop), answers(endless), strict=True):
        assert not set(answer.tokens) & stop
        assert answer.tokens == free.tokens[: len(answer.tokens)]
        if answer.finish_reason == "stop":
            assert free.tokens[len(answer.tokens)] in stop


@pytest.mark.parametrize("cap", [1, 2, 7])
def test_the_cap_cuts_and_says_so(endless, cap):
    longest = answers(endless)
    for answer, free in zip(answers(endless, cap=cap), longest, strict=True):
        assert answer == GeneratedAnswer(free.tokens[:cap], "length")


def test_a_stop_token_just_past_the_cap_is_not_seen(endless):
    """`stop` means the model ended the turn, not that it might have."""
    free = answers(endless, PROMPTS[2:3])[0].tokens
    place = max(i for i, token in enumerate(free) if token not in free[:i])
    end = {free[place]}
    at = answers(endless, PROMPTS[2:3], stop=end, cap=place + 1)[0]
    before = answers(endless, PROMPTS[2:3], stop=end, cap=max(1, place))[0]
    assert at == GeneratedAnswer(free[:place], "stop")
    assert place == 0 or before == GeneratedAnswer(free[:place], "length")


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_a_broken_model_answers_nothing_and_says_why(model, broken):
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] = broken
    assert answers(model) == [GeneratedAnswer([], "nonfinite")] * len(PROMPTS)


def test_generating_leaves_the_model_as_it_was(model):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    answers(model)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_no_prompts_no_answers(model):
    assert answers(model, []) == []


@settings(derandomize=True, deadline=None, max_examples=100)
@given(st.lists(st.integers(1, 60), max_size=30), st.integers(1, 300))
def test_batches_hold_everything_once_within_the_budget(lengths, budget):
    batches = token_budget_batches(lengths, batch_tokens=budget)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    for batch in batches:
        padded = len(batch) * max(lengths[i] for i in batch)
        assert padded <= budget or len(batch) == 1


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_keeps_each_row_whole(side):
    rows = [[1, 2, 3], [4], [5, 6]]
    padded = pad(rows, value=9, side=side, device="cpu").tolist()
    for row, filled in zip(rows, padded, strict=True):
        blank = [9] * (3 - len(row))
        assert filled == (blank + row if side == "left" else row + blank)
