"""Chat templates and conversations: system turn first, worked examples, then the question.

One wording serves training, calibration and generation, so that what is measured is the
quantization and not a change of prompt. The examples are about nothing in any dataset.

A template is a program that came with the model. What it may do unnoticed would make every number
of a study about another question: leave out or misplace the system turn, ignore a switch that the
study sets, or print today's date. All of it is found out by rendering, before anything is asked.
"""

from collections.abc import Callable
from datetime import datetime
from functools import partial, wraps

from jinja2 import TemplateError

from helpers.core.errors import StudyError, one_line
from helpers.core.records import sha256_text
from helpers.sources.items import Item

SWITCH = "enable_thinking"
FIXED_DATE = datetime(2024, 7, 26)  # the default date of Llama 3's template
MARKS = ("first-mark", "second-mark", "third-mark", "fourth-mark")
ROLES = ("system", "user", "assistant", "user")
PROBE_CONVERSATION = [
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
    conversation = tokenizer.apply_chat_template([*PROBE_CONVERSATION, ANSWER], tokenize=False)
    before, answer, _ = conversation.partition(ANSWER["content"])
    return before[len(prompt) :] if answer and before.startswith(prompt) else ""


def _rendered(tokenizer, **switches) -> str:
    return tokenizer.apply_chat_template(
        PROBE_CONVERSATION, tokenize=False, add_generation_prompt=True, **switches
    )


def _turn_problem(tokenizer) -> str | None:
    """The fault of a rendered conversation, with the remedy; None if there is none.

    Each turn must appear once, in order, the system's first, followed by room for an answer.
    """
    try:
        text = _rendered(tokenizer)
        without_prompt = tokenizer.apply_chat_template(PROBE_CONVERSATION, tokenize=False)
        answered = tokenizer.apply_chat_template([*PROBE_CONVERSATION, ANSWER], tokenize=False)
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


PROBE_TEXT = "a text"  # shows which tokens a tokenizer puts around a text
SYSTEM = {
    "openmath": "Solve the problem. Give the answer in a box.",
    "squad_v2": (
        "Answer with a few words copied from the passage, in a box. "
        "If the passage does not say, the answer is unanswerable."
    ),
    "arc": "Answer the question with the label of the right option, in a box.",
    "boolq": "Answer the question about the passage with yes or no, in a box.",
}

_LIBRARY = (
    "The Elm Street library opened in 1962. Its first librarian was Rosa Field, "
    "who stayed for thirty years."
)
_MILL = (
    "Harlow Mill ground flour until a flood in 1904 broke its wheel. "
    "The miller then moved to Denby."
)

EXAMPLES: dict[str, tuple[tuple[Item, str], ...]] = {
    "openmath": (
        (
            Item("e1", "A farmer has 4 rows of 6 trees. How many trees does the farmer have?", ()),
            r"4 * 6 = 24. The answer is \boxed{24}.",
        ),
        (
            Item("e2", "Mia had 15 pens and gave away 8. How many pens are left?", ()),
            r"15 - 8 = 7. The answer is \boxed{7}.",
        ),
    ),
    "squad_v2": (
        (Item("e1", "Who was the first librarian?", (), passage=_LIBRARY), r"\boxed{Rosa Field}"),
        (Item("e2", "Who built the mill?", (), passage=_MILL), r"\boxed{unanswerable}"),
        (Item("e3", "What broke the wheel?", (), passage=_MILL), r"\boxed{a flood}"),
    ),
    "arc": (
        (
            Item("e1", "Which of these is a tool?", (), "", ("a hammer", "a cloud"), ("A", "B")),
            r"\boxed{A}",
        ),
        (
            Item("e2", "Which of these is a color?", (), "", ("seven", "green"), ("A", "B")),
            r"\boxed{B}",
        ),
    ),
    "boolq": (
        (
            Item("e1", "did rosa field work at the library for thirty years", (), _LIBRARY),
            r"\boxed{yes}",
        ),
        (
            Item("e2", "is harlow mill still grinding flour", (), _MILL),
            r"\boxed{no}",
        ),
    ),
}

# Of plain text that options are scored after: (item, option). A small model that copies words
# needs examples whose passages say the answer in the words of the question.
PLAIN_EXAMPLES: dict[str, tuple[tuple[Item, str], ...]] = {
    "boolq": tuple(
        (Item(f"p{number}", question, (), passage), option)
        for number, (passage, question, option) in enumerate(
            (
                (
                    "Corin Lake lies high in the hills. The lake does freeze over in winter.",
                    "does corin lake freeze over in winter",
                    "Yes",
                ),
                (
                    "The Tamber is a short river. It can be crossed on foot in August.",
                    "can the tamber be crossed on foot in august",
                    "Yes",
                ),
                (
                    "The bus to Harlow leaves at noon. It does not run on Sunday.",
                    "does the bus to harlow run on sunday",
                    "No",
                ),
                (
                    "Denby church has two towers. The west tower is taller than the east one.",
                    "is the west tower taller than the east one",
                    "Yes",
                ),
                (
                    "Harlow Mill ground flour until a flood broke its wheel. "
                    "The mill is not in use today.",
                    "is harlow mill still in use today",
                    "No",
                ),
                (
                    "The Elm Street library opened in 1962. "
                    "Its first librarian did stay for thirty years.",
                    "did the first librarian stay for thirty years",
                    "Yes",
                ),
            ),
            start=1,
        )
    ),
}


def user_turn(item: Item, adapter: str) -> str:
    """The user's message: the passage if there is one, the question, the options."""
    if adapter == "arc":
        options = "\n".join(
            f"{label}. {text}" for label, text in zip(item.labels, item.options, strict=True)
        )
        return f"Question: {item.question}\n{options}"
    if item.passage:
        question = with_question_mark(item.question) if adapter == "boolq" else item.question
        return f"Passage: {item.passage}\n\nQuestion: {question}"
    return item.question


def with_question_mark(question: str) -> str:
    """The question with a question mark, which BoolQ's own questions lack."""
    return question if question.rstrip().endswith("?") else f"{question}?"


def conversation(item: Item, adapter: str, *, shots: int) -> list[dict[str, str]]:
    """System turn, `shots` worked examples, and the item's question, as chat messages.

    Raises:
        ValueError: `shots` exceeds the number of examples.
    """
    examples = EXAMPLES[adapter]
    if shots > len(examples):
        raise ValueError(
            f"shots = {shots} but {adapter} has {len(examples)} examples; ask for fewer"
        )
    messages = [{"role": "system", "content": SYSTEM[adapter]}]
    for example, answer in examples[:shots]:
        messages.append({"role": "user", "content": user_turn(example, adapter)})
        messages.append({"role": "assistant", "content": answer})
    return [*messages, {"role": "user", "content": user_turn(item, adapter)}]


def render(tokenizer, messages: list[dict[str, str]]) -> str:
    """The messages in the model's own chat format, ready for its answer.

    Without a chat template they are plain text, and worked examples show where an answer stands.

    Raises:
        StudyError: there is neither template nor example, or the template rejects these messages.
    """
    if not tokenizer.chat_template:
        if all(message["role"] != "assistant" for message in messages):
            raise StudyError(
                "the model has no chat template, which training and answers without worked "
                "examples need; set ask.shots, or set tokenizer.chat_template and save it"
            )
        return _plain_text(messages)
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except (TemplateError, ValueError, TypeError, OverflowError) as error:
        raise StudyError(
            f"the model's chat template does not work ({one_line(error)[:200]}); mend "
            "chat_template in its tokenizer_config.json, or use another model"
        ) from None


PLAIN_CUE = "Answer:"  # before an answer in plain text, which follows after a space


def _plain_text(messages: list[dict[str, str]]) -> str:
    """The messages one after the other, an answer behind its cue; the last one is to come."""
    parts = []
    for message in messages:
        if message["role"] == "assistant":
            parts[-1] += f" {message['content']}"
        else:
            cue = f"\n{PLAIN_CUE}" if message["role"] == "user" else ""
            parts.append(message["content"] + cue)
    return "\n\n".join(parts)


def tokenize(tokenizer, text: str) -> list[int]:
    """Token ids of a rendered text; adds no special tokens."""
    return tokenizer(text, add_special_tokens=False).input_ids


def beginning_tokens(tokenizer) -> list[int]:
    """Token ids that the tokenizer puts before every plain text: mostly a BOS token, or none.

    Raises:
        StudyError: with special tokens, the text itself gets other tokens.
    """
    plain = tokenize(tokenizer, PROBE_TEXT)
    with_special = tokenizer(PROBE_TEXT).input_ids
    for start in range(len(with_special) - len(plain) + 1):
        if with_special[start : start + len(plain)] == plain:
            return with_special[:start]
    raise StudyError(
        "the model's tokenizer gives a text other tokens where it adds its special ones; mend "
        "tokenizer.json, or use another model"
    )


def plain_tokens(tokenizer, text: str) -> list[int]:
    """Token ids of a plain text, preceded once by the tokenizer's `beginning_tokens`.

    Tokens that the tokenizer puts after a text are left out, because the text goes on.
    """
    beginning, tokens = beginning_tokens(tokenizer), tokenize(tokenizer, text)
    return tokens if tokens[: len(beginning)] == beginning else beginning + tokens


def training_tokens(tokenizer, item: Item) -> tuple[list[int], list[int]]:
    """(prompt, answer) token ids of one training example; the answer ends its turn.

    Raises:
        StudyError: the item has no worked solution.
    """
    if not item.solution:
        raise StudyError(
            f"item {item.id} has no generated_solution to train on; give every row of the "
            "training file one"
        )
    prompt = render(tokenizer, conversation(item, "openmath", shots=0))
    answer = [*tokenize(tokenizer, item.solution), end_of_turn(tokenizer)]
    return tokenize(tokenizer, prompt), answer


def calibration_tokens(tokenizer, item: Item, adapter: str) -> list[int]:
    """Token ids of one calibration text: the question and, if known, its solution.

    A model without a chat template reads it as plain text.
    """
    if not tokenizer.chat_template:
        parts = (user_turn(item, adapter), item.solution)
        return plain_tokens(tokenizer, "\n".join(filter(None, parts)))
    text = render(tokenizer, conversation(item, adapter, shots=0)) + item.solution
    return tokenize(tokenizer, text)
