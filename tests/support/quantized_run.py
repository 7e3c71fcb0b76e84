"""A tiny model calibrated, quantized and saved as the notebooks do it, for tests to tamper with.

A run is made once for each family and variant and copied for each test; the copy's
source model, calibration and checkpoint are the test's own to break.
"""

import os
import shutil
from contextlib import contextmanager
from pathlib import Path

import torch
import yaml
from safetensors.torch import load_file, save_file

from helpers.core.records import RECORD, Record, checksums, read_json, sha256_folder, write_json
from helpers.quantization import calibration, protection, simulation, smoothing, variants
from helpers.sources.chat import calibration_tokens
from helpers.sources.models import (
    byte_tokenizer,
    load_model,
    load_tokenizer,
    model_folder,
    random_model,
)
from helpers.sources.sampling import calibration_items
from helpers.study.loading import Job, open_job
from helpers.verification import variant_gates

NORMS = ["attention_input", "mlp_input"]
SMOOTH = {"alpha": 0.5, "targets": NORMS}
VARIANTS = {
    "noquant": {},
    "rtn_w8a8": {"preset": "w8a8"},
    "smoothquant_w8a8": {"preset": "w8a8", "smooth": SMOOTH},
    "o1": {"preset": "o1", "smooth": SMOOTH},
    "o2": {"preset": "o2", "smooth": {"alpha": 0.7, "targets": ["mlp_input"]}},
    "o3": {"preset": "o3", "smooth": SMOOTH},
    "w8a8_grid": {"preset": "w8a8", "smooth": {"alpha": [0.3, 0.6], "targets": NORMS}},
    "o3_auto": {"preset": "o3", "smooth": {"alpha": "auto", "targets": [*NORMS, "mlp_down"]}},
    "o3_down": {"preset": "o3", "smooth": {"alpha": 0.5, "targets": [*NORMS, "mlp_down"]}},
    "o3_optional": {
        "preset": "o3",
        "smooth": {"alpha": [0.3, 0.6], "targets": NORMS, "optional": ["mlp_down"]},
    },
    "w8a8_down": {"preset": "w8a8", "smooth": {"alpha": 0.5, "targets": [*NORMS, "mlp_down"]}},
    "down_float": {"preset": "w8a8", "smooth": SMOOTH, "ignore": ["lm_head", "down_proj"]},
    "protected": {"preset": "w8a8", "smooth": SMOOTH, "protect": {"bytes": 0.07}},
    "gptq_w8a8": {
        "preset": "w8a8",
        "rounding": "gptq",
        "smooth": {"alpha": 0.8, "targets": NORMS},
    },
    "mse_w8a8": {"preset": "w8a8", "rounding": "mse", "smooth": SMOOTH},
    "of_few": {"preset": "w8a8", "smooth": SMOOTH, "calibration": "few"},
    "smooth_only": {"smooth": SMOOTH},
    "smooth_only_down": {"smooth": {"alpha": 0.5, "targets": [*NORMS, "mlp_down"]}},
    "seed_recipe": {"recipe": "seed", "smooth": SMOOTH},
}


