"""Gates on an evaluation: answers are complete and belong to this variant and these items.

Data in, gates out; no model and no torch is needed.

How a variant answers is held against the baseline on the same items: does it end, repeat itself,
keep the format, echo, read? A baseline that behaves no better makes a set uninformative, which
`helpers.statistics.verdicts` decides; it does not make a variant invalid. So the baseline, held
against itself, passes.

A baseline that is broken is broken for every variant, and nothing that is held against it shows
that. So some gates have limits of their own, where one measured on the baseline would move with
it.
"""

import bz2
import lzma
import math
import zlib
from collections import Counter
from dataclasses import dataclass, field, replace

from helpers.core.records import WHOLE_VARIANT, Gate, none_of
from helpers.evaluation.checks import item_gates
from helpers.evaluation.checks.item_gates import (
    RenderedPrompt,
    clusters_gate,
    contents_gate,
    draw_gate,
    foils_gate,
    leakage_gate,
    raw_rows_gate,
    rows_gate,
    unchecked_note,
)
from helpers.evaluation.checks.numeric_gates import (
    invariance_gate,
    is_batch_invariant,
    options_gate,
    range_gate,
    recomputed_gates,
    reference_gates,
    repeat_gate,
    same_reference_gate,
)
from helpers.evaluation.checks.recomputed_answers import (
    ExpectedGolds,
    foil_gate,
    gold_invariance_gate,
    golds_gate,
    has_nonfinite_golds,
    rescored,
    second_reading_gate,
)
from helpers.evaluation.scoring import (
    best_fixed_answer,
    collapsed_to_one_answer,
    ends_in_loop,
    example_answers,
    normalize_answer,
    readable_share,
    status_and_answer,
)
from helpers.sources.items import Item
from helpers.study.schema import EvaluationSet, MadeModel, RandomModel, Study, TaskSet

LEAST_CHANGE = 1e-4  # relative change of a held-out loss; float32 rounds a mean over tokens to 1e-6
RAW = [{"id": lzma.FILTER_LZMA2, "preset": 9}]


def is_random(study: Study, model: str) -> bool:
    """Whether the study declares that a model's weights are random, or were before training."""
    source = study.models[model]
    if isinstance(source, MadeModel):
        return is_random(study, source.start)
    return isinstance(source, RandomModel)


def plain_text_gate(study: Study, model: str, rows: list[dict], texts: dict[str, str]) -> Gate:
    """The baseline predicts plain text better than a general-purpose compressor.

    Measured in bits per byte, which no tokenizer changes. Compressed passage by passage, text
    takes 3 to 5 bits per byte; a usable language model needs 1 to 2.

    Args:
        rows: the baseline's rows of the shared text.
        texts: the scored part of each passage, by its id.
    """
    name = "plain text beats compression"
    scored_rows = [row for row in rows if row["id"] in texts and row["nll"] is not None]
    text_bytes = sum(len(texts[row["id"]].encode()) for row in scored_rows)
    if not text_bytes or len(scored_rows) != len(rows):
        measured = f"{len(scored_rows)} of {len(rows)} passages have a loss and a text"
        return Gate(name, False, measured, "all")
    bits = sum(row["nll"] for row in scored_rows) / math.log(2) / text_bytes
    limit = 8 * sum(compressed_bytes(texts[row["id"]]) for row in scored_rows) / text_bytes
    bits_measured = f"{bits:.2f} bits a byte"
    if is_random(study, model):
        return Gate(
            name, True, f"{bits_measured}; its weights are random", "none for random weights"
        )
    return Gate(
        name, bits < limit, bits_measured, f"less than {limit:.2f}, what a compressor needs"
    )


def compressed_bytes(text: str) -> int:
    """Bytes of a text by the best of three compressors, without their headers."""
    data = text.encode()
    deflate = zlib.compressobj(9, wbits=-15)
    return min(
        len(deflate.compress(data) + deflate.flush()),
        len(bz2.compress(data)),
        len(lzma.compress(data, format=lzma.FORMAT_RAW, filters=RAW)),
    )


def training_gate(results: dict) -> Gate:
    """Training changed the loss on held-out items by more than rounding.

    Args:
        results: from the record of the fine-tuning.
    """
    before, after = results["heldout_loss_before"], results["heldout_loss_after"]
    change = abs(after - before) / abs(before) if before else math.inf
    return Gate(
        "training changed the held-out loss",
        math.isfinite(change) and change > LEAST_CHANGE,
        f"from {before:.6g} to {after:.6g} nats a token",
        f"by more than {LEAST_CHANGE:g} of it",
    )


