"""Predictions as lm-evaluation-harness writes its samples: one line an item.

The fields are those of its 0.4.13 (`lm_eval/result_schema.py`), so that what reads its
files reads these: `resps` as it logs them, hashes as it makes them. What it knows and
this project does not (whether an option is also the greedy continuation) is "None".
"""

import json
from typing import Any

from helpers.core.hashing import sha256_text
from helpers.study.schema import EvaluationSet

INVALID = "[invalid]"  # its word for an answer that a filter could not read
NOT_FINITE = "nan"


def metric_names(evaluation_set: EvaluationSet) -> list[str]:
    """The per-item metrics of an evaluation set, the study's main metric first."""
    if evaluation_set.ask.protocol == "loglikelihood":
        return ["acc_norm", "acc"] if evaluation_set.ask.normalize == "bytes" else ["acc"]
    return ["exact_match", "f1"] if evaluation_set.adapter == "squad_v2" else ["exact_match"]


def filter_name(evaluation_set: EvaluationSet) -> str:
    """The harness's filter name: `boxed` if the answer is parsed from the last box."""
    boxed = evaluation_set.ask.protocol == "generate" and evaluation_set.ask.answer == "boxed"
    return "boxed" if boxed else "none"


def sample_line(
    place: int, row: dict, prompt_record: dict, evaluation_set: EvaluationSet
) -> dict[str, Any]:
    """One line of `samples_<task>_<date>.jsonl`.

    Args:
        place: the item's place in the evaluation set.
        row: the prediction.
        prompt_record: the item's prompt (`helpers.evaluation.prompt_records`).
    """
    scored = evaluation_set.ask.protocol == "loglikelihood"
    doc = {key: prompt_record[key] for key in ("id", "question", "passage", "options", "labels")}
    doc["golds"] = row["golds"]
    target = _target_index(row, prompt_record) if scored else "; ".join(row["golds"])
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
    logprobs = row.get("logprobs") or [NOT_FINITE] * len(prompt_record["continuations"])
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
