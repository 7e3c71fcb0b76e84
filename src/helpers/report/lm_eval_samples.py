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


def metric_names(wanted: EvaluationSet) -> list[str]:
    """The per-item metrics of an evaluation set, the one the study judges by first."""
    if wanted.ask.protocol == "loglikelihood":
        return ["acc_norm", "acc"] if wanted.ask.normalize == "bytes" else ["acc"]
    return ["exact_match", "f1"] if wanted.adapter == "squad_v2" else ["exact_match"]


def filter_name(wanted: EvaluationSet) -> str:
    """`boxed` where the answer is read from the last box, as its filters are named."""
    boxed = wanted.ask.protocol == "generate" and wanted.ask.answer == "boxed"
    return "boxed" if boxed else "none"


def sample(place: int, row: dict, asked: dict, wanted: EvaluationSet) -> dict[str, Any]:
    """One line of `samples_<task>_<date>.jsonl`.

    Args:
        place: the item's place in the evaluation set.
        row: the prediction.
        asked: what the item was asked (`helpers.evaluation.prompt_records`).
    """
    scored = wanted.ask.protocol == "loglikelihood"
    doc = {key: asked[key] for key in ("id", "question", "passage", "options", "labels")}
    doc["golds"] = row["golds"]
    target = _target(row, asked) if scored else "; ".join(row["golds"])
    values = _values(row, asked, wanted)
    return {
        "doc_id": place,
        "doc": doc,
        "target": target,
        **(_scored(row, asked) if scored else _generated(row, asked, wanted)),
        "filter": filter_name(wanted),
        "metrics": list(values),
        "doc_hash": sha256_text(json.dumps(doc, indent=2, ensure_ascii=False)),
        "prompt_hash": sha256_text(asked["prompt"]),
        "target_hash": sha256_text(target),
        **values,
    }


def task_hash(samples: list[dict]) -> str:
    """Equal where the same items were asked in the same words."""
    keys = ("doc_hash", "prompt_hash", "target_hash")
    return sha256_text("".join(found[key] for found in samples for key in keys))


def _target(row: dict, asked: dict) -> str:
    """Of a choice, its place among the options."""
    return str(asked["labels"].index(row["golds"][0]))


def _values(row: dict, asked: dict, wanted: EvaluationSet) -> dict[str, float]:
    found = {"exact_match": row["score"], "acc_norm": row["score"], "f1": row.get("f1", 0.0)}
    found["acc"] = row["score"]
    if wanted.ask.protocol == "loglikelihood" and wanted.ask.normalize != "none":
        found["acc"] = _unnormalized(row, asked)
    return {name: float(found[name]) for name in metric_names(wanted)}


def _unnormalized(row: dict, asked: dict) -> float:
    """Whether the option with the largest sum, not divided by its length, is right."""
    logprobs = row.get("logprobs")
    if not logprobs:
        return 0.0
    best = max(range(len(logprobs)), key=logprobs.__getitem__)
    return float(asked["labels"][best] in row["golds"])


def _scored(row: dict, asked: dict) -> dict[str, Any]:
    """One request an option: (log-probability, whether it is greedy), as texts."""
    logprobs = row.get("logprobs") or [NOT_FINITE] * len(asked["continuations"])
    answers = [[str(value), "None"] for value in logprobs]
    pairs = enumerate(asked["continuations"])
    return {
        "arguments": {f"gen_args_{i}": {"arg_0": asked["prompt"], "arg_1": c} for i, c in pairs},
        "resps": [[answer] for answer in answers],
        "filtered_resps": answers,
    }


def _generated(row: dict, asked: dict, wanted: EvaluationSet) -> dict[str, Any]:
    read = row["parsed"] if row["status"] == "answered" else row["status"]
    limits = {"until": [], "do_sample": False, "max_gen_toks": wanted.ask.max_new_tokens}
    return {
        "arguments": {"gen_args_0": {"arg_0": asked["prompt"], "arg_1": limits}},
        "resps": [[row["output"]]],
        "filtered_resps": [INVALID if row["status"] == "unparsed" else read],
    }
