"""The prompts of params/qwen3-0.6b.yaml are what Qwen3's own template and tokenizer make of them.

tests/support/qwen3/prompts.json names the package with Qwen3's files and holds, for a few items of
this project, the text by its chat template (rendered by plain jinja2) and the ids by its own
tokenizer (in JavaScript). The tokenizer beside it is the part of Qwen3's that these texts use; the
template is the tests' stand-in, which has to write what Qwen3's does.
"""

import json
from functools import cache
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from helpers.evaluation.prompts import answer_tokens, tokenize_prompts
from helpers.sources.chat import (
    answer_lead,
    beginning_tokens,
    calibration_tokens,
    configure_chat_template_,
    end_of_turn,
    training_tokens,
)
from helpers.sources.sampling import load_items
from helpers.study.loading import load_study
from helpers.study.schema import ShippedDataset
from hub_repositories import QWEN3_TEMPLATE

FOLDER = Path(__file__).parents[1] / "support" / "qwen3"
FACTS = json.loads((FOLDER / "prompts.json").read_text("utf-8"))
SHIPPED = {"arc": "arc", "squad_v2": "squad_v2", "openmath": "openmath_eval", "boolq": "boolq"}
IM_START, IM_END, THINK, END_THINK, EMPTY_LINE = 151644, 151645, 151667, 151668, 271


@pytest.fixture(scope="module")
def settings():
    return load_study("qwen3-0.6b", with_sources=False)


@cache
def qwen3(enable_thinking: bool):
    tokenizer = AutoTokenizer.from_pretrained(FOLDER, local_files_only=True)
    tokenizer.chat_template = QWEN3_TEMPLATE
    configure_chat_template_(tokenizer, enable_thinking=enable_thinking, place="x")
    return tokenizer


@cache
def items(name: str, adapter: str) -> dict:
    return {item.id: item for item in load_items(ShippedDataset(shipped=name), adapter=adapter)}


def asked(fact: dict, settings):
    """(the prompt as the study makes it, its tokenizer, its evaluation set)."""
    name = fact["set"]
    evaluation_set, tokenizer = settings.evaluation.datasets[name], qwen3(fact["enable_thinking"])
    item = items(SHIPPED[name], evaluation_set.adapter)[fact["item"]]
    (prompt,) = tokenize_prompts([item], evaluation_set, tokenizer)
    return prompt, tokenizer, evaluation_set


PROMPTS = [
    pytest.param(fact | {"enable_thinking": thinking}, id=f"{fact['set']}-thinking-{thinking}")
    for fact in FACTS["prompts"]
    for thinking in (
        [False, True] if fact["enable_thinking"] is None else [fact["enable_thinking"]]
    )
]
WRITTEN = [param for param in PROMPTS if "gold" in param.values[0]]


@pytest.mark.parametrize("fact", PROMPTS)
def test_texts_and_ids_are_those_of_qwen3s_own_files(fact, settings):
    prompt, _, _ = asked(fact, settings)
    assert prompt.prompt.text == fact["text"]
    assert list(prompt.tokens.context) == fact["ids"]
    assert [list(option) for option in getattr(prompt.tokens, "options", ())] == fact["options"]


@pytest.mark.parametrize("fact", WRITTEN)
def test_gold_answers_stand_where_qwen3s_template_puts_an_answer(fact, settings):
    """Thinking or not: behind an empty thinking block, as a finished answer has."""
    prompt, tokenizer, evaluation_set = asked(fact, settings)
    answers = [rf"\boxed{{{fact['gold']}}}"]
    (gold,) = answer_tokens(tokenizer, prompt, answers, evaluation_set.ask).answers
    whole = list(prompt.tokens.context) + gold
    assert whole == fact["answered_ids"][: len(whole)]
    assert fact["answered_ids"][len(whole)] == IM_END


def test_the_study_has_the_prompts_checked_here(settings):
    """It asks without thinking; all four sets and both ways to ask are among the facts."""
    assert settings.enable_thinking is False
    assert {fact["set"] for fact in FACTS["prompts"]} == set(settings.evaluation.datasets)
    assert {settings.evaluation.datasets[f["set"]].ask.protocol for f in FACTS["prompts"]} == {
        "generate",
        "loglikelihood",
    }


def test_training_and_calibration_texts_are_an_answered_turn_of_qwen3s():
    fact = FACTS["training"]
    tokenizer = qwen3(fact["enable_thinking"])
    item = items("openmath_train", "openmath")[fact["item"]]
    prompt, answer = training_tokens(tokenizer, item)
    newline = fact["ids"][-1:]
    assert prompt + answer + newline == fact["ids"]
    assert [*calibration_tokens(tokenizer, item, "openmath"), IM_END, *newline] == fact["ids"]


def test_special_tokens_are_single_ids():
    """<|im_end|> ends a turn, nothing stands before a text, and off means an empty block."""
    for thinking, block in ((False, [THINK, EMPTY_LINE, END_THINK, EMPTY_LINE]), (True, [])):
        tokenizer = qwen3(thinking)
        assert end_of_turn(tokenizer) == IM_END
        assert beginning_tokens(tokenizer) == []
        assert answer_lead(tokenizer) == ("" if block else "<think>\n\n</think>\n\n")
        for fact in FACTS["prompts"]:
            if fact["enable_thinking"] is thinking:
                assert fact["ids"][0] == IM_START
                assert fact["ids"][len(fact["ids"]) - len(block) :] == block
                assert fact["ids"].count(THINK) == bool(block)
