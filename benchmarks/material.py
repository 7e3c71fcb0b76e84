"""What all comparisons are measured on: the demo study's model, items, prompts and caps."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from helpers.evaluation.engine import evaluate
from helpers.inference.perplexity import passage_tokens
from helpers.quantization import variants
from helpers.quantization.calibration import run_calibration
from helpers.quantization.smoothing import same_alpha, smooth_variant_
from helpers.quantization.variants import load_int8
from helpers.sources.chat import calibration_tokens
from helpers.sources.items import Item
from helpers.sources.models import bundled_model_folder, load_model, load_tokenizer
from helpers.sources.sampling import calibration_items, evaluation_items, shared_passages
from helpers.study.loading import load_study
from helpers.study.schema import Batch, EvaluationSet, Study, Variant

STUDY = "demo"
VARIANT = "smoothquant_w8a8"


@dataclass(frozen=True)
class Material:
    """Model and items of the study that the benchmarks use.

    Attributes:
        threads: of every way, ours and the peers'.
        most: at most so many items a set.
        rounds: of each comparison. Where the ratio does not depend on how many items there
            are, a round asks its share of them.
        scratch: where checkpoints are written.
    """

    threads: int
    most: int
    rounds: int
    scratch: Path
    folder: Path = field(default_factory=bundled_model_folder)

    @cached_property
    def study(self) -> Study:
        """The study, on all threads, with no more items than wanted."""
        study, _ = load_study(STUDY), variants.quiet_llmcompressor()
        runtime = study.runtime.model_copy(update={"threads": self.threads})
        wanted = study.calibration
        calibration = wanted.model_copy(update={"items": min(wanted.items, self.most)})
        changes = {"runtime": runtime, "calibration": calibration}
        return _asking(study.model_copy(update=changes), self.most)

    @cached_property
    def tokenizer(self):
        return load_tokenizer(self.folder, enable_thinking=self.study.enable_thinking)

    @cached_property
    def linear_shapes(self) -> set[tuple[int, int]]:
        """(in_features, out_features) of the Linears of the decoder."""
        modules = self.float_model().base_model.modules()
        return {(m.in_features, m.out_features) for m in modules if isinstance(m, nn.Linear)}

    @property
    def variant(self) -> Variant:
        """The variant that stands for INT8."""
        return self.study.variants[VARIANT]

    def share(self, things: list, turn: int | None) -> list:
        """One round's share of a list; the whole list if no round is named."""
        return things if turn is None else things[turn :: self.rounds]

    def sets(
        self, names: Iterable[str], turn: int | None
    ) -> Iterator[tuple[EvaluationSet, list[Item]]]:
        """(evaluation set, the round's share of its items) of each named set."""
        for name in names:
            items = evaluation_items(self.study, name)
            yield self.study.evaluation.datasets[name], self.share(items, turn)

    def ask(
        self, model, names: Iterable[str], turn: int | None, *, rows: int | None = None
    ) -> list[dict]:
        """Our predictions of the round's share, set after set, in the items' order.

        Args:
            rows: the most answers written at once; the study's own if None.
        """
        limits, predictions = self.study.evaluation.batch, []
        limits = Batch(tokens=limits.tokens, rows=rows or limits.rows)
        for evaluation_set, items in self.sets(names, turn):
            stream = evaluate(model, self.tokenizer, items, evaluation_set, limits=limits)
            by_id = {prediction["id"]: prediction for prediction in stream}
            predictions += [by_id[item.id] for item in items]
        return predictions

    def passages(self, turn: int | None) -> list[list[int]]:
        """Token ids of the round's share of the study's shared text."""
        settings, texts = self.study.evaluation.shared_text, shared_passages(self.study)
        tokens = passage_tokens(self.tokenizer, texts, max_tokens=settings.max_tokens)
        return self.share(tokens, turn)

    def float_model(self, dtype: str = "float32"):
        """The model as a study loads it."""
        return load_model(self.folder, self.study.runtime.model_copy(update={"dtype": dtype}))

    def peers_model(self):
        """The model in float32 as transformers loads and multiplies it."""
        return AutoModelForCausalLM.from_pretrained(self.folder, dtype=torch.float32).eval()

    def int8_model(self):
        """The INT8 variant on our kernels."""
        return load_int8(self.checkpoint, dtype=torch.float32, device="cpu")

    @cached_property
    def checkpoint(self) -> Path:
        """The INT8 variant, made anew."""
        folder = self.scratch / VARIANT
        self.write_checkpoint(self.calibrate(), self.variant, folder)
        return folder

    @cached_property
    def calibration_texts(self) -> list[list[int]]:
        """Token ids of the calibration items."""
        items, adapter = calibration_items(self.study), self.study.calibration.adapter
        return [calibration_tokens(self.tokenizer, item, adapter) for item in items]

    def calibrate(self) -> dict[str, torch.Tensor]:
        """(in_features,) abs-max of the input of every Linear, in one pass."""
        limit = self.study.calibration.batch_tokens
        found = run_calibration(self.float_model(), self.calibration_texts, batch_tokens=limit)
        return {name: statistics.absmax for name, statistics in found.items()}

    def write_checkpoint(self, absmax: dict, variant: Variant, folder: Path) -> None:
        """Load the float model, smooth it, quantize it and save it."""
        model = self.float_model()
        alphas = same_alpha(model.config, variant.smooth.targets, variant.smooth.alpha)
        smoothed = smooth_variant_(model, absmax, variant, alphas)
        variants.quantize_variant_(model, variant, absmax, smoothed, self.calibration_texts)
        variants.save_checkpoint(model, self.tokenizer, folder)


def _asking(study: Study, most: int) -> Study:
    sets = {
        name: settings.model_copy(update={"items": min(settings.items, most)})
        for name, settings in study.evaluation.datasets.items()
    }
    shared = study.evaluation.shared_text
    shared = shared.model_copy(update={"passages": min(shared.passages, most)})
    changes = {"datasets": sets, "shared_text": shared}
    evaluation = study.evaluation.model_copy(update=changes)
    return study.model_copy(update={"evaluation": evaluation})
