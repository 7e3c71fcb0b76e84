"""A chat template that leaves out, misplaces or ignores something is caught; thinking is said."""

import datetime

import pytest
from transformers.utils import chat_template_utils

from helpers.core.errors import StudyError
from helpers.evaluation.prompts import render_prompt
from helpers.sources import chat
from helpers.sources.chat import (
    calibration_tokens,
    configure_chat_template_,
    conversation,
    end_of_turn,
    knows_switch,
    render,
    tokenize,
    training_tokens,
)
from helpers.sources.items import Item
from helpers.sources.models import CHAT_TEMPLATE, byte_tokenizer
from helpers.sources.sampling import evaluation_items
from hub_repositories import qwen3_tokenizer

NO_THOUGHT = "<think>\n\n</think>\n\n"
ITEM = Item("m", "How many legs have two cats?", ("8",), solution=r"2 * 4 = \boxed{8}.")
TURN = "{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}"
ROOM = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
EACH = "{% for m in messages %}"


@pytest.fixture
def qwen3():
    return qwen3_tokenizer()


def with_template(template: str):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def refusal(tokenizer, enable_thinking=None) -> str:
    with pytest.raises(StudyError) as caught:
        configure_chat_template_(tokenizer, enable_thinking=enable_thinking, place="the-model")
    message = str(caught.value)
    assert len(message.splitlines()) == 1, message
    assert message.startswith("the-model: ")
    assert "; " in message
    return message


SYSTEM_LAST = (
    EACH + "{% if m['role'] != 'system' %}" + TURN + "{% endif %}{% endfor %}"
    "{{ messages[0]['content'] }}" + ROOM
)
SYSTEM_GONE = EACH + "{% if m['role'] != 'system' %}" + TURN + "{% endif %}{% endfor %}" + ROOM
SYSTEM_WITH_LAST = (
    EACH
    + "{% if m['role'] == 'user' and loop.last %}{{ messages[0]['content'] + '\\n' }}{% endif %}"
    "{% if m['role'] != 'system' %}" + TURN + "{% endif %}{% endfor %}" + ROOM
)
TWICE = "{{ messages[0]['content'] }}" + CHAT_TEMPLATE
REFUSES = "{{ raise_exception('no system turns here') }}" + CHAT_TEMPLATE
NO_ROOM = EACH + TURN + "{% endfor %}"
WRONG = [
    (SYSTEM_LAST, "renders the turns as user, assistant, user, system"),
    (SYSTEM_WITH_LAST, "renders the turns as user, assistant, system, user"),
    (TWICE, "renders the system turn 2 times"),
    (REFUSES, "refuses a conversation with a system turn (no system turns here)"),
    (NO_ROOM, "leaves no room for an answer"),
]


@pytest.mark.parametrize(("template", "message"), WRONG)
def test_a_template_that_does_not_keep_the_conversation_is_refused(template, message):
    assert message in refusal(with_template(template))


def test_qwen3_renders_a_late_system_turn_without_complaint(qwen3):
    """Why the order is made, and looked at, here: the template would not say a word."""
    turns = conversation(ITEM, "openmath", shots=0)
    assert "the problem" in render(qwen3, turns[::-1])


@pytest.mark.parametrize("enable_thinking", [True, False])
def test_the_switch_reaches_every_text(qwen3, enable_thinking):
    configure_chat_template_(qwen3, enable_thinking=enable_thinking, place="x")
    render_prompt = render(qwen3, conversation(ITEM, "openmath", shots=1))
    assert render_prompt.endswith("assistant\n" + NO_THOUGHT * (not enable_thinking))
    bare = render(qwen3, conversation(ITEM, "openmath", shots=0))
    prompt_tokens, answered = training_tokens(qwen3, ITEM)
    assert qwen3.decode(prompt_tokens) == bare
    assert qwen3.decode(answered) == ITEM.solution + "<|im_end|>"
    assert qwen3.decode(calibration_tokens(qwen3, ITEM, "openmath")) == bare + ITEM.solution


