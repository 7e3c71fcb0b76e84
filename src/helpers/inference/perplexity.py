"""Perplexity, token-level KL and top-1 agreement on text every variant reads.

These see what a hundred items cannot: every token of every passage compares two whole
distributions. The float model reads the text once; what it had in mind at each token is
kept, so that no variant has to load it again.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from helpers.core.errors import StudyError
from helpers.core.files import write_atomically
from helpers.core.processes import Bar
from helpers.core.records import check_checksums, sha256_text
from helpers.inference import protocols, vllm_client
from helpers.inference.packed_attention import (
    Segment,
    SplitText,
    logits_at,
    packed_batches,
    read,
    use_packed_attention,
)
from helpers.inference.protocols import HEAD_ROWS
from helpers.runtime.devices import product
from helpers.sources.chat import beginning_tokens, plain_tokens
from helpers.sources.model_files import check_context_length, reads_alone
from helpers.sources.models import load_head, model_folder
from helpers.sources.sampling import shared_passages
from helpers.study.loading import Job

TOKEN_DIGITS = 6  # significant digits of a token's KL; float32's softmax has no more


@dataclass(frozen=True)
class HiddenStates:
    """Last hidden state at every token of the shared text, and the head that reads it.

    Attributes:
        hidden: (tokens, hidden), passage after passage, without each passage's last token.
        head: (rows, hidden) → (rows, vocabulary) float32 logits.
    """

    hidden: Tensor
    head: Callable[[Tensor], Tensor]


def read_shared_text(job: Job, model, tokenizer) -> list[dict]:
    """One row per passage of the shared text, with its tokens' texts; saves the baseline's states.

    Args:
        job: names the variant; every variant is compared with the baseline's states.
        model: that variant, loaded.

    Raises:
        StudyError: the baseline has not been evaluated yet, or a file of it is damaged.
    """
    if job.variant != job.study.baseline:
        baseline = job.paths.evaluation(job.model, job.study.baseline)
        check_checksums(baseline, made_by="03_evaluation")
    settings, passages = job.study.evaluation.shared_text, shared_passages(job.study)
    tokens = passage_tokens(tokenizer, passages, max_tokens=settings.max_tokens)
    check_context_length("shared text", list(map(len, tokens)), model.config)
    states = read_passages(model, tokens, batch_tokens=job.study.evaluation.batch.tokens)
    first, reference = first_scored_token(tokenizer), None
    if job.variant == job.study.baseline:
        save_states(states_path(job), states)
    else:
        source = model_folder(job.study, job.model, job.paths)
        reference = load_states(states_path(job), source, model)
    rows = passage_rows(passages, tokens, states, reference, first=first)
    return [
        row | {"token_texts": token_texts(tokenizer, ids, first=first)}
        for row, ids in zip(rows, tokens, strict=True)
    ]


def states_path(job: Job) -> Path:
    """The file of the baseline's hidden states for the job's model."""
    return job.paths.evaluation(job.model, job.study.baseline) / "states.safetensors"


def passage_tokens(tokenizer, passages: list[str], *, max_tokens: int) -> list[list[int]]:
    """Token ids of each passage with the tokenizer's start tokens, cut at `max_tokens`.

    Raises:
        StudyError: a passage has no token to predict.
    """
    token_ids = [plain_tokens(tokenizer, passage)[:max_tokens] for passage in passages]
    if (shortest := min(map(len, token_ids))) <= first_scored_token(tokenizer):
        raise StudyError(f"shared text: a passage has {shortest} tokens; give longer ones")
    return token_ids


def first_scored_token(tokenizer) -> int:
    """Index of a passage's first scored token: it belongs to the text and has a token before it."""
    return max(1, len(beginning_tokens(tokenizer)))


def token_texts(tokenizer, tokens: list[int], *, first: int) -> list[str]:
    """The text of each scored token; joined they are the scored part of the passage.

    A tokenizer may write a token differently at the beginning of a text, so each is decoded after
    the tokens before it. Of a character spread over several tokens the last one has the text.

    Args:
        tokens: token ids of one passage.
        first: index of the first scored token.
    """
    decode = partial(tokenizer.decode, clean_up_tokenization_spaces=False)
    texts, start, complete = [], first - 1, first  # tokens[start:complete] precede the next text
    for end in range(first + 1, len(tokens) + 1):
        text = decode(tokens[start:end])
        if end < len(tokens) and text.endswith("\ufffd"):  # half a character
            texts.append("")
            continue
        texts.append(text[len(decode(tokens[start:complete])) :])
        start, complete = complete, end
    return texts


