"""`make serve-check`: does vLLM serve a study's checkpoints, on int8, as this project runs them?

For every model and variant of a study whose checkpoint is there: which kernels vLLM
chose, whether its Linears give the int8 products of the files, and how its answers and
log-probabilities compare with this project's own. Writes `outputs/serve-check/<study>.md`.
"""

import argparse
import statistics
import sys
import time
from collections import Counter
from contextlib import nullcontext
from pathlib import Path

import torch

from benchmarks.rounding_draws import off_by_a_millionth, prediction_interval, vllms_step
from benchmarks.vllm_linears import INT8_KERNEL, largest_difference, linear_kernels
from helpers.core.errors import StudyError
from helpers.core.files import outputs_root, write_atomically
from helpers.core.records import package_versions, write_json
from helpers.evaluation.engine import evaluate
from helpers.inference.perplexity import passage_rows, passage_tokens, read_passages
from helpers.inference.vllm_client import VllmModel
from helpers.quantization.variants import load_variant
from helpers.report.markdown import Markup, Rows, code, markdown_table, number, percent
from helpers.runtime.devices import prepare
from helpers.sources.models import load_tokenizer, model_folder
from helpers.sources.sampling import evaluation_items, shared_passages
from helpers.study.loading import Job, open_job
from helpers.study.schema import Variant

LAYER_TOLERANCE = 1e-5  # of the largest output: float32 rounding
FLOAT_TOLERANCE = 1e-3  # nats, of one token's log-probability in a float32 model
DRAWS = 12  # of our own rounding noise, that vLLM's KL has to be like
CONFIDENCE = 0.998  # of one checkpoint; of a study's six together 0.99
PROBE_TOKENS = 48


def not_served(recipe: Variant) -> str:
    """Why vLLM cannot run a variant as this project does; empty if it can."""
    if recipe.dtype:
        return "float, in another type"
    if recipe.ruler:
        return "a ruler, simulated"
    if recipe.kv:
        return "its int8 cache is simulated"
    if recipe.protect:
        return "it leaves Linears float that vLLM fuses with others"
    return ""


def check_variant(job: Job, *, passages: int, items: int) -> dict:
    """All measurements of one variant of one model."""
    source = model_folder(job.study, job.model, job.paths)
    tokenizer = load_tokenizer(source, enable_thinking=None)
    changed = job.recipe.needs_checkpoint
    folder = job.paths.checkpoint(job.model, job.variant) if changed else source
    ours, _ = load_variant(job)
    start = time.monotonic()
    served = VllmModel(folder, job.study.runtime, seed=job.study.seed)
    results = {"model": job.model, "variant": job.variant, "quantized": job.recipe.quantized}
    results["load_s"] = round(time.monotonic() - start, 1)
    results["versions"] = served.versions()
    try:
        results |= compare_kernels(job, served, ours, folder, tokenizer)
        results |= compare_text(job, served, ours, tokenizer, passages=passages)
        results |= compare_items(job, served, ours, tokenizer, items=items)
    finally:
        served.close()
    return results | {"agrees": not (problems := disagreements(results)), "disagreements": problems}


def compare_kernels(job: Job, served: VllmModel, ours, folder: Path, tokenizer) -> dict:
    """vLLM's kernels, and the largest difference of its Linears from the files' int8 products."""
    chosen = linear_kernels(served)
    results = {"kernels": dict(Counter(chosen.values())), "layer_difference": None}
    if job.recipe.quantized:
        text = passage_tokens(tokenizer, shared_passages(job.study)[:1], max_tokens=PROBE_TOKENS)
        names = [n for n, kernel in chosen.items() if INT8_KERNEL in kernel]
        results["layer_difference"] = largest_difference(served, ours, folder, names, text[0])
    return results


def compare_text(job: Job, served: VllmModel, ours, tokenizer, *, passages: int) -> dict:
    """Log-probabilities on the shared text: each runtime against the float model and each other."""
    texts = shared_passages(job.study)[:passages]
    limit = job.study.evaluation.shared_text.max_tokens
    tokens = passage_tokens(tokenizer, texts, max_tokens=limit)
    budget = job.study.evaluation.batch.tokens
    base = load_variant(open_on_own_kernels(job.name, job.model, job.study.baseline))[0]
    states = {"float": read_passages(base, tokens, batch_tokens=budget)}
    states |= {"ours": read_passages(ours, tokens, batch_tokens=budget)}
    states |= {"vllm": read_passages(served, tokens, batch_tokens=budget)}
    rows = {
        "ours": passage_rows(texts, tokens, states["ours"], states["float"]),
        "vllm": passage_rows(texts, tokens, states["vllm"], states["float"]),
        "both": passage_rows(texts, tokens, states["vllm"], states["ours"]),
    }
    results = {
        f"{key}_{side}": mean_per_token(rows[side], key)
        for side in rows
        for key in ("nll", "kl", "top1_agreements")
    }
    results["tokens"] = sum(row["tokens"] for row in rows["both"])
    results["logprob_difference"] = largest_logprob_difference(states, tokens)
    if job.recipe.quantized:
        results["draws"] = kl_of_draws(ours, texts, tokens, states, batch_tokens=budget)
    return results


