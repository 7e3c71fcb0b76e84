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

from helpers.core.activity import Bar
from helpers.core.checksums import check_checksums
from helpers.core.errors import StudyError
from helpers.core.file_writing import write_atomically
from helpers.core.hashing import sha256_text
from helpers.inference import single_sequence, vllm_protocols
from helpers.inference.loglikelihood import HEAD_ROWS
from helpers.inference.packed_attention import packed
from helpers.inference.packed_rows import Segment, Text, logits_at, read, rows
from helpers.runtime.linears import product
from helpers.runtime.rotary_positions import check_context_length, reads_alone
from helpers.sources.chat_conversations import beginning_tokens, plain_tokens
from helpers.sources.models import load_head, model_folder
from helpers.sources.sampling import shared_passages
from helpers.study.study_run import Job


@dataclass(frozen=True)
class States:
    """What a model has in mind at every token of the shared text, and the head that says it.

    Attributes:
        hidden: (tokens, hidden) last states, passage after passage, but each one's last token.
        head: (rows, hidden) → (rows, vocabulary) float32 logits.
    """

    hidden: Tensor
    head: Callable[[Tensor], Tensor]


def read_shared_text(job: Job, model, tokenizer) -> list[dict]:
    """One row a passage of what every variant reads; the baseline's states are kept.

    Args:
        job: the variant at hand; any but the baseline is held against the baseline's states.
        model: that variant, loaded.

    Raises:
        StudyError: the baseline has not been evaluated yet, or a file of it is damaged.
    """
    if job.variant != job.study.baseline:
        baseline = job.paths.evaluation(job.model, job.study.baseline)
        check_checksums(baseline, made_by="03_evaluation")
    wanted, passages = job.study.evaluation.shared_text, shared_passages(job.study)
    tokens = passage_tokens(tokenizer, passages, max_tokens=wanted.max_tokens)
    check_context_length("shared text", list(map(len, tokens)), model.config)
    states = read_passages(model, tokens, batch_tokens=job.study.evaluation.batch.tokens)
    first, reference = first_scored(tokenizer), None
    if job.variant == job.study.baseline:
        save_states(states_path(job), states)
    else:
        source = model_folder(job.study, job.model, job.paths)
        reference = load_states(states_path(job), source, model)
    return passage_rows(passages, tokens, states, reference, first=first)


def states_path(job: Job) -> Path:
    """Where the baseline's states of the job's model are kept."""
    return job.paths.evaluation(job.model, job.study.baseline) / "states.safetensors"


def passage_tokens(tokenizer, passages: list[str], *, max_tokens: int) -> list[list[int]]:
    """Token ids of each passage as the tokenizer begins a text, cut at `max_tokens`.

    Raises:
        StudyError: a passage is too short to predict anything in.
    """
    found = [plain_tokens(tokenizer, passage)[:max_tokens] for passage in passages]
    if (shortest := min(map(len, found))) <= first_scored(tokenizer):
        raise StudyError(f"shared text: a passage has {shortest} tokens; give longer ones")
    return found


def first_scored(tokenizer) -> int:
    """Place of the first token of a passage that is predicted: of the text, with one before it."""
    return max(1, len(beginning_tokens(tokenizer)))


def read_passages(model, passages: list[list[int]], *, batch_tokens: int) -> States:
    """The model's states at every token that has a next one; each passage is read alone.

    Args:
        passages: token ids, two at least.
        batch_tokens: the most tokens of one forward pass.
    """
    if vllm_protocols.is_served(model):
        return States(vllm_protocols.passage_states(model, passages), model.head)
    if getattr(model, "scale_scope", "token") == "pass":
        batch_tokens = 1
    apart = {i for i, tokens in enumerate(passages) if reads_alone(model.config, len(tokens))}
    together = [i for i in range(len(passages)) if i not in apart]
    texts = [Text((), tuple(passages[i][:-1])) for i in together]
    leaf = lambda index, before: Segment(list(texts[index].rest), before)  # noqa: E731
    found: dict[int, Tensor] = {}
    with Bar(total=len(passages), desc="shared text", unit="passage") as bar:
        for index in apart:
            found[index] = single_sequence.states(model, passages[index])[:-1]
            bar.update()
        with packed(model):
            for indices, segments, _ in rows(texts, leaf, row_tokens=batch_tokens):
                hidden = read(model, segments).split([len(s.tokens) for s in segments])
                found |= {together[i]: h for i, h in zip(indices, hidden, strict=True)}
                bar.update(len(indices))
    return States(torch.cat([found[i] for i in range(len(passages))]), partial(logits_at, model))


