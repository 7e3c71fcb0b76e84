"""Calibration: the Linears to quantize, and statistics of their inputs from one pass.

Items are padded into batches and the padding is masked out, so that a statistic is over real
tokens only. The head is not calibrated: no variant quantizes it. Histograms and percentiles come
from an even sample of the tokens; abs-max is exact.

Where scales can be folded is found by `helpers.runtime.discovery`; here it becomes the groups of
some targets, and the Linears that one variant quantizes.
"""

from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from helpers.core.architectures import Place
from helpers.core.errors import StudyError
from helpers.core.files import write_atomically
from helpers.core.processes import Bar
from helpers.core.records import Record, check_checksums, sha256_file
from helpers.runtime.devices import every_expert_reads, pad, token_budget_batches, trim_heap
from helpers.runtime.discovery import linear_names, places
from helpers.sources.model_files import batch_tokens_for, check_context_length
from helpers.study.loading import Job
from helpers.study.schema import is_ignored


@dataclass(frozen=True)
class SmoothingGroup:
    """Modules into which one vector of smoothing scales s is folded, by name.

    Attributes:
        target: the study file's word for this kind of group.
        producer: the norm or Linear whose (last) output channels are divided by s.
        consumers: the Linears that read it; their input channels are multiplied by s.
        readers: float matrices that read it too (a router), multiplied by s as well.
        norm_offset: the constant that a norm adds to its weight before it multiplies.
    """

    target: str
    producer: str
    consumers: tuple[str, ...]
    readers: tuple[str, ...]
    norm_offset: float


def smoothing_groups(config, targets: tuple[str, ...]) -> list[SmoothingGroup]:
    """The groups of the named targets in a model of this configuration, in layer order.

    A norm that feeds both attention and MLP is a group of either target, and named by the first.

    Raises:
        StudyError: the model cannot be studied, or no scales can be folded at a target.
    """
    known = places(config)
    for target in targets:
        of_target = [place for place in known if place.serves((target,))]
        if not any(place.producer for place in of_target):
            raise StudyError(f"smooth.targets: {unfoldable(config, target, of_target)}")
    return [
        SmoothingGroup(p.target, p.producer, p.consumers, p.readers, p.norm_offset)
        for p in known
        if p.producer and p.serves(targets)
    ]


def unfoldable(config, target: str, of_target: list[Place]) -> str:
    """Why no scales can be folded at a target: what its first place would need."""
    if not of_target:
        return f"{target!r} is no place of a {config.model_type} model; leave it out"
    condition = of_target[0].refusal.format(config=config)
    return f"{target!r} needs {condition}; leave it out"


def linear_layers(model) -> dict[str, nn.Linear]:
    """Every Linear that the model calls by name, the head included, in the order of modules."""
    called = set(linear_names(model.config))
    return {name: m for name, m in model.named_modules() if name in called}


def quantized_linears(model, ignore: tuple[str, ...]) -> dict[str, nn.Linear]:
    """The Linears a variant quantizes: all but those it ignores.

    Args:
        ignore: module names, whole or their last part (`lm_head`, `down_proj`), and patterns
            after `re:` that match from the start of a whole name.

    Raises:
        StudyError: an ignored name or pattern matches nothing, or all of them everything.
    """
    linears = linear_layers(model)
    matrices = {k.removesuffix(".weight") for k, p in model.named_parameters() if p.ndim > 1}
    for entry in ignore:  # a router stays float anyway, and may be listed
        if not any(is_ignored(name, [entry]) for name in {*linears, *matrices}):
            raise StudyError(f"ignore: {entry!r} matches no Linear of this model; correct the name")
    quantized = {name: m for name, m in linears.items() if not is_ignored(name, ignore)}
    if not quantized:
        raise StudyError(f"ignore: {', '.join(ignore)} match every Linear; leave some to quantize")
    return quantized


SAMPLED_TOKENS = 16  # per batch and layer, for the histograms and percentiles
LOG2_EDGES = range(-12, 15)  # histogram bins of |x|, a power of two each