def test_the_switch_does_not_go_into_what_is_saved(qwen3, tmp_path):
    configure_chat_template_(qwen3, enable_thinking=False, place="x")
    qwen3.save_pretrained(tmp_path)
    from transformers import AutoTokenizer

    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again.chat_template == qwen3_tokenizer().chat_template
    assert not render(again, conversation(ITEM, "openmath", shots=0)).endswith(NO_THOUGHT)


def test_a_model_that_can_think_must_be_told_whether_it_does(qwen3):
    assert "say in the study whether it does, as enable_thinking: false" in refusal(qwen3)


def test_a_model_that_cannot_think_is_not_told_to():
    assert "has no enable_thinking switch" in refusal(byte_tokenizer(), enable_thinking=True)


@pytest.mark.parametrize("enable_thinking", [None, False])
def test_a_model_that_cannot_think_may_be_told_not_to(enable_thinking):
    """It is on record that there is no such switch."""
    tokenizer = byte_tokenizer()
    configure_chat_template_(tokenizer, enable_thinking=enable_thinking, place="x")
    account = chat.describe_template(tokenizer, enable_thinking=enable_thinking)
    assert account["enable_thinking"] == "no such switch"


def test_the_account_tells_the_switch_and_the_template(qwen3):
    configure_chat_template_(qwen3, enable_thinking=False, place="x")
    assert knows_switch(qwen3)
    description = chat.describe_template(qwen3, enable_thinking=False)
    assert description["enable_thinking"] is False
    assert (
        description["sha256"]
        != chat.describe_template(byte_tokenizer(), enable_thinking=None)["sha256"]
    )


def test_a_turn_ends_where_the_template_ends_it():
    """Not where the tokenizer says that a text ends: chat models have both."""
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]})
    tokenizer.eos_token = "<|endoftext|>"
    assert tokenizer.convert_ids_to_tokens(end_of_turn(tokenizer)) == "<|im_end|>"
    assert tokenizer.decode(training_tokens(tokenizer, ITEM)[1]).endswith("<|im_end|>")


def test_without_a_token_of_its_own_a_turn_ends_with_the_text():
    tokenizer = with_template(
        EACH + "{{ m['role'] + ': ' + m['content'] + '\\n' }}{% endfor %}assistant: "
    )
    assert end_of_turn(tokenizer) == tokenizer.eos_token_id
    assert tokenize(tokenizer, "<|im_end|>") == [tokenizer.eos_token_id]


DATED = (
    "{% set today = strftime_now('%d %b %Y') if strftime_now is defined else 'some day' %}" + EACH
) + ("{% if m['role'] == 'system' %}Today: {{ today }}\n{% endif %}" + TURN + "{% endfor %}" + ROOM)
SYSTEM = "{% set s = messages[0]['content'] if messages[0]['role'] == 'system' else '' %}"
REST = "{% set turns = messages[1:] if s else messages %}"
SAID = "{{ ' ' + m['content'] + eos_token }}"
INST = {
    "first": SYSTEM
    + REST
    + "{% for m in turns %}{% if m['role'] == 'user' %}"
    + "{{ '[INST] ' + (s + '\n\n' if loop.first and s else '') + m['content'] + ' [/INST]' }}"
    + "{% else %}"
    + SAID
    + "{% endif %}{% endfor %}",
    "last": SYSTEM
    + REST
    + "{% for m in turns %}{% if m['role'] == 'user' %}"
    + "{{ '[INST] ' + (s + '\n\n' if loop.last and s else '') + m['content'] + ' [/INST]' }}"
    + "{% else %}"
    + SAID
    + "{% endif %}{% endfor %}",
    "none": EACH
    + "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    + "{{ raise_exception('roles take turns, user first') }}{% endif %}"
    + "{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}{% else %}"
    + SAID
    + "{% endif %}{% endfor %}",
    "dropped": EACH
    + "{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    + "{% elif m['role'] == 'assistant' %}"
    + SAID
    + "{% endif %}{% endfor %}",
}
IN_USER_TURN = {"first": "a turn of its own"} | dict.fromkeys(
    ("last", "none", "dropped"), "in the first user turn"
)


def settled(template: str):
    tokenizer = with_template(template)
    configure_chat_template_(tokenizer, enable_thinking=None, place="x")
    return tokenizer


