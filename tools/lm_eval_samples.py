"""Sample files of lm-evaluation-harness: read, checked, paired, and as rows for the statistics.

A sample file (`--log_samples`, version 0.4.5 or newer) has a line for each document and filter.
Hashes are compared with what they are of. How targets name options, and by which lengths `acc_norm`
divides, is not in the file: it is what makes the logged accuracies come out again.
"""

import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from helpers.core.errors import StudyError, one_line
from helpers.core.records import sha256_text

REQUIRED = ("doc_id", "doc", "target", "arguments", "resps", "filtered_resps")
HASHES = ("doc_hash", "prompt_hash", "target_hash")
NOT_METRICS = {*REQUIRED, *HASHES, "filter", "metrics"}
INVALID = "[invalid]"  # the harness's word for an answer that a filter could not read
EXPECTED = "give samples_<task>_<date>.jsonl, which lm-evaluation-harness's --log_samples writes"
LONG_TEXT = 60  # characters; documents that share a longer text are probably not independent


@dataclass(frozen=True)
class SampleFile:
    """One run's samples of one task.

    Attributes:
        place: the file's name in messages.
        samples: by (filter, document number), in the order of the file.
        metrics: names of the metrics, in the order of the file.
    """

    place: str
    samples: dict[tuple[str, Any], dict]
    metrics: tuple[str, ...]


Pairs = list[tuple[dict, dict]]


def read_samples(path: Path) -> SampleFile:
    """The samples of a file.

    Raises:
        StudyError: the file is none of the harness's samples, is damaged, or holds a document
            twice.
    """
    place, samples, lines = str(path), {}, {}
    if not path.is_file():
        raise StudyError(f"{place}: is no file; {EXPECTED}")
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise StudyError(f"{place}: is not UTF-8 ({error}); {EXPECTED}") from None
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        sample = _sample(line, f"{place}: line {number}")
        key = (str(sample.get("filter", "none")), sample["doc_id"])
        if key in samples:
            raise StudyError(
                f"{place}: document {key[1]} is there twice, in lines {lines[key]} and {number}; "
                "the harness appends to a file that exists, so keep the lines of one run"
            )
        samples[key], lines[key] = sample, number
    if not samples:
        raise StudyError(f"{place}: holds no samples; {EXPECTED}")
    metrics = [_metric_names(sample) for sample in samples.values()]
    if other := next((m for m in metrics if set(m) != set(metrics[0])), None):
        differing = ", ".join(sorted(set(other) ^ set(metrics[0])))
        raise StudyError(
            f"{place}: its documents have different metrics ({differing}); give one task's file"
        )
    return SampleFile(place, samples, metrics[0])


def _sample(line: str, place: str) -> dict:
    """One line of a sample file, its hashes compared with what it holds."""
    try:
        sample = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise StudyError(f"{place} is not JSON ({one_line(error)[:80]}); {EXPECTED}") from None
    if not isinstance(sample, dict):
        raise StudyError(f"{place} is no object; {EXPECTED}")
    if "results" in sample and "configs" in sample:
        raise StudyError(f"{place} holds aggregated results; {EXPECTED}")
    if missing := [name for name in (*REQUIRED, *HASHES) if name not in sample]:
        raise StudyError(
            f"{place} has no {missing[0]}: no sample of a harness from 0.4.5 on; {EXPECTED}"
        )
    if not isinstance(sample["doc_id"], int | str) or isinstance(sample["doc_id"], bool):
        raise StudyError(f"{place} has a doc_id that is no number; {EXPECTED}")
    requests = requests_of(sample)
    if not requests or len(requests) != len(sample["resps"]):
        raise StudyError(f"{place} holds no answer to each of its requests; evaluate again")
    contents = {"target_hash": str(sample["target"])}
    if isinstance(requests[0].get("arg_0"), str):
        contents["prompt_hash"] = requests[0]["arg_0"]
    for name, content in contents.items():
        if sample[name] != sha256_text(content):
            kind = name.partition("_")[0]
            raise StudyError(f"{place} has a {kind} that is not the hashed one; evaluate again")
    return sample


def requests_of(sample: dict) -> list[dict]:
    """The arguments of each request, `{"arg_0": prompt, "arg_1": continuation or limits}`."""
    arguments = sample["arguments"]
    if not isinstance(arguments, dict) or not isinstance(sample["resps"], list):
        return []
    requests = [arguments.get(f"gen_args_{i}") for i in range(len(arguments))]
    return requests if all(isinstance(request, dict) for request in requests) else []


