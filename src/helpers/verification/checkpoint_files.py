"""Files and loaded models that the gates on a variant read.

Nothing here comes from the run that made the checkpoint. The smoothing scales are recovered from
the files (a norm on disk is the source's norm over s), and the paper's formula is written out
again, so that a bug in `helpers.quantization.smoothing` or `.compression` does not vouch for
itself. Tensors are read one at a time, and one model is in memory at a time: a check needs little
more memory than the model it checks.

Hooks show what Linears are given, and what the model answers, on a few real texts. Token ids come
from the source's own tokenizer, loaded anew: transformers alone says what a text begins with, and
nothing of `helpers.sources.chat` or `helpers.evaluation.prompts` is used for it.
"""

import math
from collections.abc import Callable, Iterable
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import torch
from compressed_tensors.utils.match import match_name
from torch import Tensor, nn
from transformers import AutoTokenizer

from helpers.core.architectures import HEAD
from helpers.core.records import read_json
from helpers.quantization.calibration import SmoothingGroup, load_absmax, smoothing_groups
from helpers.quantization.int8_linear import HALF_RANGE
from helpers.quantization.variants import load_int8, load_quantized, load_reference, load_variant
from helpers.runtime.devices import every_expert_reads, release_memory
from helpers.runtime.discovery import architecture, head_logits, linear_names
from helpers.sources.chat import conversation
from helpers.sources.items import Item
from helpers.sources.model_files import TensorFiles, load_config, reads_alone
from helpers.sources.models import load_model, load_tokenizer, model_folder
from helpers.sources.sampling import calibration_items
from helpers.study.loading import Job
from helpers.study.schema import Runtime


def source_tokenizer(job: Job):
    """The tokenizer of the job's model as transformers loads it."""
    folder = model_folder(job.study, job.model, job.paths)
    return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


def source_token_ids(tokenizer, text: str, plain: bool) -> tuple[list[int], int]:
    """(token ids of a text without closing special tokens, number of leading special tokens).

    Args:
        plain: the text is not rendered by a chat template, which adds its own special tokens.
    """
    encoding = tokenizer(text, add_special_tokens=plain, return_special_tokens_mask=True)
    ids, added = list(encoding.input_ids), list(encoding.special_tokens_mask) if plain else []
    first = next((i for i, special in enumerate(added) if not special), 0)
    last = next((i for i, special in enumerate(reversed(added)) if not special), 0)
    return ids[: len(ids) - last], first


@torch.inference_mode()
def logits_of(model, items: list[list[int]]) -> list[Tensor]:
    """Float32 logits of each item read alone: (tokens, vocabulary)."""
    logits = []
    for tokens in items:
        ids = torch.tensor([tokens], device=model.device)
        hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state[0]
        logits.append(head_logits(model, hidden).float().cpu())
    return logits


@torch.inference_mode()
def capture_inputs(model, names: Iterable[str], tokens: list[int]) -> dict[str, Tensor]:
    """Module name to its input on one text, in the original shape.

    In a mixture every expert reads every token, so that each expert has an input.
    """
    inputs: dict[str, Tensor] = {}

    def keep(name: str):
        return lambda _module, args: inputs.__setitem__(name, args[0].detach())

    handles = [model.get_submodule(n).register_forward_pre_hook(keep(n)) for n in names]
    with every_expert_reads(model):
        logits_of(model, [tokens])
    for handle in handles:
        handle.remove()
    return inputs


