"""Asks a model that another engine runs: token ids go in, log-probabilities come out.

The same three operations as `loglikelihood`, `generation` and `perplexity` do on
a model of torch, for one that can only be asked (`helpers.inference.vllm_client`).
How its engine batches is its own affair; what is handed over at once is bounded.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch

from helpers.inference.generation import GeneratedAnswer
from helpers.inference.loglikelihood import OptionTokens
from helpers.runtime.batching import token_budget_batches


def is_served(model) -> bool:
    """Whether another engine runs the model, so that it has no torch modules here."""
    return not isinstance(model, torch.nn.Module)


def engine_packages(model) -> dict[str, str]:
    """Package versions of the engine of a served model, for records; empty for a torch model."""
    if not is_served(model):
        return {}
    return {f"{name} (serving)": version for name, version in model.versions().items()}


def option_loglikelihoods(
    model, items: list[OptionTokens], *, batch_tokens: int
) -> Iterator[tuple[int, list[float]]]:
    """Yield (item index, summed log-probability of each option)."""
    lengths = [sum(len(i.context) + len(option) for option in i.options) for i in items]
    for batch in token_budget_batches(lengths, batch_tokens=batch_tokens):
        rows = [(items[i].context, option) for i in batch for option in items[i].options]
        sums = iter(model.score(rows))
        for i in batch:
            yield i, [next(sums) for _ in items[i].options]


def generate_greedy(
    model,
    prompts: list[list[int]],
    *,
    max_new_tokens: int,
    stop_tokens: set[int],
    batch_tokens: int,
    complete: Callable[[list[int]], bool] | None = None,
    options: Sequence[Sequence[list[int]]] = (),
    **_batch_options,
) -> Iterator[tuple[int, GeneratedAnswer]]:
    """Yield (prompt index, answer); an answer is cut where it was first complete.

    After the answers of a batch, `prompt_logprobs` gives the log-likelihoods of its options.
    """
    lengths = [len(prompt) + max_new_tokens for prompt in prompts]
    for batch in token_budget_batches(lengths, batch_tokens=batch_tokens):
        batch_prompts = [prompts[i] for i in batch]
        answers = model.generate(
            batch_prompts, max_new_tokens=max_new_tokens, stop_tokens=stop_tokens
        )
        batch_options = [list(options[i]) if options else [] for i in batch]
        pairs = [
            (prompt, option)
            for prompt, own in zip(batch_prompts, batch_options, strict=True)
            for option in own
        ]
        sums = iter(model.score(pairs) if pairs else ())
        for i, own, (tokens, reason) in zip(batch, batch_options, answers, strict=True):
            answer = _cut_at_complete(tokens, reason, complete)
            yield i, replace(answer, loglikelihoods=tuple(next(sums) for _ in own))


def _cut_at_complete(tokens: list[int], reason: str, complete) -> GeneratedAnswer:
    for end in range(1, len(tokens) + 1) if complete else ():
        if complete(tokens[:end]):
            return GeneratedAnswer(tokens[:end], "answer")
    return GeneratedAnswer(tokens, reason)


def passage_states(model, passages: list[list[int]]) -> torch.Tensor:
    """(tokens, hidden) last states, passage after passage, without each passage's last token."""
    return torch.cat([model.states(tokens[:-1]) for tokens in passages])
