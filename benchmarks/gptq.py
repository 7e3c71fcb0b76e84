"""SmoothQuant and GPTQ here, and by llmcompressor's `oneshot`: time, output error and KL.

    python -m benchmarks.gptq

writes outputs/bench/gptq.md and gptq.json. The peer is the recipe with which llmcompressor's own
example makes W8A8 checkpoints: SmoothQuantModifier at 0.8, GPTQModifier with scheme W8A8, the head
kept. Both read the demo study's calibration texts without padding. The smoothing statistics differ
(max − min there, max|X| here; NOTES.md), so the weights do too; a second run of the peer's GPTQ
starts from the model smoothed here. In the first block nearly all integers have to be equal then.
From block to block differences grow, since GPTQ passes every error on; how far is seen in a third
run of the peer, which reads the same texts in reverse order.

Output errors are those of each Linear alone, on float inputs: the checkpoint's smoothing scales are
the source's norms over its own.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

os.environ |= {"TQDM_DISABLE": "1", "TRANSFORMERS_VERBOSITY": "error", "HF_HUB_OFFLINE": "1"}
os.environ["LLM_COMPRESSOR_LOG_LEVEL"] = "ERROR"

import torch
from datasets import Dataset

from benchmarks.material import Material
from benchmarks.quantizing import costs
from helpers.core.files import outputs_root, write_atomically
from helpers.core.records import package_versions, write_json
from helpers.quantization import simulation
from helpers.quantization.calibration import smoothing_groups
from helpers.quantization.simulation import SquaredSums
from helpers.quantization.smoothing import same_alpha, smooth_variant_
from helpers.quantization.variants import load_int8, read_checkpoint_tensors
from helpers.runtime.devices import processor_class, processor_name, set_malloc_thresholds
from helpers.sources.model_files import TensorFiles
from helpers.study.schema import Variant

ALPHA = 0.8
TARGETS = ("attention_input", "mlp_input")
PEER, PEERS_GPTQ = "llmcompressor `oneshot`", "llmcompressor's GPTQ on the model smoothed here"
REVERSED = "the same, texts in reverse order"
KL_FACTOR = 1.25  # two right checkpoints of one recipe cost the model about the same
MOST_IN_FIRST = 0.01  # share of the first block's integers that may differ on equal weights
SHARE_FACTOR = 1.1  # of the peer's own share, over all blocks


def recipe(rounding: str) -> Variant:
    """SmoothQuant 0.8 with one rounding of weights."""
    return Variant(preset="w8a8", rounding=rounding, smooth={"alpha": ALPHA, "targets": TARGETS})


def ours(material: Material, rounding: str) -> Path:
    """The checkpoint of one rounding, from the calibration on."""
    folder = material.scratch / rounding
    material.write_checkpoint(material.calibrate(), recipe(rounding), folder)
    return folder


def peers(material: Material) -> Path:
    """SmoothQuant and GPTQ as llmcompressor's own W8A8 example does them."""
    from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier

    smoothing = SmoothQuantModifier(smoothing_strength=ALPHA)
    return _one_shot(material, material.peers_model(), [smoothing], material.scratch / "oneshot")


def peers_gptq(material: Material, *, order: int = 1) -> Path:
    """llmcompressor's GPTQ alone, on the model smoothed here; order −1 reverses the texts."""
    model, variant = material.peers_model(), recipe("gptq")
    alphas = same_alpha(model.config, TARGETS, ALPHA)
    smooth_variant_(model, material.calibrate(), variant, alphas)
    return _one_shot(material, model, [], material.scratch / f"gptq{order}", order=order)


def _one_shot(material: Material, model, modifiers: list, folder: Path, *, order: int = 1) -> Path:
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier

    texts = material.calibration_texts[::order]
    rows = [{"input_ids": tokens, "attention_mask": [1] * len(tokens)} for tokens in texts]
    oneshot(
        model=model,
        processor=material.tokenizer,
        dataset=Dataset.from_list(rows),
        recipe=[*modifiers, GPTQModifier(targets="Linear", scheme="W8A8", ignore=["lm_head"])],
        max_seq_length=max(map(len, texts)),
        num_calibration_samples=len(texts),
        shuffle_calibration_samples=False,
        output_dir=str(folder),
    )
    return folder


@torch.inference_mode()
def output_sqnr(material: Material, folder: Path) -> list[float]:
    """Output SQNR of every Linear of a checkpoint in dB, on a few calibration texts."""
    model, int8 = material.float_model(), load_int8(folder, dtype=torch.float32, device="cpu")
    source = TensorFiles(material.folder, dtype=torch.float32)
    saved = TensorFiles(folder, dtype=torch.float32)
    divisors = {}
    for group in smoothing_groups(model.config, TARGETS):
        key = f"{group.producer}.weight"
        divisors |= dict.fromkeys(group.consumers, source[key] / saved[key])
    sums = SquaredSums()

    def hook(name: str):
        def observe(linear, args: tuple) -> None:
            x = args[0]
            exact = torch.nn.functional.linear(x, linear.weight, linear.bias)
            noise = exact - int8.get_submodule(name)(x / divisors.get(name, 1.0))
            sums.signal[name] = sums.signal.get(name, 0.0) + exact.square().sum().item()
            sums.noise[name] = sums.noise.get(name, 0.0) + noise.square().sum().item()

        return observe

    for name in (k.removesuffix(".weight_scale") for k in saved if k.endswith(".weight_scale")):
        model.get_submodule(name).register_forward_pre_hook(hook(name))
    for tokens in material.calibration_texts[: simulation.ITEMS]:
        model.base_model(input_ids=torch.tensor([tokens]), use_cache=False)
    return list(sums.decibels().values())


