"""Scores: answers parsed and compared with the golds, and averaged over an evaluation set.

An answer is *answered*, *abstained* (it says, and says only, that there is none) or *unparsed*.
Parsing does not know the gold answer and guesses nothing: what does not parse is `None`. Unparsed
answers score zero, on unanswerable questions too: silence is not an abstention. Numbers are read
in `helpers.sources.items`.

Whatever is averaged is averaged over all items: an answer that does not parse is wrong, it does
not shrink the denominator. The one exception, the median absolute difference of numbers, carries
its coverage beside it. Fractions are 0–1. Imports no torch.

Answers without a model are here too: constants, copies of worked examples, repetition loops,
counted on the items that a variant was given. Verdicts and gates (`helpers.statistics.verdicts`,
`helpers.evaluation.checks.integrity`) decide what follows from them.
"""

import math
import re
import statistics
import string
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from helpers.core.errors import StudyError, valid_unicode
from helpers.sources.chat import EXAMPLES
from helpers.sources.items import Item, gold_number, label_key, parse_number
from helpers.sources.tasks import IN_ORDER, REVERSED, harness_metrics
from helpers.study.schema import EvaluationSet, Study, TaskSet

ABSTENTION = "unanswerable"

_BRACES = re.compile(r"\\boxed\{|[{}]")


def last_boxed(text: str) -> str | None:
    r"""The content of the last complete `\boxed{…}`, braces balanced; None if there is none."""
    begin, end, opened = -1, -1, []
    for brace in _BRACES.finditer(text, max(0, text.find(r"\boxed{"))):
        if brace[0] != "}":
            opened.append(-1 if brace[0] == "{" else brace.end())
        elif opened and (start := opened.pop()) > begin:
            begin, end = start, brace.start()
    return text[begin:end] if begin >= 0 else None


_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalize_answer(text: str) -> str:
    """SQuAD's normalisation: lower case, no punctuation, no articles, single spaces.

    Rajpurkar et al., arXiv:1806.03822, official evaluation.
    """
    lowered = text.lower().translate(_NO_PUNCTUATION)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", lowered).split())


def is_abstention(text: str) -> bool:
    """Whether a text says, and says only, that the question cannot be answered."""
    return normalize_answer(text) == ABSTENTION


RELATIVE_TOLERANCE = Fraction(1, 10**6)


def score_options(item: Item, logprobs: list[float], continuations, *, normalize: str) -> dict:
    """The prediction of a log-likelihood protocol: the option with the best score.

    Labels and lengths are kept with the answer, so that its graded score follows from the row.

    Args:
        logprobs: summed log-probability of each continuation.
        continuations: the options' texts.
        normalize: `bytes` divides each sum by its text's UTF-8 length without the leading space.
    """
    if not all(map(math.isfinite, logprobs)):
        return _prediction(item, output="", parsed=None, status="unparsed", finish="nonfinite")
    lengths = [len(c.strip().encode("utf-8")) if normalize == "bytes" else 1 for c in continuations]
    scores = [s / n for s, n in zip(logprobs, lengths, strict=True)]
    best = item.labels[max(range(len(scores)), key=scores.__getitem__)]
    prediction = _prediction(item, output=best, parsed=best, status="answered", finish="scored")
    prediction["score"] = float(best in item.golds)
    prediction["logprobs"] = [round(s, 6) for s in logprobs]
    prediction["labels"] = list(item.labels)
    if normalize == "bytes":
        prediction["option_bytes"] = lengths
    return prediction


def score_text(item: Item, adapter: str, text: str, *, answer: str, finish: str) -> dict:
    """The prediction of a generate protocol.

    Args:
        text: the model's answer without its end-of-turn token; half a surrogate pair is
            stored as U+FFFD.
        answer: `boxed` takes the last complete box; `text` takes all of it.
        finish: the finish reason of the generation.
    """
    text = valid_unicode(text)
    answer_text = last_boxed(text) if answer == "boxed" else text.strip()
    parsed, status = _parse(item, adapter, answer_text)
    if finish == "nonfinite":
        parsed, status = None, "unparsed"
    prediction = _prediction(item, output=text, parsed=parsed, status=status, finish=finish)
    if adapter == "squad_v2":
        prediction["score"], prediction["f1"] = squad_scores(parsed, status, item.golds)
    elif adapter == "openmath":
        prediction["score"], prediction["absolute_difference"] = number_scores(
            parsed, item.golds[0]
        )
    else:
        prediction["score"] = float(parsed is not None and parsed in item.golds)
    return prediction