def _metric_names(sample: dict) -> tuple[str, ...]:
    names = sample.get("metrics")
    if not isinstance(names, list):
        names = [name for name in sample if name not in NOT_METRICS]
    return tuple(name for name in names if name in sample)


def paired_samples(baseline: SampleFile, variant: SampleFile) -> dict[str, Pairs]:
    """Both samples of every document, by filter and in the order of the documents' numbers.

    Raises:
        StudyError: documents, prompts, targets, options, limits or metrics differ.
    """
    if set(baseline.metrics) != set(variant.metrics):
        raise StudyError(
            f"{variant.place}: its metrics are {', '.join(variant.metrics)}, those of "
            f"{baseline.place} are {', '.join(baseline.metrics)}; evaluate the same task twice"
        )
    first, second = baseline.samples.keys(), variant.samples.keys()
    if unpaired := sorted(first ^ second, key=_order):
        both = len(first & second)
        name, number = unpaired[0]
        filtered = "" if name == "none" else f" with the filter {name}"
        raise StudyError(
            f"{variant.place}: document {number}{filtered} is in one file alone ({both} are in "
            f"both, {len(unpaired)} in one); evaluate both on the same documents"
        )
    pairs: dict[str, Pairs] = {}
    for name, number in sorted(first, key=_order):
        before, after = baseline.samples[name, number], variant.samples[name, number]
        if difference := _difference(before, after):
            raise StudyError(
                f"{variant.place}: document {number} {difference} in {baseline.place}; evaluate "
                "both with one version of the task, the same examples and the same template"
            )
        pairs.setdefault(name, []).append((before, after))
    return pairs


def _order(key: tuple[str, Any]) -> tuple:
    name, number = key
    return name, isinstance(number, str), number


def _difference(before: dict, after: dict) -> str | None:
    for name, words in (
        ("doc_hash", "is another one than"),
        ("prompt_hash", "has another prompt than"),
        ("target_hash", "has another target than"),
    ):
        if before[name] != after[name]:
            return words
    asked, again = requests_of(before), requests_of(after)
    if [r.get("arg_0") for r in asked] != [r.get("arg_0") for r in again]:
        return "has another prompt than"
    if asked != again:
        is_text = isinstance(asked[0].get("arg_1"), str)
        return "has other options than" if is_text else "was generated with other limits than"
    return None


@dataclass(frozen=True)
class Options:
    """How the options of a task are read, so that its logged accuracies come out again.

    Attributes:
        target: `index` or `text`: how a target names the right options.
        lengths: the unit in which `acc_norm` divides, `characters` or `bytes`; None if neither
            gives the logged values.
    """

    target: str
    lengths: str | None


def options_of(pairs: Pairs) -> Options | str:
    """How to read the options; or why there are none, as the end of a sentence."""
    samples = [sample for pair in pairs for sample in pair]
    if not all(loglikelihoods(sample) for sample in samples):
        return "the files hold no log-likelihoods of options"
    for target in ("index", "text"):
        if all(right_options(sample, target) for sample in samples) and _follows(
            samples, "acc", target, None
        ):
            break
    else:
        return "the logged acc does not follow from log-likelihoods and target"
    units = [u for u in ("characters", "bytes") if _follows(samples, "acc_norm", target, u)]
    return Options(target, units[0] if units and "acc_norm" in samples[0] else None)


def loglikelihoods(sample: dict) -> list[float] | None:
    """The log-likelihood of each option in nats; None if the requests are none of options.

    With mutual information each option is also scored without a prompt; those are left out.
    """
    requests = requests_of(sample)
    half = len(requests) // 2
    if half > 1 and all(r.get("arg_0") == "" for r in requests[half:]) and requests[0]["arg_0"]:
        requests = requests[:half]
    if len(requests) < 2 or not all(isinstance(r.get("arg_1"), str) for r in requests):
        return None
    try:
        return [float(sample["resps"][i][0][0]) for i in range(len(requests))]
    except (TypeError, ValueError, IndexError, KeyError):
        return None


def option_texts(sample: dict) -> list[str]:
    """The options without the delimiter before them."""
    texts = [request["arg_1"] for request in requests_of(sample)]
    return [text.lstrip() for text in texts[: len(loglikelihoods(sample) or texts)]]


