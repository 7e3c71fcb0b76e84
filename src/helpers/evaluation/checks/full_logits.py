"""Loss, KL and top-1 agreement of a few passages, from two full float64 logit matrices.

The second opinion on `perplexity`, of whose code nothing is used here. The baseline is
loaded anew from its folder, its tokenizer too, and reads each passage by transformers' own
forward pass. A variant is not run again: the last states of the passes that its evaluation
made are kept by a hook, so that its figures are those of the path that was evaluated (two
correct int8 paths end in different logits). How much rounding matters is measured on the
baseline alone: each passage is read with two of transformers' implementations of attention,
and its softmax over the vocabulary is taken in float32 too.
"""

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from helpers.core.hashing import sha256_text
from helpers.sources.models import model_folder
from helpers.sources.sampling import shared_passages
from helpers.study.schema import Runtime
from helpers.study.study_run import Job
from helpers.verification.source_tokenizer import own_tokenizer, own_tokens

ATTENTION = ("sdpa", "eager")  # two ways that transformers itself has
ROWS, COLUMNS = 64, 16384  # of a matrix that are in float64 at once


@dataclass(frozen=True)
class Recomputed:
    """What `recompute` found.

    Attributes:
        rows: of a few passages: `id`, `tokens`, `nll`, `kl`, `top1_agreements`, and how far
            rounding moves them: `nll_blur`, `kl_blur` (nats), `ties` (tokens).
        token_counts: predicted tokens of every passage, by its id.
        texts: the part of every passage that is predicted, by its id.
        unread: ids of the passages whose own tokens stand in none of the model's passes.
    """

    rows: list[dict] = field(default_factory=list)
    token_counts: dict[str, int] = field(default_factory=dict)
    texts: dict[str, str] = field(default_factory=dict)
    unread: list[str] = field(default_factory=list)


class Passes:
    """What the decoder of a model reads from now on: token ids and last states of every pass.

    Attributes:
        read: a (token ids, (tokens, hidden) last states) for every row of every pass.
    """

    def __init__(self, model):
        self.read: list[tuple[list[int], Tensor]] = []
        self._hook = None
        if isinstance(model, torch.nn.Module):  # else another engine runs it
            self._hook = model.base_model.register_forward_hook(self._record, with_kwargs=True)

    def _record(self, _module, _args, options, output) -> None:
        ids, states = options["input_ids"], output.last_hidden_state
        self.read += [(i.tolist(), s.detach()) for i, s in zip(ids, states, strict=True)]

    def end(self) -> None:
        """Record no more."""
        if self._hook is not None:
            self._hook.remove()


def recompute(job: Job, model, passes: Passes) -> Recomputed:
    """The figures of the first and the last passage, and the token counts of all.

    Args:
        job: the variant at hand.
        model: that variant; asked again only where another engine runs it.
        passes: what its evaluation read; ended here.
    """
    passes.end()
    folder, texts = model_folder(job.study, job.model, job.paths), shared_passages(job.study)
    limit = job.study.evaluation.shared_text.max_tokens
    tokenizer = own_tokenizer(job)
    begun = [own_tokens(tokenizer, text, plain=True) for text in texts]
    tokens = [found[:limit] for found, _ in begun]
    starts = [max(1, before) for _, before in begun]  # of what is predicted
    ids = [sha256_text(text)[:16] for text in texts]
    baseline = transformers_model(folder, job.study.runtime)
    dtype = getattr(torch, job.recipe.dtype or job.study.runtime.dtype)
    rows = []
    for place in sorted({0, len(texts) - 1}):
        first, second = (_own_logits(baseline, tokens[place], way) for way in ATTENTION)
        logits = None
        if job.variant != job.study.baseline:
            states = _states_of(tokens[place][:-1], passes.read, model)
            logits = None if states is None else _head(baseline, states, dtype)
            if logits is None:
                continue  # no pass read it: the gate misses its row
        begin = slice(starts[place] - 1, None)
        logits = None if logits is None else logits[begin]
        row = compared(tokens[place][begin], first[begin], second[begin], logits)
        rows.append({"id": ids[place], **row})
    predicted = {k: t[start:] for k, t, start in zip(ids, tokens, starts, strict=True)}
    counts = {key: len(found) for key, found in predicted.items()}
    read = {k: tokenizer.decode(found, skip_special_tokens=True) for k, found in predicted.items()}
    places = zip(ids, tokens, strict=True)
    unread = [key for key, found in places if _states_of(found[:-1], passes.read, model) is None]
    return Recomputed(rows, counts, read, unread)


