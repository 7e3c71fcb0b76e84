"""How items are put to a chat model: system turn first, worked examples, then the question.

One wording serves training, calibration and generation, so that what is measured is the
quantization and not a change of prompt. The examples are about nothing in any dataset.
"""

from jinja2 import TemplateError

from helpers.core.errors import StudyError
from helpers.core.plain_text import one_line
from helpers.sources.chat_template import end_of_turn
from helpers.sources.items import Item

PROBE = "a text"  # to see what a tokenizer puts around it
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


def user_turn(item: Item, adapter: str) -> str:
    """What the user says: the passage if there is one, the question, the options."""
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
    """The question with a mark at its end: BoolQ's own have none, others' do."""
    return question if question.rstrip().endswith("?") else f"{question}?"


def conversation(item: Item, adapter: str, *, shots: int) -> list[dict[str, str]]:
    """System turn, `shots` worked examples, and the item's question, as chat messages.

    Raises:
        ValueError: more examples are asked for than there are.
    """
    examples = EXAMPLES[adapter]
    if shots > len(examples):
        raise ValueError(
            f"shots = {shots} but {adapter} has {len(examples)} examples; ask for fewer"
        )
    turns = [{"role": "system", "content": SYSTEM[adapter]}]
    for example, answer in examples[:shots]:
        turns.append({"role": "user", "content": user_turn(example, adapter)})
        turns.append({"role": "assistant", "content": answer})
    return [*turns, {"role": "user", "content": user_turn(item, adapter)}]


def render(tokenizer, messages: list[dict[str, str]]) -> str:
    """The messages in the model's own chat format, ready for its answer.

    Raises:
        StudyError: the model has no chat template, or one that does not take these messages.
    """
    if not tokenizer.chat_template:
        raise StudyError(
            "the model has no chat template, which answers, worked examples and training need; "
            "ask by protocol: loglikelihood, or set tokenizer.chat_template and save it"
        )
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except (TemplateError, ValueError, TypeError, OverflowError) as error:
        raise StudyError(
            f"the model's chat template does not work ({one_line(error)[:200]}); mend "
            "chat_template in its tokenizer_config.json, or use another model"
        ) from None


def tokenize(tokenizer, text: str) -> list[int]:
    """Token ids of a rendered text, without special tokens beyond those written in it."""
    return tokenizer(text, add_special_tokens=False).input_ids


def beginning_tokens(tokenizer) -> list[int]:
    """Token ids that the tokenizer puts before every plain text: mostly one that says so, or none.

    Raises:
        StudyError: it changes more than the ends of a text.
    """
    own = tokenize(tokenizer, PROBE)
    whole = tokenizer(PROBE).input_ids
    for start in range(len(whole) - len(own) + 1):
        if whole[start : start + len(own)] == own:
            return whole[:start]
    raise StudyError(
        "the model's tokenizer gives a text other tokens where it adds its special ones; mend "
        "tokenizer.json, or use another model"
    )


def plain_tokens(tokenizer, text: str) -> list[int]:
    """Token ids of a plain text, which begins as the tokenizer begins it, once.

    What the tokenizer would put after a text is left out: the text goes on.
    """
    first, own = beginning_tokens(tokenizer), tokenize(tokenizer, text)
    return own if own[: len(first)] == first else first + own


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
    """Token ids of one calibration text: the question as asked and, if known, its solution.

    Plain text for a model without a chat template.
    """
    if not tokenizer.chat_template:
        parts = (user_turn(item, adapter), item.solution)
        return plain_tokens(tokenizer, "\n".join(filter(None, parts)))
    text = render(tokenizer, conversation(item, adapter, shots=0)) + item.solution
    return tokenize(tokenizer, text)
