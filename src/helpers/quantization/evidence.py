"""What the gates read: the source's files, the checkpoint's files, the calibration's files.

Nothing here comes from the run that made the checkpoint. The smoothing scales are
recovered from the files (a norm on disk is the source's norm over s), and the paper's
formula is written out again, so that a bug in `helpers.quantization.smoothing` or
`.compression` does not vouch for itself.
"""

import math
from functools import cached_property

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from helpers.quantization.calibration import load_absmax
from helpers.quantization.int8 import read_tensors
from helpers.quantization.layer_groups import SmoothingGroup, smoothing_groups
from helpers.quantization.variants import load_variant
from helpers.sources.conversations import calibration_tokens
from helpers.sources.datasets import calibration_items
from helpers.sources.items import Item
from helpers.sources.models import load_model, load_tokenizer, model_folder
from helpers.study.opening import Job
from helpers.study.records import read_json

BLOCK_LINEARS = (
    *("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"),
    *("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
)
SMALLEST = 1e-5  # floor of maxima and scales, as the smoothing declares it
PROBES, PROBE_TOKENS = 2, 48  # real texts the models are run on; few, since forwards cost most


class Evidence:
    """The files of one job's source, calibration and checkpoint, read when first needed.

    Args:
        job: the model and variant at hand.
        source_hash: content hash of the source's folder before the run touched anything.
    """

    def __init__(self, job: Job, *, source_hash: str):
        self.job, self.source_hash = job, source_hash
        self.claim = job.recipe.claim
        self.dtype = getattr(torch, job.study.runtime.dtype)
        self.source_folder = model_folder(job.study, job.model, job.paths)
        self.folder = job.paths.checkpoint(job.model, job.variant)
        self.calibration_folder = job.paths.calibration(job.model)

    @cached_property
    def config(self):
        return AutoConfig.from_pretrained(self.source_folder, local_files_only=True)

    @cached_property
    def source(self) -> dict[str, Tensor]:
        """The source's tensors at the study's dtype; a tied head is its embeddings."""
        return {k: t.to(self.dtype) for k, t in self._untied(self.source_folder).items()}

    @cached_property
    def saved(self) -> dict[str, Tensor]:
        """The checkpoint's tensors, as they lie on disk."""
        return self._untied(self.folder)

    def _untied(self, folder) -> dict[str, Tensor]:
        tensors = read_tensors(folder)
        head, embeddings = tensors.get("lm_head.weight"), tensors.get("model.embed_tokens.weight")
        same = head is not None and embeddings is not None and torch.equal(head, embeddings)
        if self.config.tie_word_embeddings and same:
            del tensors["lm_head.weight"]
        return tensors

    @cached_property
    def linears(self) -> list[str]:
        """Names of every Linear the architecture has, the head included."""
        blocks = range(self.config.num_hidden_layers)
        return [f"model.layers.{i}.{n}" for i in blocks for n in BLOCK_LINEARS] + ["lm_head"]

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
        saved = self.saved.items()
        return {k.removesuffix(".weight") for k, t in saved if t.dtype == torch.int8}

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
        with torch.device("meta"):
            skeleton = AutoModelForCausalLM.from_config(self.config)
        return smoothing_groups(skeleton, self.claim.smooth.targets)

    def declared_scales(self, group: SmoothingGroup) -> Tensor:
        """(in_features,) float64 s_j = max|X_j|^α / max|W_j|^(1-α), SmoothQuant's equation 4.

        Of the calibration file and the source's weights. A Linear is a consumer once, and
        its rows are divided after its columns were looked at, so the source's weights are
        the right ones for every group.
        """
        alpha = self.claim.smooth.alpha
        columns = [self.source[f"{n}.weight"].double().abs().amax(0) for n in group.consumers]
        weight = torch.stack(columns).amax(0).clamp(min=SMALLEST)
        act = self.absmax[group.consumers[0]].double().clamp(min=SMALLEST)
        return (act**alpha / weight ** (1 - alpha)).clamp(min=SMALLEST)

    def recovered_scales(self, group: SmoothingGroup) -> Tensor:
        """(in_features,) float64 s as the checkpoint has it: the source's norm over the saved.

        A norm channel of zero tells nothing of its s: there, the declared one stands. So
        it does where the producer is a Linear, whose rows the grid gate looks at.
        """
        declared = self.declared_scales(group)
        before = self.source[f"{group.producer}.weight"].double()
        if before.ndim > 1:
            return declared
        after = self.saved[f"{group.producer}.weight"].double()
        dead = (before == 0) & (after == 0)
        return torch.where(dead, declared, before / after)

    @cached_property
    def folded(self) -> dict[str, tuple[Tensor | None, Tensor | None]]:
        """Linear name to the scales of (its input channels, its output channels)."""
        found: dict = {n: (None, None) for n in self.linears}
        for group in self.groups:
            scales = self.recovered_scales(group)
            for name in group.consumers:
                found[name] = (scales, found[name][1])
            if group.producer in found:
                found[group.producer] = (found[group.producer][0], scales)
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
        adapter = self.job.study.calibration.adapter
        return [calibration_tokens(self.tokenizer, item, adapter) for item in self.items]

    @cached_property
    def probes(self) -> list[list[int]]:
        """The beginnings of a few calibration items."""
        return [tokens[:PROBE_TOKENS] for tokens in self.tokens[:PROBES]]

    @cached_property
    def source_model(self):
        """The source, loaded from its files; not to be changed."""
        return load_model(self.source_folder, self.job.study.runtime)

    @cached_property
    def running_model(self):
        """The checkpoint, loaded as the evaluation loads it."""
        return load_variant(self.job)[0]

    @cached_property
    def captured(self) -> dict[str, Tensor]:
        """Linear name to its (1, tokens, in_features) input in the running model, on one text."""
        inputs: dict[str, Tensor] = {}

        def keep(name: str):
            return lambda _module, args: inputs.__setitem__(name, args[0].detach())

        modules = [(n, self.running_model.get_submodule(n)) for n in self.targets]
        handles = [module.register_forward_pre_hook(keep(n)) for n, module in modules]
        logits_of(self.running_model, self.probes[:1])
        for handle in handles:
            handle.remove()
        return inputs

    def rounding(self, in_features: int) -> float:
        """Relative error that one correct Linear may have against another.

        Sums run in float32 and gather about √K of its roundings over K products; the
        input, the two factors and the result are each rounded to the model's dtype once.
        """
        eps32 = torch.finfo(torch.float32).eps
        return 4 * torch.finfo(self.dtype).eps + math.sqrt(in_features) * eps32


@torch.inference_mode()
def logits_of(model, items: list[list[int]]) -> list[Tensor]:
    """Float32 logits of each item read alone: (tokens, vocabulary)."""
    found = []
    for tokens in items:
        ids = torch.tensor([tokens], device=model.device)
        hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state[0]
        found.append(model.get_output_embeddings()(hidden).float().cpu())
    return found