def right_options(sample: dict, target: str) -> list[int]:
    """Places of the right options; empty if the target names none."""
    texts, value = option_texts(sample), str(sample["target"])
    if target == "text":
        return [i for i, text in enumerate(texts) if text.strip() == value.strip()]
    places = [int(number) for number in re.findall(r"-?\d+", value)]
    plain = re.fullmatch(r"\[?\s*-?\d+(?:\s*,\s*-?\d+)*\s*\]?", value)
    return places if plain and all(0 <= place < len(texts) for place in places) else []


def chosen_option(sample: dict, unit: str | None) -> int:
    """The option with the largest log-likelihood, per `unit` if one is given; -1 of NaN."""
    scores = np.array(loglikelihoods(sample))
    if not np.isfinite(scores).all():
        return -1
    if unit:
        scores = scores / option_lengths(sample, unit)
    return int(np.argmax(scores))


def option_lengths(sample: dict, unit: str) -> list[int]:
    texts = option_texts(sample)
    return [max(1, len(text.encode() if unit == "bytes" else text)) for text in texts]


def _follows(samples: Sequence[dict], metric: str, target: str, unit: str | None) -> bool:
    """Whether a logged accuracy follows from the log-likelihoods of every sample that has it."""
    return all(
        chosen_option(s, unit) == -1
        or (chosen_option(s, unit) in right_options(s, target)) == bool(s[metric])
        for s in samples
        if isinstance(s.get(metric), int | float)
    )


def document_id(sample: dict) -> str:
    """The document's number as a text that sorts as the number does."""
    number = sample["doc_id"]
    return f"{number:012d}" if isinstance(number, int) else number


def prediction(sample: dict, metric: str, options: Options | None, cluster: str) -> dict:
    """A sample's score by one metric, in the shape that the verdicts read."""
    row = {
        "id": document_id(sample),
        "cluster": cluster,
        "score": float(sample[metric]),
        "prompt_hash": sample["prompt_hash"],
        "status": "answered",
        "finish_reason": "unknown",
        "output": "",
    }
    if not options:
        answer = sample["filtered_resps"]
        answer = answer[0] if isinstance(answer, list) and len(answer) == 1 else answer
        text = answer if isinstance(answer, str) else json.dumps(answer, ensure_ascii=False)
        output = sample["resps"][0][0] if isinstance(sample["resps"][0], list) else ""
        return row | {
            "parsed": text,
            "golds": [str(sample["target"])],
            "status": "unparsed" if text == INVALID else "answered",
            "output": output if isinstance(output, str) else "",
        }
    unit = options.lengths if metric == "acc_norm" else None
    chosen, logprobs = chosen_option(sample, unit), loglikelihoods(sample)
    labels = [str(place) for place in range(len(logprobs))]
    return row | {
        "parsed": str(chosen),
        "golds": [labels[place] for place in right_options(sample, options.target)],
        "labels": labels,
        "logprobs": logprobs,
        "option_bytes": option_lengths(sample, unit) if unit else None,
        "finish_reason": "nonfinite" if chosen == -1 else "unknown",
    }


def clusters_of(pairs: Pairs, field: str | None) -> list[str]:
    """The cluster of each document: the value of a field of it; empty text without a field.

    Raises:
        StudyError: a document has no such field, or all have one value.
    """
    if field is None:
        return [""] * len(pairs)
    docs = [before["doc"] for before, _ in pairs]
    for sample, doc in ((pair[0], pair[0]["doc"]) for pair in pairs):
        if not isinstance(doc, dict) or field not in doc:
            names = ", ".join(map(str, doc)) if isinstance(doc, dict) else "none"
            raise StudyError(
                f"--cluster {field}: document {sample['doc_id']} has no such field; its fields: "
                f"{names}"
            )
    clusters = [sha256_text(json.dumps(doc[field], sort_keys=True))[:16] for doc in docs]
    if len(set(clusters)) < 2:
        raise StudyError(f"--cluster {field}: all documents have one value; name another field")
    return clusters


def shared_field(pairs: Pairs) -> tuple[str, int] | None:
    """A field with a long text that some documents share but not all: (name, documents)."""
    docs = [before["doc"] for before, _ in pairs]
    if not all(isinstance(doc, dict) for doc in docs):
        return None
    shared: dict[str, int] = {}
    for field in docs[0]:
        values = [doc[field] for doc in docs if isinstance(doc.get(field), str)]
        texts = Counter(value for value in values if len(value) >= LONG_TEXT)
        if len(texts) > 1:
            shared[field] = sum(times for times in texts.values() if times > 1)
    best = max(shared, key=shared.__getitem__, default="")
    return (best, shared[best]) if shared.get(best) else None