OTHER_WORDS = "other words"  # what a model writes that would not write the target
INVALID = "[invalid]"  # the harness's word for an answer that a filter could not read


def score_task_options(
    task_set: TaskSet, item: Item, logprobs: list[float], greedy: list[bool]
) -> dict:
    """The prediction of a task's options; the harness decides whether it is right.

    Args:
        logprobs, greedy: of each option: its summed log-probability, and whether it is what
            the model would write.
    """
    if not all(map(math.isfinite, logprobs)):
        return _prediction(item, output="", parsed=None, status="unparsed", finish="nonfinite")
    lengths = option_lengths(task_set.metric_name, item.options)
    scores = [s / n for s, n in zip(logprobs, lengths, strict=True)]
    best = item.labels[max(range(len(scores)), key=scores.__getitem__)]
    prediction = _prediction(item, output=best, parsed=best, status="answered", finish="scored")
    result = harness_metrics(task_set, item, list(zip(logprobs, greedy, strict=True)))
    prediction["score"] = right_or_wrong(task_set, item, result["metrics"])
    prediction["metrics"] = result["metrics"]
    prediction["logprobs"] = [round(s, 6) for s in logprobs]
    prediction["labels"] = list(item.labels)
    if task_set.ask.normalize == "bytes":
        prediction["option_bytes"] = lengths
    return prediction


def option_lengths(metric: str, options: Sequence[str]) -> list[int]:
    """The lengths by which a metric of the harness divides: characters, bytes, or 1."""
    if metric == "acc_norm":
        return [len(option) for option in options]
    if metric == "acc_bytes":
        return [len(option.encode("utf-8")) for option in options]
    return [1] * len(options)


def target_foil(task_set: TaskSet, item: Item) -> str | None:
    """The name of the foil of an item with a given target; None if it has none."""
    if task_set.read.output_type == "loglikelihood_rolling":
        return REVERSED
    return item.options[1] if len(item.options) > 1 else None


def score_task_target(
    task_set: TaskSet, item: Item, logprobs: list[float], greedy: list[bool], tokens: list[int]
) -> dict:
    """The prediction of a given target: whether the model would write it, or its harness metrics.

    A whole text has no right or wrong in the harness; it counts as right if it is likelier a
    token than with its words reversed.

    Args:
        logprobs, greedy, tokens: of the target, then of its foil if it has one.
    """
    if not all(map(math.isfinite, logprobs)):
        return _prediction(item, output="", parsed=None, status="unparsed", finish="nonfinite")
    rolling = task_set.read.output_type == "loglikelihood_rolling"
    response = logprobs[0] if rolling else (logprobs[0], greedy[0])
    metrics = harness_metrics(task_set, item, [response])["metrics"]
    if rolling:
        each = [s / n for s, n in zip(logprobs, tokens, strict=True)]
        parsed = IN_ORDER if each[0] > each[1] else REVERSED
    else:
        parsed = item.golds[0].strip() if greedy[0] else OTHER_WORDS
    prediction = _prediction(item, output=parsed, parsed=parsed, status="answered", finish="scored")
    score = float(parsed == IN_ORDER) if rolling else right_or_wrong(task_set, item, metrics)
    return prediction | {"score": score, "metrics": metrics}


