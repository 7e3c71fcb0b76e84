"""What a model's chat template does with a conversation, found out by rendering one.

A template is a program that came with the model. What it may do unnoticed would make every
number of a study about another question: leave out or misplace the system turn, ignore a
switch that the study sets, or print today's date. All of it is settled before anything is
asked.
"""

from collections.abc import Callable
from datetime import datetime
from functools import partial, wraps

from helpers.core.errors import StudyError
from helpers.core.hashing import sha256_text

SWITCH = "enable_thinking"
FIXED_DATE = datetime(2024, 7, 26)  # the default date of Llama 3's template
MARKS = ("first-mark", "second-mark", "third-mark", "fourth-mark")
ROLES = ("system", "user", "assistant", "user")
PROBE = [
    {"role": role, "content": f"the {mark} is here"}
    for role, mark in zip(ROLES, MARKS, strict=True)
]
ANSWER = {"role": "assistant", "content": "fifth-mark"}
OWN_TURN, FIRST_USER_TURN = "a turn of its own", "in the first user turn"
KEEP_ORDER = "set tokenizer.chat_template to one that keeps the order, and save it"
LEAVE_ROOM = "set tokenizer.chat_template to one that ends where the answer begins, and save it"


def configure_chat_template_(tokenizer, *, enable_thinking: bool | None, place: str) -> None:
    """Make the tokenizer render every conversation as the study says, or refuse.

    Fixes the date and the thinking switch. If the template has no usable system turn, the
    system's text goes into the first user turn. `enable_thinking = False` is allowed for a
    template without the switch. A tokenizer without a template is unchanged.

    Raises:
        StudyError: the template misplaces turns or renders at random, the study does not set
            its switch, or the study turns on a switch that the template lacks.
    """
    if not tokenizer.chat_template:
        return
    tokenizer.apply_chat_template = partial(tokenizer.apply_chat_template, strftime_now=_now)
    tokenizer.system_turn = _configure_system_turn_(tokenizer, place)
    if len({_rendered(tokenizer) for _ in range(4)}) > 1:
        raise StudyError(
            f"{place}: its chat template renders a conversation differently each time; set "
            "tokenizer.chat_template to one that does not draw by lot, and save it"
        )
    if knows_switch(tokenizer):
        if enable_thinking is None:
            raise StudyError(
                f"{place}: the model can think before it answers; say in the study whether it "
                f"does, as {SWITCH}: false"
            )
        tokenizer.apply_chat_template = partial(
            tokenizer.apply_chat_template, enable_thinking=enable_thinking
        )
    elif enable_thinking:
        raise StudyError(
            f"{place}: its chat template has no {SWITCH} switch, so the model would not think; "
            f"remove {SWITCH}: true from the study"
        )


def _now(form: str) -> str:
    """The fixed date, as the template formats it."""
    return FIXED_DATE.strftime(form)


def _configure_system_turn_(tokenizer, place: str) -> str:
    """Move the system's text if necessary; returns its place for `describe_template`."""
    if (problem := _turn_problem(tokenizer)) is None:
        return OWN_TURN
    render = tokenizer.apply_chat_template
    tokenizer.apply_chat_template = _without_system_turn(render)
    if _turn_problem(tokenizer) is not None:
        raise StudyError(f"{place}: its chat template {problem}")
    return FIRST_USER_TURN


def _without_system_turn(render: Callable) -> Callable:
    """A renderer that moves the system's text to the beginning of the first user turn."""

    @wraps(render)
    def rendered(conversation: list[dict[str, str]], **options):
        return render(in_first_user_turn(conversation), **options)

    return rendered


def in_first_user_turn(messages: list[dict[str, str]]) -> list[dict[str, str]]:
    """The messages, with the text of a leading system turn put before the first user's."""
    if len(messages) < 2 or messages[0]["role"] != "system":
        return messages
    system, first_user, *rest = messages
    return [{**first_user, "content": f"{system['content']}\n\n{first_user['content']}"}, *rest]


