"""An item as the exact text a protocol shows the model, with a hash to pair results by."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache

from helpers.core.plain_text import printable
from helpers.core.records import write_jsonl
from helpers.evaluation.prompt_records import FOLDER, prompt_digest
from helpers.inference.loglikelihood import OptionTokens
from helpers.sources.chat_conversations import (
    conversation,
    plain_tokens,
    render,
    tokenize,
    with_question_mark,
)
from helpers.sources.items import Item
from helpers.sources.sampling import evaluation_items
from helpers.study.schema import EvaluationSet, Study
from helpers.study.study_run import Job


@dataclass(frozen=True)
class Prompt:
    """The text before the answer and, for log-likelihood, its continuations.

    Attributes:
        shared: prefixes of the text that other prompts may have too, shortest first.
        plain: not rendered by a chat template; it starts as the tokenizer starts any text.
    """

    item: Item
    text: str
    continuations: tuple[str, ...] = ()
    shared: tuple[str, ...] = ()
    plain: bool = False

    @property
    def hash(self) -> str:
        """Digest of the words alone; `input_digest` covers the token ids too."""
        return prompt_digest(self.text, self.continuations)


def loglikelihood_prompt(item: Item, adapter: str) -> Prompt:
    """Plain text as lm-evaluation-harness renders it; options are full texts, BoolQ's yes/no."""
    if adapter == "boolq":
        text = f"{item.passage}\nQuestion: {with_question_mark(item.question)}\nAnswer:"
        return Prompt(item, text, (" Yes", " No"), shared=(item.passage,), plain=True)
    options = tuple(f" {option}" for option in item.options)
    return Prompt(item, f"Question: {item.question}\nAnswer:", options, plain=True)


def render_prompt(item: Item, evaluation_set: EvaluationSet, tokenizer) -> Prompt:
    """The item's prompt in the protocol of its evaluation set."""
    if evaluation_set.ask.protocol == "loglikelihood":
        return loglikelihood_prompt(item, evaluation_set.adapter)
    messages = conversation(item, evaluation_set.adapter, shots=evaluation_set.ask.shots)
    text = render(tokenizer, messages)
    return Prompt(item, text, shared=_shared_prefixes(text, messages[-1]["content"], item.passage))


def _shared_prefixes(text: str, question: str, passage: str) -> tuple[str, ...]:
    """The text before the item's own turn, and the same with the item's passage."""
    own = text.rfind(question)
    if own < 0:  # the template changes the question
        return ()
    end = question.find(passage) + len(passage) if passage else 0
    return (text[:own], text[: own + end]) if end else (text[:own],)


def context_tokens(tokenizer, prompt: Prompt) -> list[int]:
    """Token ids of the text before the answer."""
    return (plain_tokens if prompt.plain else tokenize)(tokenizer, prompt.text)


def prefix_lengths(tokenizer, prompt: Prompt, tokens: list[int]) -> tuple[int, ...]:
    """The number of prompt tokens in each of the prompt's shared prefixes."""
    lengths = []
    for prefix in prompt.shared:
        alone = _cached_tokens(tokenizer, prefix, prompt.plain)
        pairs = enumerate(zip(alone, tokens, strict=False))
        shorter = min(len(alone), len(tokens))
        lengths.append(next((i for i, (a, b) in pairs if a != b), shorter))
    return tuple(lengths)


@lru_cache(maxsize=64)  # the worked examples come before every item
def _cached_tokens(tokenizer, text: str, plain: bool) -> tuple[int, ...]:
    return tuple((plain_tokens if plain else tokenize)(tokenizer, text))


def option_tokens(tokenizer, prompt: Prompt) -> OptionTokens:
    """Context and continuations as token ids, split where the context alone ends.

    Tokenizing the whole and cutting at the context's length is what
    lm-evaluation-harness does, so that the two score the same tokens.
    """
    context = plain_tokens(tokenizer, prompt.text)
    full_texts = [plain_tokens(tokenizer, prompt.text + c) for c in prompt.continuations]
    options = [full_text[len(context) :] for full_text in full_texts]
    return OptionTokens(context, options, prefix_lengths(tokenizer, prompt, context))


