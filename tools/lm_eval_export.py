"""A study's results in lm-evaluation-harness's format, for whatever reads its files.

    python -m tools.lm_eval_export demo

writes, for every variant of every model, `outputs/<study>/lm-eval/<model>__<variant>/` with
`results_<date>.json` and `samples_<task>_<date>.jsonl`: the names, the fields and the hashes of
its 0.4.13 (`lm_eval/result_schema.py`). Only results that the report would show are handed on. The
tasks are this study's own and not the harness's of similar names: items, prompts and parsing
differ.

Samples are one line an item, `resps` as the harness logs them, hashes as it makes them. What it
knows and this project does not (whether an option is also the greedy continuation) is "None".
Every mean of the aggregated results is over the rows of the samples file beside it, with the
standard error the harness gives a mean. Fractions are 0-1, for SQuAD too, where the harness counts
to 100.
"""

import argparse
import json
import math
import shutil
import sys
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from helpers.core.errors import StudyError
from helpers.core.records import sha256_text, write_json, write_jsonl
from helpers.evaluation.checks.recomputed_answers import log_likelihoods
from helpers.evaluation.predictions import read_prompts
from helpers.evaluation.scoring import mean
from helpers.report.estimates import VariantResults
from helpers.report.results import Results, load_results
from helpers.study.loading import Job, open_job
from helpers.study.schema import EvaluationSet, TaskSet

INVALID = "[invalid]"  # its word for an answer that a filter could not read
NOT_FINITE = "nan"


def metric_names(evaluation_set: EvaluationSet) -> list[str]:
    """The per-item metrics of an evaluation set, the study's main metric first."""
    if isinstance(evaluation_set, TaskSet):
        return [evaluation_set.metric_name or "in_order"]
    if evaluation_set.ask.protocol == "loglikelihood":
        return ["acc_norm", "acc"] if evaluation_set.ask.normalize == "bytes" else ["acc"]
    return ["exact_match", "f1"] if evaluation_set.adapter == "squad_v2" else ["exact_match"]


def filter_name(evaluation_set: EvaluationSet) -> str:
    """The harness's filter name: `boxed` if the answer is parsed from the last box."""
    if isinstance(evaluation_set, TaskSet):
        return (evaluation_set.read.metric or "").partition(",")[2] or "none"
    boxed = evaluation_set.ask.protocol == "generate" and evaluation_set.ask.answer == "boxed"
    return "boxed" if boxed else "none"


def sample_line(
    place: int, row: dict, prompt_record: dict, evaluation_set: EvaluationSet
) -> dict[str, Any]:
    """One line of `samples_<task>_<date>.jsonl`.

    Args:
        place: the item's place in the evaluation set.
        row: the prediction.
        prompt_record: the item's prompt (`helpers.evaluation.predictions`).
    """
    scored = evaluation_set.ask.protocol != "generate"
    has_options = evaluation_set.ask.protocol == "loglikelihood"
    doc = {key: prompt_record[key] for key in ("id", "question", "passage", "options", "labels")}
    doc["golds"] = row["golds"]
    target = _target_index(row, prompt_record) if has_options else "; ".join(row["golds"])
    values = _metric_values(row, prompt_record, evaluation_set)
    return {
        "doc_id": place,
        "doc": doc,
        "target": target,
        **(
            _choice_fields(row, prompt_record)
            if scored
            else _generation_fields(row, prompt_record, evaluation_set)
        ),
        "filter": filter_name(evaluation_set),
        "metrics": list(values),
        "doc_hash": sha256_text(json.dumps(doc, indent=2, ensure_ascii=False)),
        "prompt_hash": sha256_text(prompt_record["prompt"]),
        "target_hash": sha256_text(target),
        **values,
    }


def task_hash(samples: list[dict]) -> str:
    """Hash of all items and prompts: equal for the same items with the same prompts."""
    keys = ("doc_hash", "prompt_hash", "target_hash")
    return sha256_text("".join(sample[key] for sample in samples for key in keys))


def _target_index(row: dict, prompt_record: dict) -> str:
    """Index of the gold option, as text."""
    return str(prompt_record["labels"].index(row["golds"][0]))


def _metric_values(
    row: dict, prompt_record: dict, evaluation_set: EvaluationSet
) -> dict[str, float]:
    if isinstance(evaluation_set, TaskSet):
        own = {
            name.partition(",")[0]: v for name, v in row.get("metrics", {}).items() if v in (0, 1)
        }
        return own | dict.fromkeys(metric_names(evaluation_set), row["score"])
    values = {"exact_match": row["score"], "acc_norm": row["score"], "f1": row.get("f1", 0.0)}
    values["acc"] = row["score"]
    if evaluation_set.ask.protocol == "loglikelihood" and evaluation_set.ask.normalize != "none":
        values["acc"] = _unnormalized(row, prompt_record)
    return {name: float(values[name]) for name in metric_names(evaluation_set)}


