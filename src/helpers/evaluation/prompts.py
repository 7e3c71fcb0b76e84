"""An item as the exact text a protocol shows the model, with a hash to pair results by."""

from dataclasses import dataclass

from helpers.evaluation.loglikelihood import OptionTokens
from helpers.sources.conversations import conversation, render, tokenize
from helpers.sources.items import Item
from helpers.study.hashing import sha256_data
from helpers.study.schema import EvaluationSet


@dataclass(frozen=True)
class Prompt:
    """What is asked: the text before the answer and, for log-likelihood, its continuations."""

    item: Item
    text: str
    continuations: tuple[str, ...] = ()

    @property
    def hash(self) -> str:
        """Equal for two variants if and only if they were asked the same thing."""
        return sha256_data([self.text, list(self.continuations)])[:16]


def loglikelihood_prompt(item: Item, adapter: str) -> Prompt:
    """Plain text, as harnesses ask it; options are full texts, yes/no for BoolQ."""
    if adapter == "boolq":
        text = f"{item.passage}\nQuestion: {item.question}?\nAnswer:"
        return Prompt(item, text, (" Yes", " No"))
    options = tuple(f" {option}" for option in item.options)
    return Prompt(item, f"Question: {item.question}\nAnswer:", options)


def prompt(item: Item, wanted: EvaluationSet, tokenizer) -> Prompt:
    """The item as the evaluation set asks it."""
    if wanted.ask.protocol == "loglikelihood":
        return loglikelihood_prompt(item, wanted.adapter)
    messages = conversation(item, wanted.adapter, shots=wanted.ask.shots)
    return Prompt(item, render(tokenizer, messages))


def option_tokens(tokenizer, asked: Prompt) -> OptionTokens:
    """Context and continuations as token ids, split where the context alone ends.

    Tokenizing the whole and cutting at the context's length is what
    lm-evaluation-harness does, so that the two score the same tokens.
    """
    context = tokenize(tokenizer, asked.text)
    wholes = [tokenize(tokenizer, asked.text + c) for c in asked.continuations]
    return OptionTokens(context, [whole[len(context) :] for whole in wholes])
