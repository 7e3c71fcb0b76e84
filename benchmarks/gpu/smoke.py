"""Part 5: the smoke study, stage by stage, on the card and on the CPU beside it.

Items, prompts, how texts are parsed and what is made of predictions must not differ by a byte;
log-probabilities and KL may, by how sums are ordered, and are shown with how far.
"""

import json
import os
import tempfile
from pathlib import Path

from benchmarks.gpu.part import Part
from helpers.core.files import PROJECT
from helpers.core.records import Record, sha256_folder, write_json
from helpers.evaluation.engine import ask_all
from helpers.evaluation.prompts import input_digest, model_inputs, render_prompt
from helpers.evaluation.scoring import all_metrics, score_text, shared_text_metrics
from helpers.inference.perplexity import read_shared_text
from helpers.quantization import calibration, simulation, smoothing, variants
from helpers.quantization.variants import load_variant
from helpers.runtime.devices import prepare
from helpers.sources.chat import calibration_tokens
from helpers.sources.models import load_model, load_tokenizer, model_folder
from helpers.sources.sampling import calibration_items, evaluation_items, item_ids
from helpers.study.loading import open_job
from helpers.verification.variant_gates import verify_checkpoint

STUDY, MODEL = "smoke", "base"
VARIANTS = ("noquant", "rtn_w8a8", "smoothquant_w8a8", "smoothquant_o3", "noquant_bf16")
DRY_VARIANTS = ("noquant", "smoothquant_w8a8")
VERIFIED = "smoothquant_w8a8"
FLOAT32_TOLERANCE = 1e-3  # of a summed log-probability


def run(part: Part) -> None:
    """Run the study on CPU and card, then compare the results."""
    variants.quiet_llmcompressor()
    with tempfile.TemporaryDirectory() as scratch:
        os.environ |= {"STUDY_OUTPUTS": scratch, "STUDY_CACHE": f"{scratch}/cache"}
        runs = {device: Run(device, Path(scratch)) for device in ("cpu", part.device)}
        here, there = runs["cpu"], runs[part.device]
        stages: list[dict] = []
        for device_run in runs.values():
            with part.stage(stages, f"calibration, {device_run.device}"):
                device_run.calibrate()
        part.note("calibrated maxima, largest relative difference", here.maxima_off(there))
        rows: list[dict] = []
        for variant in _variants(part):
            if part.over(need=4):
                break
            for device_run in runs.values():
                with part.stage(stages, f"{variant}, {device_run.device}"):
                    device_run.quantize(variant)
                    device_run.evaluate(variant)
            rows.append(compared(here, there, variant))
            part.note("card and CPU", rows)
        part.note("what must not differ does not", all(row["must not differ"] for row in rows))
        if not part.over(need=8):
            part.note(f"gates of {VERIFIED} on the device", there.verified())


def _variants(part: Part) -> tuple[str, ...]:
    return DRY_VARIANTS if part.dry else VARIANTS