def kl_of_draws(ours, texts, tokens, states: dict, *, batch_tokens: int) -> dict[str, list[float]]:
    """KLs of this project's runtime with vLLM's step, from the float model and from the first.

    Each draw but the first has the input embeddings off by a millionth.
    """
    draws = []
    for seed in range(DRAWS):
        with vllms_step(), off_by_a_millionth(ours, seed=seed) if seed else nullcontext():
            draws.append(read_passages(ours, tokens, batch_tokens=batch_tokens))
    return {
        name: [
            mean_per_token(passage_rows(texts, tokens, draw, reference), "kl") for draw in compared
        ]
        for name, reference, compared in (
            ("kl_from_float", states["float"], draws),
            ("kl_from_first", draws[0], draws[1:]),
        )
    }


def mean_per_token(rows: list[dict], key: str) -> float:
    """Mean per token of a quantity that the shared text's rows store as sums."""
    return sum(row[key] for row in rows) / sum(row["tokens"] for row in rows)


@torch.inference_mode()
def largest_logprob_difference(states: dict, tokens: list[list[int]]) -> float:
    """The largest difference between the runtimes over the text's own tokens."""
    targets = torch.tensor([t for text in tokens for t in text[1:]])
    logprobs = []
    for side in ("ours", "vllm"):
        logits = states[side].head(states[side].hidden)
        logprobs.append(logits.log_softmax(-1).gather(1, targets[:, None]))
    return (logprobs[0] - logprobs[1]).abs().max().item()


def compare_items(job: Job, served: VllmModel, ours, tokenizer, *, items: int) -> dict:
    """The number of the study's items with equal answers, by protocol."""
    by_set, limits = {}, job.study.evaluation.batch
    for name, evaluation_set in job.study.evaluation.datasets.items():
        sampled = evaluation_items(job.study, name)[:items]
        sides = [
            {p["id"]: p for p in evaluate(model, tokenizer, sampled, evaluation_set, limits=limits)}
            for model in (ours, served)
        ]
        key = "parsed" if evaluation_set.ask.protocol == "loglikelihood" else "output"
        same = [sides[0][item.id][key] == sides[1][item.id][key] for item in sampled]
        scores = [[side[item.id]["score"] for item in sampled] for side in sides]
        by_set[name] = {
            "protocol": evaluation_set.ask.protocol,
            "items": len(sampled),
            "same": sum(same),
        }
        by_set[name] |= {"score_ours": statistics.mean(scores[0])}
        by_set[name] |= {"score_vllm": statistics.mean(scores[1])}
    return {"items": by_set}


def disagreements(results: dict) -> list[str]:
    """Differences outside the tolerances; empty if the runtimes agree.

    A float32 model has to be the same model. Of an int8 one its Linears have to be the
    same, and it has to be as far from the float model as ours is with vLLM's step; which
    answers flip is a draw of rounding noise.
    """
    names = set(results["kernels"])
    if not results["quantized"]:
        problems = [f"kernels {names}"] if any(INT8_KERNEL in name for name in names) else []
        if not results["logprob_difference"] <= FLOAT_TOLERANCE:
            problems.append(f"log-probabilities differ by {results['logprob_difference']:.2g}")
        differing = [n for n, x in results["items"].items() if x["same"] < x["items"]]
        return problems + [f"answers to {name} differ" for name in differing]
    problems = [] if all(INT8_KERNEL in name for name in names) else [f"kernels {sorted(names)}"]
    if not results["layer_difference"] <= LAYER_TOLERANCE:
        problems.append(f"a Linear differs by {results['layer_difference']:.2g}")
    low, high = prediction_interval(results["draws"]["kl_from_float"], confidence=CONFIDENCE)
    if not low <= results["kl_vllm"] <= high:
        problems.append("its KL from the float model is another")
    return problems