def trained_on_gate(results: dict, drawn: list[str]) -> Gate:
    """The recorded training items equal those that the study draws.

    Args:
        results: from the record of the fine-tuning.
        drawn: ids of the training items, then of the held-out ones.
    """
    items = results.get("items", {})
    recorded = [*items.get("training", []), *items.get("heldout", [])]
    differing = len(set(recorded) ^ set(drawn))
    return Gate(
        "training items on record",
        bool(drawn) and recorded == drawn,
        f"{len(recorded)} items on record, {differing} of them others",
        f"the {len(drawn)} drawn, in their order",
    )


FORMAT_DROP = 0.25  # a larger drop in parsable answers means a broken run, not a lower score
BEHAVIOR_MARGIN = 0.25  # the same for endless, looping and echoing answers


def behavior_gates(
    evaluation_set: EvaluationSet, predictions: list[dict], baseline: list[dict]
) -> list[Gate]:
    """The gates on the answering behaviour in one set.

    Args:
        predictions: the variant's, at least one.
        baseline: the baseline's on the same items, at least one.
    """
    return [
        end_gate(predictions, baseline),
        loop_gate(predictions, baseline),
        format_gate(predictions, baseline),
        one_answer_gate(predictions, baseline),
        echo_gate(evaluation_set, predictions, baseline),
        fixed_answer_gate(evaluation_set, predictions, baseline),
    ]


def end_gate(predictions: list[dict], baseline: list[dict]) -> Gate:
    """The token limit stops hardly more answers than it stops of the baseline."""
    capped = (
        _mean_share(p["finish_reason"] == "length" for p in s) for s in (predictions, baseline)
    )
    return _not_more_often_gate("answers within the token limit", "stopped by the cap", *capped)


def loop_gate(predictions: list[dict], baseline: list[dict]) -> Gate:
    """Hardly more answers end in a loop than of the baseline's."""
    looping = (_mean_share(ends_in_loop(p["output"]) for p in s) for s in (predictions, baseline))
    return _not_more_often_gate("answers do not loop", "end in a loop", *looping)


def format_gate(predictions: list[dict], baseline: list[dict]) -> Gate:
    """The share of readable answers is not far below the baseline's."""
    share, baseline_share = readable_share(predictions), readable_share(baseline)
    return Gate(
        "answers parse",
        baseline_share - share <= FORMAT_DROP,
        f"{_percent(share)} of the answers are readable",
        f"at most {_points(FORMAT_DROP)} points below the baseline's {_percent(baseline_share)}",
    )


def one_answer_gate(predictions: list[dict], baseline: list[dict]) -> Gate:
    """Questions with different gold answers do not all get the same answer."""
    distinct_answers = len(set(map(status_and_answer, predictions)))
    return Gate(
        "answers not constant",
        not collapsed_to_one_answer(predictions, baseline),
        f"{distinct_answers} different answers to {len(predictions)} items",
        "more than one, unless the baseline gives that one but for as few as chance may take "
        f"(here it gives {len(set(map(status_and_answer, baseline)))})",
    )


def echo_gate(evaluation_set: EvaluationSet, predictions: list[dict], baseline: list[dict]) -> Gate:
    """The prompt's worked examples are not given as answers far more often than they are gold."""
    examples = example_answers(evaluation_set)

    def echo_share(rows: list[dict]) -> float:
        return _mean_share(p["parsed"] and normalize_answer(p["parsed"]) in examples for p in rows)

    gold_share = _mean_share(
        any(normalize_answer(g) in examples for g in p["golds"]) for p in predictions
    )
    description = "are the answer of a worked example"
    return _not_more_often_gate(
        "examples not echoed",
        description,
        echo_share(predictions),
        max(gold_share, echo_share(baseline)),
    )


def fixed_answer_gate(
    evaluation_set: EvaluationSet, predictions: list[dict], baseline: list[dict]
) -> Gate:
    """If the baseline clearly beats the best fixed answer, the variant beats it too.

    Clearly: by more than two standard errors. The verdict tests the same at the study's
    own confidence level; this gate uses none of that code.
    """
    fixed_answer = best_fixed_answer(evaluation_set.adapter, predictions)
    score, baseline_score = (
        _mean_share(p["score"] for p in rows) for rows in (predictions, baseline)
    )
    threshold = fixed_answer.score + 2 * math.sqrt(
        max(0.0, baseline_score * (1 - baseline_score)) / len(baseline)
    )
    return Gate(
        "beats fixed answers",
        baseline_score <= threshold or score > fixed_answer.score,
        f"{_percent(score)} right, baseline {_percent(baseline_score)}",
        f"more than {_percent(fixed_answer.score)} (always {fixed_answer.answer}), "
        f"if the baseline has more than {_percent(threshold)}",
    )


