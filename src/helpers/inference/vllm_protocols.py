"""Asks a model that another engine runs: token ids go in, log-probabilities come out.

The same three operations as `loglikelihood`, `generation` and `perplexity` do on
a model of torch, for one that can only be asked (`helpers.inference.vllm_client`).
How its engine batches is its own affair; what is handed over at once is bounded.
"""

from collections.abc import Callable, Iterator, Sequence

import torch

from helpers.inference.generation import Generated
from helpers.inference.loglikelihood import OptionTokens
from helpers.runtime.batching import token_budget_batches


def is_served(model) -> bool:
    """Whether a model can only be asked, and has no modules of its own here."""
    return not isinstance(model, torch.nn.Module)


def packages(model) -> dict[str, str]:
    """Versions of the engine that runs a served model, for records; none of a model of torch."""
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
    **_its_own_affair,
) -> Iterator[tuple[int, Generated]]:
    """Yield (prompt index, answer); an answer that was complete before its end is cut there.

    The log-likelihoods of the options are asked for by prompt_logprobs, after the answers.
    """
    lengths = [len(prompt) + max_new_tokens for prompt in prompts]
    for batch in token_budget_batches(lengths, batch_tokens=batch_tokens):
        asked = [prompts[i] for i in batch]
        found = model.generate(asked, max_new_tokens=max_new_tokens, stop_tokens=stop_tokens)
        after = [list(options[i]) if options else [] for i in batch]
        rows = [(prompt, o) for prompt, own in zip(asked, after, strict=True) for o in own]
        sums = iter(model.score(rows) if rows else ())
        for i, own, (tokens, reason) in zip(batch, after, found, strict=True):
            yield i, _cut(tokens, reason, complete, tuple(next(sums) for _ in own))


def _cut(tokens: list[int], reason: str, complete, loglikelihoods: tuple) -> Generated:
    for end in range(1, len(tokens) + 1) if complete else ():
        if complete(tokens[:end]):
            return Generated(tokens[:end], "answer", loglikelihoods)
    return Generated(tokens, reason, loglikelihoods)


def passage_states(model, passages: list[list[int]]) -> torch.Tensor:
    """(tokens, hidden) last states, passage after passage, but each one's last token."""
    return torch.cat([model.states(tokens[:-1]) for tokens in passages])
