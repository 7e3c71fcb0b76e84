"""What a chat model is shown: system turn first, honest examples, room for the answer."""

import pytest

from helpers.evaluation.prompts import loglikelihood_prompt, option_tokens, render_prompt
from helpers.evaluation.scoring import is_abstention, last_boxed, score_text
from helpers.sources.chat import (
    EXAMPLES,
    PLAIN_EXAMPLES,
    SYSTEM,
    calibration_tokens,
    conversation,
    render,
    tokenize,
    training_tokens,
    user_turn,
)
from helpers.sources.items import ADAPTERS, Item, load_rows, normalized_text, parse_number
from helpers.study.loading import PLAIN_SHOTS
from helpers.study.schema import EvaluationSet, LogLikelihood, ShippedDataset

SHIPPED = ["arc", "boolq", "boolq_stated", "squad_v2", "openmath_eval", "openmath_train"]
ITEMS = {
    "openmath": Item("m", "How many legs have two cats?", ("8",), solution=r"2 * 4 = \boxed{8}."),
    "squad_v2": Item("s", "Who came?", ("Ann",), passage="Ann came."),
    "arc": Item("a", "Which burns?", ("2",), options=("iron", "wood"), labels=("1", "2")),
    "boolq": Item(
        "b",
        "did ann come",
        ("yes",),
        passage="Ann came.",
        options=("yes", "no"),
        labels=("yes", "no"),
    ),
}


@pytest.mark.parametrize("shots", [0, 1, 2])
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_the_system_turn_comes_first_and_the_question_last(adapter, shots):
    turns = conversation(ITEMS[adapter], adapter, shots=shots)
    roles = [turn["role"] for turn in turns]
    assert roles == ["system", *["user", "assistant"] * shots, "user"]
    assert turns[0]["content"] == SYSTEM[adapter]
    assert turns[-1]["content"] == user_turn(ITEMS[adapter], adapter)


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_more_examples_than_there_are_are_refused(adapter):
    with pytest.raises(ValueError, match=f"{adapter} has {len(EXAMPLES[adapter])} examples"):
        conversation(ITEMS[adapter], adapter, shots=len(EXAMPLES[adapter]) + 1)


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_the_user_is_told_everything_but_the_answer(adapter):
    item, message = ITEMS[adapter], user_turn(ITEMS[adapter], adapter)
    assert item.question in message
    assert item.passage in message
    assert adapter != "arc" or "1. iron\n2. wood" in message
    assert not item.solution or item.solution not in message


@pytest.mark.parametrize("name", SHIPPED)
def test_no_example_is_in_a_dataset(name):
    """Neither its question nor its passage."""
    known = set()
    for row in load_rows(ShippedDataset(shipped=name)):
        for key in ("question", "problem", "passage", "context"):
            known.add(normalized_text(row.get(key, "")))
    for examples in (*EXAMPLES.values(), *PLAIN_EXAMPLES.values()):
        for item, _ in examples:
            shown = {normalized_text(item.question), normalized_text(item.passage)} - {""}
            assert not shown & known


@pytest.mark.parametrize(
    ("adapter", "item", "answer"),
    [(a, item, text) for a, examples in EXAMPLES.items() for item, text in examples],
)
def test_an_example_is_answered_as_the_item_must_be(adapter, item, answer):
    """A box, once, with a content the scoring understands."""
    boxed = last_boxed(answer)
    assert boxed is not None
    assert answer.count(r"\boxed") == 1
    if adapter == "openmath":
        assert parse_number(boxed) is not None
    elif adapter == "squad_v2":
        assert is_abstention(boxed) or boxed in item.passage
    elif adapter == "arc":
        assert boxed in item.labels
    else:
        assert boxed in ("yes", "no")


@pytest.mark.parametrize(("item", "option"), PLAIN_EXAMPLES["boolq"])
def test_a_passage_of_a_plain_example_says_its_answer(item, option):
    """In the question's words, and with a negation where the answer is no."""
    words = set(normalized_text(item.passage).split())
    assert ("not" in words) == (option == "No")
    assert option in ("Yes", "No")
    assert len(words & set(normalized_text(item.question).split())) >= 3