class Tomorrow:
    """A clock that is a day on."""

    @staticmethod
    def now() -> datetime.datetime:
        return datetime.datetime.now() + datetime.timedelta(days=1)


def test_a_template_says_the_same_tomorrow(monkeypatch):
    """And would not by itself."""
    turns = conversation(ITEM, "openmath", shots=1)

    def texts():
        bare = with_template(DATED).apply_chat_template(turns, tokenize=False)
        return bare, render(settled(DATED), turns)

    today = texts()
    monkeypatch.setattr(chat_template_utils, "datetime", Tomorrow)
    tomorrow = texts()
    assert today[0] != tomorrow[0]
    assert today[1] == tomorrow[1]
    assert "Today: 26 Jul 2024" in today[1]


def test_the_date_that_a_template_prints_is_on_record():
    assert chat.describe_template(settled(DATED), enable_thinking=None)["clock"] == "2024-07-26"
    plain = chat.describe_template(settled(CHAT_TEMPLATE), enable_thinking=None)
    assert plain["clock"] == "not read"


def test_a_template_that_draws_by_lot_is_refused():
    drawn = "{{ ['a', 'b', 'c', 'd', 'e', 'f', 'g', 'h'] | random }}" + CHAT_TEMPLATE
    assert "renders a conversation differently each time" in refusal(with_template(drawn))


@pytest.mark.parametrize("shots", [0, 1])
@pytest.mark.parametrize("where", INST)
def test_inst_templates_render_every_turn_in_order(where, shots):
    tokenizer = settled(INST[where])
    turns = conversation(ITEM, "openmath", shots=shots)
    text = render(tokenizer, turns)
    places = [text.index(turn["content"]) for turn in turns]
    assert places == sorted(places)
    assert text.startswith("[INST] " + turns[0]["content"])
    assert text.endswith(turns[-1]["content"] + " [/INST]")
    account = chat.describe_template(tokenizer, enable_thinking=None)
    assert account["system_turn"] == IN_USER_TURN[where]


def test_training_and_calibration_have_the_system_text_too():
    tokenizer = settled(INST["none"])
    system, user = (turn["content"] for turn in conversation(ITEM, "openmath", shots=0))
    begun = f"[INST] {system}\n\n{user} [/INST]"
    prompt_tokens, answered = training_tokens(tokenizer, ITEM)
    assert tokenizer.decode(prompt_tokens) == begun
    assert tokenizer.decode(answered) == ITEM.solution + "<|im_end|>"
    assert tokenizer.decode(calibration_tokens(tokenizer, ITEM, "openmath")) == (
        begun + ITEM.solution
    )


def test_prompts_share_what_they_did_before(study):
    """The system's text and the worked examples are read once for all items."""
    settings, tokenizer = study.evaluation.datasets["squad_v2"], settled(INST["last"])
    prompts = [render_prompt(i, settings, tokenizer) for i in evaluation_items(study, "squad_v2")]
    assert all(p.shared and p.text.startswith(p.shared[0]) for p in prompts)
    assert len({p.shared[0] for p in prompts}) == 1


def test_a_base_model_without_a_template_is_read_as_plain_text():
    tokenizer = settled(None)
    text = f"{ITEM.question}\n{ITEM.solution}"
    assert calibration_tokens(tokenizer, ITEM, "openmath") == tokenizer(text).input_ids
    assert chat.describe_template(tokenizer, enable_thinking=None)["sha256"] is None
    assert end_of_turn(tokenizer) == tokenizer.eos_token_id
    with pytest.raises(StudyError, match="has no chat template, which training and answers"):
        render(tokenizer, conversation(ITEM, "openmath", shots=0))


def test_a_base_model_without_a_template_is_shown_how_to_answer():
    text = render(settled(None), conversation(ITEM, "openmath", shots=2))
    instruction, first, second, question = text.split("\n\n")
    assert instruction == chat.SYSTEM["openmath"]
    for (example, answer), shown in zip(chat.EXAMPLES["openmath"], (first, second), strict=True):
        assert shown == f"{example.question}\nAnswer: {answer}"
    assert question == f"{ITEM.question}\nAnswer:"
