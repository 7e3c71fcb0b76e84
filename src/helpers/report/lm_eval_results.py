"""One variant's figures as lm-evaluation-harness writes its aggregated results.

Every mean is over the rows of the samples file beside it, with the standard error the
harness gives a mean. Fractions are 0-1, for SQuAD too, where the harness counts to 100.
"""

import math
from datetime import datetime
from importlib.metadata import version

from helpers.evaluation.metrics import mean
from helpers.report.lm_eval_samples import filter_name, metric_names, task_hash
from helpers.report.results import Results, VariantResults
from helpers.study.schema import EvaluationSet

HARNESS = "0.4.13"
SHARED = "shared_text"
LOWER_IS_BETTER = {"token_perplexity", "kl", "median_absolute_difference"}
METRICS_WITHOUT_MEAN = (
    "macro_f1",
    "has_answer_exact_match",
    "has_answer_f1",
    "no_answer_exact_match",
)
METRICS_WITHOUT_MEAN += ("median_absolute_difference",)


def aggregated_results(
    results: Results, variant: VariantResults, samples: dict[str, list[dict]]
) -> dict:
    """The content of `results_<date>.json` for one variant of one model."""
    datasets = results.study.evaluation.datasets
    metrics = {
        name: _aggregated_metrics(variant, name, rows, datasets[name])
        for name, rows in samples.items()
    }
    counts = {name: len(rows) for name, rows in samples.items()}
    metrics[SHARED], counts[SHARED] = _shared_text_values(variant), variant.shared_text["passages"]
    return {
        "results": {
            task: {"name": task, "alias": task, "sample_len": counts[task], **values}
            for task, values in metrics.items()
        },
        "group_subtasks": {task: [] for task in metrics},
        "configs": {SHARED: _shared_text_config(results)}
        | {
            name: _task_config(results, name, evaluation_set)
            for name, evaluation_set in datasets.items()
        },
        "versions": dict.fromkeys(metrics, version("smoothquant-study")),
        "n-shot": {SHARED: 0}
        | {name: _fewshot_count(evaluation_set) for name, evaluation_set in datasets.items()},
        "higher_is_better": {task: _higher_is_better(values) for task, values in metrics.items()},
        "n-samples": {task: {"original": n, "effective": n} for task, n in counts.items()},
        "config": _run_config(results, variant),
        "task_hashes": {name: task_hash(rows) for name, rows in samples.items()},
        **_provenance_fields(variant),
    }


def _fewshot_count(evaluation_set: EvaluationSet) -> int:
    return evaluation_set.ask.shots if evaluation_set.ask.protocol == "generate" else 0


def _aggregated_metrics(
    variant: VariantResults, name: str, rows: list[dict], evaluation_set: EvaluationSet
) -> dict:
    """`metric,filter` and its standard error, as the harness names them."""
    suffix, values = filter_name(evaluation_set), {}
    for metric in metric_names(evaluation_set):
        scores = [row[metric] for row in rows]
        values[f"{metric},{suffix}"] = mean(scores)
        values[f"{metric}_stderr,{suffix}"] = standard_error(scores)
    for metric in METRICS_WITHOUT_MEAN:
        if (value := variant.metrics[name].get(metric)) is not None:
            values[f"{metric},{suffix}"], values[f"{metric}_stderr,{suffix}"] = value, "N/A"
    return values


def standard_error(values: list[float]) -> float | str:
    """Sample standard deviation over √n; `N/A` of a single value."""
    if len(values) < 2:
        return "N/A"
    middle = mean(values)
    variance = math.fsum((v - middle) ** 2 for v in values) / (len(values) - 1)
    return math.sqrt(variance / len(values))


def _shared_text_values(variant: VariantResults) -> dict:
    shared_text = variant.shared_text
    figures = {"token_perplexity": shared_text["perplexity"], "kl": shared_text["kl"]}
    figures["top1_agreement"] = shared_text["top1_agreement"]
    finite = {name: value for name, value in figures.items() if value is not None}
    return {f"{name},none": value for name, value in finite.items()} | {
        f"{name}_stderr,none": "N/A" for name in finite
    }


def _higher_is_better(values: dict) -> dict[str, bool]:
    names = {key.partition(",")[0] for key in values}
    return {n: n not in LOWER_IS_BETTER for n in sorted(names) if not n.endswith("_stderr")}


def _task_config(results: Results, name: str, evaluation_set: EvaluationSet) -> dict:
    """The task in the harness's fields, with the sampling under `metadata`."""
    scored = evaluation_set.ask.protocol == "loglikelihood"
    config = {
        "task": name,
        "dataset_path": next(iter(evaluation_set.source.model_dump().values())),
        "dataset_name": getattr(evaluation_set.source, "config", None),
        "test_split": getattr(evaluation_set.source, "split", None),
        "output_type": "multiple_choice" if scored else "generate_until",
        "num_fewshot": _fewshot_count(evaluation_set),
        "repeats": 1,
        "metric_list": [
            {"metric": metric, "aggregation": "mean", "higher_is_better": True}
            for metric in metric_names(evaluation_set)
        ],
        "metadata": {
            "version": version("smoothquant-study"),
            "study": results.name,
            "seed": results.study.seed,
            "adapter": evaluation_set.adapter,
            **evaluation_set.ask.model_dump(),
        },
    }
    if not scored:
        limits = {
            "until": [],
            "do_sample": False,
            "max_gen_toks": evaluation_set.ask.max_new_tokens,
        }
        config["generation_kwargs"] = limits
    return config


def _shared_text_config(results: Results) -> dict:
    text = results.study.evaluation.shared_text
    return {
        "task": SHARED,
        "dataset_path": next(iter(text.dataset.model_dump().values())),
        "output_type": "loglikelihood_rolling",
        "num_fewshot": 0,
        "metadata": {"version": version("smoothquant-study"), "max_tokens": text.max_tokens},
    }


def _run_config(results: Results, variant: VariantResults) -> dict:
    study = results.study
    model = {"pretrained": f"{results.name}/{variant.model}/{variant.variant}"}
    model |= {"dtype": study.runtime.dtype, "quantized": study.runtime.quantized}
    seeds = ("random_seed", "numpy_seed", "torch_seed", "fewshot_seed")
    return {
        "model": "smoothquant-study",
        "model_args": model,
        "model_dtype": f"torch.{study.runtime.dtype}",
        "model_sha": variant.record["inputs"]["variant"],
        "batch_size": None,
        "batch_sizes": [],
        "device": study.runtime.device,
        "use_cache": None,
        "limit": None,
        "bootstrap_iters": study.statistics.resamples,
        "gen_kwargs": None,
        **dict.fromkeys(seeds, study.seed),
    }


def _provenance_fields(variant: VariantResults) -> dict:
    """Date, environment and versions; the harness's version is that of the format."""
    record, name = variant.record, f"{variant.model}/{variant.variant}"
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