def test_a_study_may_ask_for_as_many_plain_examples_as_there_are():
    assert {name: len(examples) for name, examples in PLAIN_EXAMPLES.items()} == PLAIN_SHOTS
    [most] = [m.le for m in LogLikelihood.model_fields["shots"].metadata if hasattr(m, "le")]
    assert most == max(PLAIN_SHOTS.values())


@pytest.mark.parametrize("adapter", ["arc", "boolq", "squad_v2"])
def test_examples_do_not_all_give_the_same_answer(adapter):
    answers = [last_boxed(text) for _, text in EXAMPLES[adapter]]
    assert len(set(answers)) == len(answers)


def test_examples_show_an_abstention_and_an_answer():
    abstentions = [is_abstention(last_boxed(text)) for _, text in EXAMPLES["squad_v2"][:2]]
    assert sorted(abstentions) == [False, True]


def test_the_abstention_the_system_turn_names_is_the_one_scored():
    item = Item("s", "Who left?", (), passage="Ann came.")
    assert "unanswerable" in SYSTEM["squad_v2"]
    scored = score_text(item, "squad_v2", r"\boxed{unanswerable}", answer="boxed", finish="stop")
    assert (scored["status"], scored["score"]) == ("abstained", 1.0)


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_a_prompt_ends_ready_for_the_answer(tokenizer, adapter):
    text = render(tokenizer, conversation(ITEMS[adapter], adapter, shots=1))
    assert text.startswith(f"<|im_start|>system\n{SYSTEM[adapter]}<|im_end|>")
    assert text.endswith("<|im_end|>\n<|im_start|>assistant\n")
    assert tokenizer.decode(tokenize(tokenizer, text)) == text


def test_training_answers_end_their_turn(tokenizer):
    item = ITEMS["openmath"]
    prompt_tokens, answered = training_tokens(tokenizer, item)
    assert tokenizer.decode(prompt_tokens) == render(
        tokenizer, conversation(item, "openmath", shots=0)
    )
    assert tokenizer.decode(answered) == item.solution + "<|im_end|>"


def test_an_item_without_a_solution_cannot_be_trained_on(tokenizer):
    with pytest.raises(ValueError, match="item s has no"):
        training_tokens(tokenizer, ITEMS["squad_v2"])


def test_training_calibration_and_generation_ask_alike(tokenizer):
    """One wording, so that a difference is the quantization's."""
    item = ITEMS["openmath"]
    ask = {
        "protocol": "generate",
        "answer": "boxed",
        "stop": "answer",
        "shots": 0,
        "max_new_tokens": 8,
    }
    settings = EvaluationSet(
        adapter="openmath", source={"shipped": "openmath_eval"}, items=1, ask=ask
    )
    generated = tokenize(tokenizer, render_prompt(item, settings, tokenizer).text)
    assert training_tokens(tokenizer, item)[0] == generated
    calibrated = calibration_tokens(tokenizer, item, "openmath")
    assert calibrated == generated + tokenize(tokenizer, item.solution)


@pytest.mark.parametrize("adapter", ["arc", "boolq"])
def test_option_tokens_spell_the_prompt_and_each_option(tokenizer, adapter):
    scored_prompt = loglikelihood_prompt(ITEMS[adapter], adapter)
    tokens = option_tokens(tokenizer, scored_prompt)
    assert tokenizer.decode(tokens.context) == scored_prompt.text
    assert [tokenizer.decode(option) for option in tokens.options] == list(
        scored_prompt.continuations
    )
    assert len(scored_prompt.continuations) == len(ITEMS[adapter].options)


def test_prompts_are_equal_by_hash_only_if_equal_in_text():
    scored_prompt = loglikelihood_prompt(ITEMS["arc"], "arc")
    turned = Item("a", "Which burns?", ("2",), options=("wood", "iron"), labels=("1", "2"))
    renamed = Item("z", "Which burns?", ("1",), options=("iron", "wood"), labels=("1", "2"))
    assert scored_prompt.hash != loglikelihood_prompt(turned, "arc").hash
    assert scored_prompt.hash == loglikelihood_prompt(renamed, "arc").hash
