"""Out of memory on a card: the batch is halved once, and one line says what to set.

What was answered before is kept. Answers may depend on the batch in their last bits there
(`batch_invariance`), as they do on any card.
"""

import gc
import warnings
from collections.abc import Callable, Iterator

import torch

from helpers.core.errors import StudyError
from helpers.study.schema import Batch


def halving(ask: Callable[[list, Batch], Iterator[dict]], prompts: list, limits: Batch):
    """Yield the predictions of `ask`, with half the batch from where memory ran out.

    Args:
        ask: (prompts, limits) → one prediction a prompt, whose `id` is the prompt's item's.
        prompts: all of them.
        limits: the most tokens and answers of one forward pass.

    Raises:
        StudyError: half a batch does not fit either; names one that is smaller.
    """
    answered: set[str] = set()
    try:
        for made in ask(prompts, limits):
            answered.add(made["id"])
            yield made
        return
    except torch.OutOfMemoryError:
        pass  # what the failed pass holds is let go with the error
    half = halved(limits)
    _let_go()
    warnings.warn(
        f"out of memory with evaluation.batch = {_words(limits)}; the rest is asked with "
        f"{_words(half)}, which the study file can set",
        stacklevel=2,
    )
    rest = [prompt for prompt in prompts if prompt.item.id not in answered]
    try:
        yield from ask(rest, half)
    except torch.OutOfMemoryError:
        _let_go()
        raise StudyError(
            f"out of memory with evaluation.batch = {_words(limits)}, and with half of it; "
            f"set evaluation.batch to {_words(halved(half))}"
        ) from None


def halved(limits: Batch) -> Batch:
    """Half the tokens and answers of a batch, one at least."""
    return Batch(tokens=max(1, limits.tokens // 2), rows=max(1, limits.rows // 2))


def _words(limits: Batch) -> str:
    return f"{{tokens: {limits.tokens}, rows: {limits.rows}}}"


def _let_go() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
