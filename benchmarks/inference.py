"""`make bench`: the study's own paths against the plain transformers way, side by side.

Each row runs both ways in this process, in turns, on the bundled model and the shipped
items, and says whether the answers agree. Writes `outputs/bench/inference.md` and
`inference.json`. Ratios hold from machine to machine better than seconds do.
"""

import argparse
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from helpers.evaluation.generation import generate_greedy
from helpers.evaluation.loglikelihood import option_loglikelihoods
from helpers.evaluation.prompts import loglikelihood_prompt, option_tokens
from helpers.quantization import compression
from helpers.quantization.int8 import load_int8
from helpers.quantization.variants import load_reference
from helpers.sources.batching import pad, token_budget_batches
from helpers.sources.bundled import bundled_model_folder
from helpers.sources.conversations import conversation, render, tokenize
from helpers.sources.datasets import load_items
from helpers.sources.models import load_model, load_tokenizer
from helpers.study.paths import outputs_root
from helpers.study.records import package_versions, write_atomically, write_json
from helpers.study.schema import Runtime, ShippedDataset, Variant

BUDGET = 4096
NEW_TOKENS = 32


@dataclass(frozen=True)
class Row:
    """One comparison: seconds of each way (median of the rounds) and their ratio."""

    what: str
    peer: str
    ours_s: float
    peer_s: float
    spread: float
    agreement: str

    @property
    def ratio(self) -> float:
        return self.peer_s / self.ours_s


def side_by_side(ours: Callable, peer: Callable, *, rounds: int):
    """(answers of ours, answers of the peer, median seconds of each, spread), in turns."""
    seconds: dict[str, list[float]] = {"ours": [], "peer": []}
    answers = {}
    for _ in range(rounds):
        for name, run in (("ours", ours), ("peer", peer)):
            started = time.perf_counter()
            answers[name] = run()
            seconds[name].append(time.perf_counter() - started)
    middle = {name: statistics.median(times) for name, times in seconds.items()}
    spread = max((max(t) - min(t)) / middle[n] for n, t in seconds.items())
    return answers["ours"], answers["peer"], middle["ours"], middle["peer"], spread


@torch.inference_mode()
def plain_loglikelihoods(model, items) -> list[list[float]]:
    """One row an option, the context read again for each, logits at every position."""
    rows = [(i, item.context + option, len(option)) for i, item in items for option in item.options]
    scores: list[list[float]] = [[] for _ in items]
    batches = token_budget_batches([len(r[1]) for r in rows], batch_tokens=BUDGET)
    found = {}
    for batch in batches:
        tokens = pad([rows[b][1] for b in batch], value=0, side="right", device=model.device)
        mask = pad(
            [[1] * len(rows[b][1]) for b in batch], value=0, side="right", device=model.device
        )
        logprobs = model(input_ids=tokens, attention_mask=mask).logits.log_softmax(-1)
        for place, b in enumerate(batch):
            _, row, length = rows[b]
            targets = torch.tensor(row[-length:])[:, None]
            window = logprobs[place, len(row) - length - 1 : len(row) - 1]
            found[b] = window.gather(1, targets).sum().item()
    for b, (i, _, _) in enumerate(rows):
        scores[i].append(found[b])
    return scores


@torch.inference_mode()
def plain_generate(model, tokenizer, prompts: list[list[int]]) -> list[list[int]]:
    """transformers' own greedy `generate`, in the same batches."""
    answers: list[list[int]] = [[] for _ in prompts]
    lengths = [len(p) + NEW_TOKENS for p in prompts]
    for batch in token_budget_batches(lengths, batch_tokens=BUDGET):
        rows = [prompts[i] for i in batch]
        tokens = pad(rows, value=0, side="left", device=model.device)
        mask = pad([[1] * len(r) for r in rows], value=0, side="left", device=model.device)
        out = model.generate(
            input_ids=tokens, attention_mask=mask, max_new_tokens=NEW_TOKENS, do_sample=False
        )
        for i, row in zip(batch, out[:, tokens.shape[1] :].tolist(), strict=True):
            end = row.index(tokenizer.eos_token_id) if tokenizer.eos_token_id in row else len(row)
            answers[i] = row[:end]
    return answers


def scored(model, items) -> list[list[float]]:
    found = dict(option_loglikelihoods(model, [item for _, item in items], batch_tokens=BUDGET))
    return [found[i] for i in range(len(items))]


def generated(model, tokenizer, prompts) -> list[list[int]]:
    stop = {tokenizer.eos_token_id}
    answers = generate_greedy(
        model, prompts, max_new_tokens=NEW_TOKENS, stop_tokens=stop, batch_tokens=BUDGET
    )
    found = {i: answer.tokens for i, answer in answers}
    return [found[i] for i in range(len(prompts))]


def same_choices(ours: list[list[float]], peer: list[list[float]]) -> str:
    same = sum(a.index(max(a)) == b.index(max(b)) for a, b in zip(ours, peer, strict=True))
    gap = max(
        abs(x - y) for a, b in zip(ours, peer, strict=True) for x, y in zip(a, b, strict=True)
    )
    return f"{same} of {len(ours)} choices, log-probabilities within {gap:.1e}"


