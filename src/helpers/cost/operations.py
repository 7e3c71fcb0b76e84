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

READING, WRITING = "reading", "writing"  # many tokens in one product, or one of each answer
TOUCHED = "weights touched"  # loaded, hashed, rounded or compared, each time one; no operation
BACKWARD = 2  # gradients of inputs and of weights: each as many operations as the product
OPTIMIZER = 12  # times that a step of AdamW reads or writes something the size of the weights


@dataclass(frozen=True)
class Size:
    """What of a model a token is multiplied by.

    Attributes:
        linears: weights of all Linears but the head; of a mixture, of the experts that a token
            is sent to.
        head: weights of the head, tied to the embeddings or not.
        weights: all of the model's, as they are loaded and saved.
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
    sent = getattr(config, "num_experts_per_tok", 1) / getattr(config, "num_experts", 1)
    counted = sum(
        round(m.weight.numel() * (sent if ".experts." in name else 1))
        for name, m in linears.items()
    )
    shapes = tuple((m.in_features, m.out_features) for m in linears.values())
    head = model.get_output_embeddings().weight.numel()
    return Size(counted, head, sum(p.numel() for p in model.parameters()), shapes)


def folder_to_count(study: Study, model: str, paths: StudyPaths) -> Path:
    """The folder that has a model's size and tokenizer: of one that is trained here, its start's.

    Raises:
        StudyError: the model is not on this machine.
    """
    source = study.models[model]
    start = source.finetune.start if isinstance(source, FineTunedModel) else model
    return model_folder(study, start, paths)


def read(size: Size, arithmetic: str, tokens: int, *, head: int = 0, floats: str = "") -> Counter:
    """Operations of reading some tokens.

    Args:
        arithmetic: what the Linears multiply in.
        head: at how many of the tokens the head is asked.
        floats: what the head multiplies in, if not in the same.
    """
    return _forward(size, tokens, head, f"{arithmetic} {READING}", f"{floats or arithmetic} ")


def written(size: Size, arithmetic: str, tokens: int, *, floats: str = "") -> Counter:
    """Operations of writing some tokens: each is read and predicts the next."""
    return _forward(size, tokens, tokens, f"{arithmetic} {WRITING}", f"{floats or arithmetic} ")


def _forward(size: Size, tokens: int, head: int, how: str, floats: str) -> Counter:
    counted = Counter({how: 2 * size.linears * tokens})
    counted[floats + how.rpartition(" ")[2]] += 2 * size.head * head
    return counted


def touched(size: Size, times: int) -> Counter:
    """All weights of a model, some times over."""
    return Counter({TOUCHED: size.weights * times})


def operations(counted: Counter) -> dict[str, int]:
    """Operations by arithmetic, without what is none: for a record."""
    found: Counter = Counter()
    for kind, number in counted.items():
        if kind != TOUCHED:
            found[kind.partition(" ")[0]] += number
    return dict(sorted(found.items()))


def for_record(job: Job, tokenizer, *, stage: str) -> dict[str, int]:
    """Operations of a fine-tuning by arithmetic."""
    assert stage == "finetuning", stage  # others count in modules that fine-tuning does not need
    size = size_of(folder_to_count(job.study, job.model, job.paths))
    return operations(training(job.study, job.model, size, tokenizer))


def training(study: Study, model: str, size: Size, tokenizer) -> Counter:
    """What fine-tuning a model of the study takes: its epochs, and the held-out loss twice."""
    settings = study.models[model].finetune
    examples, heldout = training_items(study, model)
    in_batches = settings.batch_items
    tokens, answers = _padded([training_tokens(tokenizer, i) for i in examples], in_batches)
    arithmetic = "bfloat16" if settings.autocast == "bfloat16" else "float32"
    once = read(size, arithmetic, tokens, head=answers)
    counted = Counter({k: settings.epochs * (1 + BACKWARD) * n for k, n in once.items()})
    tokens, answers = _padded([training_tokens(tokenizer, i) for i in heldout], in_batches)
    steps = settings.epochs * -(-len(examples) // in_batches)
    return (
        counted
        + read(size, "float32", 2 * tokens, head=2 * answers)
        + touched(size, OPTIMIZER * steps + 6)  # loaded, hashed and saved beside
    )


def _padded(examples: list[tuple[list[int], list[int]]], batch_items: int) -> tuple[int, int]:
    """(tokens with their padding, in batches of similar length; tokens of the answers)."""
    lengths = sorted(len(prompt) + len(answer) - 1 for prompt, answer in examples)
    batches = [lengths[i : i + batch_items] for i in range(0, len(lengths), batch_items)]
    return sum(len(b) * b[-1] for b in batches), sum(len(answer) for _, answer in examples)
