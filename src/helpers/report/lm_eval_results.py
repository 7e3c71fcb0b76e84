"""One variant's figures as lm-evaluation-harness writes its aggregated results.

Every mean is over the rows of the samples file beside it, with the standard error the
harness gives a mean. Fractions are 0-1, for SQuAD too, where the harness counts to 100.
"""

import math
from datetime import datetime
from importlib.metadata import version

from helpers.evaluation.metrics import mean
from helpers.report.lm_eval_samples import filter_name, metric_names, task_hash
from helpers.report.results import Evaluated, Results
from helpers.study.schema import EvaluationSet

HARNESS = "0.4.13"
SHARED = "shared_text"
LOWER_IS_BETTER = {"token_perplexity", "kl", "median_absolute_difference"}
BEYOND_MEANS = ("macro_f1", "has_answer_exact_match", "has_answer_f1", "no_answer_exact_match")
BEYOND_MEANS += ("median_absolute_difference",)


def aggregated(results: Results, found: Evaluated, samples: dict[str, list[dict]]) -> dict:
    """The content of `results_<date>.json` for one variant of one model."""
    asked = results.study.evaluation.datasets
    metrics = {name: _metrics(found, name, rows, asked[name]) for name, rows in samples.items()}
    counts = {name: len(rows) for name, rows in samples.items()}
    metrics[SHARED], counts[SHARED] = _shared(found), found.shared_text["passages"]
    return {
        "results": {
            task: {"name": task, "alias": task, "sample_len": counts[task], **values}
            for task, values in metrics.items()
        },
        "group_subtasks": {task: [] for task in metrics},
        "configs": {SHARED: _shared_config(results)}
        | {name: _config(results, name, wanted) for name, wanted in asked.items()},
        "versions": dict.fromkeys(metrics, version("smoothquant-study")),
        "n-shot": {SHARED: 0} | {name: _shots(wanted) for name, wanted in asked.items()},
        "higher_is_better": {task: _directions(values) for task, values in metrics.items()},
        "n-samples": {task: {"original": n, "effective": n} for task, n in counts.items()},
        "config": _run(results, found),
        "task_hashes": {name: task_hash(rows) for name, rows in samples.items()},
        **_identity(found),
    }


def _shots(wanted: EvaluationSet) -> int:
    return wanted.ask.shots if wanted.ask.protocol == "generate" else 0


def _metrics(found: Evaluated, name: str, rows: list[dict], wanted: EvaluationSet) -> dict:
    """`metric,filter` and its standard error, as the harness names them."""
    suffix, values = filter_name(wanted), {}
    for metric in metric_names(wanted):
        scores = [row[metric] for row in rows]
        values[f"{metric},{suffix}"] = mean(scores)
        values[f"{metric}_stderr,{suffix}"] = standard_error(scores)
    for metric in BEYOND_MEANS:
        if (value := found.metrics[name].get(metric)) is not None:
            values[f"{metric},{suffix}"], values[f"{metric}_stderr,{suffix}"] = value, "N/A"
    return values


def standard_error(values: list[float]) -> float | str:
    """Sample standard deviation over √n; `N/A` of a single value."""
    if len(values) < 2:
        return "N/A"
    middle = mean(values)
    variance = math.fsum((v - middle) ** 2 for v in values) / (len(values) - 1)
    return math.sqrt(variance / len(values))


def _shared(found: Evaluated) -> dict:
    told = found.shared_text
    figures = {"token_perplexity": told["perplexity"], "kl": told["kl"]}
    figures["top1_agreement"] = told["top1_agreement"]
    known = {name: value for name, value in figures.items() if value is not None}
    return {f"{name},none": value for name, value in known.items()} | {
        f"{name}_stderr,none": "N/A" for name in known
    }


def _directions(values: dict) -> dict[str, bool]:
    names = {key.partition(",")[0] for key in values}
    return {n: n not in LOWER_IS_BETTER for n in sorted(names) if not n.endswith("_stderr")}


def _config(results: Results, name: str, wanted: EvaluationSet) -> dict:
    """The task as the harness describes its own, and how it was drawn under `metadata`."""
    scored = wanted.ask.protocol == "loglikelihood"
    found = {
        "task": name,
        "dataset_path": next(iter(wanted.source.model_dump().values())),
        "dataset_name": getattr(wanted.source, "config", None),
        "test_split": getattr(wanted.source, "split", None),
        "output_type": "multiple_choice" if scored else "generate_until",
        "num_fewshot": _shots(wanted),
        "repeats": 1,
        "metric_list": [
            {"metric": metric, "aggregation": "mean", "higher_is_better": True}
            for metric in metric_names(wanted)
        ],
        "metadata": {
            "version": version("smoothquant-study"),
            "study": results.name,
            "seed": results.study.seed,
            "adapter": wanted.adapter,
            **wanted.ask.model_dump(),
        },
    }
    if not scored:
        limits = {"until": [], "do_sample": False, "max_gen_toks": wanted.ask.max_new_tokens}
        found["generation_kwargs"] = limits
    return found


def _shared_config(results: Results) -> dict:
    text = results.study.evaluation.shared_text
    return {
        "task": SHARED,
        "dataset_path": next(iter(text.dataset.model_dump().values())),
        "output_type": "loglikelihood_rolling",
        "num_fewshot": 0,
        "metadata": {"version": version("smoothquant-study"), "max_tokens": text.max_tokens},
    }


def _run(results: Results, found: Evaluated) -> dict:
    study = results.study
    model = {"pretrained": f"{results.name}/{found.model}/{found.variant}"}
    model |= {"dtype": study.runtime.dtype, "quantized": study.runtime.quantized}
    seeds = ("random_seed", "numpy_seed", "torch_seed", "fewshot_seed")
    return {
        "model": "smoothquant-study",
        "model_args": model,
        "model_dtype": f"torch.{study.runtime.dtype}",
        "model_sha": found.record["inputs"]["variant"],
        "batch_size": None,
        "batch_sizes": [],
        "device": study.runtime.device,
        "use_cache": None,
        "limit": None,
        "bootstrap_iters": study.statistics.resamples,
        "gen_kwargs": None,
        **dict.fromkeys(seeds, study.seed),
    }


def _identity(found: Evaluated) -> dict:
    """Who made it, when, with what; the harness's version is that of the format."""
    record, name = found.record, f"{found.model}/{found.variant}"
    machine = record["machine"]
    return {
        "git_hash": None,
        "date": datetime.fromisoformat(record["started"]).timestamp(),
        "pretty_env_info": f"{machine['architecture']}, {machine['cpu_count']} CPUs; "
        + ", ".join(f"{k} {v}" for k, v in record["packages"].items()),
        "transformers_version": record["packages"].get("transformers"),
        "lm_eval_version": None,
        "format": f"lm-evaluation-harness {HARNESS}",
        "model_source": "smoothquant-study",
        "model_name": name,
        "model_name_sanitized": name.replace("/", "__"),
        "total_evaluation_time_seconds": str(record["duration_s"]),
    }
