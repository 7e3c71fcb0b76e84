"""Multiplications and additions that a study asks for, counted before anything runs.

A token read by a model costs two operations for each weight of a Linear that multiplies it.
That is counted; attention, norms and activations are not: for texts of a few hundred tokens
they are a few percent of the operations. Counts depend on the study file and the models alone,
never on the machine. Answers are counted at their longest, since nobody knows where they end.
"""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from helpers.core.architectures import HEAD
from helpers.core.paths import StudyPaths
from helpers.sources.chat_conversations import training_tokens
from helpers.sources.models import empty_model, load_config, model_folder
from helpers.sources.sampling import training_items
from helpers.study.schema import Study
from helpers.study.schema_sources import FineTunedModel
from helpers.study.study_run import Job

READING, WRITING = (
    "reading",
    "writing",
)  # products of many tokens (prefill) or of one token per answer (decode)
TOUCHED = (
    "weights touched"  # weights read by loading, hashing, rounding or comparing; not an operation
)
BACKWARD = 2  # gradients of inputs and of weights: each as many operations as the product
OPTIMIZER = 12  # passes over weight-sized tensors in one step of AdamW


@dataclass(frozen=True)
class Size:
    """Numbers of weights of a model, as operation counts need them.

    Attributes:
        linears: weights of all Linears but the head; in a mixture, of the experts that one
            token is routed to.
        head: weights of the head, tied to the embeddings or not.
        weights: all weights of the model, as they are loaded and saved.
        shapes: (in_features, out_features) of every Linear but the head.
    """

    linears: int
    head: int
    weights: int
    shapes: tuple[tuple[int, int], ...] = ()


def size_of(folder: Path) -> Size:
    """The size of a folder's model, from its configuration.

    Raises:
        StudyError: the configuration cannot be used.
    """
    config = load_config(folder)
    with torch.device("meta"):
        model = empty_model(config, dtype=torch.float32)
    linears = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != HEAD}
    routed_share = getattr(config, "num_experts_per_tok", 1) / getattr(config, "num_experts", 1)
    linear_weights = sum(
        round(m.weight.numel() * (routed_share if ".experts." in name else 1))
        for name, m in linears.items()
    )
    shapes = tuple((m.in_features, m.out_features) for m in linears.values())
    head = model.get_output_embeddings().weight.numel()
    return Size(linear_weights, head, sum(p.numel() for p in model.parameters()), shapes)


def folder_to_count(study: Study, model: str, paths: StudyPaths) -> Path:
    """The folder with a model's config and tokenizer; for a fine-tuned model its start's folder.

    Raises:
        StudyError: the model is not on this machine.
    """
    source = study.models[model]
    start = source.finetune.start if isinstance(source, FineTunedModel) else model
    return model_folder(study, start, paths)


def reading_operations(
    size: Size, arithmetic: str, tokens: int, *, head: int = 0, floats: str = ""
) -> Counter:
    """Operations of reading tokens.

    Args:
        arithmetic: the type the Linears multiply in.
        head: for how many of the tokens the head runs.
        floats: the type the head multiplies in; by default that of the Linears.
    """
    return _forward(size, tokens, head, f"{arithmetic} {READING}", f"{floats or arithmetic} ")


def writing_operations(size: Size, arithmetic: str, tokens: int, *, floats: str = "") -> Counter:
    """Operations of generating tokens: each is read and predicts the next."""
    return _forward(size, tokens, tokens, f"{arithmetic} {WRITING}", f"{floats or arithmetic} ")


def _forward(size: Size, tokens: int, head: int, kind: str, floats: str) -> Counter:
    counts = Counter({kind: 2 * size.linears * tokens})
    counts[floats + kind.rpartition(" ")[2]] += 2 * size.head * head
    return counts


def weight_passes(size: Size, times: int) -> Counter:
    """Passes over all weights of a model: numbers read, not operations."""
    return Counter({TOUCHED: size.weights * times})


def without_weight_passes(counts: Counter) -> dict[str, int]:
    """Operations by arithmetic, without passes over weights: for a record."""
    by_arithmetic: Counter = Counter()
    for kind, number in counts.items():
        if kind != TOUCHED:
            by_arithmetic[kind.partition(" ")[0]] += number
    return dict(sorted(by_arithmetic.items()))


def finetuning_operations(job: Job, tokenizer, *, stage: str) -> dict[str, int]:
    """Operations of a fine-tuning job by arithmetic, for its record."""
    assert stage == "finetuning", stage  # others count in modules that fine-tuning does not need
    size = size_of(folder_to_count(job.study, job.model, job.paths))
    return without_weight_passes(count_finetuning(job.study, job.model, size, tokenizer))


def count_finetuning(study: Study, model: str, size: Size, tokenizer) -> Counter:
    """Counts of fine-tuning one model: its epochs, and the held-out loss twice."""
    settings = study.models[model].finetune
    examples, heldout = training_items(study, model)
    batch_items = settings.batch_items
    tokens, answers = _padded([training_tokens(tokenizer, i) for i in examples], batch_items)
    arithmetic = "bfloat16" if settings.autocast == "bfloat16" else "float32"
    one_epoch = reading_operations(size, arithmetic, tokens, head=answers)
    counts = Counter({k: settings.epochs * (1 + BACKWARD) * n for k, n in one_epoch.items()})
    tokens, answers = _padded([training_tokens(tokenizer, i) for i in heldout], batch_items)
    steps = settings.epochs * -(-len(examples) // batch_items)
    return (
        counts
        + reading_operations(size, "float32", 2 * tokens, head=2 * answers)
        + weight_passes(size, OPTIMIZER * steps + 6)  # plus loading, hashing and saving
    )


def _padded(examples: list[tuple[list[int], list[int]]], batch_items: int) -> tuple[int, int]:
    """(tokens with padding, in batches of similar length; tokens of the answers)."""
    lengths = sorted(len(prompt) + len(answer) - 1 for prompt, answer in examples)
    batches = [lengths[i : i + batch_items] for i in range(0, len(lengths), batch_items)]
    return sum(len(b) * b[-1] for b in batches), sum(len(answer) for _, answer in examples)
