"""Every family of transformers' causal mapping from end to end, on a tiny twin of its default.

For each entry: discovery and fold proof, calibration, smoothing and quantization, every gate on the
checkpoint (int8 parity among them), and some texts read by the engine, in float and int8, compared
with transformers' own forward pass. An entry that cannot be studied is named with its reason.

Each entry runs in a process of its own with a time limit. Results are kept in families.json beside
the table as they are made: a run that was interrupted goes on, and entries made with other versions
of transformers or torch are made again. usage: python -m benchmarks.families [ENTRY ...]
"""

import gc
import json
import multiprocessing
import os
import resource
import sys
import tempfile
import time
import traceback
import warnings
from importlib.metadata import version
from pathlib import Path

import torch
import yaml
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging

from helpers.core.errors import StudyError, one_line
from helpers.core.files import PROJECT
from helpers.core.records import RECORD, Record, checksums, sha256_folder, write_json
from helpers.inference.protocols import (
    OptionTokens,
    generate_greedy,
    option_loglikelihoods,
    prove_engine,
)
from helpers.quantization import calibration, int8_matmul, smoothing, variants
from helpers.quantization.variants import load_variant
from helpers.runtime import twins
from helpers.runtime.devices import processor_class
from helpers.runtime.discovery import architecture, linear_experts, places, source_hash
from helpers.sources.chat import calibration_tokens
from helpers.sources.models import byte_tokenizer, load_model, load_tokenizer, save_model
from helpers.sources.sampling import calibration_items
from helpers.study.loading import Job, open_job
from helpers.verification.variant_gates import verify_checkpoint

FOLDER = PROJECT / "outputs" / "bench"
LIMIT_S, MEMORY_BYTES = 900, 10 * 2**30  # of one entry
LAYERS, MOST_LAYERS = 4, 12  # of a twin; as many as it takes to have every kind of layer
TARGETS = ("attention_input", "attention_output", "mlp_input", "mlp_down")
NEAR = 1e-3  # nats between the engine's float log-likelihoods and transformers' own
# Settings that a default configuration lacks, although the models of the family have them.
COMPLETED = {
    "bamba": {"attn_layer_indices": [1, 3]},
    "blenderbot": {"max_position_embeddings": 2048},
    "ctrl": {"n_positions": 2048},
    "deepseek_v2": {"num_experts_per_tok": 6, "topk_method": "greedy"},
    "dots1": {"n_shared_experts": 2, "n_routed_experts": 128, "num_experts_per_tok": 6},
    "hunyuan_v1_dense": {"head_dim": 128},
    "hunyuan_v1_moe": {"head_dim": 128},
    "lfm2_moe": {"layer_types": ["conv", "conv", "full_attention", "conv"] * 8},
    "ministral": {"head_dim": 128},
    "nemotron": {"num_key_value_heads": 48},
}


def family_config(entry: str, *, layers: int | None = LAYERS):
    """A small configuration of a family, from its default.

    Raises:
        StudyError: the default has no small form.
    """
    try:
        default = CONFIG_MAPPING[entry](**COMPLETED.get(entry, {}))
    except Exception as error:
        raise StudyError(f"its default settings are not valid ({twins.reason(error)})") from None
    try:
        config = twins.twin_config(default, layers=_with_every_kind(default, layers))
        twins.build_twin(config)
    except StudyError:
        if layers is None:
            raise
        return family_config(entry, layers=None)
    return config


def _with_every_kind(config, layers: int | None) -> int | None:
    """The least number of layers, from `layers` on, that has every kind of the default."""
    kinds = getattr(config, "layer_types", None)
    if layers is None or not kinds:
        return layers
    least = 1 + max(kinds.index(kind) for kind in set(kinds))
    return max(layers, min(least, MOST_LAYERS))


