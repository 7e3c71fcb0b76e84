"""Tasks on this project's engine against lm-evaluation-harness's own run, item by item.

    python -m benchmarks.lm_eval_parity --items 48

Both start from the same task files and rows (`benchmarks.lm_eval_tasks`), in float32, and end with
the metrics of every item: requests are built, answered and scored. Compared are the metrics, the
log-probabilities and the texts. Times are taken in turns, in seconds of the processor, which what
else the machine does hardly changes. Ours also read what the graded scores need, which the harness
does not: golds and foils.
"""

import argparse
import logging
import os
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from statistics import median

os.environ |= {"TQDM_DISABLE": "1", "TRANSFORMERS_VERBOSITY": "error", "HF_HUB_OFFLINE": "1"}

import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from benchmarks.lm_eval_tasks import ROWS, SHOTS, TASKS, task_settings, write_tasks
from helpers.core.files import outputs_root
from helpers.core.records import package_versions
from helpers.evaluation.engine import answer
from helpers.evaluation.prompts import gold_answers, tokenize_prompts
from helpers.runtime.devices import features, set_malloc_thresholds
from helpers.sources import tasks
from helpers.sources.models import bundled_model_folder, load_model, load_tokenizer
from helpers.sources.tasks import task_items, with_foils
from helpers.study.schema import Batch, Runtime, TaskSet
from helpers.study.tasks import read_definition
from lm_eval import evaluator

HARNESS_BATCH = 16
LIMITS = Batch(tokens=4096, rows=64)
CLOSE = 1e-4  # nats; the most that log-probabilities may differ


@dataclass
class Parity:
    """One task, answered by both.

    Attributes:
        metrics: values of all items that were compared; differing: those that are not equal.
        texts: written answers compared; other_texts: those that are not equal.
        largest: difference of a log-probability, in nats; per_token: the same a token.
        ours, theirs: processor seconds of each round.
    """

    kind: str
    items: int
    metrics: int = 0
    differing: int = 0
    texts: int = 0
    other_texts: int = 0
    largest: float = 0.0
    per_token: float = 0.0
    ours: list[float] = field(default_factory=list)
    theirs: list[float] = field(default_factory=list)


def read_task(kind: str, file: Path, *, items: int) -> TaskSet:
    """The task file as an evaluation set of all its items."""
    task_set = TaskSet(**task_settings(kind, file, items=items))
    return task_set.model_copy(update={"definition": read_definition(task_set)})


def our_rows(model, tokenizer, task_set: TaskSet) -> list[dict]:
    """Our predictions of all items, in the order of the rows; the task file is read anew."""
    tasks._open_cached.cache_clear()
    items = with_foils(task_items(task_set)[0], task_set)
    prompts = tokenize_prompts(items, task_set, tokenizer)
    golds = gold_answers(items, task_set)
    rows = {
        r["id"]: r for r in answer(model, tokenizer, prompts, task_set, limits=LIMITS, golds=golds)
    }
    return [rows[item.id] for item in items]


def their_samples(harness: HFLM, file: Path, shots: int) -> list[dict[str, dict]]:
    """The harness's samples of all items by filter, in the order of the rows."""
    results = evaluator.simple_evaluate(
        model=harness,
        tasks=[str(file)],
        task_manager=TaskManager(include_defaults=False),
        num_fewshot=shots,
        log_samples=True,
        bootstrap_iters=0,
    )
    [samples] = results["samples"].values()
    by_item: dict[int, dict[str, dict]] = {}
    for sample in samples:
        by_item.setdefault(sample["doc_id"], {})[sample["filter"]] = sample
    return [by_item[number] for number in sorted(by_item)]


def compare(parity: Parity, rows: Sequence[dict], samples: Sequence[dict[str, dict]]) -> None:
    """Add the differences between our rows and the harness's samples of one task."""
    for row, by_filter in zip(rows, samples, strict=True):
        first = next(iter(by_filter.values()))
        responses = [response[0] for response in first["resps"]]
        if isinstance(responses[0], str):
            parity.texts += 1
            parity.other_texts += row["output"] != responses[0]
        else:
            theirs = [r[0] if isinstance(r, tuple | list) else r for r in responses]
            ours = row.get("logprobs") or row["gold_loglikelihoods"]
            tokens = row.get("gold_tokens") or [1] * len(ours)
            for a, b, n in zip(ours, theirs, tokens, strict=True):
                parity.largest = max(parity.largest, abs(a - float(b)))
                parity.per_token = max(parity.per_token, abs(a - float(b)) / n)
        for name, value in row["metrics"].items():
            metric, _, filter_name = name.partition(",")
            parity.metrics += 1
            parity.differing += not _same(metric, value, by_filter[filter_name][metric])