def score_task_text(task_set: TaskSet, item: Item, text: str, *, finish: str) -> dict:
    """The prediction of a written answer: filtered and scored by the harness.

    Args:
        text: the answer up to the first text that ends it.
        finish: the finish reason of the generation.
    """
    text = valid_unicode(text)
    result = harness_metrics(task_set, item, [text])
    _, _, name = (task_set.read.metric or "").partition(",")
    filtered = result["filtered"].get(name, text)
    parsed = filtered if isinstance(filtered, str) else str(filtered)
    readable = finish != "nonfinite" and parsed.strip() not in ("", INVALID)
    status = "answered" if readable else "unparsed"
    parsed = parsed.strip() if readable else None
    prediction = _prediction(item, output=text, parsed=parsed, status=status, finish=finish)
    score = right_or_wrong(task_set, item, result["metrics"]) if finish != "nonfinite" else 0.0
    return prediction | {"score": score, "metrics": result["metrics"]}


def cut_at_stop(text: str, until: Sequence[str]) -> str:
    """The text before the first of the texts that end an answer."""
    return text[: min((at for u in until if (at := text.find(u)) >= 0), default=len(text))]


def right_or_wrong(task_set: TaskSet, item: Item, metrics: dict) -> float:
    """The harness's metric that decides right or wrong.

    Raises:
        StudyError: its value is neither 0 nor 1.
    """
    value = metrics.get(task_set.read.metric)
    if value not in (0, 1):
        known = ", ".join(name for name, v in metrics.items() if v in (0, 1))
        raise StudyError(
            f"task {task_set.task}: {task_set.read.metric} is {value} for item {item.id}, neither "
            f"right (1) nor wrong (0); name another with metric: ({known or 'there is none'})"
        )
    return float(value)


def _prediction(item: Item, *, output: str, parsed, status: str, finish: str) -> dict:
    return {
        "id": item.id,
        "cluster": item.cluster,
        "golds": list(item.golds),
        "output": output,
        "parsed": parsed,
        "status": status,
        "finish_reason": finish,
        "score": 0.0,
    }


def _parse(item: Item, adapter: str, answer_text: str | None) -> tuple[str | None, str]:
    """(parsed answer, status)."""
    if answer_text is None or not answer_text.strip():
        return None, "unparsed"
    if adapter == "squad_v2":
        return (
            (None, "abstained") if is_abstention(answer_text) else (answer_text.strip(), "answered")
        )
    if adapter == "openmath":
        return answer_text.strip(), "answered"
    key = label_key(answer_text)
    for label in item.labels:
        if label_key(label) == key:
            return label, "answered"
    return None, "unparsed"


def squad_scores(parsed: str | None, status: str, golds) -> tuple[float, float]:
    """(exact match, token F1), the best over all golds; (1, 1) for a correct abstention.

    SQuAD 2.0's official evaluation, except that an unparsed answer never counts as empty.
    """
    if not golds:
        score = float(status == "abstained")
        return score, score
    if parsed is None:
        return 0.0, 0.0
    exact = max(float(_words(parsed) == _words(gold)) for gold in golds)
    return exact, max(token_f1(parsed, gold) for gold in golds)


def _words(text: str) -> list[str]:
    """The normalised words; a text without any ("A", "!") is itself one word.

    Without this rule, any article would match the gold answer "A" (as in vitamin A).
    """
    return normalize_answer(text).split() or [text.strip().casefold()]


def token_f1(answer: str, gold: str) -> float:
    """Harmonic mean of precision and recall over normalized words."""
    words, gold_words = _words(answer), _words(gold)
    shared = sum((Counter(words) & Counter(gold_words)).values())
    return 2 * shared / (len(words) + len(gold_words))


def number_scores(parsed: str | None, gold: str) -> tuple[float, float | None]:
    """(1 if right else 0, |answer - gold| if both are numbers).

    Numbers agree within a relative tolerance of 1e-6, which allows for rounded decimals; two
    integers must be equal. A gold that is not a number must match as text without spaces.
    """
    if parsed is None:
        return 0.0, None
    value, expected = parse_number(parsed), gold_number(gold)
    if value is None or expected is None:
        is_equal = "".join(parsed.split()) == "".join(gold.split())
        return float(is_equal), None
    difference = abs(value - expected)
    both_whole = value.denominator == expected.denominator == 1
    tolerance = 0 if both_whole else RELATIVE_TOLERANCE * max(abs(expected), Fraction(1, 10**6))
    is_right = difference <= tolerance
    return float(is_right), _finite_float(difference)


