"""An item as the exact text a protocol shows the model, with a hash to pair results by."""

from dataclasses import dataclass
from functools import lru_cache

from helpers.core.plain_text import visible
from helpers.core.records import write_jsonl
from helpers.evaluation.prompt_records import FOLDER, prompt_digest
from helpers.inference.loglikelihood import OptionTokens
from helpers.sources.chat_conversations import (
    conversation,
    plain_tokens,
    render,
    tokenize,
    with_mark,
)
from helpers.sources.items import Item
from helpers.sources.sampling import evaluation_items
from helpers.study.schema import EvaluationSet, Study
from helpers.study.study_run import Job


@dataclass(frozen=True)
class Prompt:
    """What is asked: the text before the answer and, for log-likelihood, its continuations.

    Attributes:
        shared: beginnings of the text that other prompts may have too, shortest first.
        plain: not rendered by a chat template; it begins as the tokenizer begins a text.
    """

    item: Item
    text: str
    continuations: tuple[str, ...] = ()
    shared: tuple[str, ...] = ()
    plain: bool = False

    @property
    def hash(self) -> str:
        """Of the words alone; what the model is handed is in `asked_hash`."""
        return prompt_digest(self.text, self.continuations)


def loglikelihood_prompt(item: Item, adapter: str) -> Prompt:
    """Plain text, as harnesses ask it; options are full texts, yes/no for BoolQ."""
    if adapter == "boolq":
        text = f"{item.passage}\nQuestion: {with_mark(item.question)}\nAnswer:"
        return Prompt(item, text, (" Yes", " No"), shared=(item.passage,), plain=True)
    options = tuple(f" {option}" for option in item.options)
    return Prompt(item, f"Question: {item.question}\nAnswer:", options, plain=True)


def prompt(item: Item, wanted: EvaluationSet, tokenizer) -> Prompt:
    """The item as the evaluation set asks it."""
    if wanted.ask.protocol == "loglikelihood":
        return loglikelihood_prompt(item, wanted.adapter)
    messages = conversation(item, wanted.adapter, shots=wanted.ask.shots)
    text = render(tokenizer, messages)
    return Prompt(item, text, shared=_beginnings(text, messages[-1]["content"], item.passage))


def _beginnings(text: str, question: str, passage: str) -> tuple[str, ...]:
    """What comes before the item's own turn, and that with the item's passage."""
    own = text.rfind(question)
    if own < 0:  # the template rewrites what it is given
        return ()
    end = question.find(passage) + len(passage) if passage else 0
    return (text[:own], text[: own + end]) if end else (text[:own],)


def prompt_tokens(tokenizer, asked: Prompt) -> list[int]:
    """Token ids of the text before the answer."""
    return (plain_tokens if asked.plain else tokenize)(tokenizer, asked.text)


def cuts(tokenizer, asked: Prompt, tokens: list[int]) -> tuple[int, ...]:
    """How many of the prompt's tokens lie in each of its shared beginnings."""
    found = []
    for beginning in asked.shared:
        alone = _tokens_of(tokenizer, beginning, asked.plain)
        pairs = enumerate(zip(alone, tokens, strict=False))
        found.append(next((i for i, (a, b) in pairs if a != b), min(len(alone), len(tokens))))
    return tuple(found)


@lru_cache(maxsize=64)  # the worked examples come before every item
def _tokens_of(tokenizer, text: str, plain: bool) -> tuple[int, ...]:
    return tuple((plain_tokens if plain else tokenize)(tokenizer, text))


def option_tokens(tokenizer, asked: Prompt) -> OptionTokens:
    """Context and continuations as token ids, split where the context alone ends.

    Tokenizing the whole and cutting at the context's length is what
    lm-evaluation-harness does, so that the two score the same tokens.
    """
    context = plain_tokens(tokenizer, asked.text)
    wholes = [plain_tokens(tokenizer, asked.text + c) for c in asked.continuations]
    options = [whole[len(context) :] for whole in wholes]
    return OptionTokens(context, options, cuts(tokenizer, asked, context))


@dataclass(frozen=True)
class PromptTokens:
    """A prompt to be answered in writing, as token ids; see `OptionTokens`."""

    context: list[int]
    cuts: tuple[int, ...]
    options: tuple[()] = ()


def asked_tokens(tokenizer, asked: Prompt) -> OptionTokens | PromptTokens:
    """Token ids of the prompt and its continuations, as they are handed to the model."""
    if asked.continuations:
        return option_tokens(tokenizer, asked)
    context = prompt_tokens(tokenizer, asked)
    return PromptTokens(context, cuts(tokenizer, asked, context))


def asked_hash(asked: Prompt, tokens: OptionTokens | PromptTokens) -> str:
    """Equal for two variants if and only if they were handed the same token ids."""
    return prompt_digest(asked.text, asked.continuations, tokens.context, tokens.options)


def record_prompts(job: Job, tokenizer) -> None:
    """Write `prompts/<dataset>.jsonl` of the baseline; other variants are asked the same."""
    if job.variant != job.study.baseline:
        return
    folder = job.paths.evaluation(job.model, job.variant) / FOLDER
    for name, wanted in job.study.evaluation.datasets.items():
        asked = [prompt(item, wanted, tokenizer) for item in evaluation_items(job.study, name)]
        rows = (_as_row(p, asked_tokens(tokenizer, p)) for p in asked)
        write_jsonl(folder / f"{name}.jsonl", rows)


def prompt_examples(study: Study, tokenizer) -> str:
    """The first item of each evaluation set, word by word, with the continuations it scores.

    Characters that act on a terminal are replaced; line ends stay.
    """
    examples = []
    for name, wanted in study.evaluation.datasets.items():
        asked = prompt(evaluation_items(study, name)[0], wanted, tokenizer)
        lines = [f"===== {name} ({wanted.ask.protocol}) =====", asked.text]
        lines += [f"  continuation: {text!r}" for text in asked.continuations]
        examples.append("\n".join(lines))
    return visible("\n\n".join(examples), keep="\n")


def _as_row(asked: Prompt, tokens: OptionTokens | PromptTokens) -> dict:
    item = asked.item
    row = {"id": item.id, "question": item.question, "passage": item.passage}
    row |= {"options": list(item.options), "labels": list(item.labels)}
    row |= {"prompt": asked.text, "continuations": list(asked.continuations)}
    row |= {"tokens": tokens.context, "continuation_tokens": list(tokens.options)}
    return row | {"prompt_hash": asked_hash(asked, tokens)}