def discovered(config) -> dict:
    """What discovery finds of a configuration, for the table.

    Raises:
        StudyError: it cannot be studied.
    """
    known = architecture(config)
    folding = [place for place in places(config) if place.producer]
    by_target = {t: sum(place.serves((t,)) for place in folding) for t in TARGETS}
    refusals = {t: next((p.refusal for p in places(config) if p.serves((t,)) and p.refusal), "")
                for t in TARGETS}  # fmt: skip
    return {
        "groups": by_target,
        "shared_norms": sum(bool(place.also) for place in folding),
        "offsets": sorted({p.norm_offset for p in folding if p.norm_offset}),
        "experts": known.experts.rpartition(".")[2],
        "refusals": {t: w.format(config=config) for t, w in refusals.items()
                     if w and not by_target[t]},
    }  # fmt: skip


class FamilyRun:
    """One twin's run: its folder, its study, its stages as the notebooks call them.

    Args:
        config: of the twin.
        root: an empty folder.
        targets: where scales can be folded; without any the variant is not smoothed.
    """

    def __init__(self, config, root: Path, targets: list[str]):
        self.config, self.root = config, root
        self.variant = "smoothquant_w8a8" if targets else "rtn_w8a8"
        settings = yaml.safe_load((PROJECT / "params" / "smoke.yaml").read_text("utf-8"))
        settings["models"] = {"base": {"folder": str(root / "source")}}
        smooth = {"smooth": {"alpha": 0.5, "targets": targets}} if targets else {}
        settings["variants"] = {"noquant": {}, self.variant: {"preset": "w8a8"} | smooth}
        settings["statistics"]["primary"] = []
        settings["calibration"]["items"] = 3
        settings["evaluation"]["datasets"] = {"arc": settings["evaluation"]["datasets"]["arc"]}
        with linear_experts(config):
            model = twins.build_twin(config).float()
        save_model(model, byte_tokenizer(), root / "source")
        self.study = root / "study.yaml"
        self.study.write_text(yaml.safe_dump(settings, sort_keys=False), "utf-8")

    def job(self, variant: str) -> Job:
        return open_job(self.study, model="base", variant=variant)

    def calibrate(self) -> None:
        job, source = self.job(""), self.root / "source"
        model = load_model(source, job.study.runtime)
        tokenizer = load_tokenizer(source, enable_thinking=None)
        folder, settings = job.paths.calibration("base"), job.study.calibration
        record = Record(folder, stage="calibration", parameters=job.parameters)
        record.add_input("model", sha256_folder(source))
        items = calibration_items(job.study)
        tokens = [calibration_tokens(tokenizer, item, settings.adapter) for item in items]
        statistics = calibration.run_calibration(model, tokens, batch_tokens=settings.batch_tokens)
        calibration.save_calibration(folder / "activations.safetensors", statistics)
        loudest = max(statistics, key=lambda name: statistics[name].absmax.max())
        surface = calibration.input_surface(model, loudest, tokens[statistics[loudest].argmax_item])
        calibration.save_surface(folder / "surface.safetensors", loudest, surface)
        record.write({"items": [item.id for item in items], "tokens": sum(map(len, tokens))})

    def quantize(self) -> None:
        job, source = self.job(self.variant), self.root / "source"
        model = load_model(source, job.study.runtime)
        absmax = calibration.load_absmax(job.paths.calibration("base") / "activations.safetensors")
        smooth = job.recipe.smooth
        alphas = smoothing.same_alpha(model.config, smooth.targets, 0.5) if smooth else {}
        smoothed = smoothing.smooth_variant_(model, absmax, job.recipe, alphas)
        variants.quantize_variant_(model, job.recipe, absmax, smoothed)
        tokenizer = load_tokenizer(source, enable_thinking=None)
        checkpoint = job.paths.checkpoint("base", self.variant)
        variants.save_checkpoint(model, tokenizer, checkpoint)
        write_json(checkpoint.parent / "alpha.json", {"alphas": alphas})

    def failed_gates(self) -> list[str]:
        """The gates on the checkpoint that do not hold, with what they measured."""
        job = self.job(self.variant)
        gates = verify_checkpoint(job, source_hash=sha256_folder(self.root / "source"))
        return [f"{gate.name}: {gate.measured}" for gate in gates if not gate.passed]

    def load(self, variant: str):
        """The variant on the study's runtime, its way of reading settled."""
        job = self.job(variant)
        if variant != "noquant":  # as 02_quantization names the checkpoint that it verified
            record = job.paths.quantization("base", variant) / RECORD
            files = [job.paths.checkpoint("base", variant)]
            write_json(record, {"files": checksums(record.parent, files)})
        model = load_variant(job)[0]
        prove_engine(model)
        return model