def _unnormalized(row: dict, prompt_record: dict) -> float:
    """Whether the option with the largest sum, not divided by its length, is right."""
    logprobs = row.get("logprobs")
    if not logprobs:
        return 0.0
    best = max(range(len(logprobs)), key=logprobs.__getitem__)
    return float(prompt_record["labels"][best] in row["golds"])


def _choice_fields(row: dict, prompt_record: dict) -> dict[str, Any]:
    """One request per option: (log-probability, whether it is greedy), as texts."""
    logprobs = row.get("logprobs") or log_likelihoods(row)
    logprobs = logprobs or [NOT_FINITE] * len(prompt_record["continuations"])
    answers = [[str(value), "None"] for value in logprobs]
    pairs = enumerate(prompt_record["continuations"])
    return {
        "arguments": {
            f"gen_args_{i}": {"arg_0": prompt_record["prompt"], "arg_1": c} for i, c in pairs
        },
        "resps": [[answer] for answer in answers],
        "filtered_resps": answers,
    }


def _generation_fields(
    row: dict, prompt_record: dict, evaluation_set: EvaluationSet
) -> dict[str, Any]:
    parsed = row["parsed"] if row["status"] == "answered" else row["status"]
    limits = {"until": [], "do_sample": False, "max_gen_toks": evaluation_set.ask.max_new_tokens}
    return {
        "arguments": {"gen_args_0": {"arg_0": prompt_record["prompt"], "arg_1": limits}},
        "resps": [[row["output"]]],
        "filtered_resps": [INVALID if row["status"] == "unparsed" else parsed],
    }


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
    if isinstance(evaluation_set, TaskSet):
        return evaluation_set.shots
    return evaluation_set.ask.shots


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
    scored = evaluation_set.ask.protocol != "generate"
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
    if isinstance(evaluation_set, TaskSet):
        config["output_type"] = evaluation_set.read.output_type
        config["metadata"]["task"] = evaluation_set.task
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


def write_harness_files(job: Job) -> Path:
    """Write every variant's files anew and return the folder they are in.

    Raises:
        StudyError: the results are not complete, or the prompts are not on record.
    """
    results, folder = load_results(job), job.paths.root / "lm-eval"
    samples_by_variant = [
        (variant, _sample_rows(job, results, variant)) for variant in results.evaluations.values()
    ]
    shutil.rmtree(folder, ignore_errors=True)
    for variant, samples in samples_by_variant:
        place, date = folder / f"{variant.model}__{variant.variant}", _evaluation_date(variant)
        write_json(place / f"results_{date}.json", aggregated_results(results, variant, samples))
        for task, rows in samples.items():
            write_jsonl(place / f"samples_{task}_{date}.jsonl", rows)
    return folder


def _sample_rows(job: Job, results: Results, variant: VariantResults) -> dict[str, list[dict]]:
    """The rows of every evaluation set, each with the baseline's prompt."""
    baseline = job.paths.evaluation(variant.model, results.study.baseline)
    samples = {}
    for name, evaluation_set in results.study.evaluation.datasets.items():
        prompt_records, rows = read_prompts(baseline, name), []
        for place, row in enumerate(variant.predictions[name]):
            prompt_record = prompt_records.get(row["id"], {})
            if prompt_record.get("prompt_hash") != row["prompt_hash"]:
                raise StudyError(
                    f"{variant.model}/{variant.variant}: the prompt of item {row['id']} of "
                    f"{name} is not on record; run 03_evaluation again"
                )
            rows.append(sample_line(place, row, prompt_record, evaluation_set))
        samples[name] = rows
    return samples


def _evaluation_date(variant: VariantResults) -> str:
    """Start time of the evaluation in the format of the harness's file names."""
    began = datetime.fromisoformat(variant.record["started"]).astimezone(UTC)
    return began.strftime("%Y-%m-%dT%H-%M-%S.%f")


def main(argv: list[str] | None = None) -> int:
    """The command line; see `--help`."""
    parser = argparse.ArgumentParser(prog="python -m tools.lm_eval_export", description=__doc__)
    parser.add_argument("study", help="a study's name in params/, or the path of its YAML file")
    arguments = parser.parse_args(argv)
    try:
        print(f"written: {write_harness_files(open_job(arguments.study))}")
    except StudyError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