def transformers_model(folder: Path, runtime: Runtime):
    """The model of a folder as transformers loads and runs it."""
    model = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=getattr(torch, runtime.dtype),
        device_map=runtime.device_map,
        use_safetensors=True,
        local_files_only=True,
        trust_remote_code=False,
    )
    return (model if runtime.device_map else model.to(runtime.device)).eval()


@torch.inference_mode()
def _own_logits(model, tokens: list[int], attention: str) -> Tensor:
    """(tokens - 1, vocabulary) logits of the next tokens, by the model's own forward."""
    model.set_attn_implementation(attention)
    ids = torch.tensor([tokens[:-1]], device=model.device)
    return model(input_ids=ids, use_cache=False).logits[0].cpu()


def _states_of(tokens: list[int], passes: list, model) -> Tensor | None:
    """(tokens, hidden) states of a passage, where it stands in a recorded pass; None nowhere."""
    if not isinstance(model, torch.nn.Module):
        return model.states(tokens)
    for read, states in passes:
        for start in range(len(read) - len(tokens) + 1):
            if read[start : start + len(tokens)] == tokens:
                return states[start : start + len(tokens)]
    return None


@torch.inference_mode()
def _head(baseline, states: Tensor, dtype: torch.dtype) -> Tensor:
    """(tokens, vocabulary) logits: the product in float64, rounded once to the type announced.

    No variant changes the head, so it is the baseline's.
    """
    head, parts = baseline.get_output_embeddings(), []
    x, bias = states.double().cpu(), getattr(head, "bias", None)
    for start in range(0, len(head.weight), COLUMNS):
        chosen = slice(start, start + COLUMNS)
        logits = x @ head.weight[chosen].to(dtype).double().cpu().T
        if bias is not None:
            logits += bias[chosen].to(dtype).double().cpu()
        parts.append(logits.to(dtype))
    return torch.cat(parts, dim=1)


def compared(tokens: list[int], first: Tensor, second: Tensor, logits: Tensor | None) -> dict:
    """The row of one passage.

    Args:
        tokens: token ids; the rows of the matrices predict all but the first one.
        first: (tokens - 1, vocabulary) the baseline's logits, which are compared with.
        second: the same by another implementation of attention: their distance is rounding.
        logits: the variant's; None where it is the baseline itself.
    """
    total: Counter[str] = Counter()
    for start in range(0, len(first), ROWS):
        rows = slice(start, start + ROWS)
        targets = torch.tensor(tokens[1:])[rows, None]
        own = None if logits is None else logits[rows].double()
        total.update(_sums(first[rows].double(), second[rows].double(), own, targets))
    return {
        "tokens": len(tokens) - 1,
        "nll": total["nll"],
        "kl": total["kl"],
        "top1_agreements": total["same"],
        "nll_blur": abs(total["nll"] - total["other_nll"]) + abs(total["softmax"]),
        "kl_blur": abs(total["kl"] - total["other_kl"]),
        "ties": total["ties"],
    }


def _sums(first: Tensor, second: Tensor, logits: Tensor | None, targets: Tensor) -> dict:
    """Sums over some tokens, of float64 logits (tokens, vocabulary) and (tokens, 1) targets.

    The KL, and the baseline's own loss, are from both readings of the baseline; `softmax` is
    what float32 loses in its loss.
    """
    references = [matrix.log_softmax(-1) for matrix in (first, second)]
    found = references if logits is None else [logits.log_softmax(-1)] * 2
    losses = [-matrix.gather(1, targets).sum().item() for matrix in (*found, references[0])]
    single = -first.float().log_softmax(-1).gather(1, targets).double().sum().item()
    terms = [p.exp() * (p - q) for p, q in zip(references, found, strict=True)]
    chosen, blur = first if logits is None else logits, (first - second).abs().amax(-1)
    return {
        "nll": losses[0],
        "other_nll": losses[1],
        "softmax": single - losses[2],
        "kl": terms[0].sum().item(),
        "other_kl": terms[1].sum().item(),
        "same": int((first.argmax(-1) == chosen.argmax(-1)).sum()),
        "ties": int((_undecided(first, blur) | _undecided(chosen, blur)).sum()),
    }


def _undecided(logits: Tensor, blur: Tensor) -> Tensor:
    """(tokens,) bool: whether rounding may change which token is the most likely one.

    Args:
        logits: (tokens, vocabulary).
        blur: (tokens,) how far rounding moves them.
    """
    best = logits.topk(2, dim=-1).values
    size = best[:, 0].abs() * torch.finfo(torch.float32).eps
    return best[:, 0] - best[:, 1] <= 2 * (blur + size)
