"""Asks a model its evaluation sets: one prediction an item, in the items' order."""

from collections.abc import Iterator

from tqdm import tqdm

from helpers.evaluation.attention import GROUPED_QUERIES
from helpers.evaluation.generation import generate_greedy
from helpers.evaluation.loglikelihood import option_loglikelihoods
from helpers.evaluation.prompts import Prompt, option_tokens, prompt
from helpers.evaluation.scoring import score_options, score_text
from helpers.sources.chat_template import end_of_turn
from helpers.sources.conversations import tokenize
from helpers.sources.datasets import evaluation_items
from helpers.sources.items import Item
from helpers.study.errors import StudyError
from helpers.study.schema import EvaluationSet, Study


def ask_all(model, tokenizer, study: Study) -> dict[str, list[dict]]:
    """The predictions of every evaluation set of the study, by its name."""
    model.set_attn_implementation(GROUPED_QUERIES)
    answers = {}
    for name, wanted in study.evaluation.datasets.items():
        items = evaluation_items(study, name)
        budget = study.evaluation.batch_tokens
        stream = evaluate(model, tokenizer, items, wanted, batch_tokens=budget)
        found = {p["id"]: p for p in tqdm(stream, total=len(items), desc=name, unit="item")}
        answers[name] = [found[item.id] for item in items]
    return answers


def evaluate(
    model, tokenizer, items: list[Item], wanted: EvaluationSet, *, batch_tokens: int
) -> Iterator[dict]:
    """Yield one prediction an item, in the order batches finish.

    Args:
        model: a causal language model of transformers, on any runtime.
        items: the evaluation set's items.
        wanted: adapter and protocol.
        batch_tokens: the most tokens of one forward pass.

    Raises:
        StudyError: a prompt does not fit the model's context.
    """
    prompts = [prompt(item, wanted, tokenizer) for item in items]
    if wanted.ask.protocol == "loglikelihood":
        yield from _score(model, tokenizer, prompts, wanted, batch_tokens)
    else:
        yield from _generate(model, tokenizer, prompts, wanted, batch_tokens)


def _score(model, tokenizer, prompts: list[Prompt], wanted, batch_tokens: int) -> Iterator[dict]:
    tokens = [option_tokens(tokenizer, asked) for asked in prompts]
    longest = [len(t.context) + max(map(len, t.options)) for t in tokens]
    _refuse_long(model, prompts, longest)
    for index, logprobs in option_loglikelihoods(model, tokens, batch_tokens=batch_tokens):
        asked = prompts[index]
        made = score_options(
            asked.item, logprobs, asked.continuations, normalize=wanted.ask.normalize
        )
        made |= {"prompt_hash": asked.hash, "prompt_tokens": len(tokens[index].context)}
        yield made | {"output_tokens": sum(map(len, tokens[index].options))}


def _generate(model, tokenizer, prompts: list[Prompt], wanted, batch_tokens: int):
    tokens = [tokenize(tokenizer, asked.text) for asked in prompts]
    cap = wanted.ask.max_new_tokens
    _refuse_long(model, prompts, [len(t) + cap for t in tokens])
    answers = generate_greedy(
        model,
        tokens,
        max_new_tokens=cap,
        stop_tokens=stop_tokens(model, tokenizer),
        batch_tokens=batch_tokens,
    )
    for index, answer in answers:
        asked, text = prompts[index], tokenizer.decode(answer.tokens, skip_special_tokens=True)
        made = score_text(
            asked.item, wanted.adapter, text, answer=wanted.ask.answer, finish=answer.finish_reason
        )
        made |= {"prompt_hash": asked.hash, "prompt_tokens": len(tokens[index])}
        yield made | {"output_tokens": len(answer.tokens)}


def stop_tokens(model, tokenizer) -> set[int]:
    """Ids that end an answer: of a turn or of a text, and the model's own list."""
    declared = model.generation_config.eos_token_id
    listed = declared if isinstance(declared, list) else [declared]
    ends = {end_of_turn(tokenizer), tokenizer.eos_token_id}
    return ends | {i for i in listed if i is not None}


def _refuse_long(model, prompts: list[Prompt], lengths: list[int]) -> None:
    limit = model.config.max_position_embeddings
    for asked, length in zip(prompts, lengths, strict=True):
        if length > limit:
            raise StudyError(
                f"item {asked.item.id} needs {length} tokens but the model reads {limit}; "
                "lower max_new_tokens or shots, or leave the item out"
            )