def table(results: list[dict]) -> Rows:
    """One row per variant."""
    rows = []
    for x in results:
        scored = [n for n in x["items"].values() if n["protocol"] == "loglikelihood"]
        generated = [n for n in x["items"].values() if n["protocol"] != "loglikelihood"]
        row = {"model": code(x["model"]), "variant": code(x["variant"])}
        row["kernels"] = ", ".join(f"{n} {kernel}" for kernel, n in x["kernels"].items())
        row["Linear by Linear"] = number(x["layer_difference"])
        row["log-probability"] = number(x["logprob_difference"])
        kls = [number(x[f"kl_{side}"]) for side in ("ours", "vllm", "both")]
        row["KL from float: ours, vLLM"] = f"{kls[0]}, {kls[1]}"
        row["our draws"], row["KL ours to vLLM"] = "–", kls[2]
        if x["quantized"]:
            draws, own = x["draws"]["kl_from_float"], statistics.mean(x["draws"]["kl_from_first"])
            low, high = map(number, prediction_interval(draws, confidence=CONFIDENCE))
            interval = f"{number(min(draws))} to {number(max(draws))} [{low}, {high}]"
            row["our draws"] = Markup(interval)
            row["KL ours to vLLM"] = f"{kls[2]} (two of our draws {number(own)})"
        row["same top-1 token"] = percent(x["top1_agreements_both"])
        row["same choice"] = f"{sum(n['same'] for n in scored)} of {_items(scored)}"
        row["same text"] = f"{sum(n['same'] for n in generated)} of {_items(generated)}"
        row["verdict"] = "agrees" if x["agrees"] else "; ".join(x["disagreements"])
        rows.append(row)
    return rows


def _items(sets: list[dict]) -> int:
    return sum(n["items"] for n in sets)


LEGEND = f"""
*Linear by Linear*: the largest difference between what one of vLLM's int8 Linears makes of
real inputs and the int8 product of the tensors on disk, over its largest output; it has to
be at most {LAYER_TOLERANCE:g}, float32 rounding, beyond what ties between two steps allow, which
each side may round its way. *Log-probability*: the largest difference of one token's between
vLLM and this project, in nats; in a float32 model at most {FLOAT_TOLERANCE:g}, with every
choice and every text the same.

Two int8 engines do not agree token by token, and need not: a last bit tips a value over a
rounding edge, and after a few layers every rounding is drawn anew. Besides, vLLM's dynamic
step is abs-max / 127 where compressed-tensors has abs-max / 127.5, which is another model by a
little. What has to agree is how far from the float model it is: *our draws* are the KLs of this
project's own runtime given vLLM's step, as it is and {DRAWS - 1} times with its input embeddings
off by a millionth: least and most, and in brackets where one more draw lies at {CONFIDENCE:.1%};
vLLM's KL has to lie there. *KL ours to vLLM* has beside it how far two such draws are apart.
"""


def open_on_own_kernels(study: str, model: str, variant: str) -> Job:
    """The job on this machine, on this project's own int8 kernels."""
    return prepare(open_job(study, model=model, variant=variant))


def report(
    study: str, results: list[dict], versions: dict[str, str], left_out: dict[str, str]
) -> str:
    """The report: the table, its explanation, and the variants that vLLM does not run."""
    agreeing = sum(x["agrees"] for x in results)
    versions_text = ", ".join(f"{name} {version}" for name, version in versions.items())
    first = results[0]
    return (
        f"# vLLM against this project's own runtime\n\n{agreeing} of {len(results)} checkpoints of "
        f"the study `{study}` agree, on {first['tokens']:,} tokens of text and "
        f"{_items(list(first['items'].values()))} questions each (there: {versions_text}).\n\n"
        f"{markdown_table(table(results))}{LEGEND}{_left_out(left_out)}"
    )


def _left_out(reasons: dict[str, str]) -> str:
    if not reasons:
        return ""
    named = "; ".join(f"{code(variant)} ({reason})" for variant, reason in reasons.items())
    return f"\nNot compared: {named}.\n"


def main() -> int:
    """The command line; see `--help`."""
    parser = argparse.ArgumentParser(prog="make serve-check", description=__doc__)
    parser.add_argument("study")
    parser.add_argument("--passages", type=int, default=16)
    parser.add_argument("--items", type=int, default=24, help="of each evaluation set")
    parser.add_argument("--variants", nargs="*", help="only these")
    options = parser.parse_args()
    folder = outputs_root() / "serve-check"
    try:
        study, results = open_job(options.study).study, []
        named = options.variants or list(study.variants)
        reasons = {name: not_served(study.variants[name]) for name in named}
        left_out = {name: reason for name, reason in reasons.items() if reason}
        for model in study.models:
            for variant in [name for name in named if name not in left_out]:
                job = open_on_own_kernels(options.study, model, variant)
                results.append(check_variant(job, passages=options.passages, items=options.items))
                outcome = (
                    "agrees" if results[-1]["agrees"] else "; ".join(results[-1]["disagreements"])
                )
                print(f"{model:<12} {variant:<20} {outcome}", flush=True)
    except StudyError as error:
        print(error, file=sys.stderr)
        return 2
    own_versions = package_versions()
    write_json(
        folder / f"{Path(options.study).stem}.json",
        {"study": options.study, "ours": own_versions, "checked": results},
    )
    text = report(options.study, results, results[0]["versions"], left_out)
    path = folder / f"{Path(options.study).stem}.md"
    write_atomically(path, lambda p: p.write_text(text, "utf-8"))
    print(f"written: {path}")
    return 0 if all(x["agrees"] for x in results) else 1


if __name__ == "__main__":
    sys.exit(main())
