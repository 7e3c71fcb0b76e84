"""The evaluation's engine: a model answers every item of every set, in the items' order.

Out of memory on a card, the batch is halved once, and one line says what to set. What was answered
before is kept. Answers may depend on the batch in their last bits there, as they do on any card
(`helpers.evaluation.checks.numeric_gates`).
"""

import gc
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from types import MappingProxyType

import torch

from helpers.core.errors import StudyError
from helpers.core.processes import Bar
from helpers.evaluation.predictions import Progress, UnsavedPredictions
from helpers.evaluation.prompts import (
    AnswerTokens,
    GoldAnswers,
    TokenizedPrompt,
    answer_tokens,
    gold_answers,
    gold_fields,
    study_prompts,
    tokenize_prompts,
)
from helpers.evaluation.scoring import (
    cut_at_stop,
    last_boxed,
    score_options,
    score_task_options,
    score_task_target,
    score_task_text,
    score_text,
    target_foil,
)
from helpers.inference import vllm_client
from helpers.inference.protocols import (
    GeneratedAnswer,
    OptionScore,
    OptionTokens,
    generate_greedy,
    option_loglikelihoods,
    windowed_scores,
)
from helpers.sources.chat import end_of_turn
from helpers.sources.items import Item
from helpers.sources.model_files import context_length
from helpers.study.schema import Batch, EvaluationSet, Generate, Study, TaskSet


def with_halved_batch(ask: Callable[[list, Batch], Iterator[dict]], prompts: list, limits: Batch):
    """Yield the predictions of `ask`; after running out of memory, continue with half the batch.

    Args:
        ask: (prompts, limits) → one prediction per prompt, with the `id` of the prompt's item.
        prompts: all prompts, with an `item` each.
        limits: the most tokens and answers of one forward pass.

    Raises:
        StudyError: half a batch does not fit either; the message suggests a smaller one.
    """
    answered: set[str] = set()
    try:
        for prediction in ask(prompts, limits):
            answered.add(prediction["id"])
            yield prediction
        return
    except torch.OutOfMemoryError:
        pass  # the error's traceback references the memory of the failed pass
    half_batch = half_of(limits)
    _free_memory()
    warnings.warn(
        f"out of memory with evaluation.batch = {_describe(limits)}; the rest is asked with "
        f"{_describe(half_batch)}, which the study file can set",
        stacklevel=2,
    )
    remaining = [prompt for prompt in prompts if prompt.item.id not in answered]
    try:
        yield from ask(remaining, half_batch)
    except torch.OutOfMemoryError:
        _free_memory()
        raise StudyError(
            f"out of memory with evaluation.batch = {_describe(limits)}, and with half of it; "
            f"set evaluation.batch to {_describe(half_of(half_batch))}"
        ) from None


