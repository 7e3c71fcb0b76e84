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
