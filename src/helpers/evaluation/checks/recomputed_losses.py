"""Losses computed a second time by transformers' own forward pass: shared text, and fine-tuning.

Loss, KL and top-1 agreement of a few passages come from two full float64 logit matrices. This is
the second opinion on `helpers.inference.perplexity`, of whose code nothing is used here. The
baseline is loaded anew from its folder, its tokenizer too, and reads each passage by transformers'
own forward pass. A variant is not run again: the last states of the passes that its evaluation
made are kept by a hook, so that its figures are those of the path that was evaluated (two correct
int8 paths end in different logits). How much rounding matters is measured on the baseline alone:
each passage is read with two of transformers' implementations of attention, and its softmax over
the vocabulary is taken in float32 too.

Of a fine-tuning the loss, the items and the steps are checked. The examples are rendered by the
template itself, the end of a turn is read off it, and the labels are shifted by transformers. The
words around a question are the training's own.
"""

import math
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from helpers.core.processes import set_activity
from helpers.core.records import Gate, largest, sha256_text
from helpers.evaluation.checks.forward_passes import named_form
from helpers.sources.chat import SYSTEM
from helpers.sources.items import Item
from helpers.sources.model_files import TensorFiles
from helpers.sources.models import model_folder
from helpers.sources.sampling import shared_passages
from helpers.study.loading import Job
from helpers.study.schema import FineTuning, Runtime
from helpers.verification.checkpoint_files import source_token_ids, source_tokenizer

ATTENTION = ("sdpa", "eager")  # two implementations in transformers
ROWS, COLUMNS = 64, 16384  # size of the float64 blocks of a logit matrix


@dataclass(frozen=True)
class Recomputed:
    """Results of `recompute`.

    Attributes:
        rows: of a few passages: `id`, `tokens`, `nll`, `kl`, `top1_agreements`, their rounding
            errors `nll_blur`, `kl_blur` (nats), `ties` (tokens), and of each token `token_kl` and
            its rounding error `token_kl_blur` (None for the baseline).
        token_counts: predicted tokens of every passage, by its id.
        texts: the scored part of every passage, by its id.
        unread: ids of the passages whose tokens occur in no pass of the model.
    """

    rows: list[dict] = field(default_factory=list)
    token_counts: dict[str, int] = field(default_factory=dict)
    texts: dict[str, str] = field(default_factory=dict)
    unread: list[str] = field(default_factory=list)


class Passes:
    """Records token ids and last hidden states of every pass of a decoder.

    Attributes:
        read: (token ids, (tokens, hidden) last states) of every row of every pass.
    """

    def __init__(self, model):
        self.read: list[tuple[list[int], Tensor]] = []
        self._hook = None
        if isinstance(model, torch.nn.Module):  # otherwise another engine runs the model
            self._hook = model.base_model.register_forward_hook(self._record, with_kwargs=True)

    def _record(self, _module, _args, options, output) -> None:
        ids, states = options["input_ids"], output.last_hidden_state
        self.read += [(i.tolist(), s.detach()) for i, s in zip(ids, states, strict=True)]

    def end(self) -> None:
        """Stop recording."""
        if self._hook is not None:
            self._hook.remove()