@dataclass(frozen=True)
class PromptTokens:
    """Token ids of a prompt that is answered in writing; fields as in `OptionTokens`."""

    context: list[int]
    cuts: tuple[int, ...]
    options: tuple[()] = ()


def model_inputs(tokenizer, prompt: Prompt) -> OptionTokens | PromptTokens:
    """Token ids of the prompt and its continuations, as the model receives them."""
    if prompt.continuations:
        return option_tokens(tokenizer, prompt)
    context = context_tokens(tokenizer, prompt)
    return PromptTokens(context, prefix_lengths(tokenizer, prompt, context))


def input_digest(prompt: Prompt, tokens: OptionTokens | PromptTokens) -> str:
    """Equal for two variants if and only if they receive the same token ids."""
    return prompt_digest(prompt.text, prompt.continuations, tokens.context, tokens.options)


@dataclass(frozen=True)
class TokenizedPrompt:
    """A prompt with its token ids and the digest of both, rendered once for a whole job."""

    prompt: Prompt
    tokens: OptionTokens | PromptTokens
    digest: str

    @property
    def item(self) -> Item:
        return self.prompt.item


def tokenize_prompts(
    items: Iterable[Item], evaluation_set: EvaluationSet, tokenizer
) -> list[TokenizedPrompt]:
    """The items' prompts as the evaluation set asks them, in the items' order."""
    prompts = [render_prompt(item, evaluation_set, tokenizer) for item in items]
    tokens = [model_inputs(tokenizer, prompt) for prompt in prompts]
    return [TokenizedPrompt(p, t, input_digest(p, t)) for p, t in zip(prompts, tokens, strict=True)]


def study_prompts(study: Study, tokenizer) -> dict[str, list[TokenizedPrompt]]:
    """Draw the items of every evaluation set and render their prompts, by the set's name."""
    return {
        name: tokenize_prompts(evaluation_items(study, name), evaluation_set, tokenizer)
        for name, evaluation_set in study.evaluation.datasets.items()
    }


def record_prompts(job: Job, prompts: Mapping[str, list[TokenizedPrompt]]) -> None:
    """Write the baseline's `prompts/<dataset>.jsonl`; other variants get the same prompts.

    Args:
        prompts: of every evaluation set, by its name.
    """
    if job.variant != job.study.baseline:
        return
    folder = job.paths.evaluation(job.model, job.variant) / FOLDER
    for name, of_set in prompts.items():
        write_jsonl(folder / f"{name}.jsonl", map(_record_row, of_set))


def prompt_examples(prompts: Mapping[str, list[TokenizedPrompt]]) -> str:
    """The first prompt of each set, word by word, with the continuations that are scored.

    Characters that act on a terminal are replaced; line ends stay.

    Args:
        prompts: of every evaluation set, by its name.
    """
    examples = []
    for name, (first, *_) in prompts.items():
        protocol = "loglikelihood" if first.prompt.continuations else "generate"
        lines = [f"===== {name} ({protocol}) =====", first.prompt.text]
        lines += [f"  continuation: {text!r}" for text in first.prompt.continuations]
        examples.append("\n".join(lines))
    return printable("\n\n".join(examples), keep="\n")


def _record_row(tokenized: TokenizedPrompt) -> dict:
    item, prompt, tokens = tokenized.item, tokenized.prompt, tokenized.tokens
    row = {"id": item.id, "question": item.question, "passage": item.passage}
    row |= {"options": list(item.options), "labels": list(item.labels)}
    row |= {"prompt": prompt.text, "continuations": list(prompt.continuations)}
    row |= {"tokens": tokens.context, "continuation_tokens": list(tokens.options)}
    return row | {"prompt_hash": tokenized.digest}
