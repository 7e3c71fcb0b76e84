"""Full supervised fine-tuning in a plain loop: AdamW, loss on the answer only.

Batches hold items of similar length, the head runs only where a target is predicted,
and the order is seeded. No adapters, no packing across items. Weights are trained in
float32 whatever the study's dtype is: a usual step is smaller than half the spacing of
bfloat16 numbers, so that most of it would be rounded away unseen.
"""

import math
import random
from dataclasses import dataclass
from statistics import fmean, variance

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from helpers.core.errors import StudyError
from helpers.core.processes import Bar
from helpers.runtime.devices import has_bfloat16_units
from helpers.runtime.discovery import head_logits
from helpers.runtime.linears import pad
from helpers.sources.model_files import reads_alone
from helpers.study.schema import FineTunedModel, FineTuning, Runtime, Study

Example = tuple[list[int], list[int]]  # (prompt tokens, answer tokens)
LOSS_DECIMALS = 6  # of a loss on record: float32 has about seven digits
WINDOW_STEPS = 8  # of the running mean: enough to smooth the noise of single batches


@dataclass(frozen=True)
class Step:
    """One optimizer step: its mean loss per answer token, in nats."""

    number: int
    of: int
    loss: float
    learning_rate: float


def fine_tune_(model, examples: list[Example], settings: FineTuning, *, seed: int) -> list[Step]:
    """Train all weights of the model in place; returns its steps.

    Args:
        model: the float model; it is changed.
        examples: (prompt, answer) token ids.
        settings: epochs, learning rate, warm-up, items a batch, autocast.

    Raises:
        StudyError: an example is longer than `max_tokens`, or the loss is not finite.
        ValueError: the weights are not float32.
    """
    if other_dtypes := {p.dtype for p in model.parameters()} - {torch.float32}:
        raise ValueError(f"weights in {other_dtypes.pop()} would hardly move; load them in float32")
    _check_lengths(examples, settings.max_tokens)
    batches = [b for e in range(settings.epochs) for b in _epoch(examples, settings, seed + e)]
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=settings.learning_rate, weight_decay=0.0, fused=True
    )
    warmup = max(1, round(settings.warmup_fraction * len(batches)))
    steps = []
    model.train()
    for number, batch in enumerate(Bar(batches, desc="fine-tuning", unit="step"), start=1):
        decay = (len(batches) - number + 1) / max(1, len(batches) - warmup)
        learning_rate = settings.learning_rate * min(number / warmup, decay, 1.0)
        optimizer.param_groups[0]["lr"] = learning_rate
        loss = answer_loss(model, batch, autocast=settings.autocast)
        if not torch.isfinite(loss):
            raise StudyError(
                f"fine-tuning: the loss is {loss.item()} at step {number}; lower learning_rate"
            )
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        steps.append(Step(number, len(batches), loss.item(), learning_rate))
    model.eval()
    return steps


def uses_bfloat16(autocast: str, device: str) -> bool:
    """Whether training multiplies in bfloat16: requested, and not emulated by the processor."""
    return autocast == "bfloat16" and (device != "cpu" or has_bfloat16_units())


def _epoch(examples: list[Example], settings: FineTuning, seed: int) -> list[list[Example]]:
    """All examples once, in batches of similar length and in seeded order."""
    rng = random.Random(seed)
    order = sorted(examples, key=lambda e: (len(e[0]) + len(e[1]), rng.random()))
    size = settings.batch_items
    batches = [order[i : i + size] for i in range(0, len(order), size)]
    rng.shuffle(batches)
    return batches