def read_passages(model, passages: list[list[int]], *, batch_tokens: int) -> HiddenStates:
    """The model's hidden states at every token that has a next one; passages do not mix.

    Args:
        passages: token ids, at least two each.
        batch_tokens: the most tokens of one forward pass.
    """
    if vllm_client.is_served(model):
        return HiddenStates(vllm_client.passage_states(model, passages), model.head)
    if getattr(model, "scale_scope", "token") == "pass":
        batch_tokens = 1
    alone = {i for i, tokens in enumerate(passages) if protocols.read_alone(model, len(tokens))}
    batched = [i for i in range(len(passages)) if i not in alone]
    texts = [SplitText((), tuple(passages[i][:-1])) for i in batched]
    make_suffix = lambda index, before: Segment(list(texts[index].rest), before)  # noqa: E731
    hidden_by_passage: dict[int, Tensor] = {}
    with Bar(total=len(passages), desc="shared text", unit="passage") as bar:
        for index in alone:
            tokens = passages[index]
            if not reads_alone(model.config, len(tokens)):  # its positions need no last token
                tokens = [*tokens[:-1]]
            states = protocols.hidden_states(model, tokens)
            hidden_by_passage[index] = states[: len(passages[index]) - 1]
            bar.update()
        with use_packed_attention(model):
            for indices, segments, _ in packed_batches(texts, make_suffix, row_tokens=batch_tokens):
                hidden = read(model, segments).split([len(s.tokens) for s in segments])
                hidden_by_passage |= {batched[i]: h for i, h in zip(indices, hidden, strict=True)}
                bar.update(len(indices))
    return HiddenStates(
        torch.cat([hidden_by_passage[i] for i in range(len(passages))]), partial(logits_at, model)
    )


def save_states(path: Path, states: HiddenStates) -> None:
    """Write a model's hidden states, for the variants that are compared with it."""
    write_atomically(path, lambda p: save_file({"hidden": states.hidden.contiguous().cpu()}, p))


def load_states(path: Path, source: Path, like) -> HiddenStates:
    """The float model's states with the head of its own files.

    Args:
        path: what `save_states` wrote.
        source: the float model's folder.
        like: the model to compare with; its device is used.

    Raises:
        StudyError: the states are not there.
    """
    if not path.is_file():
        raise StudyError(f"{path.name} of the baseline is missing; run 03_evaluation for it first")
    hidden = load_file(path)["hidden"].to(like.device)
    weight, bias = load_head(source, dtype=hidden.dtype, device=like.device)
    return HiddenStates(hidden, lambda x: product(x, weight, bias).float())


@torch.inference_mode()
def passage_rows(
    passages: list[str],
    tokens: list[list[int]],
    states: HiddenStates,
    reference: HiddenStates | None,
    *,
    first: int = 1,
) -> list[dict]:
    """One row a passage: summed nll, KL(reference ‖ model) and top-1 agreements, KL by token.

    A number that is not finite becomes None, since JSON has no NaN. `token_kl` has the KL of each
    scored token in reading order, rounded to six digits; rows of the reference itself have none.

    Args:
        passages: the texts, for their ids.
        tokens: their token ids.
        states: the variant's.
        reference: the float model's; None if the variant is that model itself.
        first: index of the first scored token of each passage.
    """
    targets = torch.tensor([t for passage in tokens for t in passage[first:]])
    places = _predicting_rows(tokens, first)
    nll, kl, top1_agreements = (torch.zeros(len(targets), dtype=torch.float64) for _ in range(3))
    starts = range(0, len(targets), HEAD_ROWS)
    for start in Bar(starts, desc="comparing distributions", unit="part"):
        chunk = slice(start, start + HEAD_ROWS)
        at = places[chunk].to(states.hidden.device)
        logprobs = log_softmax(states.head(states.hidden[at]))  # (chunk, vocabulary)
        chunk_targets = targets[chunk, None].to(logprobs.device)
        nll[chunk] = -logprobs.gather(1, chunk_targets)[:, 0].double().cpu()
        top1_agreements[chunk] = 1
        if reference is not None:
            reference_logprobs = log_softmax(reference.head(reference.hidden[at]))
            terms = reference_logprobs.exp() * (reference_logprobs - logprobs)
            kl[chunk] = terms.sum(-1, dtype=torch.float64).cpu()
            top1_agreements[chunk] = (
                (reference_logprobs.max(-1).indices == logprobs.max(-1).indices).double().cpu()
            )
    rows, lengths = [], [len(passage) - first for passage in tokens]
    sums = zip(*(x.split(lengths) for x in (nll, kl, top1_agreements)), strict=True)
    for passage, length, (nlls, kls, agreements) in zip(passages, lengths, sums, strict=True):
        row = {"id": sha256_text(passage)[:16], "tokens": length}
        row |= {"nll": _finite(nlls.sum().item()), "kl": _finite(kls.sum().item())}
        row["top1_agreements"] = int(agreements.sum().item())
        if reference is not None:
            row["token_kl"] = [_finite(float(f"{x:.{TOKEN_DIGITS}g}")) for x in kls.tolist()]
        rows.append(row)
    return rows


def log_softmax(logits: Tensor) -> Tensor:
    """(rows, vocabulary) float32 log-probabilities, normalized by a sum in float64.

    torch sums in float32. Over 49,152 tokens that biases each log-probability by 1e-5 nats,
    and by more the flatter the distribution is, which shows in a large KL (NOTES.md).
    """
    largest = logits.amax(-1, keepdim=True)
    total = (logits - largest).exp().sum(-1, keepdim=True, dtype=torch.float64)
    return logits - (largest + total.log()).float()


def _predicting_rows(tokens: list[list[int]], first: int) -> Tensor:
    """(scored tokens,) the row of the hidden states that predicts each."""
    rows, start = [], 0
    for passage in tokens:
        rows += range(start + first - 1, start + len(passage) - 1)
        start += len(passage) - 1
    return torch.tensor(rows)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
