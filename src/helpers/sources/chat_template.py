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
CLOCK = datetime(2024, 7, 26)  # what Llama 3's template says itself where it is given no clock
MARKS = ("first-mark", "second-mark", "third-mark", "fourth-mark")
ROLES = ("system", "user", "assistant", "user")
PROBE = [
    {"role": role, "content": f"the {mark} is here"}
    for role, mark in zip(ROLES, MARKS, strict=True)
]
ANSWER = {"role": "assistant", "content": "fifth-mark"}
OWN_TURN, FIRST_USER_TURN = "a turn of its own", "in the first user turn"
ORDER = "set tokenizer.chat_template to one that keeps the order, and save it"
ROOM = "set tokenizer.chat_template to one that ends where the answer begins, and save it"


def settle_(tokenizer, *, enable_thinking: bool | None, place: str) -> None:
    """Make the tokenizer render every conversation as the study says, or refuse.

    Sets the clock and the thinking switch for good. A template without a usable system turn
    gets the system's text in the first user turn. One without the switch may be told not to
    think, which it does not anyhow. A tokenizer without a template is left as it is.

    Raises:
        StudyError: the template misplaces turns, draws by lot, or the study does not say what
            its switch should be, or says it for a template that cannot think.
    """
    if not tokenizer.chat_template:
        return
    tokenizer.apply_chat_template = partial(tokenizer.apply_chat_template, strftime_now=_now)
    tokenizer.system_turn = _settle_system_turn_(tokenizer, place)
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
    """A template's clock, which stands still."""
    return CLOCK.strftime(form)


def _settle_system_turn_(tokenizer, place: str) -> str:
    """Where the system's text is put, as `account` tells it."""
    if (disorder := _disorder(tokenizer)) is None:
        return OWN_TURN
    own = tokenizer.apply_chat_template
    tokenizer.apply_chat_template = _without_system_turn(own)
    if _disorder(tokenizer) is not None:
        raise StudyError(f"{place}: its chat template {disorder}")
    return FIRST_USER_TURN


def _without_system_turn(render: Callable) -> Callable:
    """Render, the system's text moved to the beginning of the first user turn."""

    @wraps(render)
    def rendered(conversation: list[dict[str, str]], **options):
        return render(in_first_user_turn(conversation), **options)

    return rendered


def in_first_user_turn(messages: list[dict[str, str]]) -> list[dict[str, str]]:
    """The messages with the text of a leading system turn before the first user's."""
    if len(messages) < 2 or messages[0]["role"] != "system":
        return messages
    system, first, *rest = messages
    return [{**first, "content": f"{system['content']}\n\n{first['content']}"}, *rest]


def knows_switch(tokenizer) -> bool:
    """Whether the template renders anything else when the model shall not think."""
    return _rendered(tokenizer, enable_thinking=True) != _rendered(tokenizer, enable_thinking=False)


def reads_clock(tokenizer) -> bool:
    """Whether the template writes the date or the time into what it renders."""
    return _rendered(tokenizer, strftime_now=lambda _form: "another day") != _rendered(tokenizer)


def account(tokenizer, *, enable_thinking: bool | None) -> dict:
    """For the record: which template, its switch, its clock, and where the system's text goes."""
    if not tokenizer.chat_template:
        return {"sha256": None, "used": "none; texts are plain"}
    used = enable_thinking if knows_switch(tokenizer) else "no such switch"
    return {
        "sha256": sha256_text(str(tokenizer.chat_template)),
        SWITCH: used,
        "clock": CLOCK.date().isoformat() if reads_clock(tokenizer) else "not read",
        "system_turn": getattr(tokenizer, "system_turn", OWN_TURN),
    }


def end_of_turn(tokenizer) -> int:
    """Id of the special token with which the template ends an answer.

    The tokenizer's own end of text where the template ends it with none, or there is no
    template: some models have one token for the end of a turn and another for the end of a
    text.
    """
    if not tokenizer.chat_template:
        return tokenizer.eos_token_id
    answered = [{"role": "user", "content": MARKS[0]}, {"role": "assistant", "content": MARKS[1]}]
    text = tokenizer.apply_chat_template(answered, tokenize=False)
    after = text[text.rindex(MARKS[1]) + len(MARKS[1]) :]
    added = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    special = added | set(tokenizer.all_special_ids)
    found = [i for i in tokenizer(after, add_special_tokens=False).input_ids if i in special]
    return found[0] if found else tokenizer.eos_token_id


def answer_lead(tokenizer) -> str:
    """What the template writes between the room for an answer and the answer.

    Mostly nothing; a space after `[/INST]`, or a thinking block that is empty. Empty too where
    the template renders an answer that was given behind another header than one to be written.
    """
    if not tokenizer.chat_template:
        return ""
    asked = _rendered(tokenizer)
    answered = tokenizer.apply_chat_template([*PROBE, ANSWER], tokenize=False)
    before, mark, _ = answered.partition(ANSWER["content"])
    return before[len(asked) :] if mark and before.startswith(asked) else ""


def _rendered(tokenizer, **switches) -> str:
    return tokenizer.apply_chat_template(
        PROBE, tokenize=False, add_generation_prompt=True, **switches
    )


def _disorder(tokenizer) -> str | None:
    """What is wrong with a rendered conversation, and the remedy; None if nothing is.

    Each turn has to be there once, in the order they were said, the system's before all; then
    room to answer.
    """
    try:
        text = _rendered(tokenizer)
        bare = tokenizer.apply_chat_template(PROBE, tokenize=False)
        answered = tokenizer.apply_chat_template([*PROBE, ANSWER], tokenize=False)
    except Exception as error:  # a template raises what it likes
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        return f"refuses a conversation with a system turn ({reason}); give it one that takes it"
    for role, mark in zip(ROLES, MARKS, strict=True):
        if (times := text.count(mark)) != 1:
            return f"renders the {role} turn {times} times; {ORDER}"
    order = sorted(MARKS, key=text.index)
    if tuple(order) != MARKS:
        found = ", ".join(ROLES[MARKS.index(mark)] for mark in order)
        return f"renders the turns as {found}; {ORDER}"
    if text == bare and not _answer_follows(bare, answered):
        return (
            "leaves no room for an answer (add_generation_prompt changes nothing, and an answer "
            f"is written behind a header of its own); {ROOM}"
        )
    return None


def _answer_follows(asked: str, answered: str) -> bool:
    """Whether an answer is written right behind the question, as `[/INST]` templates have it."""
    before, mark, _ = answered.partition(ANSWER["content"])
    return bool(mark) and before.startswith(asked) and not before[len(asked) :].strip()
