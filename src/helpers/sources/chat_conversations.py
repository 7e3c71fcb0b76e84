"""How items are put to a chat model: system turn first, worked examples, then the question.

One wording serves training, calibration and generation, so that what is measured is the
quantization and not a change of prompt. The examples are about nothing in any dataset.
"""

from jinja2 import TemplateError

from helpers.core.errors import StudyError
from helpers.core.plain_text import one_line
from helpers.sources.chat_template import end_of_turn
from helpers.sources.items import Item

PROBE = "a text"  # shows which tokens a tokenizer puts around a text
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

    Raises:
        StudyError: the model has no chat template, or it rejects these messages.
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
    """Token ids of a rendered text; adds no special tokens."""
    return tokenizer(text, add_special_tokens=False).input_ids


def beginning_tokens(tokenizer) -> list[int]:
    """Token ids that the tokenizer puts before every plain text: mostly a BOS token, or none.

    Raises:
        StudyError: with special tokens, the text itself gets other tokens.
    """
    plain = tokenize(tokenizer, PROBE)
    with_special = tokenizer(PROBE).input_ids
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