def half_of(limits: Batch) -> Batch:
    """Half the tokens and answers of a batch, at least one each."""
    return Batch(tokens=max(1, limits.tokens // 2), rows=max(1, limits.rows // 2))


def _describe(limits: Batch) -> str:
    return f"{{tokens: {limits.tokens}, rows: {limits.rows}}}"


def _free_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


NO_GOLDS: Mapping[str, GoldAnswers] = MappingProxyType({})


def ask_all(
    model,
    tokenizer,
    study: Study,
    progress: Progress | None = None,
    prompts: Mapping[str, list[TokenizedPrompt]] | None = None,
) -> dict[str, list[dict]]:
    """The predictions of every evaluation set of the study, by its name.

    Args:
        progress: saves predictions as they come, and holds those of an interrupted run.
        prompts: what `study_prompts` returned for this job; rendered here if None.
    """
    prompts = study_prompts(study, tokenizer) if prompts is None else prompts
    predictions = {}
    for name, evaluation_set in study.evaluation.datasets.items():
        digests = {p.item.id: p.digest for p in prompts[name]}
        saved = progress.open_set(name, digests) if progress else UnsavedPredictions()
        remaining = [p for p in prompts[name] if p.item.id not in saved.rows]
        golds = gold_answers([p.item for p in prompts[name]], evaluation_set)
        options = {"limits": study.evaluation.batch, "golds": golds}
        answers = answer(model, tokenizer, remaining, evaluation_set, **options)
        bar = {"total": len(digests), "initial": len(saved.rows), "desc": name, "unit": "item"}
        rows = saved.rows | {p["id"]: p for p in Bar(saved.appending(answers), **bar)}
        predictions[name] = [rows[item_id] for item_id in digests]
    return predictions


def evaluate(
    model,
    tokenizer,
    items: list[Item],
    evaluation_set: EvaluationSet,
    *,
    limits: Batch,
    golds: Mapping[str, GoldAnswers] = NO_GOLDS,
) -> Iterator[dict]:
    """Render the items' prompts and yield their predictions; see `answer`."""
    prompts = tokenize_prompts(items, evaluation_set, tokenizer)
    yield from answer(model, tokenizer, prompts, evaluation_set, limits=limits, golds=golds)


def answer(
    model,
    tokenizer,
    prompts: list[TokenizedPrompt],
    evaluation_set: EvaluationSet,
    *,
    limits: Batch,
    golds: Mapping[str, GoldAnswers] = NO_GOLDS,
) -> Iterator[dict]:
    """Yield one prediction per prompt, in the order in which they finish.

    Args:
        model: a causal language model of transformers, on any runtime, or a served one.
        prompts: of the evaluation set's items.
        evaluation_set: adapter and protocol.
        limits: the most tokens and the most answers of one forward pass.
        golds: by item id, the texts whose log-likelihood is read after the item's prompt; the
            prediction of an item that is not among them has no graded score.

    Raises:
        StudyError: a prompt exceeds the model's context, or half a batch the card's memory.
    """
    prompts, limits = _as_scales_allow(model, prompts, limits)
    scored = evaluation_set.ask.protocol in ("loglikelihood", "target")
    protocol = _score_options if scored else partial(_generate_answers, golds=golds)
    yield from with_halved_batch(
        partial(protocol, model, tokenizer, evaluation_set), prompts, limits
    )


def _as_scales_allow(
    model, prompts: list[TokenizedPrompt], limits: Batch
) -> tuple[list[TokenizedPrompt], Batch]:
    """Prompts without cuts if a text has one activation scale; one text a pass if a pass has."""
    scope = getattr(model, "scale_scope", "token")
    if scope != "token":
        prompts = [replace(p, tokens=replace(p.tokens, cuts=())) for p in prompts]
    return prompts, Batch(tokens=1, rows=1) if scope == "pass" else limits


def _score_options(
    model, tokenizer, evaluation_set, prompts: list[TokenizedPrompt], limits: Batch
) -> Iterator[dict]:
    tokens = [p.tokens for p in prompts]
    whole = [p.prompt.whole for p in prompts]  # a whole text is read in windows
    longest = [
        0 if w else len(t.context) + max(map(len, t.options))
        for t, w in zip(tokens, whole, strict=True)
    ]
    _check_context_length(model, prompts, longest)
    if isinstance(evaluation_set, TaskSet):
        yield from _score_task_options(model, evaluation_set, prompts, limits)
        return
    score = (
        vllm_client.option_loglikelihoods if vllm_client.is_served(model) else option_loglikelihoods
    )
    for index, logprobs in score(model, tokens, batch_tokens=limits.tokens):
        prompt, normalize = prompts[index].prompt, evaluation_set.ask.normalize
        prediction = score_options(prompt.item, logprobs, prompt.continuations, normalize=normalize)
        yield prediction | _counts(prompts[index], sum(map(len, tokens[index].options)))


def _score_task_options(
    model, task_set: TaskSet, prompts: list[TokenizedPrompt], limits: Batch
) -> Iterator[dict]:
    """Options of a task's requests, or its target with a foil, scored by the harness's metrics."""
    tokens = [p.tokens for p in prompts]
    if vllm_client.is_served(model):
        sums = vllm_client.option_loglikelihoods(model, tokens, batch_tokens=limits.tokens)
        scored = ((i, [OptionScore(s, False) for s in own]) for i, own in sums)
    else:
        limit = model.config.max_position_embeddings
        scored = windowed_scores(model, tokens, limit=limit, batch_tokens=limits.tokens)
    for index, scores in scored:
        item, options = prompts[index].item, tokens[index].options
        sums = [score.loglikelihood for score in scores]
        greedy = [score.greedy for score in scores]
        if task_set.ask.protocol == "target":
            prediction = score_task_target(task_set, item, sums, greedy, list(map(len, options)))
            golds = GoldAnswers(item.golds, target_foil(task_set, item))
            prediction |= gold_fields(golds, AnswerTokens(options, []), sums)
        else:
            prediction = score_task_options(task_set, item, sums, greedy)
        yield prediction | _counts(prompts[index], sum(map(len, options)))


# An answer's text is what its tokens say: transformers can take out spaces before punctuation.
ANSWER = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
NO_ANSWERS = AnswerTokens([], [])  # of an item without golds


def _generate_answers(
    model,
    tokenizer,
    evaluation_set,
    prompts: list[TokenizedPrompt],
    limits: Batch,
    *,
    golds: Mapping[str, GoldAnswers],
) -> Iterator[dict]:
    ask = evaluation_set.ask
    tokens = {
        i: answer_tokens(tokenizer, p, golds[p.item.id].texts, ask)
        for i, p in enumerate(prompts)
        if p.item.id in golds
    }
    options = [tokens.get(i, NO_ANSWERS) for i in range(len(prompts))]
    longest = [max([ask.max_new_tokens, *map(len, own.answers)]) for own in options]
    lengths = [len(p.tokens.context) + n for p, n in zip(prompts, longest, strict=True)]
    _check_context_length(model, prompts, lengths)
    for index, generated in _generate(model, tokenizer, ask, prompts, options, limits):
        item = prompts[index].item
        text = tokenizer.decode(generated.tokens, **ANSWER)
        finish = generated.finish_reason
        if isinstance(evaluation_set, TaskSet):
            text = cut_at_stop(text, prompts[index].prompt.until)
            prediction = score_task_text(evaluation_set, item, text, finish=finish)
        else:
            adapter = evaluation_set.adapter
            prediction = score_text(item, adapter, text, answer=ask.answer, finish=finish)
        prediction |= _counts(prompts[index], len(generated.tokens))
        if index in tokens:
            sums = generated.loglikelihoods
            prediction |= gold_fields(golds[item.id], tokens[index], sums)
        yield prediction


def _generate(
    model,
    tokenizer,
    ask: Generate,
    prompts: list[TokenizedPrompt],
    options: list[AnswerTokens],
    limits: Batch,
) -> Iterator[tuple[int, GeneratedAnswer]]:
    """Yield (prompt index, answer with the log-likelihoods of the prompt's options).

    Options are read in the row of their prompt, so that the prompt is read once. If several
    tokens share one activation scale, options would change what the model generates; they are
    then read before, in rows of their own.
    """
    shares_scale = getattr(model, "scale_scope", "token") != "token"
    loglikelihoods = _read_apart(model, prompts, options, limits) if shares_scale else {}
    generate = vllm_client.generate_greedy if vllm_client.is_served(model) else generate_greedy
    answers = generate(
        model,
        [p.tokens.context for p in prompts],
        max_new_tokens=ask.max_new_tokens,
        stop_tokens=stop_tokens(model, tokenizer, plain=all(p.prompt.plain for p in prompts)),
        batch_tokens=limits.tokens,
        batch_rows=limits.rows,
        cuts=[p.tokens.cuts for p in prompts],
        complete=_end_of_answer(tokenizer, ask, prompts),
        options=[] if shares_scale else [own.answers for own in options],
        forms=[len(own.form) for own in options],
    )
    for index, generated in answers:
        sums = loglikelihoods.get(index, generated.loglikelihoods)
        yield index, replace(generated, loglikelihoods=sums)


def _read_apart(
    model, prompts: list[TokenizedPrompt], options: list[AnswerTokens], limits: Batch
) -> dict[int, tuple[float, ...]]:
    """Log-likelihoods of each prompt's options by prompt index, without any generation."""
    indices = [i for i, own in enumerate(options) if own.answers]
    items = [
        OptionTokens(tokens.context, options[i].answers, tokens.cuts, len(options[i].form))
        for i in indices
        for tokens in [prompts[i].tokens]
    ]
    served = vllm_client.is_served(model)
    score = vllm_client.option_loglikelihoods if served else option_loglikelihoods
    sums = score(model, items, batch_tokens=limits.tokens)
    return {indices[number]: tuple(own) for number, own in sums}


def read_golds(
    model,
    tokenizer,
    prompts: list[TokenizedPrompt],
    evaluation_set: EvaluationSet,
    *,
    limits: Batch,
    golds: Mapping[str, GoldAnswers],
) -> list[dict]:
    """The graded scores of prompts without any generation: their ids and the fields of golds.

    Args:
        prompts: of a set with generated answers; those without golds are left out.
    """
    prompts, limits = _as_scales_allow(model, [p for p in prompts if p.item.id in golds], limits)
    ask = evaluation_set.ask
    tokens = [answer_tokens(tokenizer, p, golds[p.item.id].texts, ask) for p in prompts]
    sums = _read_apart(model, prompts, tokens, limits)
    return [
        {"id": p.item.id} | gold_fields(golds[p.item.id], tokens[i], sums[i])
        for i, p in enumerate(prompts)
    ]


def _counts(prompt: TokenizedPrompt, output_tokens: int) -> dict:
    """The fields of a prediction that say what was asked, and how many tokens it took."""
    return {
        "prompt_hash": prompt.digest,
        "prompt_tokens": len(prompt.tokens.context),
        "output_tokens": output_tokens,
    }


def stop_tokens(model, tokenizer, *, plain: bool = False) -> set[int]:
    """Ids that end an answer: end of turn, end of text, and the model's own list.

    Args:
        plain: whether the answer goes on with a plain text, in which there are no turns.
    """
    declared = model.generation_config.eos_token_id
    listed = declared if isinstance(declared, list) else [declared]
    ends = {tokenizer.eos_token_id, *listed} | (set() if plain else {end_of_turn(tokenizer)})
    return {i for i in ends if i is not None}


def _end_of_answer(
    tokenizer, ask: Generate, prompts: list[TokenizedPrompt]
) -> Callable[[list[int]], bool] | None:
    """The test of whether an answer is complete before the model ends it; None without one."""
    if ask.stop == "answer":
        return box_closes(tokenizer)
    until = {text for p in prompts for text in p.prompt.until}
    return holds_stop(tokenizer, sorted(until)) if until else None


def holds_stop(tokenizer, until: Sequence[str]) -> Callable[[list[int]], bool]:
    """A test of whether the last tokens of an answer hold one of the texts that end it."""
    longest = max(len(text.encode("utf-8")) for text in until)

    def complete(tokens: list[int]) -> bool:
        # A special token may be one of the texts.
        end = tokenizer.decode(tokens[-longest - 1 :], clean_up_tokenization_spaces=False)
        return any(text in end for text in until)

    return complete


def box_closes(tokenizer) -> Callable[[list[int]], bool]:
    """A test of whether an answer's newest token closes its box; it decodes only after a brace."""
    pieces = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    closing = {i for i, piece in enumerate(pieces) if piece and "}" in piece}

    def complete(tokens: list[int]) -> bool:
        if tokens[-1] not in closing:
            return False
        return last_boxed(tokenizer.decode(tokens, **ANSWER)) is not None

    return complete


def _check_context_length(model, prompts: list[TokenizedPrompt], lengths: list[int]) -> None:
    limit = context_length(model.config)
    for prompt, length in zip(prompts, lengths, strict=True):
        if length > limit:
            raise StudyError(
                f"item {prompt.item.id} needs {length} tokens but the model reads {limit}; "
                "lower max_new_tokens or shots, or leave the item out"
            )