def _finite_float(value: Fraction) -> float | None:
    try:
        return float(value)
    except OverflowError:
        return None


STATUSES = ("answered", "abstained", "unparsed")
LARGEST_NLL = 700.0  # nats per token; exp of more overflows a float


def all_metrics(study: Study, predictions: dict[str, list[dict]]) -> dict[str, dict]:
    """The metrics of every evaluation set of the study, by its name.

    Raises:
        ValueError: a set of the study has no predictions.
    """
    by_set = {}
    for name, evaluation_set in study.evaluation.datasets.items():
        if name not in predictions:
            raise ValueError(f"evaluation set {name!r} has no predictions; run 03_evaluation again")
        by_set[name] = set_metrics(evaluation_set.adapter, predictions[name])
    return by_set


def set_metrics(adapter: str, predictions: list[dict]) -> dict:
    """All metrics of one evaluation set.

    Args:
        adapter: `arc`, `boolq`, `squad_v2`, `openmath` or `task`.
        predictions: one per item, as `helpers.evaluation.engine` yields them.

    Raises:
        ValueError: there are no predictions, or an item occurs twice.
    """
    if not predictions:
        raise ValueError("there are no predictions to score; run 03_evaluation")
    if repeated := [i for i, n in Counter(p["id"] for p in predictions).items() if n > 1]:
        raise ValueError(f"item {repeated[0]} is predicted more than once; run 03_evaluation again")
    values = {"items": len(predictions), "accuracy": mean(p["score"] for p in predictions)}
    if adapter == "squad_v2":
        values = squad_metrics(predictions)
    elif adapter == "openmath":
        values |= number_metrics(predictions)
    elif adapter == "task":
        values["harness"] = harness_means(predictions)
    else:
        values["macro_f1"] = macro_f1(predictions)
    return values | behavior_counts(predictions) | gold_metrics(predictions)


def harness_means(predictions: list[dict]) -> dict[str, float]:
    """The harness's metrics over a set by `metric,filter`, as its own aggregation gives them.

    Metrics that it computes from the whole set at once (such as BLEU) are left out.
    """
    rows = [p["metrics"] for p in predictions if "metrics" in p]
    if len(rows) < len(predictions):
        return {}
    means = {}
    for name in dict.fromkeys(name for row in rows for name in row):
        values, metric = [row.get(name) for row in rows], name.partition(",")[0]
        if all(isinstance(v, list) for v in values):
            nats = -math.fsum(v[0] for v in values) / math.fsum(v[1] for v in values)
            if metric == "bits_per_byte":
                means[name] = nats / math.log(2)
            elif metric in ("word_perplexity", "byte_perplexity") and nats < LARGEST_NLL:
                means[name] = math.exp(nats)
        elif all(isinstance(v, int | float) for v in values):
            average = mean(values)
            if metric == "perplexity":
                average = math.exp(min(-average, LARGEST_NLL))
            means[name] = average
    return means


def gold_metrics(predictions: list[dict]) -> dict:
    """Graded scores of generated answers, in nats per token; empty if golds were not scored.

    Of an item's golds, the one with the highest mean per token counts. Values are None if a
    sum is not finite.
    """
    if not all("gold_loglikelihoods" in p for p in predictions):
        return {}
    golds = [gold_score(p) for p in predictions]
    foils = [(g, foil_score(p)) for g, p in zip(golds, predictions, strict=True) if p["foil"]]
    finite = None not in golds and all(foil is not None for _, foil in foils)
    return {
        "gold_nats_per_token": mean(golds) if finite else None,
        "foil_nats_per_token": mean(f for _, f in foils) if finite and foils else None,
        "gold_above_foil": mean(g > f for g, f in foils) if finite and foils else None,
    }


def gold_score(prediction: dict) -> float | None:
    """Log-likelihood of the best gold in nats per token; None if a sum is not finite."""
    sums, sizes = prediction["gold_loglikelihoods"], prediction["gold_tokens"]
    if None in sums:
        return None
    return max(s / n for s, n in zip(sums, sizes, strict=True))