@dataclass
class InputStatistics:
    """Statistics of one Linear's input over all calibration tokens.

    Attributes:
        absmax: (in_features,) exact per-channel maximum of |x|.
        fit_absmax: the same without the items that judge the choice of α.
        argmax_item: index of the item with the layer's largest |x|.
        samples: (tokens, in_features) |x| of evenly sampled tokens.
        tokens: number of tokens.
    """

    absmax: Tensor
    fit_absmax: Tensor
    argmax_item: int
    samples: list[Tensor]
    tokens: int


def first_judging_item(items: int) -> int:
    """Index of the first judging item; the last tenth of the items judges the choice of α."""
    return items - max(1, items // 10)


def run_calibration(
    model, items: list[list[int]], *, batch_tokens: int
) -> dict[str, InputStatistics]:
    """Statistics of the input of every Linear but the head, over the tokens of all items.

    In a mixture every expert reads every token, so that rarely routed experts have statistics.

    Args:
        model: the float model, in evaluation mode; it is not changed.
        items: token ids of the calibration texts.
        batch_tokens: the most rows × longest row of one forward pass.

    Raises:
        StudyError: an activation is not finite, or an item longer than the model's context.
    """
    statistics: dict[str, InputStatistics] = {}
    lengths = [len(i) for i in items]
    check_context_length("calibration", lengths, model.config)
    budget = batch_tokens_for(model.config, lengths, batch_tokens=batch_tokens)
    with Bar(total=len(items), desc="calibration", unit="item") as bar:
        for batch in token_budget_batches(lengths, batch_tokens=budget):
            rows = [items[i] for i in batch]
            mask = pad([[1] * len(r) for r in rows], value=0, side="right", device=model.device)
            tokens = pad(rows, value=0, side="right", device=model.device)
            owners = torch.tensor([i for i in batch for _ in items[i]])
            fit = owners < first_judging_item(len(items))
            observed = _input_hooks(model, mask.bool(), owners, fit, statistics)
            with observed, every_expert_reads(model), torch.no_grad():
                model.base_model(input_ids=tokens, attention_mask=mask, use_cache=False)
            trim_heap()
            bar.update(len(batch))
    return statistics


@contextmanager
def _input_hooks(
    model, mask: Tensor, owners: Tensor, fit: Tensor, statistics: dict[str, InputStatistics]
):
    """Hooks on every Linear but the head; Linears that share an input share its statistics."""
    head = model.get_output_embeddings()
    last: dict[str, object] = {"input": None}

    def hook(name: str):
        def observe(_module: nn.Module, args: tuple) -> None:
            if args[0] is not last["input"]:
                last["input"] = args[0]
                x = args[0].reshape(*mask.shape, -1)  # some modules flatten rows and tokens
                last["summary"] = _summarize(x[mask.to(x.device)].float(), owners, fit)
            _merge_statistics_(statistics, name, last["summary"])

        return observe

    linears = {n: m for n, m in linear_layers(model).items() if m is not head}
    handles = [m.register_forward_pre_hook(hook(n)) for n, m in linears.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _summarize(x: Tensor, owners: Tensor, fit: Tensor) -> InputStatistics:
    """Statistics of one batch.

    Args:
        x: (tokens, in_features).
        owners: (tokens,) item indices; fit: (tokens,) bool, True for items that do not judge.
    """
    magnitude = x.abs()
    if not torch.isfinite(magnitude).all():
        raise StudyError(
            "calibration: an activation is not finite; use dtype float32 or mend the model"
        )
    absmax = magnitude.amax(0)
    loudest_token = magnitude[:, absmax.argmax()].argmax().item()
    step = max(1, len(x) // SAMPLED_TOKENS)
    fit_magnitude = magnitude[fit.to(x.device)]
    fit_absmax = fit_magnitude.amax(0) if len(fit_magnitude) else torch.zeros_like(absmax)
    samples = [magnitude[::step].clone().cpu()]
    return InputStatistics(
        absmax.cpu(), fit_absmax.cpu(), int(owners[loudest_token]), samples, len(x)
    )


def _merge_statistics_(
    statistics: dict[str, InputStatistics], name: str, new: InputStatistics
) -> None:
    old = statistics.get(name)
    if old is None:
        statistics[name] = replace(new, samples=list(new.samples))
        return
    if new.absmax.max() > old.absmax.max():
        old.argmax_item = new.argmax_item
    old.absmax = torch.maximum(old.absmax, new.absmax)
    old.fit_absmax = torch.maximum(old.fit_absmax, new.fit_absmax)
    old.samples += new.samples
    old.tokens += new.tokens


def save_calibration(path: Path, statistics: dict[str, InputStatistics]) -> None:
    """Write abs-max, 99th percentile, median, log2 histogram and token count of every input."""
    tensors = {}
    for name, of_input in statistics.items():
        samples = torch.cat(of_input.samples)
        tensors[f"{name}.absmax"] = of_input.absmax
        tensors[f"{name}.fit_absmax"] = of_input.fit_absmax
        tensors[f"{name}.p99"] = torch.quantile(samples, 0.99, dim=0)
        tensors[f"{name}.median"] = samples.median(0).values
        tensors[f"{name}.histogram"] = log2_histogram(samples)
        tensors[f"{name}.tokens"] = torch.tensor(of_input.tokens)
    tensors = {key: value.clone() for key, value in tensors.items()}
    write_atomically(path, lambda p: save_file(tensors, p))


def as_arrays(statistics: dict[str, InputStatistics]) -> dict[str, np.ndarray]:
    """(in_features,) abs-max of every Linear's input as numpy arrays, for tables."""
    return {name: of_input.absmax.numpy() for name, of_input in statistics.items()}


def save_surface(path: Path, linear: str, magnitude: Tensor) -> None:
    """Write one Linear's (tokens, in_features) |x| under the Linear's name."""
    tensors = {linear: magnitude.contiguous()}
    write_atomically(path, lambda p: save_file(tensors, p))


def check_item_lengths(items: list[list[int]], *, max_tokens: int) -> None:
    """Check that no item exceeds `max_tokens`, since calibration reads items untruncated.

    Raises:
        StudyError: an item is longer than `max_tokens`.
    """
    longest = max(map(len, items))
    if longest > max_tokens:
        raise StudyError(
            f"calibration.max_tokens = {max_tokens} but an item has {longest} tokens; raise it"
        )


def log2_histogram(magnitude: Tensor) -> Tensor:
    """(bins,) int64 counts of |x| by power of two; the end bins include all values beyond."""
    low, high = LOG2_EDGES[0], LOG2_EDGES[-1]
    exponent = magnitude.clamp(min=2.0**low).log2().floor().clamp(low, high - 1).long() - low
    return torch.bincount(exponent.flatten(), minlength=high - low)


def load_maxima(job: Job, record: Record) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(abs-max over all items, over those that do not judge a choice of α), for a quantization.

    Args:
        job: the model whose calibration is read.
        record: of the quantization; takes the calibration's hash as an input.

    Raises:
        StudyError: the calibration is missing or not what its stage wrote.
    """
    folder = job.paths.calibration(job.model)
    check_checksums(folder, made_by="01_calibration")
    path = folder / "activations.safetensors"
    record.add_input("calibration", sha256_file(path))
    return load_absmax(path), load_absmax(path, fit=True)


def judging(items: list[list[int]]) -> list[list[int]]:
    """The last tenth of the items, which judge a choice of α."""
    return items[first_judging_item(len(items)) :]


def load_absmax(path: Path, *, fit: bool = False) -> dict[str, Tensor]:
    """(in_features,) abs-max of every calibrated Linear's input, by name.

    Args:
        fit: only over the items that do not judge the choice of α.

    Raises:
        StudyError: there is no calibration file.
    """
    if not path.is_file():
        raise StudyError(f"{path.name} is missing; run 01_calibration first")
    suffix = ".fit_absmax" if fit else ".absmax"
    return {k.removesuffix(suffix): v for k, v in load_file(path).items() if k.endswith(suffix)}


@torch.inference_mode()
def input_surface(model, linear: str, tokens: list[int]) -> Tensor:
    """(tokens, in_features) |x| at one Linear's input on one item, for the outlier figures."""
    captured: list[Tensor] = []
    module = model.get_submodule(linear)
    handle = module.register_forward_pre_hook(lambda _m, args: captured.append(args[0].abs().cpu()))
    try:
        with every_expert_reads(model):
            model.base_model(input_ids=torch.tensor([tokens], device=model.device), use_cache=False)
    finally:
        handle.remove()
    return captured[0].reshape(len(tokens), -1).float()
