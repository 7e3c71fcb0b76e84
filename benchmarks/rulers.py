"""KL of other recipes than int8 W8A8, simulated by compressed-tensors: rulers for its loss.

    python -m benchmarks.rulers

writes outputs/bench/rulers.md and rulers.json. A ruler tells how large a loss is: weights alone
(W8A16) and activations alone (A8) say where the loss of W8A8 comes from, FP8 dynamic and W4A16 what
people run instead. Nothing here is a speed or a checkpoint: the float model computes with values
rounded as the recipe rounds them. Weights are rounded to nearest. The groups of W4A16 have 64
weights, since 576 input features are no multiple of the usual 128.
"""

import argparse
import os
import tempfile
from pathlib import Path

os.environ |= {"TQDM_DISABLE": "1", "TRANSFORMERS_VERBOSITY": "error", "HF_HUB_OFFLINE": "1"}
os.environ["LLM_COMPRESSOR_LOG_LEVEL"] = "ERROR"

import torch

from benchmarks.gptq import ALPHA, TARGETS, recipe
from benchmarks.material import Material
from helpers.core.files import outputs_root, write_atomically
from helpers.core.records import package_versions, write_json
from helpers.inference.perplexity import passage_rows, read_passages
from helpers.quantization.smoothing import same_alpha, smooth_variant_
from helpers.runtime.devices import (
    processor_class,
    processor_name,
    set_malloc_thresholds,
    simulated_by_onednn,
)
from helpers.sources.sampling import shared_passages

INT8 = {"num_bits": 8, "type": "int", "symmetric": True}
FP8 = {"num_bits": 8, "type": "float", "symmetric": True}
WEIGHTS = INT8 | {"strategy": "channel", "dynamic": False}
ACTIVATIONS = INT8 | {"strategy": "token", "dynamic": True}
INT4 = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 64}
SCHEMES = {
    "W8A8": {"weights": WEIGHTS, "input_activations": ACTIVATIONS},
    "W8A16, weights alone": {"weights": WEIGHTS},
    "A8, activations alone": {"input_activations": ACTIVATIONS},
    "FP8 dynamic": {
        "weights": FP8 | {"strategy": "channel", "dynamic": False},
        "input_activations": FP8 | {"strategy": "token", "dynamic": True},
    },
    "W4A16, groups of 64": {"weights": INT4 | {"dynamic": False}},
}
SMOOTHED = ("W8A8", "W8A16, weights alone", "A8, activations alone")


def simulated_model(material: Material, absmax: dict | None, scheme: dict):
    """The float model, smoothed if maxima are given, computing as the scheme does."""
    from llmcompressor.core import State
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor.modifiers.quantization.calibration import observe, update_qparams

    model = material.float_model()
    if absmax is not None:
        alphas = same_alpha(model.config, TARGETS, ALPHA)
        smooth_variant_(model, absmax, recipe("nearest"), alphas)
    groups = {"group_0": {"targets": ["Linear"], **scheme}}
    modifier = QuantizationModifier(config_groups=groups, ignore=["lm_head"])
    modifier.on_initialize(State(model=model))
    modifier.start_calibration(model)
    modules = [m for m in model.modules() if hasattr(m, "weight_observer")]
    observe(modules, "weight")
    update_qparams(modules, "weight")
    modifier.end_calibration(model)
    return model


def measure(material: Material) -> list[dict]:
    """KL and top-1 agreement of every ruler on the demo's shared text."""
    limit, tokens = material.study.evaluation.batch.tokens, material.passages(None)
    passages = shared_passages(material.study)
    reference = read_passages(material.float_model(), tokens, batch_tokens=limit)
    absmax, rows = material.calibrate(), []
    for smoothing in (None, absmax):
        for name, scheme in SCHEMES.items():
            if smoothing is not None and name not in SMOOTHED:
                continue
            model = simulated_model(material, smoothing, scheme)
            with simulated_by_onednn(model):
                states = read_passages(model, tokens, batch_tokens=limit)
            read = passage_rows(passages, tokens, states, reference)
            total = sum(row["tokens"] for row in read)
            label = name if smoothing is None else f"{name}, smoothed at α = {ALPHA}"
            rows.append({"recipe": label, "tokens": total})
            rows[-1]["kl"] = sum(row["kl"] for row in read) / total
            rows[-1]["top1"] = sum(row["top1_agreements"] for row in read) / total
            print(f"  {label}: KL {rows[-1]['kl']:.4f}", flush=True)
    return rows


def not_additive(rows: list[dict]) -> dict[str, float]:
    """KL of W8A8 − weights alone − activations alone, without and with smoothing."""
    kl = {row["recipe"]: row["kl"] for row in rows}
    remainders = {}
    for ending in ("", f", smoothed at α = {ALPHA}"):
        both, weights, activations = (kl[f"{name}{ending}"] for name in SMOOTHED)
        remainders[ending.removeprefix(", ") or "not smoothed"] = both - weights - activations
    return remainders


def markdown(result: dict) -> str:
    """The table with its conditions."""
    remainders = "; ".join(f"{n}: {r:+.4f}" for n, r in result["not_additive"].items())
    versions = ", ".join(f"{name} {value}" for name, value in result["versions"].items())
    lines = [
        "# Rulers: other recipes, simulated",
        "",
        "Made by `python -m benchmarks.rulers`: the demo's base model on "
        f"{result['rows'][0]['tokens']:,} tokens of its shared text. All are simulated by "
        "compressed-tensors; weights are rounded to nearest and the head is kept. Processor: "
        f"{result['processor']}. Versions: {versions}.",
        "",
        "| simulated recipe | KL from float32 [nats/token] | top-1 agreement |",
        "| :--- | ---: | ---: |",
        *(f"| {r['recipe']} | {r['kl']:.4f} | {r['top1']:.3f} |" for r in result["rows"]),
        "",
        "KL of W8A8 that is neither of the weights alone nor of the activations alone "
        f"[nats/token]: {remainders}.",
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    """Measure and write the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.rulers", description=__doc__)
    parser.add_argument("--items", type=int, default=10**6, help="texts and passages at most")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    given = parser.parse_args()
    set_malloc_thresholds()
    torch.set_num_threads(given.threads)
    with tempfile.TemporaryDirectory() as scratch:
        rows = measure(Material(given.threads, given.items, 1, Path(scratch)))
    result = {"rows": rows, "not_additive": not_additive(rows), "versions": package_versions()}
    result["processor"] = f"{processor_name()} ({processor_class()})"
    folder = outputs_root() / "bench"
    write_json(folder / "rulers.json", result)
    write_atomically(folder / "rulers.md", lambda p: p.write_text(markdown(result), "utf-8"))
    print(markdown(result))


if __name__ == "__main__":
    main()
