"""What the float model makes of the shared text: as its states were kept, and off by rounding.

The first tells whether a variant was held against the baseline. The second is how far
rounding alone takes a float model from itself. A float model rounds each weight once and
the result of each operation once, by half an eps at most. Here every weight is moved up or
down by a whole eps, and by what √K of float32's roundings do to a sum of K products. The root
mean square of that is more than three times that of the roundings it stands for, so that its
KL is an upper limit.
"""

import torch

from helpers.core.activity import set_activity
from helpers.inference.perplexity import (
    HiddenStates,
    first_scored_token,
    load_states,
    passage_rows,
    passage_tokens,
    read_passages,
    states_path,
)
from helpers.sources.models import load_model, model_folder
from helpers.sources.sampling import shared_passages
from helpers.study.study_run import Job

PASSAGES = 4  # a mean over some hundred tokens; more would cost as much as the evaluation


def read_reference_passages(job: Job, model, tokenizer) -> list[dict]:
    """Rows of the first passages, from the saved float states that the variant is compared with.

    Args:
        job: names the variant; the baseline gets no rows.
        model: that variant, for its device.

    Raises:
        StudyError: the baseline has not been evaluated yet.
    """
    if job.variant == job.study.baseline:
        return []
    passages, tokens = _first_passages(job, tokenizer)
    states, first = _saved_states(job, model, tokens), first_scored_token(tokenizer)
    return passage_rows(passages, tokens, states, None, first=first)


def read_perturbed_passages(job: Job, tokenizer) -> list[dict]:
    """The same rows for the float model with every weight perturbed by one rounding.

    The reference is the same model before the perturbation, read again here: a baseline that
    was evaluated wrongly would widen the limit. Only for float variants that change the model
    or its float type.
    """
    if job.recipe.is_unmodified or job.recipe.claim.quantized:
        return []
    set_activity("the float model, off by rounding")
    passages, tokens = _first_passages(job, tokenizer)
    runtime = job.study.runtime
    types = {job.recipe.dtype, runtime.dtype}
    coarsest = torch.bfloat16 if "bfloat16" in types else torch.float32
    model = load_model(model_folder(job.study, job.model, job.paths), runtime)
    batch = {"batch_tokens": job.study.evaluation.batch.tokens}
    hidden = read_passages(model, tokens, **batch).hidden
    head = _saved_states(
        job, model, tokens
    ).head  # from the files, since the model's own head is perturbed too
    perturb_by_rounding_(model, dtype=coarsest)
    perturbed, first = read_passages(model, tokens, **batch), first_scored_token(tokenizer)
    return passage_rows(passages, tokens, perturbed, HiddenStates(hidden, head), first=first)


def _first_passages(job: Job, tokenizer) -> tuple[list[str], list[list[int]]]:
    passages = shared_passages(job.study)[:PASSAGES]
    limit = job.study.evaluation.shared_text.max_tokens
    return passages, passage_tokens(tokenizer, passages, max_tokens=limit)


def _saved_states(job: Job, model, tokens: list[list[int]]) -> HiddenStates:
    """The baseline's saved states at the tokens of these passages, which come first."""
    source = model_folder(job.study, job.model, job.paths)
    states = load_states(states_path(job), source, model)
    return HiddenStates(states.hidden[: sum(len(t) - 1 for t in tokens)], states.head)


@torch.no_grad()
def perturb_by_rounding_(model, *, dtype: torch.dtype) -> None:
    """Move every weight by one rounding of `dtype`, up or down at random with a fixed seed."""
    generator = torch.Generator().manual_seed(0)
    for weight in model.parameters():
        signs = torch.randint(0, 2, weight.shape, generator=generator, dtype=torch.int8) * 2 - 1
        size = torch.finfo(dtype).eps + weight.shape[-1] ** 0.5 * torch.finfo(torch.float32).eps
        weight.mul_((1 + size * signs).to(weight))
