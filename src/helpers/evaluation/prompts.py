"""Prompts: the exact text that a protocol shows the model, and gold answers to score after it.

Each prompt has a hash of its text and tokens, by which results are paired.

A generated answer is right or wrong, which says little about an item. Its graded score is the
log-likelihood of a gold answer as the continuation of the item's own prompt, in nats per token; of
several golds the best counts. The form is given and not scored: what counts begins with the first
token in which answers of that form can differ, after the opened box if the study reads boxes. So a
model that seldom opens a box is compared on what it would put into one. A gold is compared with a
*foil*: the gold of another item of the set, in the same form after the same prompt. A model that
knows anything of the item prefers the gold.

A gold answer is as short as the protocol allows: a box and nothing else if the study reads boxes,
"unanswerable" if there is no answer. It ends where the protocol ends it: with the closing brace of
the box, or with the token that ends the turn (`stop: turn`).
"""

import itertools
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

from helpers.core.errors import printable
from helpers.core.records import sha256_data, write_jsonl
from helpers.evaluation.predictions import FOLDER, prompt_digest
from helpers.evaluation.scoring import ABSTENTION, normalize_answer
from helpers.inference.protocols import OptionTokens
from helpers.sources.chat import (
    PLAIN_EXAMPLES,
    answer_lead,
    conversation,
    end_of_turn,
    plain_tokens,
    render,
    tokenize,
    with_question_mark,
)
from helpers.sources.items import Item, gold_number, label_key
from helpers.sources.sampling import evaluation_items
from helpers.sources.tasks import task_request
from helpers.study.loading import Job
from helpers.study.schema import EvaluationSet, Generate, Study, TaskSet


@dataclass(frozen=True)
class Prompt:
    """The text before the answer and, for log-likelihood, its continuations.

    Attributes:
        shared: prefixes of the text that other prompts may have too, shortest first.
        plain: not rendered by a chat template; it starts as the tokenizer starts any text.
        until: texts that end a written answer.
        lead: the text between a plain prompt and a written answer.
        whole: the continuations are whole texts, and nothing stands before them.
    """

    item: Item
    text: str
    continuations: tuple[str, ...] = ()
    shared: tuple[str, ...] = ()
    plain: bool = False
    until: tuple[str, ...] = ()
    lead: str = ""
    whole: bool = False

    @property
    def hash(self) -> str:
        """Digest of the words alone; `input_digest` covers the token ids too."""
        return prompt_digest(self.text, self.continuations)


def loglikelihood_prompt(item: Item, adapter: str, *, shots: int = 0) -> Prompt:
    """Plain text as lm-evaluation-harness renders it; options are full texts, BoolQ's yes/no."""
    if adapter == "boolq":
        examples = PLAIN_EXAMPLES[adapter][:shots]
        head = "".join(f"{_boolq_text(example)} {option}\n\n" for example, option in examples)
        passages = (head + item.passage,)
        shared = (head, *passages) if head else passages
        return Prompt(item, head + _boolq_text(item), (" Yes", " No"), shared=shared, plain=True)
    options = tuple(f" {option}" for option in item.options)
    return Prompt(item, f"Question: {item.question}\nAnswer:", options, plain=True)


def _boolq_text(item: Item) -> str:
    return f"{item.passage}\nQuestion: {with_question_mark(item.question)}\nAnswer:"


def render_prompt(item: Item, evaluation_set: EvaluationSet, tokenizer) -> Prompt:
    """The item's prompt in the protocol of its evaluation set."""
    if isinstance(evaluation_set, TaskSet):
        return task_prompt(item, evaluation_set)
    if evaluation_set.ask.protocol == "loglikelihood":
        ask = evaluation_set.ask
        return loglikelihood_prompt(item, evaluation_set.adapter, shots=ask.shots)
    messages = conversation(item, evaluation_set.adapter, shots=evaluation_set.ask.shots)
    text = render(tokenizer, messages)
    shared = _shared_prefixes(text, messages[-1]["content"], item.passage)
    plain = not tokenizer.chat_template
    return Prompt(item, text, shared=shared, plain=plain, lead=" " if plain else "")