def same_texts(ours: list, peer: list) -> str:
    return f"{sum(a == b for a, b in zip(ours, peer, strict=True))} of {len(ours)} answers"


def quantized_checkpoint(folder: Path, runtime: Runtime, tokenizer) -> None:
    """A plain W8A8 checkpoint of the bundled model; only its speed matters here."""
    compression.quiet_llmcompressor()
    model = load_model(bundled_model_folder(), runtime)
    compression.quantize_variant_(model, Variant(preset="w8a8"), {}, [])
    compression.save_checkpoint(model, tokenizer, folder)


def measure(items_each: int, rounds: int, threads: int) -> list[Row]:
    torch.set_num_threads(threads)
    runtime = Runtime(device="cpu", dtype="float32", threads=threads, quantized="int8")
    source = bundled_model_folder()
    tokenizer = load_tokenizer(source, enable_thinking=None)
    model = load_model(source, runtime)
    science = load_items(ShippedDataset(shipped="arc"), adapter="arc")[:items_each]
    asked = [option_tokens(tokenizer, loglikelihood_prompt(item, "arc")) for item in science]
    items = list(enumerate(asked))
    problems = load_items(ShippedDataset(shipped="openmath_eval"), adapter="openmath")[:items_each]
    prompts = [
        tokenize(tokenizer, render(tokenizer, conversation(p, "openmath", shots=2)))
        for p in problems
    ]
    tokens = torch.randint(100, 40_000, (8, 256), generator=torch.Generator().manual_seed(0))
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = Path(folder) / "checkpoint"
        quantized_checkpoint(checkpoint, runtime, tokenizer)
        fast = load_int8(checkpoint, dtype=torch.float32, device="cpu")
        simulated = load_reference(checkpoint, dtype=torch.float32, device="cpu")
    plans = [
        (
            "option scoring, float32, shared context",
            "one row an option, all logits",
            lambda: scored(model, items),
            lambda: plain_loglikelihoods(model, items),
            same_choices,
        ),
        (
            "generation, float32, shared prefix, finished rows leave",
            "transformers `generate`",
            lambda: generated(model, tokenizer, prompts),
            lambda: plain_generate(model, tokenizer, prompts),
            same_texts,
        ),
        (
            "prefill 8 × 256 tokens, INT8 kernels",
            "the same model in float32",
            lambda: forward(fast, tokens),
            lambda: forward(model, tokens),
            lambda *_: "another model",
        ),
        (
            "prefill 8 × 256 tokens, INT8 kernels",
            "the same checkpoint as transformers simulates it",
            lambda: forward(fast, tokens),
            lambda: forward(simulated, tokens),
            lambda *_: "layer by layer, in the tests",
        ),
        (
            "option scoring, INT8 kernels, shared context",
            "one row an option, simulated checkpoint",
            lambda: scored(fast, items),
            lambda: plain_loglikelihoods(simulated, items),
            same_choices,
        ),
    ]
    for what, peer, ours, theirs, agree in plans:
        a, b, ours_s, peer_s, spread = side_by_side(ours, theirs, rounds=rounds)
        rows.append(Row(what, peer, ours_s, peer_s, spread, agree(a, b)))
        print(f"{what}: {rows[-1].ratio:.2f} x {peer}", flush=True)
    return rows


@torch.inference_mode()
def forward(model, tokens) -> None:
    model.base_model(input_ids=tokens, use_cache=False)


def processor_name() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def as_markdown(rows: list[Row], machine: dict) -> str:
    lines = [
        "# Inference benchmark",
        "",
        f"{machine['processor']}, {machine['threads']} threads; torch {machine['torch']}, "
        f"transformers {machine['transformers']}. Bundled model, {machine['items']} items a row, "
        f"median of {machine['rounds']} rounds in turns. Made by `make bench`.",
        "",
        "| ours | peer | ours [s] | peer [s] | ratio | spread | agreement |",
        "|---|---|---:|---:|---:|---:|---|",
    ]
    for r in rows:
        lines.append(
            f"| {r.what} | {r.peer} | {r.ours_s:.2f} | {r.peer_s:.2f} | {r.ratio:.2f}× "
            f"| ±{50 * r.spread:.0f} % | {r.agreement} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--items", type=int, default=24, help="items a row (24)")
    parser.add_argument("--rounds", type=int, default=3, help="rounds of each way (3)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    rows = measure(options.items, options.rounds, options.threads)
    versions = package_versions()
    machine = {
        "processor": processor_name(),
        "threads": options.threads,
        "items": options.items,
        "rounds": options.rounds,
        "torch": versions["torch"],
        "transformers": versions["transformers"],
    }
    folder = outputs_root() / "bench"
    table = [asdict(row) | {"ratio": row.ratio} for row in rows]
    write_json(folder / "inference.json", {"machine": machine, "rows": table})
    text = as_markdown(rows, machine)
    write_atomically(folder / "inference.md", lambda p: p.write_text(text, encoding="utf-8"))
    print(json.dumps(machine), f"written: {folder.name}/inference.md", sep="\n")


if __name__ == "__main__":
    main()