def _not_more_often_gate(name: str, description: str, share: float, baseline_share: float) -> Gate:
    limit, measured = baseline_share + BEHAVIOR_MARGIN, f"{_percent(share)} {description}"
    if limit >= 1:  # no share can exceed it; `verdicts` calls such a set uninformative
        return Gate(
            name, True, measured, f"none: the baseline itself has {_percent(baseline_share)}"
        )
    wording = f"at most {_points(BEHAVIOR_MARGIN)} points above {_percent(baseline_share)}"
    return Gate(name, share <= limit, measured, wording)


def _mean_share(values) -> float:
    numbers = [float(value or 0) for value in values]
    return math.fsum(numbers) / len(numbers)


def _percent(fraction: float) -> str:
    return f"{100 * fraction:.1f} %"


def _points(fraction: float) -> str:
    return f"{100 * fraction:.0f}"


@dataclass(frozen=True)
class RenderedItem:
    """An item with the digest and the token count of its prompt, rendered again."""

    item: Item
    hash: str
    tokens: int
    shown: RenderedPrompt | None = None


@dataclass(frozen=True)
class EvaluationData:
    """The data that the gates of one evaluation compare.

    Attributes:
        predictions, passages, metrics: as the evaluation stored them, read from disk.
        baseline: the predictions of the study's baseline for the same model.
        baseline_passages: its rows of the shared text.
        rendered: the items of every evaluation set, drawn and rendered again.
        used: items the variant was made with, by use (worked examples, calibration, training).
        alone: predictions of a few items, each asked in a batch of one.
        repeated: the same for one item of each generated set, asked alone a second time;
            empty if the runtime is batch-invariant, where `alone` is the second time.
        golds_alone: ids, golds and foils of further items of each generated set, read by
            themselves; empty if the runtime is batch-invariant.
        perturbed: for float variants, rows of the shared text read by the float model after one
            rounding of every weight.
        reference: rows of the shared text from the saved float states; empty for the baseline.
        loaded: gates on the evaluated model from when it was loaded.
        recomputed: rows and token counts of the shared text, recomputed by `second_opinion`;
        None
            if they were not.
        training: results in the record of the model's fine-tuning; None without one.
        raw: by set and item id, digests of the raw rows before any adapter; None for a task
            whose own code makes its items.
        pools: by set, the items it is drawn from.
        texts: raw passages of the shared text's source.
        made: gates on the fine-tuning or the rotation, from the files of the model that it made.
        golds: by set of generated answers and item id, the golds and foil, rendered again.
        opinions: gates by transformers' own forward pass, with what they invalidate.
    """

    study: Study
    model: str
    variant: str
    predictions: dict[str, list[dict]]
    passages: list[dict]
    metrics: dict[str, dict]
    baseline: dict[str, list[dict]]
    baseline_passages: list[dict]
    rendered: dict[str, list[RenderedItem]]
    used: dict[str, list[Item]]
    alone: dict[str, list[dict]]
    repeated: dict[str, list[dict]] = field(default_factory=dict)
    golds_alone: dict[str, list[dict]] = field(default_factory=dict)
    perturbed: list[dict] = field(default_factory=list)
    reference: list[dict] = field(default_factory=list)
    loaded: tuple[Gate, ...] = ()
    recomputed: object = None
    training: dict | None = None
    raw: dict[str, dict[str, set[str]] | None] = field(default_factory=dict)
    opinions: tuple[tuple[str, Gate], ...] = ()
    pools: dict[str, list[Item]] = field(default_factory=dict)
    made: tuple[Gate, ...] = ()
    texts: set[str] = field(default_factory=set)
    golds: dict[str, dict[str, ExpectedGolds]] = field(default_factory=dict)


def evaluation_gates(data: EvaluationData) -> list[tuple[str, Gate]]:
    """Every gate with what it invalidates: one evaluation set, or the whole variant."""
    gates = [(WHOLE_VARIANT, gate) for gate in shared_gates(data)]
    for name in data.study.evaluation.datasets:
        gates += [(name, gate) for gate in dataset_gates(data, name)]
    return [*gates, *data.opinions]