def task_prompt(item: Item, task_set: TaskSet) -> Prompt:
    """The harness's request for an item; of a given target the foil is a continuation too.

    As in the harness, white space at the end of a context belongs to its continuations.
    """
    request = task_request(task_set, item)
    if not request.continuations:
        until, lead = request.until, request.delimiter
        shared = (request.shared,) if request.shared else ()
        return Prompt(item, request.text, (), shared, plain=True, until=until, lead=lead)
    text, continuations = request.text.rstrip(), request.continuations
    if task_set.ask.protocol == "target":
        continuations = (*continuations, *item.options[1:])
    space = request.text[len(text) :]
    continuations = tuple(space + c for c in continuations)
    shared = (request.shared,) if request.shared else ()
    return Prompt(item, text, continuations, shared, plain=True, whole=request.whole)


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
    if not prompt.text:
        encode = plain_tokens if prompt.whole else tokenize
        tokens = [encode(tokenizer, c) for c in prompt.continuations]
        return OptionTokens([first_token(tokenizer)], tokens)
    context = plain_tokens(tokenizer, prompt.text)
    full_texts = [plain_tokens(tokenizer, prompt.text + c) for c in prompt.continuations]
    options = [full_text[len(context) :] for full_text in full_texts]
    return OptionTokens(context, options, prefix_lengths(tokenizer, prompt, context))


def first_token(tokenizer) -> int:
    """The token before a text that has no context: the harness takes BOS, else the end of text."""
    bos = tokenizer.bos_token_id
    return tokenizer.eos_token_id if bos is None else bos


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


MAX_GOLDS = 3  # per item; SQuAD 2.0's annotators gave up to six, few of them different
DECIMALS = 6  # of a stored log-likelihood
BOX = r"\boxed{"  # the form of a boxed answer, before what can differ


@dataclass(frozen=True)
class GoldAnswers:
    """The golds and the foil of one item, in the form its prompt asks for.

    Attributes:
        golds: right answers, at least one and at most MAX_GOLDS.
        foil: another item's gold, wrong for this item; None if no other item has one.
    """

    golds: tuple[str, ...]
    foil: str | None

    @property
    def texts(self) -> tuple[str, ...]:
        """The golds, then the foil if there is one."""
        return self.golds if self.foil is None else (*self.golds, self.foil)


def gold_answers(items: Sequence[Item], evaluation_set: EvaluationSet) -> dict[str, GoldAnswers]:
    """Golds and foil by item id; empty for a set whose options are scored.

    Args:
        items: all items of the set, in its order: foils are other items' golds.
    """
    if evaluation_set.ask.protocol != "generate":
        return {}
    ask = evaluation_set.ask
    golds = [_distinct_golds(item, evaluation_set.adapter) for item in items]
    foils = choose_foils([list(own) for own in golds], [item.labels for item in items])
    return {
        item.id: GoldAnswers(
            tuple(answer_text(gold, ask) for gold in list(own.values())[:MAX_GOLDS]),
            None if foil is None else answer_text(next(iter(golds[foil].values())), ask),
        )
        for item, own, foil in zip(items, golds, foils, strict=True)
    }


def answer_text(answer: str, ask: Generate) -> str:
    """An answer in the form the prompt asks for."""
    return f"{BOX}{answer}}}" if ask.answer == "boxed" else answer


def _distinct_golds(item: Item, adapter: str) -> dict[str, str]:
    """The item's golds by their comparison key; the abstention if it has none."""
    golds: dict[str, str] = {}
    for gold in item.golds or (ABSTENTION,):
        golds.setdefault(comparison_key(gold, adapter), gold.strip())
    return golds


def comparison_key(answer: str, adapter: str) -> str:
    """Equal for two wordings of one answer: its words, its number, or its label."""
    if adapter == "squad_v2":
        return normalize_answer(answer) or answer.strip().casefold()
    if adapter == "openmath":
        value = gold_number(answer)
        return "".join(answer.split()) if value is None else str(value)
    return label_key(answer)