def knows_switch(tokenizer) -> bool:
    """Whether the thinking switch changes the rendered text."""
    return _rendered(tokenizer, enable_thinking=True) != _rendered(tokenizer, enable_thinking=False)


def reads_clock(tokenizer) -> bool:
    """Whether the template writes the date or the time into the text."""
    return _rendered(tokenizer, strftime_now=lambda _form: "another day") != _rendered(tokenizer)


def describe_template(tokenizer, *, enable_thinking: bool | None) -> dict:
    """The template's hash, switch, date, and place of the system's text, for the record."""
    if not tokenizer.chat_template:
        return {"sha256": None, "used": "none; texts are plain"}
    switch = enable_thinking if knows_switch(tokenizer) else "no such switch"
    return {
        "sha256": sha256_text(str(tokenizer.chat_template)),
        SWITCH: switch,
        "clock": FIXED_DATE.date().isoformat() if reads_clock(tokenizer) else "not read",
        "system_turn": getattr(tokenizer, "system_turn", OWN_TURN),
    }


def end_of_turn(tokenizer) -> int:
    """Id of the special token with which the template ends an answer.

    Without a template, or if the template ends an answer with no special token, it is the
    tokenizer's end of text; some models have different tokens for the two.
    """
    if not tokenizer.chat_template:
        return tokenizer.eos_token_id
    messages = [{"role": "user", "content": MARKS[0]}, {"role": "assistant", "content": MARKS[1]}]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    rest = text[text.rindex(MARKS[1]) + len(MARKS[1]) :]
    added_ids = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    special_ids = added_ids | set(tokenizer.all_special_ids)
    end_tokens = [
        i for i in tokenizer(rest, add_special_tokens=False).input_ids if i in special_ids
    ]
    return end_tokens[0] if end_tokens else tokenizer.eos_token_id


def answer_lead(tokenizer) -> str:
    """The text that the template writes between the generation prompt and an answer.

    Empty for most templates; else a space after `[/INST]`, or an empty thinking block. Also
    empty if the template renders a past answer with another header than the generation prompt.
    """
    if not tokenizer.chat_template:
        return ""
    prompt = _rendered(tokenizer)
    conversation = tokenizer.apply_chat_template([*PROBE, ANSWER], tokenize=False)
    before, answer, _ = conversation.partition(ANSWER["content"])
    return before[len(prompt) :] if answer and before.startswith(prompt) else ""


def _rendered(tokenizer, **switches) -> str:
    return tokenizer.apply_chat_template(
        PROBE, tokenize=False, add_generation_prompt=True, **switches
    )


def _turn_problem(tokenizer) -> str | None:
    """The fault of a rendered conversation, with the remedy; None if there is none.

    Each turn must appear once, in order, the system's first, followed by room for an answer.
    """
    try:
        text = _rendered(tokenizer)
        without_prompt = tokenizer.apply_chat_template(PROBE, tokenize=False)
        answered = tokenizer.apply_chat_template([*PROBE, ANSWER], tokenize=False)
    except Exception as error:  # a template may raise anything
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        return f"refuses a conversation with a system turn ({reason}); give it one that takes it"
    for role, mark in zip(ROLES, MARKS, strict=True):
        if (count := text.count(mark)) != 1:
            return f"renders the {role} turn {count} times; {KEEP_ORDER}"
    order = sorted(MARKS, key=text.index)
    if tuple(order) != MARKS:
        rendered_order = ", ".join(ROLES[MARKS.index(mark)] for mark in order)
        return f"renders the turns as {rendered_order}; {KEEP_ORDER}"
    if text == without_prompt and not _answer_follows(without_prompt, answered):
        return (
            "leaves no room for an answer (add_generation_prompt changes nothing, and an answer "
            f"is written behind a header of its own); {LEAVE_ROOM}"
        )
    return None


def _answer_follows(prompt: str, answered: str) -> bool:
    """Whether the answer directly follows the question, as in `[/INST]` templates."""
    prefix, mark, _ = answered.partition(ANSWER["content"])
    return bool(mark) and prefix.startswith(prompt) and not prefix[len(prompt) :].strip()