def shared_gates(data: EvaluationData) -> list[Gate]:
    """The gates on the whole variant: the model, the logits, the shared text."""
    dtype, baseline_passages = data.study.runtime.dtype, data.baseline_passages
    is_variant = data.variant != data.study.baseline
    return [
        *data.loaded,
        finite_gate(data.predictions, data.metrics["shared_text"], data.passages),
        owner_gate("shared text belongs to the variant", data.passages, data.model, data.variant),
        passages_gate(data.passages, data.baseline_passages),
        item_gates.passages_gate(data.passages, data.texts, seed=data.study.seed),
        range_gate(
            [], {"shared_text": data.metrics["shared_text"]}, "shared-text metrics in range"
        ),
        *recomputed_gates(
            data.passages, data.metrics["shared_text"], data.recomputed, is_baseline=not is_variant
        ),
        *(
            [same_reference_gate(data.reference, baseline_passages, dtype=dtype)]
            if is_variant
            else []
        ),
        *reference_gates(data.study.variants[data.variant], data.passages, data.perturbed),
        *([] if is_variant else absolute_gates(data)),
    ]


def absolute_gates(data: EvaluationData) -> list[Gate]:
    """The gates on the baseline, with limits that do not depend on it."""
    texts = data.recomputed.texts if data.recomputed else {}
    gates = [plain_text_gate(data.study, data.model, data.passages, texts)]
    if not data.training:
        return [*gates, *data.made]
    drawn_ids = [item.id for item in data.used.get("training", [])]
    return [
        *gates,
        training_gate(data.training),
        trained_on_gate(data.training, drawn_ids),
        *data.made,
    ]


def dataset_gates(data: EvaluationData, name: str) -> list[Gate]:
    """The gates on one evaluation set; an empty one has only the first."""
    evaluation_set, rendered = data.study.evaluation.datasets[name], data.rendered[name]
    rows, baseline = data.predictions.get(name, []), data.baseline.get(name, [])
    gates = [items_gate(rows, rendered)]
    if not rows or not baseline:
        return gates
    generated = evaluation_set.ask.protocol == "generate"
    task = evaluation_set if isinstance(evaluation_set, TaskSet) else None
    raw = data.raw.get(name, {})
    alone, items = data.alone.get(name, []), [a.item for a in rendered]
    gates = [
        *gates,
        owner_gate("answers belong to the variant", rows, data.model, data.variant),
        prompts_gate(rows, rendered),
        same_prompts_gate(rows, baseline),
        length_gate(rows, rendered),
        contents_gate(evaluation_set, [a.shown for a in rendered if a.shown]),
        draw_gate(items, data.pools.get(name, []), seed=data.study.seed),
        rescored_gate(evaluation_set, rows, rendered),
        second_reading_gate(evaluation_set, rows),
        range_gate(rows, {name: data.metrics["datasets"].get(name, {})}, "scores in range"),
        *behavior_gates(evaluation_set, rows, baseline),
        rows_gate(rows, items, raw) if task else raw_rows_gate(rows, items, raw),
        clusters_gate(rows, items),
        leakage_gate(items, data.used),
        invariance_gate(data.study, data.variant, rows, baseline, alone),
    ]
    if task and task.ask.protocol == "target":
        return [
            *gates,
            foils_gate(task, items),
            gold_invariance_gate(data.study, data.variant, rows, baseline, alone),
        ]
    if not generated:
        return [*gates, options_gate(rows, baseline)]
    gates += [
        golds_gate(rows, data.golds.get(name, {})),
        foil_gate(evaluation_set, rows, items),
        gold_invariance_gate(
            data.study, data.variant, rows, baseline, [*alone, *data.golds_alone.get(name, [])]
        ),
    ]
    if is_batch_invariant(data.study, data.variant):
        return gates
    return [*gates, repeat_gate(alone, data.repeated.get(name, []))]


def items_gate(rows: list[dict], rendered: list[RenderedItem]) -> Gate:
    """Each item drawn for the set is answered once, and no other item is."""
    expected, answers = {a.item.id for a in rendered}, Counter(row["id"] for row in rows)
    repeated = [i for i, times in answers.items() if times > 1]
    missing, extra = sorted(expected - answers.keys()), sorted(answers.keys() - expected)
    example = f" ({(missing + extra + repeated)[0]})" if missing or extra or repeated else ""
    return Gate(
        "every item answered once",
        bool(rows) and not example,
        f"{len(rows)} answers: {len(missing)} items missing, {len(extra)} others, "
        f"{len(repeated)} answered twice{example}",
        f"the {len(rendered)} items drawn, each once",
    )