class Run:
    """The study on one device, with its own outputs folder."""

    def __init__(self, device: str, scratch: Path):
        self.device, self.predictions, self.shared = device, {}, {}
        text = (PROJECT / "params" / f"{STUDY}.yaml").read_text("utf-8")
        text = text.replace("device: cpu", f"device: {device}")
        self.file = scratch / f"{STUDY}-{device}.yaml"
        self.file.write_text(text, "utf-8")

    def job(self, variant: str = ""):
        return prepare(open_job(self.file, model=MODEL, variant=variant))

    def calibrate(self) -> None:
        job = self.job()
        source = model_folder(job.study, MODEL, job.paths)
        tokenizer = load_tokenizer(source, enable_thinking=job.study.enable_thinking)
        settings = job.study.calibration
        items = calibration_items(job.study)
        tokens = [calibration_tokens(tokenizer, item, settings.adapter) for item in items]
        network = load_model(source, job.study.runtime)
        statistics = calibration.run_calibration(
            network, tokens, batch_tokens=settings.batch_tokens
        )
        self.absmax = {name: of_input.absmax for name, of_input in statistics.items()}
        self.judges = tokens[calibration.first_judging_item(len(tokens)) :]
        self.fit = {name: of_input.fit_absmax for name, of_input in statistics.items()}
        self.source = sha256_folder(source)
        folder = job.paths.calibration(MODEL)
        record = Record(folder, stage="calibration", parameters=job.parameters)
        calibration.save_calibration(folder / "activations.safetensors", statistics)
        record.add_input("model", self.source)
        record.write({"items": item_ids(items), "tokens": sum(map(len, tokens))})

    def quantize(self, variant: str) -> None:
        job = self.job(variant)
        if not job.recipe.needs_checkpoint:
            return
        source = model_folder(job.study, MODEL, job.paths)
        tokenizer = load_tokenizer(source, enable_thinking=job.study.enable_thinking)
        network = load_model(source, job.study.runtime)
        folder = job.paths.quantization(MODEL, variant)
        record = Record(folder, stage="quantization", parameters=job.parameters)
        chosen = simulation.choose_alphas(network, job.recipe, self.fit, self.judges)
        write_json(folder / "alpha.json", chosen.record)
        smoothed = smoothing.smooth_variant_(network, self.absmax, chosen.recipe, chosen.alphas)
        variants.quantize_variant_(network, job.recipe, self.absmax, smoothed)
        checkpoint = job.paths.checkpoint(MODEL, variant)
        variants.save_checkpoint(network, tokenizer, checkpoint)
        record.add_input("model", self.source)
        record.add_outputs(checkpoint)
        record.write({})

    def evaluate(self, variant: str) -> None:
        job = self.job(variant)
        record = Record(
            job.paths.evaluation(MODEL, variant), stage="evaluation", parameters=job.parameters
        )
        network, self.tokenizer = load_variant(job)
        self.study = job.study
        self.predictions[variant] = ask_all(network, self.tokenizer, job.study)
        self.shared[variant] = shared_text_metrics(read_shared_text(job, network, self.tokenizer))
        record.write({})

    def verified(self) -> dict:
        """The gates of a checkpoint made and run here, and the names of those that fail."""
        gates = verify_checkpoint(self.job(VERIFIED), source_hash=self.source)
        failed = [f"{gate.name}: {gate.measured}" for gate in gates if not gate.passed]
        return {"gates": len(gates), "passed": len(gates) - len(failed), "failed": failed}

    def maxima_off(self, other: "Run") -> float:
        pairs = [(self.absmax[name], other.absmax[name]) for name in self.absmax]
        return max(float(((a - b).abs() / a.clamp(min=1e-9)).max()) for a, b in pairs)

    def prompts(self) -> dict[str, str]:
        """Digest of every prompt by item id, rendered again."""
        digests = {}
        for name, evaluation_set in self.study.evaluation.datasets.items():
            for item in evaluation_items(self.study, name):
                prompt = render_prompt(item, evaluation_set, self.tokenizer)
                digests[item.id] = input_digest(prompt, model_inputs(self.tokenizer, prompt))
        return digests

    def scored_anew(self, name: str, row: dict) -> dict:
        """The prediction that a row's own text leads to; a scored option has no text."""
        evaluation_set = self.study.evaluation.datasets[name]
        if evaluation_set.ask.protocol == "loglikelihood":
            return row
        item = next(i for i in evaluation_items(self.study, name) if i.id == row["id"])
        prediction = score_text(
            item,
            evaluation_set.adapter,
            row["output"],
            answer=evaluation_set.ask.answer,
            finish=row["finish_reason"],
        )
        return row | prediction


def compared(here: Run, there: Run, variant: str) -> dict:
    """Which fields of two runs' predictions are equal, and the differences of the others."""
    cpu_predictions, device_predictions = here.predictions[variant], there.predictions[variant]
    flat = [
        (n, a, b)
        for n in cpu_predictions
        for a, b in zip(cpu_predictions[n], device_predictions[n], strict=True)
    ]
    prompts = here.prompts()
    must_agree = {
        "items": all(a["id"] == b["id"] and a["golds"] == b["golds"] for _, a, b in flat),
        "prompts": all(
            a["prompt_hash"] == b["prompt_hash"] == prompts[a["id"]] for _, a, b in flat
        ),
        "parsing": all(_same(here.scored_anew(n, b), b) for n, _, b in flat),
        "metrics": _same(
            all_metrics(here.study, json.loads(json.dumps(device_predictions))),
            all_metrics(there.study, device_predictions),
        ),
    }
    scores = [
        abs(x - y)
        for _, a, b in flat
        for x, y in zip(a.get("logprobs", ()), b.get("logprobs", ()), strict=True)
    ]
    row = {"variant": variant, **must_agree, "must not differ": all(must_agree.values())}
    row |= {"log-probability off by": max(scores, default=0.0)}
    row |= {"answers alike": sum(a["output"] == b["output"] for _, a, b in flat), "of": len(flat)}
    for key in ("kl", "perplexity"):
        if key in here.shared[variant]:
            row |= {
                f"{key} CPU": here.shared[variant][key],
                f"{key} card": there.shared[variant][key],
            }
    if variant == "noquant":
        row["must not differ"] &= row["log-probability off by"] <= FLOAT32_TOLERANCE
    return row


def _same(one: dict, other: dict) -> bool:
    return json.dumps(one, sort_keys=True) == json.dumps(other, sort_keys=True)
