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
from helpers.verification.hooks import inputs_of
from helpers.verification.model_slot import HeldModels, on_own_kernels
from helpers.verification.source_tokenizer import own_tokenizer, own_tokens

SMALLEST = 1e-5  # floor of maxima and scales, as the smoothing declares it
PROBES, PROBE_TOKENS = 2, 48  # real texts the models are run on; few, since forwards cost most


class Evidence(HeldModels):
    """The files of one job's source, calibration and checkpoint, read when first needed.

    Args:
        job: the model and variant at hand.
        source_hash: content hash of the source's folder before the run touched anything.
        made: what the record of the quantization will say.
    """

    def __init__(self, job: Job, *, source_hash: str, made: dict | None = None):
        super().__init__(on_own_kernels(job))
        self.source_hash, self.claim, self.made = source_hash, job.recipe.claim, made
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
        """The checkpoint's tensors, as they lie on disk."""
        return TensorFiles(self.folder, dtype=None)

    @property
    def blocks(self) -> str:
        """Where the decoder blocks lie."""
        return architecture(self.config).blocks

    @cached_property
    def widest(self) -> int:
        """The most inputs that a Linear sums over."""
        return max(self.source.shape(f"{n}.weight")[1] for n in self.linears if n != HEAD)

    @cached_property
    def linears(self) -> list[str]:
        """Names of every Linear the architecture has, the head included."""
        return linear_names(self.config)

    @cached_property
    def targets(self) -> list[str]:
        """Names of the Linears that the variant claims to have in int8."""
        ignored = self.claim.ignore
        if not self.claim.quantized:
            return []
        return [n for n in self.linears if not any(n == i or n.endswith("." + i) for i in ignored)]

    @cached_property
    def stored_int8(self) -> set[str]:
        """Names of the Linears whose weights lie on disk as int8."""
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
        """Where the variant claims to have folded scales; empty if it does not smooth."""
        if not self.claim.smooth:
            return []
        return smoothing_groups(self.config, self.claim.smooth.targets)

    @cached_property
    def alphas(self) -> dict[str, float]:
        """α of every group, by its first consumer: the declared one, or the one on record.

        What is on record has to be among what the study file allows.
        """
        names = [group.consumers[0] for group in self.groups]
        asked = self.claim.smooth.alpha
        if isinstance(asked, float):
            return dict.fromkeys(names, asked)
        folder = self.job.paths.quantization(self.job.model, self.job.variant)
        chosen = read_json(folder / "alpha.json", made_by="02_quantization")["alphas"]
        allowed = [step / 10 for step in range(11)] if asked == "auto" else list(asked)
        if odd := [n for n in names if chosen[n] not in allowed]:
            raise ValueError(f"α = {chosen[odd[0]]} of {odd[0]} is none that the study names")
        if asked != "auto" and len(set(chosen.values())) != 1:
            raise ValueError("a grid gives one α to all groups")
        return {name: chosen[name] for name in names}

    def declared_scales(self, group: SmoothingGroup) -> Tensor:
        """(in_features,) float64 s_j = max|X_j|^α / max|W_j|^(1-α), SmoothQuant's equation 4.

        Of the calibration file and the source's weights. A Linear is a consumer once, and
        its rows are divided after its columns were looked at, so the source's weights are
        the right ones for every group.
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
        """(features,) float64 what a group's norm multiplies by, before and after.

        None where the producer is a Linear.
        """
        key = f"{group.producer}.weight"
        if len(self.source.shape(key)) > 1:
            return None
        before, after = self.source[key].double(), self.saved[key].double()
        return before + group.norm_offset, after + group.norm_offset

    def recovered_scales(self, group: SmoothingGroup) -> Tensor:
        """(in_features,) float64 s as the checkpoint has it: the source's norm over the saved.

        A norm channel of zero tells nothing of its s: there, the declared one stands. So
        it does where the producer is a Linear, whose rows the grid gate looks at.
        """
        declared, factors = self.declared_scales(group), self.norm_factors(group)
        if factors is None:
            return declared
        before, after = factors
        return torch.where((before == 0) & (after == 0), declared, before / after)

    @cached_property
    def folded(self) -> dict[str, tuple[Tensor | None, Tensor | None]]:
        """Name of a Linear, or of a router, to the scales of (its input, its output channels).

        Both are whole: the channels of a fused Linear that no group divides have 1.
        """
        found: dict = {n: (None, None) for n in self.linears}
        for group in self.groups:
            scales = self.recovered_scales(group)
            for name in (*group.consumers, *group.readers):
                found[name] = (scales, found.get(name, (None, None))[1])
            if group.producer in found:
                rows = torch.ones(self.source.shape(f"{group.producer}.weight")[0]).double()
                rows[-len(scales) :] = scales
                found[group.producer] = (found[group.producer][0], rows)
        return found

    def smoothed_weight(self, name: str) -> Tensor:
        """(out_features, in_features) float64: the source's weight times the scales on disk."""
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
        """The calibration items as the study file draws them now."""
        return calibration_items(self.job.study)

    @cached_property
    def tokens(self) -> list[list[int]]:
        """The calibration's texts by the source's own tokenizer and template."""
        own = own_tokenizer(self.job)
        return [own_tokens(own, *self._text(item))[0] for item in self.items]

    def _text(self, item: Item) -> tuple[str, bool]:
        """(what calibration reads of an item, whether it is plain text)."""
        turns = conversation(item, self.job.study.calibration.adapter, shots=0)
        if not self.tokenizer.chat_template:
            return "\n".join(t for t in (turns[-1]["content"], item.solution) if t), True
        how = {"tokenize": False, "add_generation_prompt": True}
        return self.tokenizer.apply_chat_template(turns, **how) + item.solution, False

    @cached_property
    def probes(self) -> list[list[int]]:
        """The beginnings of a few calibration items, whole where a beginning is read otherwise."""
        return [
            tokens if reads_alone(self.config, len(tokens)) else tokens[:PROBE_TOKENS]
            for tokens in self.tokens[:PROBES]
        ]

    @cached_property
    def captured(self) -> dict[str, Tensor]:
        """Linear name to its input in the running model, on one text, in the shape it has."""
        return inputs_of(self.running_model, self.targets, self.probes[0])

    def rounding(self, in_features: int) -> float:
        """Relative error that one correct Linear may have against another.

        Sums run in float32 and gather about √K of its roundings over K products; the
        input, the two factors and the result are each rounded to the model's dtype once.
        """
        eps32 = torch.finfo(torch.float32).eps
        return 4 * torch.finfo(self.dtype).eps + math.sqrt(in_features) * eps32