def foil_score(prediction: dict) -> float | None:
    """Log-likelihood of the foil in nats per token; None if it is not finite."""
    value = prediction["foil_loglikelihood"]
    return None if value is None else value / prediction["foil_tokens"]


def behavior_counts(predictions: list[dict]) -> dict:
    """Counts of the answers' statuses, finish reasons and tokens."""
    statuses = Counter(p["status"] for p in predictions)
    finishes = Counter(p["finish_reason"] for p in predictions)
    return {
        **{status: statuses[status] for status in STATUSES},
        "format_success": 1.0 - statuses["unparsed"] / len(predictions),
        "finish_reasons": dict(sorted(finishes.items())),
        "prompt_tokens": sum(p["prompt_tokens"] for p in predictions),
        "output_tokens": sum(p["output_tokens"] for p in predictions),
    }


def macro_f1(predictions: list[dict]) -> float:
    """Unweighted mean of per-class F1 over the classes that occur as gold answers."""
    scores = []
    for label in sorted({p["golds"][0] for p in predictions}):
        true_positives = sum(p["parsed"] == label and p["golds"][0] == label for p in predictions)
        predicted = sum(p["parsed"] == label for p in predictions)
        actual = sum(p["golds"][0] == label for p in predictions)
        scores.append(2 * true_positives / (predicted + actual))
    return mean(scores)


def squad_metrics(predictions: list[dict]) -> dict:
    """Exact match and F1 over all items, and separately for items with and without an answer."""
    values = {"items": len(predictions), "exact_match": mean(p["score"] for p in predictions)}
    values["f1"] = mean(p["f1"] for p in predictions)
    parts = {
        "has_answer": [p for p in predictions if p["golds"]],
        "no_answer": [p for p in predictions if not p["golds"]],
    }
    for name, part in parts.items():
        values[f"{name}_items"] = len(part)
        values[f"{name}_exact_match"] = mean(p["score"] for p in part) if part else None
        values[f"{name}_f1"] = mean(p["f1"] for p in part) if part else None
    return values


def number_metrics(predictions: list[dict]) -> dict:
    """Median absolute difference over the numeric answers, and their share of all answers."""
    differences = [
        p["absolute_difference"] for p in predictions if p["absolute_difference"] is not None
    ]
    return {
        "median_absolute_difference": statistics.median(differences) if differences else None,
        "median_absolute_difference_coverage": len(differences) / len(predictions),
    }


def shared_text_metrics(rows: list[dict]) -> dict:
    """Perplexity, mean KL and top-1 agreement per token, over all passages.

    Perplexity and KL are None if they, or a passage's sum, are not finite.
    """
    tokens = sum(row["tokens"] for row in rows)
    nll = _finite_mean([row["nll"] for row in rows], tokens)
    return {
        "passages": len(rows),
        "tokens": tokens,
        "perplexity": None if nll is None or nll > LARGEST_NLL else math.exp(nll),
        "kl": _finite_mean([row["kl"] for row in rows], tokens),
        "top1_agreement": sum(row["top1_agreements"] for row in rows) / tokens,
    }


def _finite_mean(sums: list[float | None], tokens: int) -> float | None:
    if not all(s is not None and math.isfinite(s) for s in sums):
        return None
    return math.fsum(sums) / tokens


def mean(values) -> float:
    """Arithmetic mean of at least one value, summed exactly."""
    numbers = list(values)
    return math.fsum(numbers) / len(numbers)


LONGEST_UNIT = 60  # the most characters of a repeated piece
LOOP = 24  # the fewest characters of a loop
REPEATS = 4
MOST_LOST = 5  # exceptions; a sign test gives 2 × ½⁵ = 6 % for 5, 2 × ½⁶ = 3 % for 6
MOST_LOST_SHARE = 0.25  # the largest share of answers that counts as exceptions


@dataclass(frozen=True)
class FixedAnswer:
    """A fixed answer and its score on the same items."""

    answer: str
    score: float