def some_texts() -> tuple[list[OptionTokens], list[list[int]]]:
    """Three items with options, and three prompts."""
    generator = torch.Generator().manual_seed(3)
    draw = lambda n: torch.randint(3, twins.VOCABULARY, (n,), generator=generator).tolist()  # noqa: E731
    return [OptionTokens(draw(n), [draw(3), draw(1)]) for n in (9, 40, 17)], [draw(11), draw(30)]


def answers(model) -> tuple[list, list]:
    """(log-likelihoods of the options, generated tokens) of some texts, asked together."""
    items, prompts = some_texts()
    sums = dict(option_loglikelihoods(model, items, batch_tokens=512))
    options = {"max_new_tokens": 3, "stop_tokens": set(), "batch_tokens": 512, "batch_rows": 16}
    written = dict(generate_greedy(model, prompts, **options))
    return [sums[i] for i in range(len(items))], [written[i].tokens for i in range(len(prompts))]


@torch.inference_mode()
def furthest_from_transformers(folder: Path, sums: list, written: list) -> float:
    """The largest difference, in nats, of the float answers to transformers' own model."""
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
    )
    items, prompts = some_texts()
    differences = []
    for item, engine in zip(items, sums, strict=True):
        for option, value in zip(item.options, engine, strict=True):
            logits = model(torch.tensor([item.context + option]), use_cache=False).logits[0]
            logprobs, first = logits.double().log_softmax(-1), len(item.context) - 1
            own = sum(logprobs[first + i, token].item() for i, token in enumerate(option))
            differences.append(abs(own - value))
    for prompt, tokens in zip(prompts, written, strict=True):
        logits = model(torch.tensor([prompt + tokens]), use_cache=False).logits[0].double()
        for place, token in enumerate(tokens, start=len(prompt) - 1):
            differences.append(float(logits[place].max() - logits[place, token]))
    return max(differences)


def run_family(entry: str, root: Path, *, layers: int = LAYERS) -> dict:
    """The row of one entry: what was discovered, and whether each step held.

    Raises:
        StudyError: the family cannot be studied; the message is the reason.
    """
    config = family_config(entry, layers=layers)
    row = discovered(config)
    run = FamilyRun(config, root, [t for t in TARGETS if row["groups"][t]])
    run.calibrate()
    run.quantize()
    if failed := run.failed_gates():
        raise StudyError(f"gates on its checkpoint fail ({'; '.join(failed)[:300]})")
    model = run.load("noquant")
    packed, cached = not model.packing_problem, not model.cache_problem
    engine = "packed rows" if packed else "one text at a time" + ("" if cached else ", no cache")
    apart = furthest_from_transformers(root / "source", *answers(model))
    if not apart <= NEAR:
        raise StudyError(f"its answers are {apart:.2g} nats from those of transformers")
    int8 = run.load(run.variant)
    if bool(int8.packing_problem) == packed:
        raise StudyError(f"int8 reads otherwise than float ({int8.packing_problem})")
    if not all(torch.isfinite(torch.tensor(sums)).all() for sums in answers(int8)[0]):
        raise StudyError("its int8 log-likelihoods are not finite")
    return row | {"variant": run.variant, "engine": engine, "why": model.packing_problem,
                  "nats": apart}  # fmt: skip