def lived_in(model):
    """The model with norms and biases as uneven as training leaves them."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                uneven = torch.rand(parameter.shape, generator=generator) - 0.5
                parameter.mul_(1 + uneven).add_(0.1 * uneven)
    return model


class QuantizedRun:
    """One model's run under a folder of its own: source, calibration, checkpoint."""

    def __init__(self, root: Path, settings: dict, variant: str):
        self.root, self.settings, self.variant = Path(root), settings, variant
        self.source_hash = ""
        self.variants = VARIANTS
        self.root.mkdir(parents=True, exist_ok=True)

    def save_source(self, family: str, **changes) -> None:
        """A random model whose norms and biases are not all one or zero, as no trained ones are."""
        model = lived_in(random_model(family, seed=20260419, **changes))
        model.save_pretrained(self.root / "source")
        byte_tokenizer().save_pretrained(self.root / "source")

    @property
    def job(self) -> Job:
        self.settings["models"] = {"base": {"folder": str(self.root / "source")}}
        self.settings["variants"] = self.variants
        self.settings["calibrations"] = {"few": self.settings["calibration"] | {"items": 3}}
        self.settings["statistics"]["primary"] = []
        path = self.root / "study.yaml"
        path.write_text(yaml.safe_dump(self.settings, sort_keys=False), "utf-8")
        return open_job(path, model="base", variant=self.variant)

    @contextmanager
    def outputs(self):
        """Paths lead into this run's own folder."""
        before = os.environ["STUDY_OUTPUTS"]
        os.environ["STUDY_OUTPUTS"] = str(self.root / "outputs")
        try:
            yield
        finally:
            os.environ["STUDY_OUTPUTS"] = before

    def calibrate(self) -> None:
        """What 01_calibration does."""
        with self.outputs():
            job = self.job
            source = model_folder(job.study, job.model, job.paths)
            model = load_model(source, job.study.runtime)
            tokenizer = load_tokenizer(source, enable_thinking=job.study.enable_thinking)
            folder, settings = job.paths.calibration(job.model), job.calibration_settings
            record = Record(folder, stage="calibration", parameters=job.parameters)
            record.add_input("model", sha256_folder(source))
            items = calibration_items(job.study, job.calibration)
            tokens = [calibration_tokens(tokenizer, item, settings.adapter) for item in items]
            statistics = calibration.run_calibration(
                model, tokens, batch_tokens=settings.batch_tokens
            )
            calibration.save_calibration(folder / "activations.safetensors", statistics)
            ids, count = [item.id for item in items], sum(map(len, tokens))
            record.write({"items": ids, "tokens": count})

    def quantize(self) -> None:
        """What 02_quantization does before it verifies."""
        with self.outputs():
            job = self.job
            source = model_folder(job.study, job.model, job.paths)
            self.source_hash = sha256_folder(source)
            model = load_model(source, job.study.runtime)
            tokenizer = load_tokenizer(source, enable_thinking=job.study.enable_thinking)
            path = job.paths.calibration(job.model) / "activations.safetensors"
            absmax = calibration.load_absmax(path)
            tokens = [
                calibration_tokens(tokenizer, item, job.calibration_settings.adapter)
                for item in calibration_items(job.study, job.calibration)
            ]
            fit = calibration.load_absmax(path, fit=True)
            judges = tokens[calibration.first_judging_item(len(tokens)) :]
            chosen = simulation.choose_alphas(model, job.recipe, fit, judges)
            folder = job.paths.quantization(job.model, job.variant)
            write_json(folder / "alpha.json", chosen.record)
            protected = protection.choose_protected(
                model, chosen.recipe, absmax, chosen.alphas, tokens, seed=job.study.seed
            )
            write_json(folder / "protected.json", protected.record)
            smoothed = smoothing.smooth_variant_(model, absmax, chosen.recipe, chosen.alphas)
            variants.quantize_variant_(model, protected.recipe, absmax, smoothed, tokens)
            variants.write_checkpoint(job, model, tokenizer)

    def note_verified(self) -> None:
        """Name the checkpoint in verification.json, as 02_quantization does; no gate is asked."""
        owner = {"model": "base", "variant": self.variant}
        checked = {"checkpoint": sha256_folder(self.checkpoint), "passed": True, "gates": []}
        write_json(self.checkpoint.parent / "verification.json", owner | checked)
        record = self.checkpoint.parent / "quantization" / RECORD
        write_json(record, {"files": checksums(record.parent, [self.checkpoint])})

    @property
    def checkpoint(self) -> Path:
        return self.root / "outputs" / "study" / "base" / self.variant / "checkpoint"

    @property
    def calibration(self) -> Path:
        named = self.variants[self.variant].get("calibration")
        folder = f"calibration+{named}" if named else "calibration"
        return self.root / "outputs" / "study" / "base" / folder

    def verify(self):
        with self.outputs():
            return variant_gates.verify_checkpoint(self.job, source_hash=self.source_hash)

    def failed(self) -> set[str]:
        """Names of the gates that do not hold."""
        return {gate.name for gate in self.verify() if not gate.passed}

    def copy(self, root: Path) -> "QuantizedRun":
        shutil.copytree(self.root, root, dirs_exist_ok=True)
        made = QuantizedRun(root, self.settings, self.variant)
        made.source_hash, made.variants = self.source_hash, self.variants
        return made

    @contextmanager
    def edited(self, folder: Path | None = None, file: str = "model.safetensors"):
        """The tensors of a file, written back as the test left them."""
        path = (folder or self.checkpoint) / file
        tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
        yield tensors
        tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
        save_file(tensors, path, metadata={"format": "pt"})

    @contextmanager
    def edited_json(self, path: Path):
        data = read_json(path, made_by="the test")
        yield data
        write_json(path, data)


def at_millionth(model, ids, seed: int):
    """Logits with the embeddings of the tokens a millionth off."""
    states = model.get_input_embeddings()(ids)
    noise = torch.randn(states.shape, generator=torch.Generator().manual_seed(seed))
    return model(inputs_embeds=states * (1 + 1e-6 * noise)).logits