def choose_foils(
    keys: Sequence[Sequence[str]], labels: Sequence[Sequence[str]]
) -> list[int | None]:
    """For each item the index of another one, whose first gold is wrong for this item.

    Items are sorted by their first gold, the most frequent gold first and in their own order
    within one gold. Each item takes the gold of the item that follows after as many places as
    the most frequent gold has items. If no gold is right for more than half of the items, each
    item's gold is taken exactly once: a model that prefers one answer to every question gains
    by it as often as it loses.

    Args:
        keys: comparison keys of each item's golds, the first gold first.
        labels: labels of each item's options, one of which a foil must be; empty if answers
            are free.
    """
    size = len(keys)
    counts = Counter(own[0] for own in keys)
    first_index = {own[0]: i for i, own in reversed(list(enumerate(keys)))}
    order = sorted(range(size), key=lambda i: (-counts[keys[i][0]], first_index[keys[i][0]], i))
    allowed = [{label_key(label) for label in own} for own in labels]

    def is_wrong(index: int, other: int) -> bool:
        key = keys[other][0]
        return key not in keys[index] and (not allowed[index] or key in allowed[index])

    foils: list[int | None] = [None] * size
    shift = max(counts.values(), default=0)
    for place, index in enumerate(order):
        foil = order[(place + shift) % size]
        if not is_wrong(index, foil):
            candidates = [i for i in order if is_wrong(index, i)]
            foil = candidates[place % len(candidates)] if candidates else None
        foils[index] = foil
    return foils


@dataclass(frozen=True)
class AnswerTokens:
    """Token ids of an item's golds and its foil, as continuations of its prompt.

    Attributes:
        answers: of each text of `GoldAnswers.texts`.
        form: the tokens that all of them begin with and that the bare form begins with too.
            They are given, not scored; each answer has at least one token more.
    """

    answers: list[list[int]]
    form: list[int]


def answer_tokens(
    tokenizer, prompt: TokenizedPrompt, texts: Sequence[str], ask: Generate
) -> AnswerTokens:
    """Token ids of each answer, as the continuation of the prompt's own token ids.

    Answers stand where the chat template puts them. Their ids are the rest of the full text's
    ids; if the tokenizer would merge prompt and answer at their border, they are the ids of
    the answer alone.
    """
    plain, context = prompt.prompt.plain, prompt.tokens.context
    lead = prompt.prompt.lead if plain else answer_lead(tokenizer)
    encode = plain_tokens if plain else tokenize

    def continuation(text: str) -> list[int]:
        full_text = encode(tokenizer, prompt.prompt.text + lead + text)
        merged = full_text[: len(context)] != context
        return tokenize(tokenizer, lead + text) if merged else full_text[len(context) :]

    end = [end_of_turn(tokenizer)] if ask.stop == "turn" and not plain else []
    answers = [continuation(text) + end for text in texts]
    form = continuation(BOX) if ask.answer == "boxed" else []
    scored_from = min([len(form), *(len(answer) - 1 for answer in answers)])
    for answer in answers:
        pairs = zip(form, answer, strict=False)
        shared = itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)
        scored_from = min(scored_from, sum(1 for _ in shared))
    return AnswerTokens(answers, form[:scored_from])


def gold_digest(golds: GoldAnswers, tokens: AnswerTokens) -> str:
    """Equal for two variants if and only if they read the same token ids as golds and foil."""
    return sha256_data([list(golds.golds), golds.foil, tokens.answers, tokens.form])[:16]


def gold_fields(golds: GoldAnswers, tokens: AnswerTokens, loglikelihoods: Sequence[float]) -> dict:
    """The fields of a prediction with the log-likelihoods of its golds and its foil.

    Args:
        tokens: of `golds.texts`.
        loglikelihoods: summed log-probability of each, given the form, in nats; a sum that is
            not finite is stored as None.
    """
    sums = [round(s, DECIMALS) if math.isfinite(s) else None for s in loglikelihoods]
    sizes, count = [len(a) - len(tokens.form) for a in tokens.answers], len(golds.golds)
    foil = (None, None) if golds.foil is None else (sums[count], sizes[count])
    return {
        "gold_form_tokens": len(tokens.form),
        "gold_loglikelihoods": sums[:count],
        "gold_tokens": sizes[:count],
        "foil_loglikelihood": foil[0],
        "foil_tokens": foil[1],
        "foil": golds.foil,
        "gold_hash": gold_digest(golds, tokens),
    }