def _same(metric: str, ours, theirs) -> bool:
    """Equal; of log-likelihoods, close: of a whole text that is by CLOSE per word or byte."""
    if isinstance(ours, list):
        (nats, count), (their_nats, their_count) = ours, theirs
        return count == their_count and abs(nats - float(their_nats)) <= CLOSE * count
    return abs(ours - float(theirs)) <= (CLOSE if metric == "perplexity" else 0.0)


def run(
    model,
    tokenizer,
    harness: HFLM,
    folder: Path,
    *,
    items: int,
    rounds: int,
    kinds: Iterable[str] = tuple(ROWS),
) -> list[Parity]:
    """Answer these kinds of tasks by both, in turns."""
    kinds = list(kinds)
    warm = write_tasks(folder / "warm", items=2)[kinds[0]]
    our_rows(model, tokenizer, read_task(kinds[0], warm, items=2))
    their_samples(harness, warm, SHOTS.get(kinds[0], 0))
    files, parities = write_tasks(folder, items=items), []
    for kind in kinds:
        task_set = read_task(kind, files[kind], items=items)
        parity = Parity(kind, items)
        for turn in range(rounds):
            began = time.process_time()
            rows = our_rows(model, tokenizer, task_set)
            parity.ours.append(time.process_time() - began)
            began = time.process_time()
            samples = their_samples(harness, files[kind], SHOTS.get(kind, 0))
            parity.theirs.append(time.process_time() - began)
            if not turn:
                compare(parity, rows, samples)
        parities.append(parity)
    return parities


def table(parities: Sequence[Parity]) -> str:
    """The comparison as markdown."""
    lines = [
        "| task | output type | items | metrics that differ | texts that differ | largest "
        "difference [nats] | a token | ours [CPU s] | harness [CPU s] | ratio |",
        "| :--- | :--- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for p in parities:
        kind = TASKS.get(p.kind, {"output_type": "multiple_choice"})["output_type"]
        texts = f"{p.other_texts} of {p.texts}" if p.texts else "–"
        sums = (f"{p.largest:.1e}", f"{p.per_token:.1e}") if not p.texts else ("–", "–")
        ours, theirs = median(p.ours), median(p.theirs)
        lines.append(
            f"| {p.kind} | {kind} | {p.items} | {p.differing} of {p.metrics} | {texts} | {sums[0]} "
            f"| {sums[1]} | {ours:.2f} | {theirs:.2f} | {theirs / ours:.1f} |"
        )
    ours, theirs = (sum(median(side) for side in sides) for sides in _sides(parities))
    lines.append(f"| sum | | | | | | | {ours:.2f} | {theirs:.2f} | **{theirs / ours:.1f}** |")
    return "\n".join(lines)


def _sides(parities: Sequence[Parity]) -> tuple[list[list[float]], list[list[float]]]:
    return [p.ours for p in parities], [p.theirs for p in parities]


def main() -> None:
    """Compare on the bundled model and write outputs/bench/lm-eval-parity.md."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.lm_eval_parity", description=__doc__
    )
    parser.add_argument("--items", type=int, default=48, help="of each task (48)")
    parser.add_argument("--rounds", type=int, default=3, help="of each comparison (3)")
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    logging.disable(logging.WARNING)
    set_malloc_thresholds()
    torch.set_num_threads(given.threads)
    folder = bundled_model_folder()
    runtime = Runtime(device="cpu", dtype="float32", threads=given.threads, quantized="int8")
    model, tokenizer = load_model(folder, runtime), load_tokenizer(folder, enable_thinking=None)
    options = {"dtype": "float32", "batch_size": HARNESS_BATCH, "device": "cpu"}
    harness = HFLM(pretrained=str(folder), **options)
    with tempfile.TemporaryDirectory() as scratch:
        sizes = {"items": given.items, "rounds": given.rounds}
        parities = run(model, tokenizer, harness, Path(scratch), **sizes)
    versions = package_versions()
    shown = ", ".join(f"{name} {versions[name]}" for name in ("torch", "transformers"))
    text = f"""# Tasks of lm-evaluation-harness: ours and its own run

SmolLM2-135M-Instruct in float32 on {given.threads} thread(s) of a CPU ({", ".join(features())}),
{given.items} made-up items a task in the schemas of the Hub's datasets, {given.rounds} round(s)
in turns, medians. The harness is lm_eval {version("lm_eval")} with its HF backend at batch
{HARNESS_BATCH}; {shown}.

Goals: the metrics of every item are equal, log-probabilities differ by at most {CLOSE:g} nats, and
all tasks together take a third of the harness's time. Ours also read the golds and foils of the
graded scores.

{table(parities)}
"""
    path = outputs_root() / "bench" / "lm-eval-parity.md"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, "utf-8")
    print(text)


if __name__ == "__main__":
    main()
