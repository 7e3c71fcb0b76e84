"""Asks a model its evaluation sets: one prediction an item, in the items' order."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from types import MappingProxyType

from helpers.core.activity import Bar
from helpers.core.errors import StudyError
from helpers.evaluation.answer_parsing import last_boxed
from helpers.evaluation.gold_answers import (
    GoldAnswers,
    answer_tokens,
    gold_answers,
    gold_fields,
)
from helpers.evaluation.out_of_memory import halving
from helpers.evaluation.prompts import Prompt, PromptTokens, asked_hash, asked_tokens, prompt
from helpers.evaluation.resume import Progress, Unkept
from helpers.evaluation.scoring import score_options, score_text
from helpers.inference import vllm_protocols
from helpers.inference.generation import Generated, generate_greedy
from helpers.inference.loglikelihood import OptionTokens, option_loglikelihoods
from helpers.sources.chat_template import end_of_turn
from helpers.sources.items import Item
from helpers.sources.sampling import evaluation_items
from helpers.study.schema import Batch, EvaluationSet, Study


def ask_all(
    model, tokenizer, study: Study, progress: Progress | None = None
) -> dict[str, list[dict]]:
    """The predictions of every evaluation set of the study, by its name.

    Args:
        progress: keeps them as they are made, and holds those of a run that was cut short.
    """
    answers = {}
    for name, wanted in study.evaluation.datasets.items():
        items = evaluation_items(study, name)
        prompts = [prompt(item, wanted, tokenizer) for item in items]
        asked = {p.item.id: asked_hash(p, asked_tokens(tokenizer, p)) for p in prompts}
        kept = progress.of(name, asked) if progress else Unkept()
        rest = [item for item in items if item.id not in kept.rows]
        how = {"limits": study.evaluation.batch, "golds": gold_answers(items, wanted)}
        fresh = evaluate(model, tokenizer, rest, wanted, **how)
        counted = {"total": len(items), "initial": len(kept.rows), "desc": name, "unit": "item"}
        found = kept.rows | {p["id"]: p for p in Bar(kept.appending(fresh), **counted)}
        answers[name] = [found[item.id] for item in items]
    return answers


def evaluate(
    model,
    tokenizer,
    items: list[Item],
    wanted: EvaluationSet,
    *,
    limits: Batch,
    golds: Mapping[str, GoldAnswers] = MappingProxyType({}),
) -> Iterator[dict]:
    """Yield one prediction an item, in the order they are ready.

    Args:
        model: a causal language model of transformers, on any runtime, or a served one.
        items: the evaluation set's items.
        wanted: adapter and protocol.
        limits: the most tokens and the most answers of one forward pass.
        golds: by item id, what is read after the prompt of an item that is answered in writing;
            of an item without them no log-likelihoods are stored.

    Raises:
        StudyError: a prompt does not fit the model's context, or half a batch the card.
    """
    prompts = [prompt(item, wanted, tokenizer) for item in items]
    scope = getattr(model, "scale_scope", "token")
    if scope != "token":  # what shares one activation scale is read in one piece
        prompts = [replace(asked, shared=()) for asked in prompts]
    if scope == "pass":
        limits = Batch(tokens=1, rows=1)
    scored = wanted.ask.protocol == "loglikelihood"
    ask = _score if scored else partial(_generate, golds=golds)
    yield from halving(partial(ask, model, tokenizer, wanted), prompts, limits)


def _score(model, tokenizer, wanted, prompts: list[Prompt], limits: Batch) -> Iterator[dict]:
    tokens = [asked_tokens(tokenizer, asked) for asked in prompts]
    longest = [len(t.context) + max(map(len, t.options)) for t in tokens]
    _refuse_long(model, prompts, longest)
    score = (
        vllm_protocols.option_loglikelihoods
        if vllm_protocols.is_served(model)
        else option_loglikelihoods
    )
    for index, logprobs in score(model, tokens, batch_tokens=limits.tokens):
        asked = prompts[index]
        made = score_options(
            asked.item, logprobs, asked.continuations, normalize=wanted.ask.normalize
        )
        made |= {"prompt_hash": asked_hash(asked, tokens[index])}
        made |= {"prompt_tokens": len(tokens[index].context)}
        yield made | {"output_tokens": sum(map(len, tokens[index].options))}


def _generate(
    model,
    tokenizer,
    wanted,
    prompts: list[Prompt],
    limits: Batch,
    *,
    golds: Mapping[str, GoldAnswers],
) -> Iterator[dict]:
    tokens = [asked_tokens(tokenizer, asked) for asked in prompts]
    cap = wanted.ask.max_new_tokens
    read = [
        answer_tokens(tokenizer, asked, t, golds[asked.item.id].texts, wanted.ask)
        if asked.item.id in golds
        else None
        for asked, t in zip(prompts, tokens, strict=True)
    ]
    longest = [max([cap, *map(len, r.options)]) if r else cap for r in read]
    lengths = [len(t.context) + n for t, n in zip(tokens, longest, strict=True)]
    _refuse_long(model, prompts, lengths)
    for index, answer in _answers(model, tokenizer, wanted, tokens, read, limits):
        asked, text = prompts[index], tokenizer.decode(answer.tokens, skip_special_tokens=True)
        made = score_text(
            asked.item, wanted.adapter, text, answer=wanted.ask.answer, finish=answer.finish_reason
        )
        made |= {"prompt_hash": asked_hash(asked, tokens[index])}
        made |= {"prompt_tokens": len(tokens[index].context)}
        made |= {"output_tokens": len(answer.tokens)}
        if after := read[index]:
            own = golds[asked.item.id]
            made |= gold_fields(own, after.options, answer.loglikelihoods)
        yield made


def _answers(
    model,
    tokenizer,
    wanted,
    tokens: list[PromptTokens],
    read: list[OptionTokens | None],
    limits: Batch,
) -> Iterator[tuple[int, Generated]]:
    """What is written, with the log-likelihoods of what is read after each prompt.

    Golds are read in the row of their prompt, so that it is read once. Where several tokens
    share one activation scale that would change what the model writes, and there they are
    read before, with prompts of their own.
    """
    served = vllm_protocols.is_served(model)
    apart, options = {}, [r.options if r else [] for r in read]
    if getattr(model, "scale_scope", "token") != "token":
        places = [i for i, r in enumerate(read) if r]
        items = [read[i] for i in places]
        found = option_loglikelihoods(model, items, batch_tokens=limits.tokens)
        apart = {places[i]: tuple(sums) for i, sums in found}
        options = []
    generate = vllm_protocols.generate_greedy if served else generate_greedy
    answers = generate(
        model,
        [t.context for t in tokens],
        max_new_tokens=wanted.ask.max_new_tokens,
        stop_tokens=stop_tokens(model, tokenizer),
        batch_tokens=limits.tokens,
        batch_rows=limits.rows,
        cuts=[t.cuts for t in tokens],
        complete=box_closes(tokenizer) if wanted.ask.stop == "answer" else None,
        options=options,
    )
    for index, answer in answers:
        sums = apart.get(index, answer.loglikelihoods)
        yield index, replace(answer, loglikelihoods=sums)


def stop_tokens(model, tokenizer) -> set[int]:
    """Ids that end an answer: of a turn or of a text, and the model's own list."""
    declared = model.generation_config.eos_token_id
    listed = declared if isinstance(declared, list) else [declared]
    ends = {end_of_turn(tokenizer), tokenizer.eos_token_id}
    return ends | {i for i in listed if i is not None}


def box_closes(tokenizer) -> Callable[[list[int]], bool]:
    """Whether the newest token of an answer completes a box; only a brace is looked at twice."""
    pieces = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    closing = {i for i, piece in enumerate(pieces) if piece and "}" in piece}

    def complete(tokens: list[int]) -> bool:
        if tokens[-1] not in closing:
            return False
        return last_boxed(tokenizer.decode(tokens, skip_special_tokens=True)) is not None

    return complete


def _refuse_long(model, prompts: list[Prompt], lengths: list[int]) -> None:
    limit = model.config.max_position_embeddings
    for asked, length in zip(prompts, lengths, strict=True):
        if length > limit:
            raise StudyError(
                f"item {asked.item.id} needs {length} tokens but the model reads {limit}; "
                "lower max_new_tokens or shots, or leave the item out"
            )