def recompute(job: Job, model, passes: Passes) -> Recomputed:
    """Compute the figures of the first and the last passage, and the token counts of all.

    Args:
        job: names the variant.
        model: that variant; it reads again only if another engine runs it.
        passes: the recorded passes of its evaluation; recording stops here.
    """
    passes.end()
    folder, texts = model_folder(job.study, job.model, job.paths), shared_passages(job.study)
    limit = job.study.evaluation.shared_text.max_tokens
    tokenizer = source_tokenizer(job)
    tokenized = [source_token_ids(tokenizer, text, plain=True) for text in texts]
    tokens = [ids_of_text[:limit] for ids_of_text, _ in tokenized]
    starts = [
        max(1, special_tokens) for _, special_tokens in tokenized
    ]  # index of the first scored token
    ids = [sha256_text(text)[:16] for text in texts]
    baseline = transformers_model(folder, job.study.runtime)
    dtype = getattr(torch, job.recipe.dtype or job.study.runtime.dtype)
    rows = []
    for place in sorted({0, len(texts) - 1}):
        first, second = (
            _transformers_logits(baseline, tokens[place], implementation)
            for implementation in ATTENTION
        )
        logits = None
        if job.variant != job.study.baseline:
            states = _recorded_states(tokens[place][:-1], passes.read, model)
            logits = None if states is None else _head_logits(baseline, states, dtype)
            if logits is None:
                continue  # no pass read it, and the gate reports the missing row
        scored = slice(starts[place] - 1, None)
        logits = None if logits is None else logits[scored]
        row = compare_passage(tokens[place][scored], first[scored], second[scored], logits)
        rows.append({"id": ids[place], **row})
    predicted = {k: t[start:] for k, t, start in zip(ids, tokens, starts, strict=True)}
    counts = {key: len(ids_of_text) for key, ids_of_text in predicted.items()}
    read = {
        k: tokenizer.decode(
            ids_of_text, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        for k, ids_of_text in predicted.items()
    }
    places = zip(ids, tokens, strict=True)
    unread = [
        key
        for key, ids_of_text in places
        if _recorded_states(ids_of_text[:-1], passes.read, model) is None
    ]
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
def _transformers_logits(model, tokens: list[int], attention: str) -> Tensor:
    """(tokens - 1, vocabulary) logits of the next tokens, by the model's own forward."""
    model.set_attn_implementation(attention)
    ids = torch.tensor([tokens[:-1]], device=model.device)
    return model(input_ids=ids, use_cache=False).logits[0].cpu()


def _recorded_states(tokens: list[int], passes: list, model) -> Tensor | None:
    """(tokens, hidden) states of a passage in the recorded passes; None if no pass has it."""
    if not isinstance(model, torch.nn.Module):
        return model.states(tokens)
    for read, states in passes:
        for start in range(len(read) - len(tokens) + 1):
            if read[start : start + len(tokens)] == tokens:
                return states[start : start + len(tokens)]
    return None


@torch.inference_mode()
def _head_logits(baseline, states: Tensor, dtype: torch.dtype) -> Tensor:
    """(tokens, vocabulary) logits: the product in float64, rounded once to the declared type.

    No variant changes the head, so it is the baseline's.
    """
    head, parts = baseline.get_output_embeddings(), []
    x, bias = states.double().cpu(), getattr(head, "bias", None)
    for start in range(0, len(head.weight), COLUMNS):
        chosen = slice(start, start + COLUMNS)
        logits = x @ head.weight[chosen].to(dtype).double().cpu().T
        if bias is not None:
            logits += bias[chosen].to(dtype).double().cpu()
        parts.append(named_form(logits, baseline.config).to(dtype))
    return torch.cat(parts, dim=1)


def compare_passage(
    tokens: list[int], first: Tensor, second: Tensor, logits: Tensor | None
) -> dict:
    """The row of one passage.

    Args:
        tokens: token ids; the rows of the matrices predict all but the first one.
        first: (tokens - 1, vocabulary) the baseline's logits, the reference.
        second: the same by another implementation of attention; they differ by rounding.
        logits: the variant's; None for the baseline itself.
    """
    total: Counter[str] = Counter()
    token_kls: list[tuple[Tensor, Tensor]] = []  # by both readings of the baseline
    for start in range(0, len(first), ROWS):
        rows = slice(start, start + ROWS)
        targets = torch.tensor(tokens[1:])[rows, None]
        own = None if logits is None else logits[rows].double()
        sums, kls = _sums(first[rows].double(), second[rows].double(), own, targets)
        total.update(sums)
        token_kls.append(kls)
    kl, other_kl = (torch.cat(parts) for parts in zip(*token_kls, strict=True))  # (tokens - 1,)
    blur = (kl - other_kl).abs()  # its root of summed squares is a blur that cannot cancel
    return {
        "tokens": len(tokens) - 1,
        "nll": total["nll"],
        "kl": total["kl"],
        "top1_agreements": total["same"],
        "nll_blur": abs(total["nll"] - total["other_nll"]) + abs(total["softmax"]),
        "kl_blur": max(abs(total["kl"] - total["other_kl"]), blur.norm().item()),
        "ties": total["ties"],
        "token_kl": None if logits is None else kl.tolist(),
        "token_kl_blur": None if logits is None else blur.tolist(),
    }


def _sums(
    first: Tensor, second: Tensor, logits: Tensor | None, targets: Tensor
) -> tuple[dict, tuple[Tensor, Tensor]]:
    """(sums over some tokens, the KL of each), of float64 logits and (tokens, 1) targets.

    The KL and the baseline's own loss come from both readings of the baseline; `softmax` is
    the error of a float32 softmax in its loss.
    """
    references = [matrix.log_softmax(-1) for matrix in (first, second)]
    logprobs = references if logits is None else [logits.log_softmax(-1)] * 2
    losses = [-matrix.gather(1, targets).sum().item() for matrix in (*logprobs, references[0])]
    float32_loss = -first.float().log_softmax(-1).gather(1, targets).double().sum().item()
    pairs = zip(references, logprobs, strict=True)
    kls = tuple((p.exp() * (p - q)).sum(-1) for p, q in pairs)  # (tokens,) each
    chosen, blur = first if logits is None else logits, (first - second).abs().amax(-1)
    sums = {
        "nll": losses[0],
        "other_nll": losses[1],
        "softmax": float32_loss - losses[2],
        "kl": kls[0].sum().item(),
        "other_kl": kls[1].sum().item(),
        "same": int((first.argmax(-1) == chosen.argmax(-1)).sum()),
        "ties": int((_is_tied(first, blur) | _is_tied(chosen, blur)).sum()),
    }
    return sums, kls


def _is_tied(logits: Tensor, blur: Tensor) -> Tensor:
    """(tokens,) bool: whether rounding may change which token is the most likely one.

    Args:
        logits: (tokens, vocabulary).
        blur: (tokens,) how much rounding changes them.
    """
    best = logits.topk(2, dim=-1).values
    size = best[:, 0].abs() * torch.finfo(torch.float32).eps
    return best[:, 0] - best[:, 1] <= 2 * (blur + size)


IGNORED = -100  # transformers' label for tokens without loss
CLOSE = {"float32": 1e-3}  # relative, of a mean over all tokens
LONGEST_STEP = 3.2  # the most a step of AdamW moves a weight, in learning rates
COARSE = 0.02  # tolerance if the trained weights were rounded when saved


def steps_gate(settings: FineTuning, results: dict) -> Gate:
    """Training took one step per batch and epoch; no held-out item was trained on."""
    items = results.get("items", {})
    trained, heldout = items.get("training", []), items.get("heldout", [])
    expected = settings.epochs * math.ceil(settings.items / settings.batch_items)
    shared = set(trained) & set(heldout)
    sizes = len(set(trained)), len(set(heldout))
    return Gate(
        "training steps and held-out split",
        results["steps"] == expected == len(results["losses"])
        and sizes == (settings.items, settings.heldout_items)
        and not shared,
        f"{results['steps']} steps; {sizes[0]} items, {sizes[1]} held out, {len(shared)} in both",
        f"{expected} steps; {settings.items} items, {settings.heldout_items} held out, "
        "none in both",
    )


def weights_gate(start, folder, settings: FineTuning, results: dict, *, dtype: str) -> Gate:
    """Every tensor changed, and none by more than AdamW allows at the declared learning rate.

    A step of Adam is at most (1 - β₁) / √(1 - β₂) rates long (Kingma and Ba, arXiv:1412.6980).
    """
    before, after = (TensorFiles(path, dtype=torch.float32) for path in (start, folder))
    changes = {n: float((after[n] - before[n]).abs().max()) for n in after if n in before}
    unmoved, furthest = (
        [n for n, change in changes.items() if not change],
        largest(changes.values()),
    )
    limit = LONGEST_STEP * settings.learning_rate * results["steps"]
    if dtype != "float32":  # a step may be less than half the spacing of saved weights
        unmoved, limit = [], limit + max(float(before[n].abs().max()) for n in changes) * 2**-8
    example = f" ({unmoved[0]})" if unmoved else ""
    return Gate(
        "weight changes within the learning rate",
        not unmoved and 0 < furthest <= limit,
        f"{len(unmoved)} of {len(changes)} tensors did not move{example}; "
        f"the furthest by {furthest:.3g}",
        f"all of them, by at most {limit:.3g}",
    )


def loss_gate(folder, tokenizer, heldout: list[Item], results: dict, *, dtype: str) -> Gate:
    """The trained model's loss on the held-out answers equals the recorded one.

    Args:
        folder: the trained model's files.
        heldout: the held-out items.
        results: from the record of the fine-tuning.
    """
    name, recorded = "held-out loss matches transformers", results["heldout_loss_after"]
    set_activity("the held-out loss a second time")
    try:
        recomputed = heldout_loss(folder, tokenizer, heldout)
    except Exception as error:  # a folder that cannot be read, a template without the solution
        return Gate(name, False, f"{type(error).__name__}: {error}", "can be computed")
    tolerance = CLOSE.get(dtype, COARSE)
    return Gate(
        name,
        math.isclose(recorded, recomputed, rel_tol=tolerance),
        f"{recorded:.6g} nats a token on record, {recomputed:.6g} again",
        f"but for {tolerance:g} of it",
    )


@torch.inference_mode()
def heldout_loss(folder, tokenizer, items: list[Item]) -> float:
    """Mean loss in nats over the tokens of the worked solutions and of their end-of-turn."""
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, local_files_only=True, trust_remote_code=False
    ).eval()
    total = count = 0.0
    for item in items:
        ids, answer = training_example(tokenizer, item)
        labels = [IGNORED] * (len(ids) - answer) + ids[-answer:]
        output = model(input_ids=torch.tensor([ids]), labels=torch.tensor([labels]))
        total, count = total + output.loss.item() * answer, count + answer
    return total / count


def training_example(tokenizer, item: Item) -> tuple[list[int], int]:
    """(token ids of prompt, solution and end of turn; number of ids after the prompt)."""
    turns = [("system", SYSTEM["openmath"]), ("user", item.question), ("assistant", item.solution)]
    messages = [{"role": role, "content": content} for role, content in turns]
    prompt = tokenizer.apply_chat_template(messages[:2], tokenize=False, add_generation_prompt=True)
    conversation, solution = (
        tokenizer.apply_chat_template(messages, tokenize=False),
        item.solution.strip(),
    )
    token_ids = lambda part: tokenizer(part, add_special_tokens=False).input_ids  # noqa: E731
    added = tokenizer.added_tokens_decoder.items()
    special = {i for i, token in added if token.special} | set(tokenizer.all_special_ids)
    end_of_turn = [
        i
        for i in token_ids(conversation[conversation.rindex(solution) + len(solution) :])
        if i in special
    ]
    answer = [*token_ids(item.solution), *(end_of_turn or [tokenizer.eos_token_id])[:1]]
    return token_ids(prompt) + answer, len(answer)
