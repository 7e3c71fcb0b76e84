"""Perplexity, token-level KL and top-1 agreement on text every variant reads.

These see what a hundred items cannot: every token of every passage compares two whole
distributions.
"""

import math

import torch
from torch import Tensor
from tqdm import tqdm

from helpers.sources.conversations import tokenize
from helpers.study.errors import StudyError
from helpers.study.hashing import sha256_text


@torch.inference_mode()
def read_passages(
    model, reference, tokenizer, passages: list[str], *, max_tokens: int
) -> list[dict]:
    """One row a passage: summed nll, KL(reference ‖ model) and top-1 agreements.

    A sum that is not finite is None, as JSON has no other word for it.

    Args:
        model: the variant.
        reference: the float model, or None if the variant is that model itself.
        passages: texts; each is read alone and cut at `max_tokens`.

    Raises:
        StudyError: a passage is too short to predict anything in.
    """
    rows = []
    for passage in tqdm(passages, desc="shared text", unit="passage"):
        tokens = tokenize(tokenizer, passage)[:max_tokens]
        if len(tokens) < 2:
            raise StudyError(f"shared text: a passage has {len(tokens)} tokens; give longer ones")
        logprobs = _logprobs(model, tokens)  # (tokens - 1, vocabulary)
        targets = torch.tensor(tokens[1:], device=logprobs.device)[:, None]
        row = {"id": sha256_text(passage)[:16], "tokens": len(targets)}
        row["nll"] = _finite(-logprobs.gather(1, targets).double().sum().item())
        row["kl"], row["top1_agreements"] = 0.0, len(targets)
        if reference is not None:
            expected = _logprobs(reference, tokens)
            terms = expected.exp() * (expected - logprobs)
            row["kl"] = _finite(terms.double().sum().item())
            same = expected.argmax(-1) == logprobs.argmax(-1)
            row["top1_agreements"] = int(same.sum().item())
        rows.append(row)
    return rows


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _logprobs(model, tokens: list[int]) -> Tensor:
    """(tokens - 1, vocabulary) float32 log-probabilities of each next token."""
    ids = torch.tensor([tokens[:-1]], device=model.device)
    hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state[0]
    return model.get_output_embeddings()(hidden).float().log_softmax(-1)