def different_integers(one: Path, other: Path) -> dict[str, float]:
    """Share of the int8 weights of two checkpoints that differ: of the first block, and of all."""
    tensors, others = read_checkpoint_tensors(one), read_checkpoint_tensors(other)
    int8 = [name for name, tensor in tensors.items() if tensor.dtype == torch.int8]
    first = [name for name in int8 if ".layers.0." in name]
    return {"first block": _share(first, tensors, others), "all": _share(int8, tensors, others)}


def _share(names: list[str], tensors: dict, others: dict) -> float:
    differing = sum(int((tensors[name] != others[name]).sum()) for name in names)
    return differing / sum(tensors[name].numel() for name in names)


def measure(material: Material, roundings: Sequence[str]) -> dict:
    """CPU seconds, KL and output SQNR of each way, and how its integers compare with the peer's."""
    material.calibration_texts  # noqa: B018 - tokenized beforehand, for all of them
    ways = {f"here, {name}": partial(ours, material, name) for name in roundings}
    ways |= {PEER: partial(peers, material), PEERS_GPTQ: partial(peers_gptq, material)}
    ways |= {REVERSED: partial(peers_gptq, material, order=-1)}
    folders, seconds = {}, {}
    for name, way in ways.items():
        started = time.process_time()  # of all threads; other work on the machine is left out
        folders[name] = way()
        seconds[name] = time.process_time() - started
        print(f"  {name}: {seconds[name]:.1f} s", flush=True)
    kl = costs(material, folders)
    rows = []
    for name, folder in folders.items():
        levels = output_sqnr(material, folder)
        mean, least = sum(levels) / len(levels), min(levels)
        rows.append({"way": name, "seconds": round(seconds[name], 1), "kl": kl[name]})
        rows[-1] |= {"sqnr_mean_db": mean, "sqnr_least_db": least, "linears": len(levels)}
    mine, peers_own = (
        different_integers(folders[other], folders[PEERS_GPTQ])
        for other in ("here, gptq", REVERSED)
    )
    shares = {"here": mine, "reversed": peers_own}
    return {"rows": rows, "differing_integers": shares, "holds": _holds(kl, mine, peers_own)}


def _holds(kl: dict[str, float], share: dict[str, float], peers_own: dict[str, float]) -> bool:
    pair = kl["here, gptq"], kl[PEER]
    if max(pair) > KL_FACTOR * min(pair) or share["first block"] > MOST_IN_FIRST:
        return False
    return share["all"] <= SHARE_FACTOR * peers_own["all"]


def markdown(result: dict) -> str:
    """The table with its conditions."""
    lines = [
        "# SmoothQuant 0.8 and GPTQ, here and by llmcompressor",
        "",
        "Made by `python -m benchmarks.gptq`: from the float model to the saved checkpoint, one "
        f"run each, on {result['texts']} calibration texts of the demo study. Processor: "
        f"{result['processor']}, {result['threads']} thread(s). Output SQNR is each Linear's "
        "alone, on float inputs; KL is from the float model, on the demo's shared text. Versions: "
        + ", ".join(f"{name} {value}" for name, value in result["versions"].items())
        + ".",
        "",
        "| weights rounded | CPU seconds | KL [nats/token] | output SQNR, mean [dB] | least [dB] |",
        "| :--- | ---: | ---: | ---: | ---: |",
    ]
    for row in result["rows"]:
        cells = [row["way"], f"{row['seconds']:.1f}", f"{row['kl']:.4f}"]
        cells += [f"{row['sqnr_mean_db']:.2f}", f"{row['sqnr_least_db']:.2f}"]
        lines.append(f"| {' | '.join(cells)} |")
    here, peers_own = (result["differing_integers"][key] for key in ("here", "reversed"))
    lines += [
        "",
        f"On the model smoothed here, {here['first block']:.2%} of the first block's integers "
        f"differ from llmcompressor's own GPTQ (at most {MOST_IN_FIRST:.0%} is allowed: a sum in "
        "another order tips a weight between two steps, and those that make up for it follow). "
        "Later blocks read what earlier ones made of it: of all integers "
        f"{here['all']:.1%} differ. llmcompressor's own differ by "
        f"{peers_own['first block']:.2%} and {peers_own['all']:.1%} if it reads the texts in "
        f"reverse order, and {SHARE_FACTOR} times that is allowed.",
        "",
    ]
    return "\n".join(lines)


def main() -> int:
    """Measure and write the table; 1 if the two GPTQ checkpoints do not agree."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gptq", description=__doc__)
    parser.add_argument("--items", type=int, default=10**6, help="calibration items at most")
    parser.add_argument("--roundings", nargs="+", default=["nearest", "mse", "gptq"])
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    given = parser.parse_args()
    set_malloc_thresholds()
    torch.set_num_threads(given.threads)
    with tempfile.TemporaryDirectory() as scratch:
        material = Material(given.threads, given.items, 1, Path(scratch))
        result = measure(material, given.roundings)
        result |= {
            "processor": f"{processor_name()} ({processor_class()})",
            "threads": given.threads,
            "texts": len(material.calibration_texts),
            "versions": package_versions(),
        }
    folder = outputs_root() / "bench"
    write_json(folder / "gptq.json", result)
    write_atomically(folder / "gptq.md", lambda p: p.write_text(markdown(result), "utf-8"))
    print(markdown(result))
    return 0 if result["holds"] else 1


if __name__ == "__main__":
    raise SystemExit(main())