def best_fixed_answer(adapter: str, predictions: list[dict]) -> FixedAnswer:
    """The fixed answer with the best score on these items: a label, number, text or abstention.

    Echoing one worked example is a fixed answer too, so it never scores more.
    """
    golds = [p["golds"] for p in predictions]
    abstaining = FixedAnswer(
        "abstaining", sum(not golds_of_item for golds_of_item in golds) / len(golds)
    )
    readings = {"arc": _label_position, "openmath": _gold_value, "squad_v2": _joined_words}
    key_of = readings.get(adapter, str)
    counts = Counter(
        key for golds_of_item in golds for key in {key_of(text) for text in golds_of_item}
    )
    if not counts:
        return abstaining
    best = min(counts, key=lambda key: (-counts[key], str(key)))
    fixed_answer = FixedAnswer(f"answering “{best}”", counts[best] / len(golds))
    return (
        abstaining
        if adapter == "squad_v2" and abstaining.score >= fixed_answer.score
        else fixed_answer
    )


def _label_position(label: str) -> str:
    """Labels "1" to "5" as "A" to "E", since they name the same positions."""
    return "ABCDE"[int(label) - 1] if label in ("1", "2", "3", "4", "5") else label


def _joined_words(gold: str) -> str:
    return " ".join(_words(gold))


def _gold_value(gold: str):
    value = gold_number(gold)
    return gold if value is None else value


def status_and_answer(prediction: dict) -> tuple[str, str | None]:
    """The status and the parsed answer, without the wording."""
    return prediction["status"], prediction["parsed"]


def readable_share(predictions: list[dict]) -> float:
    """Share of answers that could be parsed, including abstentions."""
    return sum(p["status"] != "unparsed" for p in predictions) / len(predictions)


def capped_share(predictions: list[dict]) -> float:
    """Share of answers that the token limit stopped."""
    return sum(p["finish_reason"] == "length" for p in predictions) / len(predictions)


def looping_share(predictions: list[dict]) -> float:
    """Share of answers that end in a loop."""
    return sum(ends_in_loop(p.get("output", "")) for p in predictions) / len(predictions)


def is_one_answer(predictions: list[dict]) -> bool:
    """Whether questions with different gold answers all got the same answer."""
    golds = {tuple(p["golds"]) for p in predictions}
    return len({status_and_answer(p) for p in predictions}) == 1 and len(golds) > 1


def collapsed_to_one_answer(predictions: list[dict], baseline: list[dict]) -> bool:
    """Whether all answers are the same although the baseline's answers differ significantly.

    A baseline with nearly constant answers may lose its few exceptions to rounding. That is
    tolerated if an exact sign test could not tell their number from chance, if they are a
    small share, and if the remaining answer is the baseline's usual one.
    """
    [(usual_answer, times)] = Counter(map(status_and_answer, baseline)).most_common(1)
    exceptions = len(baseline) - times
    may_be_chance = exceptions <= min(MOST_LOST, MOST_LOST_SHARE * len(baseline))
    is_usual = status_and_answer(predictions[0]) == usual_answer
    return is_one_answer(predictions) and not (may_be_chance and is_usual)


def example_answers(evaluation_set: EvaluationSet) -> set[str]:
    """The normalized answers of the worked examples in this set's prompts."""
    shots = evaluation_set.ask.shots if evaluation_set.ask.protocol == "generate" else 0
    examples = EXAMPLES.get(evaluation_set.adapter, ())[:shots]
    answers = (last_boxed(answer) or answer for _, answer in examples)
    return {normalize_answer(text) for text in answers}


def ends_in_loop(text: str) -> bool:
    """Whether a text ends in repetitions of one piece.

    At least the last 24 characters repeat a piece of at most 60 characters four times or
    more; the last repetition may be incomplete.
    """
    ends = ((unit, text[-max(LOOP, REPEATS * unit) :]) for unit in range(1, LONGEST_UNIT + 1))
    return any(
        len(end) >= max(LOOP, REPEATS * unit) and end[unit:] == end[:-unit] for unit, end in ends
    )