@torch.inference_mode()
def input_maxima(model, items: list[list[int]]) -> dict[str, Tensor]:
    """Linear name to (in_features,) abs-max of its inputs, each item read alone."""
    maxima: dict[str, Tensor] = {}

    def observe(name: str):
        def keep(_module, args: tuple) -> None:
            top = args[0].float().abs().flatten(0, -2).amax(0).cpu()
            maxima[name] = torch.maximum(maxima[name], top) if name in maxima else top

        return keep

    linears = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    handles = [m.register_forward_pre_hook(observe(n)) for n, m in linears]
    try:
        with every_expert_reads(model):
            for tokens in items:
                ids = torch.tensor([tokens], device=model.device)
                model.base_model(input_ids=ids, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return maxima


@contextmanager
def first_block_only(model):
    """Inside, the model has only its first decoder block."""
    parent, _, name = architecture(model.config).blocks.rpartition(".")
    holder = model.get_submodule(parent)
    blocks = getattr(holder, name)
    setattr(holder, name, blocks[:1])
    try:
        yield
    finally:
        setattr(holder, name, blocks)


class ModelSlot:
    """A job's source and checkpoint as models; loading one frees the other.

    Args:
        job: names the model and the variant.
    """

    def __init__(self, job: Job):
        self.job = job
        self.source_folder = model_folder(job.study, job.model, job.paths)
        self.folder = job.paths.checkpoint(job.model, job.variant)
        self._slot: tuple[str, object] = ("", None)

    @property
    def source_model(self):
        """The source, loaded from its files; a caller that changes it must call `release`."""
        runtime = self.job.study.runtime
        return self._load_once("source", lambda: load_model(self.source_folder, runtime))

    @property
    def running_model(self):
        """The checkpoint, loaded as the evaluation loads it."""
        kind = self.job.study.runtime.quantized if self.job.recipe.compressed else "float"
        return self._load_once(kind, lambda: load_variant(self.job)[0])

    @property
    def int8_model(self):
        """The checkpoint on INT8 kernels."""
        runtime = self.job.study.runtime
        return self._load_once("int8", lambda: load_quantized(load_int8, self.folder, runtime))

    @property
    def reference_model(self):
        """The checkpoint as compressed-tensors simulates it."""
        runtime = self.job.study.runtime
        return self._load_once(
            "reference", lambda: load_quantized(load_reference, self.folder, runtime)
        )

    def _load_once(self, name: str, load: Callable):
        if self._slot[0] != name:
            self.release()
            self._slot = (name, load())
        return self._slot[1]

    def release(self) -> None:
        """Free the loaded model; the next access loads one again."""
        self._slot = ("", None)
        release_memory()


def with_own_kernels(job: Job) -> Job:
    """The job on this project's own int8 kernels, whose Linears the gates can access.

    If a study runs on vLLM, its checkpoints are still verified here; `make serve-check`
    compares vLLM's Linears with the same products.
    """
    if job.study.runtime.quantized != "vllm":
        return job
    runtime = job.study.runtime.model_copy(update={"quantized": "int8"})
    return replace(job, study=job.study.model_copy(update={"runtime": runtime}))


SMALLEST = 1e-5  # floor of maxima and scales, as the smoothing declares it
PROBES, PROBE_TOKENS = (
    2,
    48,
)  # real texts for forward passes, which are the expensive part of the gates

GPTQ_DAMPING = 0.01  # of the mean of the Hessian's diagonal, added to the diagonal
# GPTQ moves a weight by more than half a step, to make up for the rounding of weights before it.
# With R Rᵀ = H + λI, R triangular, a row's error e (in steps) has |(eR)_j| <= R_jj / 2, so that
# λ |e|² <= |eR|² <= tr(H + λI) / 4. With λ = 0.01 tr(H) / n, the root mean square of e is at most
GPTQ_RMS = 0.5 * math.sqrt((1 + GPTQ_DAMPING) / GPTQ_DAMPING)  # steps
# What is still taken for a way to round, in a checkpoint that says nothing of it:
SHORTEST_GRID = 0.5  # of the largest weight; llmcompressor's MSE observer tries 0.81 and above
FEW, FAR = 0.001, 4.0  # the share of moved weights that is too small, and steps that are far
SAME_SIZE = 0.02  # of a row whose weights were moved in no direction


def _reads(norm_group: SmoothingGroup, group: SmoothingGroup) -> bool:
    """Whether the Linear that is a group's producer reads the norm of another group."""
    return group.producer in norm_group.consumers


def float_dtype(folder: Path) -> torch.dtype:
    """The dtype of a folder's token embeddings."""
    files, table = TensorFiles(folder, dtype=None), architecture(load_config(folder)).embeddings[0]
    return files.stored_dtype(f"{table}.weight")


class CheckpointFiles(ModelSlot):
    """The files of one job's source, calibration and checkpoint, read on first use.

    Args:
        job: names the model and the variant.
        source_hash: content hash of the source's folder before the run touched anything.
        record: results that the quantization will record.
    """

    def __init__(self, job: Job, *, source_hash: str, record: dict | None = None):
        super().__init__(with_own_kernels(job))
        self.source_hash, self.claim, self.record = source_hash, job.claim, record
        self.dtype = getattr(torch, job.study.runtime.dtype)
        self.source_dtype = self.dtype  # that the checkpoint was made from
        if self.claim.made_elsewhere and self.folder.is_dir():
            self.source_dtype = float_dtype(self.folder)
            self.dtype = max((self.dtype, self.source_dtype), key=lambda t: torch.finfo(t).eps)
        self.calibration_folder = job.paths.calibration(job.model)
        self._declared: dict[SmoothingGroup, Tensor] = {}

    @cached_property
    def config(self):
        return load_config(self.source_folder)

    @cached_property
    def source(self) -> TensorFiles:
        """The source's tensors at the study's dtype; a tied head is its embeddings.

        For a checkpoint made elsewhere, they have the dtype of its float tensors.
        """
        return TensorFiles(self.source_folder, dtype=self.source_dtype)

    @property
    def at_study_dtype(self) -> "CheckpointFiles":
        """The same files, the source's tensors at the study's dtype."""
        files = CheckpointFiles(self.job, source_hash=self.source_hash, record=self.record)
        files.source_dtype = getattr(torch, self.job.study.runtime.dtype)
        return files

    @cached_property
    def is_converted(self) -> bool:
        """Whether source, checkpoint and study differ in dtype, so that conversions round."""
        dtypes = {float_dtype(self.source_folder), self.source_dtype, self.dtype}
        return self.claim.made_elsewhere and len(dtypes) > 1

    @cached_property
    def saved(self) -> TensorFiles:
        """The checkpoint's tensors as stored."""
        return TensorFiles(self.folder, dtype=None)

    @property
    def blocks(self) -> str:
        """Module name of the list of decoder blocks."""
        return architecture(self.config).blocks

    @cached_property
    def widest(self) -> int:
        """The largest in_features of a Linear."""
        return max(self.source.shape(f"{n}.weight")[1] for n in self.linears if n != HEAD)

    @cached_property
    def linears(self) -> list[str]:
        """Names of all Linears of the architecture, including the head."""
        return linear_names(self.config)

    @cached_property
    def targets(self) -> list[str]:
        """Names of the Linears that the variant declares as quantized."""
        if not self.claim.compressed:
            return []
        listed = {
            name
            for name in self.linears
            for i in self.claim.ignore
            if name.endswith(f".{i}") or match_name(name, i)  # as compressed-tensors reads it
        }
        return [name for name in self.linears if name not in listed]

    @property
    def rounded_targets(self) -> list[str]:
        """Names of the targets whose weights are rounded: all, unless activations alone are."""
        ruler = self.claim.ruler
        return self.targets if ruler is None or ruler.weights else []

    @cached_property
    def stored_int8(self) -> set[str]:
        """Names of the Linears whose stored weights are int8."""
        int8 = [k for k in self.saved if self.saved.stored_dtype(k) == torch.int8]
        return {k.removesuffix(".weight") for k in int8}

    @cached_property
    def absmax(self) -> dict[str, Tensor]:
        return load_absmax(self.calibration_folder / "activations.safetensors")

    @cached_property
    def calibration_record(self) -> dict:
        return read_json(self.calibration_folder / "record.json", made_by="01_calibration")

    @cached_property
    def groups(self) -> list[SmoothingGroup]:
        """The groups that the variant declares as smoothed; empty if it does not smooth.

        Of a checkpoint made elsewhere, those that its files show to be smoothed.
        """
        if self.claim.made_elsewhere:
            return [*self._norm_groups, *self._row_scales]
        if not self.claim.smooth:
            return []
        return smoothing_groups(self.config, self.claim.smooth.targets)

    @cached_property
    def _foldable(self) -> list[SmoothingGroup]:
        targets = (p.target for p in architecture(self.config).places if p.producer)
        return smoothing_groups(self.config, tuple(dict.fromkeys(targets)))

    @cached_property
    def _norm_groups(self) -> list[SmoothingGroup]:
        """The groups whose norm in the checkpoint is not the source's."""
        factors = ((group, self.norm_factors(group)) for group in self._foldable)
        return [group for group, pair in factors if pair and not torch.equal(*pair)]

    @cached_property
    def _row_scales(self) -> dict[SmoothingGroup, Tensor]:
        """(features,) scales of the groups whose producer, a Linear, had its rows divided.

        A row's step is its largest weight / 127.5, so that step and source give the divisor of a
        row. It may be that of a clipped grid: the rows were divided if their readers' weights are
        far nearer to source × these scales than to the source.
        """
        found: dict[SmoothingGroup, Tensor] = {}
        for group in self._foldable:
            step = self.saved.get(f"{group.producer}.weight_scale")
            consumers = [name for name in group.consumers if name in self.stored_int8]
            if self.norm_factors(group) or step is None or step.numel() == 1 or not consumers:
                continue
            columns = [self.recovered_scales(g) for g in self._norm_groups if _reads(g, group)]
            weight = self.source[f"{group.producer}.weight"].double() * (columns or [1])[0]
            scales = weight.abs().amax(1) / HALF_RANGE / step.double().flatten()
            scales = scales[-self.source.shape(f"{consumers[0]}.weight")[1] :]
            if bool(((scales - 1).abs() <= 2 * torch.finfo(self.dtype).eps).all()):
                continue
            plain, divided = (
                sum(self._distance(name, columns) for name in consumers)
                for columns in (torch.ones_like(scales), scales)
            )
            if divided < plain / 2:
                found[group] = scales
        return found

    def _distance(self, name: str, columns: Tensor) -> float:
        """Mean squared distance of a stored Linear from source × columns, in steps."""
        step = self.saved[f"{name}.weight_scale"].double().reshape(-1, 1)
        steps = self.source[f"{name}.weight"].double() * columns / step
        return (self.saved[f"{name}.weight"].double() - steps).square().mean().item()

    @cached_property
    def alphas(self) -> dict[str, float]:
        """α of every group, by its first consumer: the declared or the recorded one.

        A recorded α must be one that the study file allows.
        """
        names = [group.consumers[0] for group in self.groups]
        declared = self.claim.smooth.alpha
        if isinstance(declared, float):
            return dict.fromkeys(names, declared)
        folder = self.job.paths.quantization(self.job.model, self.job.variant)
        chosen = read_json(folder / "alpha.json", made_by="02_quantization")["alphas"]
        allowed_alphas = [step / 10 for step in range(11)] if declared == "auto" else list(declared)
        if undeclared := [n for n in names if chosen[n] not in allowed_alphas]:
            raise ValueError(
                f"α = {chosen[undeclared[0]]} of {undeclared[0]} is not an α of the study"
            )
        if declared != "auto" and len(set(chosen.values())) != 1:
            raise ValueError("a grid gives one α to all groups")
        return {name: chosen[name] for name in names}

    def declared_scales(self, group: SmoothingGroup) -> Tensor:
        """(in_features,) float64 s_j = max|X_j|^α / max|W_j|^(1-α), SmoothQuant's equation 4.

        Computed from the calibration file and the source's weights. A Linear is a consumer
        once, and its rows are divided only after its columns were measured, so the source's
        weights are the right ones for every group.
        """
        if group not in self._declared:
            alpha = self.alphas[group.consumers[0]]
            columns = [self.source[f"{n}.weight"].abs().amax(0) for n in group.consumers]
            weight = torch.stack(columns).amax(0).double().clamp(min=SMALLEST)
            act = self.absmax[group.consumers[0]].double().clamp(min=SMALLEST)
            scales = (act**alpha / weight ** (1 - alpha)).clamp(min=SMALLEST)
            self._declared[group] = scales
        return self._declared[group]

    def norm_factors(self, group: SmoothingGroup) -> tuple[Tensor, Tensor] | None:
        """(features,) float64 factors of a group's norm, (source, checkpoint).

        None if the producer is a Linear.
        """
        key = f"{group.producer}.weight"
        if len(self.source.shape(key)) > 1:
            return None
        before, after = self.source[key].double(), self.saved[key].double()
        return before + group.norm_offset, after + group.norm_offset

    def recovered_scales(self, group: SmoothingGroup) -> Tensor:
        """(in_features,) float64 s of the checkpoint: the source's norm over the saved norm.

        A norm channel of zero does not determine its s; the declared one is returned, or 1 if
        none is declared. The same holds if the producer is a Linear, whose rows the grid gate
        checks.
        """
        factors = self.norm_factors(group)
        if self.claim.made_elsewhere:
            if factors is None:
                return self._row_scales[group]
            before, after = factors
            return torch.where(before == after, 1.0, before / after)
        declared = self.declared_scales(group)
        if factors is None:
            return declared
        before, after = factors
        return torch.where((before == 0) & (after == 0), declared, before / after)

    @cached_property
    def folded(self) -> dict[str, tuple[Tensor | None, Tensor | None]]:
        """Name of a Linear or router to the scales of (its input channels, its output channels).

        Both cover all channels: those of a fused Linear that no group divides have scale 1.
        """
        scales_by_name: dict = {n: (None, None) for n in self.linears}
        for group in self.groups:
            scales = self.recovered_scales(group)
            for name in (*group.consumers, *group.readers):
                scales_by_name[name] = (scales, scales_by_name.get(name, (None, None))[1])
            if group.producer in scales_by_name:
                rows = torch.ones(self.source.shape(f"{group.producer}.weight")[0]).double()
                rows[-len(scales) :] = scales
                scales_by_name[group.producer] = (scales_by_name[group.producer][0], rows)
        return scales_by_name

    def smoothed_weight(self, name: str) -> Tensor:
        """(out_features, in_features) float64: the source's weight times the recovered scales."""
        weight = self.source[f"{name}.weight"].double()
        columns, rows = self.folded[name]
        weight = weight if columns is None else weight * columns
        return weight if rows is None else weight / rows[:, None]

    def errors_of_rows(self, name: str, weight: Tensor, step: Tensor) -> Tensor:
        """(out_features,) root mean square of stored − float weights, in steps.

        Input channels that calibration never saw are left out: GPTQ sets their weights to 0.

        Args:
            weight: (out_features, in_features) float64, what was rounded.
            step: (out_features or 1, 1) float64.
        """
        error = self.saved[f"{name}.weight"].double() - weight / step
        seen = self.absmax[name] > 0 if name in self.absmax else slice(None)  # no head is there
        return error[:, seen].square().mean(1).nan_to_num(torch.inf).sqrt()

    @cached_property
    def found_roundings(self) -> dict[str, str]:
        """How each target of a checkpoint made elsewhere was rounded, by what its weights show."""
        return {name: self.found_rounding(name) for name in self.targets}

    def found_rounding(self, name: str) -> str:
        """How a Linear was rounded: `nearest`, `mse` (clipped), `gptq` (moved further), or why not.

        A weight is nearest if it is within half a step of source × scales, each known to the
        dtype's rounding; clipped, if it is at the end of a shorter grid. Whoever moves weights
        further (GPTQ) moves many of them, none of them far, and in no direction: the root mean
        square of a row's errors is within GPTQ's bound and a row's mean size is that of source ×
        scales. A few weights off, and far off, are no method.
        """
        q, step = self.saved[f"{name}.weight"], self.saved[f"{name}.weight_scale"]
        step, weight = step.double().reshape(-1, 1), self.smoothed_weight(name)
        rows = weight if len(step) > 1 else weight.reshape(1, -1)
        relative = 2 * torch.finfo(self.dtype).eps + 32 * torch.finfo(torch.float32).eps
        top = rows.abs().amax(1, keepdim=True)
        share = torch.where(top == 0, 1.0, step / (top / HALF_RANGE))
        by_127 = (share * (HALF_RANGE - 0.5) / HALF_RANGE - 1).abs() <= relative  # as some divide
        if not bool(((share >= SHORTEST_GRID) & (share <= 1 + relative) | by_127).all()):
            return "of other steps"
        steps = weight / step
        clipped = steps.clamp(-128, 127)
        error = (q.double() - clipped).abs()
        beyond = error > 0.5 + relative * steps.abs()
        whole = bool((share >= 1 - relative).all())
        if not beyond.any():
            return "nearest" if whole else "mse"
        if beyond.double().mean() < FEW and error.max() > FAR:
            return "of a few other weights"
        sizes = (q.double() * clipped).sum(1) / clipped.square().sum(1)
        if self.errors_of_rows(name, clipped * step, step).max() > GPTQ_RMS + 128 * relative:
            return "of other weights"
        if (sizes.nan_to_num(1.0) - 1).abs().max() > SAME_SIZE:
            return "of other sizes"
        return "gptq"

    def rounding_of(self, name: str) -> str:
        """The declared rounding of a Linear, or the found one of a checkpoint made elsewhere."""
        return self.found_roundings[name] if self.claim.made_elsewhere else self.claim.rounding

    @cached_property
    def tokenizer(self):
        switch = self.job.study.enable_thinking
        return load_tokenizer(self.source_folder, enable_thinking=switch)

    @cached_property
    def items(self) -> list[Item]:
        """The calibration items, drawn again from the study file."""
        return calibration_items(self.job.study, self.job.calibration, draw=self.job.draw)

    @cached_property
    def tokens(self) -> list[list[int]]:
        """Token ids of the calibration texts by the source's own tokenizer and template."""
        own = source_tokenizer(self.job)
        return [source_token_ids(own, *self._text(item))[0] for item in self.items]

    def _text(self, item: Item) -> tuple[str, bool]:
        """(calibration text of an item, whether it is plain text without a template)."""
        messages = conversation(item, self.job.calibration_settings.adapter, shots=0)
        if not self.tokenizer.chat_template:
            return "\n".join(t for t in (messages[-1]["content"], item.solution) if t), True
        options = {"tokenize": False, "add_generation_prompt": True}
        return self.tokenizer.apply_chat_template(messages, **options) + item.solution, False

    @cached_property
    def probes(self) -> list[list[int]]:
        """Prefixes of a few calibration items; whole items if prefixes are read differently."""
        return [
            tokens if reads_alone(self.config, len(tokens)) else tokens[:PROBE_TOKENS]
            for tokens in self.tokens[:PROBES]
        ]

    @cached_property
    def captured(self) -> dict[str, Tensor]:
        """Linear name to its input in the running model on one text, in the original shape."""
        return capture_inputs(self.running_model, self.targets, self.probes[0])

    def rounding(self, in_features: int) -> float:
        """Relative difference allowed between two correct implementations of a Linear.

        A float32 sum of K products accumulates about √K roundings; the input, the two factors
        and the result are each rounded once to the model's dtype.
        """
        eps32 = torch.finfo(torch.float32).eps
        return 4 * torch.finfo(self.dtype).eps + math.sqrt(in_features) * eps32


class RotatedFiles:
    """The files of a rotated model beside those of its start, and what its weights should be.

    Its states are x R1 and its values v R2, a head at a time. So a Linear that reads states is
    W diag(g) R1, g the norm's weight, one that writes them R1ᵀ W, v is R2ᵀ W diag(g) R1 and o
    R1ᵀ W R2. The matrices are recovered from the embeddings and from v: of all orthogonal ones,
    the one that takes the start's to the rotated model's (Procrustes). A Hadamard matrix has
    entries ±1/√n, so that the signs give it without rounding.

    Args:
        start, folder: of the two models.
        rotations: those that the study declares.
        runtime: with the float type in which the model is saved.
        tokens: token ids of a few texts.
        texts: all texts of the study.
    """

    def __init__(
        self,
        start: Path,
        folder: Path,
        rotations: Iterable[str],
        *,
        runtime: Runtime,
        tokens: list[list[int]],
        texts: list[str],
    ):
        self.start, self.folder, self.rotations = start, folder, tuple(rotations)
        self.runtime, self.tokens, self.texts = runtime, tokens, texts
        self.dtype = getattr(torch, runtime.dtype)
        self.before, self.after = TensorFiles(start, dtype=None), TensorFiles(folder, dtype=None)
        self.config, self._found = load_config(start), {}

    @cached_property
    def blocks(self) -> list[str]:
        """Module name of every decoder block."""
        path = architecture(self.config).blocks
        return [f"{path}.{i}" for i in range(self.config.num_hidden_layers)]

    def rotation(self, block: str = "") -> Tensor | None:
        """(n, n) float64 R2 of a block, R1 without one; None if it is not declared.

        The nearest orthogonal matrix, before its signs are taken.
        """
        if ("r2" if block else "r1") not in self.rotations:
            return None
        if block not in self._found:
            u, _, v = torch.linalg.svd(self._crossed_values(block) if block else self._crossed())
            self._found[block] = u @ v
        return self._found[block]

    def hadamard(self, block: str = "") -> Tensor | None:
        """The same matrix with the entries ±1/√n that its signs say."""
        found = self.rotation(block)
        return None if found is None else found.sign() / math.sqrt(len(found))

    def _crossed(self) -> Tensor:
        name = f"{architecture(self.config).embeddings[0]}.weight"
        pairs = zip(*(files[name].split(ROWS) for files in (self.before, self.after)), strict=True)
        return sum(old.double().T @ new.double() for old, new in pairs)  # type: ignore[return-value]

    def _crossed_values(self, block: str) -> Tensor:
        name = f"{block}.self_attn.v_proj.weight"
        old, new = self._reading(name), self.after[name].double()
        heads = (part.unflatten(0, (-1, self.head_size)) for part in (old, new))
        return torch.einsum("hnd,hmd->nm", *heads)

    @property
    def head_size(self) -> int:
        """Features of one attention head."""
        width = self.config.hidden_size // self.config.num_attention_heads
        return getattr(self.config, "head_dim", None) or width

    def _reading(self, name: str, norm: str = "") -> Tensor:
        """(out, in) float64 W diag(g) R1 of a Linear that reads a norm's states."""
        block, _, part = name.removesuffix(".weight").rpartition(".")
        kind = "post_attention" if part in ("gate_proj", "up_proj") else "input"
        norm = norm or f"{block.rpartition('.')[0]}.{kind}_layernorm"
        stored = (
            name if name in self.before else f"{architecture(self.config).embeddings[0]}.weight"
        )
        weight = self.before[stored].double() * self.before[f"{norm}.weight"].double()
        r1 = self.hadamard()
        return weight if r1 is None else weight @ r1

    def expected(self, name: str) -> Tensor:
        """A tensor of the rotated model in float64, by the formula above."""
        module, _, kind = name.rpartition(".")
        block, part = module.rpartition(".self_attn.")[0], module.rpartition(".")[2]
        if part.endswith("layernorm") or module == FINAL_NORM:
            return torch.ones_like(self.before[name], dtype=torch.float64)
        if module == HEAD:
            return self._reading(name, FINAL_NORM)
        r1, r2 = self.hadamard(), self.hadamard(block) if block else None
        if kind == "weight" and part in READERS:
            weight = self._reading(name)
            return _headwise(weight.T, r2).T if part == "v_proj" else weight
        tensor = self.before[name].double()
        if part == "v_proj":  # its bias
            return _headwise(tensor, r2)
        if kind == "weight" and part in ("o_proj", "down_proj"):
            tensor = _headwise(tensor, r2) if part == "o_proj" else tensor
            return tensor if r1 is None else r1.T @ tensor
        rotated = part in ("o_proj", "down_proj") or module in architecture(self.config).embeddings
        return tensor @ r1 if rotated and r1 is not None else tensor


FINAL_NORM = "model.norm"
READERS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
ROWS = 8192  # of the embeddings in one product


def _headwise(tensor: Tensor, matrix: Tensor | None) -> Tensor:
    """(…, heads × n) times an (n, n) matrix, one head at a time."""
    if matrix is None:
        return tensor
    return (tensor.unflatten(-1, (-1, len(matrix))) @ matrix).flatten(-2)