def answer_loss(model, batch: list[Example], *, autocast: str) -> Tensor:
    """Mean cross-entropy over the answer tokens of a batch, in nats a token."""
    if len(batch) > 1 and reads_alone(model.config, max(len(p) + len(a) for p, a in batch)):
        losses = [
            answer_loss(model, [example], autocast=autocast) * len(example[1]) for example in batch
        ]
        return torch.stack(losses).sum() / sum(len(answer) for _, answer in batch)
    device = model.device
    tokens = pad([p + a[:-1] for p, a in batch], value=0, side="right", device=device)
    mask = pad(
        [[1] * (len(p) + len(a) - 1) for p, a in batch], value=0, side="right", device=device
    )
    with torch.autocast(device.type, torch.bfloat16, enabled=uses_bfloat16(autocast, device.type)):
        hidden = model.base_model(
            input_ids=tokens, attention_mask=mask, use_cache=False
        ).last_hidden_state
        states = [
            hidden[i, len(p) - 1 : len(p) - 1 + len(a)] for i, (p, a) in enumerate(batch)
        ]  # each (answer tokens, hidden): the states that predict the answer
        logits = head_logits(model, torch.cat(states))
    targets = torch.tensor([t for _, answer in batch for t in answer], device=device)
    return cross_entropy(logits.float(), targets)


@torch.inference_mode()
def heldout_loss(model, examples: list[Example], *, batch_items: int) -> float:
    """Mean cross-entropy per answer token over examples not trained on, in nats."""
    total = tokens = 0.0
    starts = range(0, len(examples), batch_items)
    for start in Bar(starts, desc="held-out loss", unit="batch"):
        batch = examples[start : start + batch_items]
        count = sum(len(answer) for _, answer in batch)
        total += answer_loss(model, batch, autocast="none").item() * count
        tokens += count
    return total / tokens


def _check_lengths(examples: list[Example], max_tokens: int) -> None:
    longest = max(len(prompt) + len(answer) for prompt, answer in examples)
    if longest > max_tokens:
        raise StudyError(
            f"finetune.max_tokens = {max_tokens} but an example has {longest} tokens; raise it"
        )


def float32_runtime(runtime: Runtime) -> Runtime:
    """The runtime with which a model to train is loaded."""
    return runtime.model_copy(update={"dtype": "float32"})


def cast_to_study_dtype(model, runtime: Runtime):
    """The trained model in the study's dtype, in which it is saved and evaluated."""
    return model.to(getattr(torch, runtime.dtype))


def fine_tuning_settings(study: Study, model: str) -> FineTuning:
    """The fine-tuning settings of a model of the study.

    Raises:
        StudyError: the study does not train this model itself.
    """
    source = study.models[model]
    if not isinstance(source, FineTunedModel):
        raise StudyError(f"models.{model} is not fine-tuned by this study; nothing to train")
    return source.finetune


def start_of(study: Study, model: str) -> str:
    """The model of the study that a fine-tuning starts from.

    Raises:
        StudyError: the study does not train this model itself.
    """
    return fine_tuning_settings(study, model).start


def recorded_losses(steps: list[Step]) -> list[float]:
    """Nats an answer token by step, as the record of the fine-tuning has them."""
    return [round(step.loss, LOSS_DECIMALS) for step in steps]


def describe_loss(losses: list[float]) -> str:
    """A sentence on whether the training loss falls, rises or does not change clearly.

    Compares the means of the first and the last quarter of the steps; they differ if they are
    more than two standard errors of their difference apart. With fewer than eight steps a
    quarter has no variance, and the sentence claims nothing.

    Args:
        losses: nats per answer token, by step.
    """
    if not all(map(math.isfinite, losses)):
        return "The loss on the answers is not a number"
    if (quarter := len(losses) // 4) < 2:
        return "The loss on the answers, by step"
    first, last = losses[:quarter], losses[-quarter:]
    change = fmean(last) - fmean(first)
    if abs(change) <= 2 * math.sqrt((variance(first) + variance(last)) / quarter):
        return "The loss on the answers does not change clearly"
    values = f"from {fmean(first):.2f} to {fmean(last):.2f} nats a token"
    return f"The loss on the answers {'falls' if change < 0 else 'rises'} {values}"


def running_mean(values: list[float]) -> list[float]:
    """The mean of the last WINDOW_STEPS values at each place, for the loss curve."""
    recent = [values[max(0, end - WINDOW_STEPS) : end] for end in range(1, len(values) + 1)]
    return [sum(part) / len(part) for part in recent]