def _in_child(entry: str, pipe) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115 - until the process ends
    started = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["STUDY_OUTPUTS"] = os.environ["STUDY_CACHE"] = folder
        try:
            row = {"passed": True} | run_family(entry, Path(folder))
        except StudyError as error:
            row = {"passed": False, "reason": one_line(error)}
        except Exception as error:
            place = traceback.extract_tb(error.__traceback__)[-1]
            where = f"{Path(place.filename).name}:{place.lineno}"
            reason = f"{type(error).__name__} in {where}: {one_line(error)[:200]}"
            row = {"passed": False, "reason": reason}
    pipe.send(row | {"seconds": round(time.process_time() - started, 1)})


def run_apart(entry: str) -> dict:
    """The row of an entry, made by a process of its own that may not exceed the limits."""
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=_in_child, args=(entry, there), daemon=True)
    process.start()
    there.close()
    try:
        return here.recv() if here.poll(LIMIT_S) else _stopped(f"not done after {LIMIT_S} s")
    except EOFError:
        return _stopped("its process ended without a result")
    finally:
        process.kill()
        process.join()


def _stopped(reason: str) -> dict:
    return {"passed": False, "reason": reason}


def versions() -> dict[str, str]:
    """What the rows depend on beside this project's code."""
    packages = ("transformers", "torch", "llmcompressor", "compressed-tensors")
    own = {"processor": processor_class(), "discovery": source_hash()[:12]}
    return own | {name: version(name) for name in packages}


def table(results: dict) -> str:
    """The Markdown of all rows."""
    rows = results["families"]
    passed = [name for name, row in rows.items() if row["passed"]]
    lines = [
        "# Families from end to end",
        "",
        f"Tiny twins of the {len(rows)} entries of transformers' causal mapping; "
        f"{len(passed)} pass from end to end. " + ", ".join(
            f"{name} {value}" for name, value in results["versions"].items()) + ".",
        "",
        "Groups are places at which scales are folded, in a twin of four layers: attention input, "
        "attention output, MLP input, MLP down. A norm that feeds both counts twice.",
        "",
        "| family | groups | norm | experts | variant | engine | CPU s | not folded: it needs |",
        "| :-- | :-- | :-- | :-- | :-- | :-- | --: | :-- |",
    ]  # fmt: skip
    for name in passed:
        row = rows[name]
        groups = " / ".join(str(row["groups"][target]) for target in TARGETS)
        groups += " (shared norm)" if row["shared_norms"] else ""
        norm = "1 + w" if row["offsets"] else "w"
        refusals = "; ".join(f"{t.replace('_', ' ')}: {w}" for t, w in row["refusals"].items())
        cells = (name, groups, norm, row["experts"], row["variant"], row["engine"],
                 f"{row['seconds']:.0f}", refusals)  # fmt: skip
        lines.append("| " + " | ".join(cell.replace("|", "/") for cell in cells) + " |")
    lines += ["", "## Not studied", "", "| family | reason |", "| :-- | :-- |"]
    lines += [
        f"| {name} | {row['reason'].replace('|', '/')} |"
        for name, row in rows.items()
        if not row["passed"]
    ]
    return "\n".join(lines) + "\n"


def main(entries: list[str]) -> None:
    """Make the rows that are missing, or those that are named."""
    warnings.filterwarnings("ignore")
    logging.set_verbosity_error()
    torch.set_num_threads(1)
    variants.quiet_llmcompressor()
    int8_matmul.are_available()  # compiled passes are loaded once, for all entries
    gc.collect()
    gc.freeze()  # what was imported is not searched again in every entry
    path = FOLDER / "families.json"
    results = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    if results.get("versions") != versions():
        results = {"versions": versions(), "families": {}}
    known = list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    for entry in entries or [name for name in known if name not in results["families"]]:
        row = run_apart(entry)
        print(f"{entry}: {'passes' if row['passed'] else row['reason']}", flush=True)
        results["families"][entry] = row
        results["families"] = {n: results["families"][n] for n in known if n in results["families"]}
        write_json(path, results)
        (FOLDER / "families.md").write_text(table(results), "utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
