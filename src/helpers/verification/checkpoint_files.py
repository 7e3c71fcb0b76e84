"""What the gates read: the source's files, the checkpoint's files, the calibration's files.

Nothing here comes from the run that made the checkpoint. The smoothing scales are
recovered from the files (a norm on disk is the source's norm over s), and the paper's
formula is written out again, so that a bug in `helpers.quantization.smoothing` or
`.compression` does not vouch for itself. Tensors are read one at a time.
"""

import math
from functools import cached_property

import torch
from torch import Tensor

from helpers.core.architectures import HEAD, architecture, linear_names
from helpers.core.records import read_json
from helpers.quantization.calibration import load_absmax
from helpers.quantization.layer_groups import SmoothingGroup, smoothing_groups
from helpers.runtime.rotary_positions import reads_alone
from helpers.sources.chat_conversations import conversation
from helpers.sources.items import Item
from helpers.sources.model_tensors import TensorFiles
from helpers.sources.models import load_config, load_tokenizer
from helpers.sources.sampling import calibration_items
from helpers.study.study_run import Job
from helpers.verification.hooks import capture_inputs
from helpers.verification.model_slot import ModelSlot, with_own_kernels
from helpers.verification.source_tokenizer import source_token_ids, source_tokenizer

SMALLEST = 1e-5  # floor of maxima and scales, as the smoothing declares it
PROBES, PROBE_TOKENS = (
    2,
    48,
)  # real texts for forward passes, which are the expensive part of the gates


class CheckpointFiles(ModelSlot):
    """The files of one job's source, calibration and checkpoint, read on first use.

    Args:
        job: names the model and the variant.
        source_hash: content hash of the source's folder before the run touched anything.
        record: results that the quantization will record.
    """

    def __init__(self, job: Job, *, source_hash: str, record: dict | None = None):
        super().__init__(with_own_kernels(job))
        self.source_hash, self.claim, self.record = source_hash, job.recipe.claim, record
        self.dtype = getattr(torch, job.study.runtime.dtype)
        self.calibration_folder = job.paths.calibration(job.model)
        self._declared: dict[SmoothingGroup, Tensor] = {}

    @cached_property
    def config(self):
        return load_config(self.source_folder)

    @cached_property
    def source(self) -> TensorFiles:
        """The source's tensors at the study's dtype; a tied head is its embeddings."""
        return TensorFiles(self.source_folder, dtype=self.dtype)

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
        """Names of the Linears that the variant declares as int8."""
        ignored = self.claim.ignore
        if not self.claim.quantized:
            return []
        return [n for n in self.linears if not any(n == i or n.endswith("." + i) for i in ignored)]

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
        """The groups that the variant declares as smoothed; empty if it does not smooth."""
        if not self.claim.smooth:
            return []
        return smoothing_groups(self.config, self.claim.smooth.targets)

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

        A norm channel of zero does not determine its s; the declared one is returned. The same
        holds if the producer is a Linear, whose rows the grid gate checks.
        """
        declared, factors = self.declared_scales(group), self.norm_factors(group)
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

    @cached_property
    def tokenizer(self):
        switch = self.job.study.enable_thinking
        return load_tokenizer(self.source_folder, enable_thinking=switch)

    @cached_property
    def items(self) -> list[Item]:
        """The calibration items, drawn again from the study file."""
        return calibration_items(self.job.study)

    @cached_property
    def tokens(self) -> list[list[int]]:
        """Token ids of the calibration texts by the source's own tokenizer and template."""
        own = source_tokenizer(self.job)
        return [source_token_ids(own, *self._text(item))[0] for item in self.items]

    def _text(self, item: Item) -> tuple[str, bool]:
        """(calibration text of an item, whether it is plain text without a template)."""
        messages = conversation(item, self.job.study.calibration.adapter, shots=0)
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
