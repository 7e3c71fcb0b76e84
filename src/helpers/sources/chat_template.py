"""What a model's chat template does with a conversation, found out by rendering one.

A template is a program that came with the model. Two things it may do unnoticed would make
every number of a study about another question: leave out or misplace the system turn, and
ignore a switch that the study sets. Both are looked at before anything is asked.
"""

from functools import partial

from helpers.study.errors import StudyError
from helpers.study.hashing import sha256_text

SWITCH = "enable_thinking"
MARKS = ("first-mark", "second-mark", "third-mark", "fourth-mark")
ROLES = ("system", "user", "assistant", "user")
PROBE = [
    {"role": role, "content": f"the {mark} is here"}
    for role, mark in zip(ROLES, MARKS, strict=True)
]


def settle_(tokenizer, *, enable_thinking: bool | None, place: str) -> None:
    """Make the tokenizer render every conversation as the study says, or refuse.

    Sets the thinking switch for good. A template without the switch may be told not to
    think, which it does not anyhow.

    Raises:
        StudyError: there is no template, it misplaces turns, or the study does not say
            what its switch should be, or says it for a template that cannot think.
    """
    if not tokenizer.chat_template:
        raise StudyError(
            f"{place}: the tokenizer has no chat template; set tokenizer.chat_template and save it"
        )
    _refuse_disorder(tokenizer, place)
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


def knows_switch(tokenizer) -> bool:
    """Whether the template renders anything else when the model shall not think."""
    return _rendered(tokenizer, enable_thinking=True) != _rendered(tokenizer, enable_thinking=False)


def account(tokenizer, *, enable_thinking: bool | None) -> dict:
    """For the record: which template, and what its switch was set to, if it has one."""
    used = enable_thinking if knows_switch(tokenizer) else "no such switch"
    return {"sha256": sha256_text(str(tokenizer.chat_template)), SWITCH: used}


def end_of_turn(tokenizer) -> int:
    """Id of the special token with which the template ends an answer.

    The tokenizer's own end of text where the template ends it with none: some models have
    one token for the end of a turn and another for the end of a text.
    """
    answered = [{"role": "user", "content": MARKS[0]}, {"role": "assistant", "content": MARKS[1]}]
    text = tokenizer.apply_chat_template(answered, tokenize=False)
    after = text[text.rindex(MARKS[1]) + len(MARKS[1]) :]
    added = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    special = added | set(tokenizer.all_special_ids)
    found = [i for i in tokenizer(after, add_special_tokens=False).input_ids if i in special]
    return found[0] if found else tokenizer.eos_token_id


def _rendered(tokenizer, **switches) -> str:
    return tokenizer.apply_chat_template(
        PROBE, tokenize=False, add_generation_prompt=True, **switches
    )


def _refuse_disorder(tokenizer, place: str) -> None:
    """Each turn once, in the order they were said, the system's before all; then room to answer."""
    remedy = "set tokenizer.chat_template to one that keeps the order, and save it"
    try:
        text = _rendered(tokenizer)
    except Exception as error:  # a template raises what it likes
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise StudyError(
            f"{place}: its chat template refuses a conversation with a system turn ({reason}); "
            "give it one that takes it"
        ) from None
    for role, mark in zip(ROLES, MARKS, strict=True):
        if (times := text.count(mark)) != 1:
            raise StudyError(
                f"{place}: its chat template renders the {role} turn {times} times; {remedy}"
            )
    order = sorted(MARKS, key=text.index)
    if tuple(order) != MARKS:
        found = ", ".join(ROLES[MARKS.index(mark)] for mark in order)
        raise StudyError(f"{place}: its chat template renders the turns as {found}; {remedy}")
    if text == tokenizer.apply_chat_template(PROBE, tokenize=False):
        raise StudyError(
            f"{place}: its chat template leaves no room for an answer (add_generation_prompt "
            f"changes nothing); {remedy}"
        )