def save_states(path: Path, states: States) -> None:
    """Keep a model's states, for the variants that are held against it."""
    write_atomically(path, lambda p: save_file({"hidden": states.hidden.contiguous().cpu()}, p))


def load_states(path: Path, source: Path, like) -> States:
    """The float model's states with the head of its own files.

    Args:
        path: what `save_states` wrote.
        source: the float model's folder.
        like: the model that is held against them, for its device.

    Raises:
        StudyError: the states are not there.
    """
    if not path.is_file():
        raise StudyError(f"{path.name} of the baseline is missing; run 03_evaluation for it first")
    hidden = load_file(path)["hidden"].to(like.device)
    head = load_head(source, dtype=hidden.dtype, device=like.device)
    return States(hidden, lambda x: product(x, head).float())


@torch.inference_mode()
def passage_rows(
    passages: list[str],
    tokens: list[list[int]],
    states: States,
    reference: States | None,
    *,
    first: int = 1,
) -> list[dict]:
    """One row a passage: summed nll, KL(reference ‖ model) and top-1 agreements.

    A sum that is not finite is None, as JSON has no other word for it.

    Args:
        passages: the texts, for their ids.
        tokens: their token ids.
        states: the variant's.
        reference: the float model's; None if the variant is that model itself.
        first: place of the first token of each passage that is scored.
    """
    targets = torch.tensor([t for passage in tokens for t in passage[first:]])
    places = _places(tokens, first)
    nll, kl, same = (torch.zeros(len(targets), dtype=torch.float64) for _ in range(3))
    starts = range(0, len(targets), HEAD_ROWS)
    for start in Bar(starts, desc="comparing distributions", unit="part"):
        chunk = slice(start, start + HEAD_ROWS)
        at = places[chunk].to(states.hidden.device)
        logprobs = log_softmax(states.head(states.hidden[at]))  # (chunk, vocabulary)
        wanted = targets[chunk, None].to(logprobs.device)
        nll[chunk] = -logprobs.gather(1, wanted)[:, 0].double().cpu()
        same[chunk] = 1
        if reference is not None:
            expected = log_softmax(reference.head(reference.hidden[at]))
            terms = expected.exp() * (expected - logprobs)
            kl[chunk] = terms.sum(-1, dtype=torch.float64).cpu()
            same[chunk] = (expected.max(-1).indices == logprobs.max(-1).indices).double().cpu()
    found, lengths = [], [len(passage) - first for passage in tokens]
    sums = zip(*(x.split(lengths) for x in (nll, kl, same)), strict=True)
    for passage, length, (n, k, s) in zip(passages, lengths, sums, strict=True):
        row = {"id": sha256_text(passage)[:16], "tokens": length}
        row |= {"nll": _finite(n.sum().item()), "kl": _finite(k.sum().item())}
        found.append(row | {"top1_agreements": int(s.sum().item())})
    return found


def log_softmax(logits: Tensor) -> Tensor:
    """(rows, vocabulary) float32 log-probabilities, normalized by a sum in float64.

    Over 49,152 tokens torch's own, summed in float32, is off to one side by 1e-5 nats, and by
    more the flatter a distribution is: a large KL is not known to its digits (NOTES.md).
    """
    most = logits.amax(-1, keepdim=True)
    total = (logits - most).exp().sum(-1, keepdim=True, dtype=torch.float64)
    return logits - (most + total.log()).float()


def _places(tokens: list[list[int]], first: int) -> Tensor:
    """(scored tokens,) rows of the states that predict them."""
    found, start = [], 0
    for passage in tokens:
        found += range(start + first - 1, start + len(passage) - 1)
        start += len(passage) - 1
    return torch.tensor(found)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