def owner_gate(name: str, rows: list[dict], model: str, variant: str) -> Gate:
    """Every row names this model and this variant."""
    owners = Counter(f"{row.get('model')}/{row.get('variant')}" for row in rows)
    listed = ", ".join(f"{n} of {owner}" for owner, n in sorted(owners.items()))
    expected = f"{model}/{variant}"
    return Gate(name, set(owners) == {expected}, listed or "no rows", f"all of {expected}")


def prompts_gate(rows: list[dict], rendered: list[RenderedItem]) -> Gate:
    """The stored hashes equal those of the prompts rendered again."""
    expected = {a.item.id: a.hash for a in rendered}
    differing = [
        r["id"] for r in rows if r["id"] in expected and r["prompt_hash"] != expected[r["id"]]
    ]
    return none_of("prompts match the study", differing, len(rows), "prompts were others")


def same_prompts_gate(rows: list[dict], baseline: list[dict]) -> Gate:
    """The baseline was asked the same items with the same prompts of the same length."""
    expected = {b["id"]: (b["prompt_hash"], b["prompt_tokens"]) for b in baseline}
    differing = [
        r["id"] for r in rows if (r["prompt_hash"], r["prompt_tokens"]) != expected.get(r["id"])
    ]
    differing += sorted(expected.keys() - {r["id"] for r in rows})
    return none_of("prompts match the baseline", differing, len(rows), "items were asked otherwise")


def length_gate(rows: list[dict], rendered: list[RenderedItem]) -> Gate:
    """No prompt was truncated."""
    expected = {a.item.id: a.tokens for a in rendered}
    differing = [
        r["id"] for r in rows if r["id"] in expected and r["prompt_tokens"] != expected[r["id"]]
    ]
    return none_of("prompts not truncated", differing, len(rows), "prompts have another length")


def rescored_gate(
    evaluation_set: EvaluationSet, rows: list[dict], rendered: list[RenderedItem]
) -> Gate:
    """Separate scoring code derives the stored score, status and golds from the output."""
    items = {a.item.id: a.item for a in rendered}
    task = isinstance(evaluation_set, TaskSet)
    note = unchecked_note(evaluation_set) if task else ""
    differing = []
    for row in (r for r in rows if r["id"] in items):
        recomputed = rescored(evaluation_set, items[row["id"]], row)
        if any(row.get(key) != value for key, value in recomputed.items()):
            differing.append(row["id"])
    gate = none_of("scores recomputed", differing, len(rows), "rows score otherwise")
    return replace(gate, measured=f"{gate.measured}; {note}") if note else gate


def finite_gate(
    predictions: dict[str, list[dict]], shared_text: dict, passages: list[dict]
) -> Gate:
    """Logits of answers, golds and foils are finite; no figure of the shared text is missing."""
    nonfinite = sum(
        r["finish_reason"] == "nonfinite" or has_nonfinite_golds(r)
        for rows in predictions.values()
        for r in rows
    )
    missing = [k for k in ("perplexity", "kl", "top1_agreement") if shared_text.get(k) is None]
    note = f"; no {' and no '.join(missing)}" if missing else ""
    tokens = [
        f"token {place} of {row['id']}"
        for row in passages
        for place, kl in enumerate(row.get("token_kl", ()))
        if kl is None
    ]
    note += f"; {len(tokens)} tokens without a finite KL, first {tokens[0]}" if tokens else ""
    return Gate(
        "finite logits",
        not nonfinite and not missing and not tokens,
        f"{nonfinite} answers with logits that are not finite{note}",
        "none; perplexity and KL are finite",
    )


def passages_gate(rows: list[dict], baseline: list[dict]) -> Gate:
    """The shared text has the baseline's passages with the baseline's token counts."""
    passages, expected = ([(r["id"], r["tokens"]) for r in side] for side in (rows, baseline))
    tokens = [sum(n for _, n in side) for side in (passages, expected)]
    return Gate(
        "shared text matches the baseline",
        bool(passages) and passages == expected,
        f"{len(passages)} passages, {tokens[0]} tokens",
        f"the baseline's {len(expected)} passages, {tokens[1]} tokens, in its order",
    )
