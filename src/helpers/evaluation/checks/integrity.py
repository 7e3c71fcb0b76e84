"""Gates on an evaluation: are these the answers of this variant to these items, whole and true?

Data in, gates out; no model and no torch is needed. How the variant answers is held
against the baseline in `behavior`; whether an answer depends on its batch in `batch_invariance`.
"""

from collections import Counter
from dataclasses import dataclass, field

from helpers.core.gates import WHOLE_VARIANT, Gate, none_of
from helpers.evaluation.checks import prompt_gates
from helpers.evaluation.checks.absolute_limits import (
    plain_text_gate,
    trained_on_gate,
    training_gate,
)
from helpers.evaluation.checks.batch_invariance import (
    invariance_gate,
    is_batch_invariant,
    repeat_gate,
)
from helpers.evaluation.checks.behavior import behavior_gates
from helpers.evaluation.checks.gold_gates import (
    ExpectedGolds,
    foil_gate,
    gold_invariance_gate,
    golds_gate,
    has_nonfinite_golds,
)
from helpers.evaluation.checks.item_gates import clusters_gate, leakage_gate, raw_rows_gate
from helpers.evaluation.checks.passage_gates import recomputed_gates
from helpers.evaluation.checks.prompt_gates import RenderedPrompt, contents_gate, draw_gate
from helpers.evaluation.checks.range_gates import range_gate
from helpers.evaluation.checks.recomputed_answers import rescored
from helpers.evaluation.checks.reference_gates import (
    options_gate,
    reference_gates,
    same_reference_gate,
)
from helpers.evaluation.checks.second_scoring import second_reading_gate
from helpers.sources.items import Item
from helpers.study.schema import EvaluationSet, Study


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
        perturbed: for float variants, rows of the shared text read by the float model after one
            rounding of every weight.
        reference: rows of the shared text from the saved float states; empty for the baseline.
        loaded: gates on the evaluated model from when it was loaded.
        recomputed: rows and token counts of the shared text, recomputed by `full_logits`; None
            if they were not.
        training: results in the record of the model's fine-tuning; None without one.
        raw: by set and item id, digests of the raw rows before any adapter.
        pools: by set, the items it is drawn from.
        texts: raw passages of the shared text's source.
        trained: gates on the fine-tuning, from the trained model's files.
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
    perturbed: list[dict] = field(default_factory=list)
    reference: list[dict] = field(default_factory=list)
    loaded: tuple[Gate, ...] = ()
    recomputed: object = None
    training: dict | None = None
    raw: dict[str, dict[str, set[str]]] = field(default_factory=dict)
    opinions: tuple[tuple[str, Gate], ...] = ()
    pools: dict[str, list[Item]] = field(default_factory=dict)
    trained: tuple[Gate, ...] = ()
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
        finite_gate(data.predictions, data.metrics["shared_text"]),
        owner_gate("shared text belongs to the variant", data.passages, data.model, data.variant),
        passages_gate(data.passages, data.baseline_passages),
        prompt_gates.passages_gate(data.passages, data.texts, seed=data.study.seed),
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
        return gates
    drawn_ids = [item.id for item in data.used.get("training", [])]
    return [
        *gates,
        training_gate(data.training),
        trained_on_gate(data.training, drawn_ids),
        *data.trained,
    ]


def dataset_gates(data: EvaluationData, name: str) -> list[Gate]:
    """The gates on one evaluation set; an empty one has only the first."""
    evaluation_set, rendered = data.study.evaluation.datasets[name], data.rendered[name]
    rows, baseline = data.predictions.get(name, []), data.baseline.get(name, [])
    gates = [items_gate(rows, rendered)]
    if not rows or not baseline:
        return gates
    generated = evaluation_set.ask.protocol == "generate"
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
        raw_rows_gate(rows, items, data.raw.get(name, {})),
        clusters_gate(rows, items),
        leakage_gate(items, data.used),
        invariance_gate(data.study, data.variant, rows, baseline, alone),
    ]
    if not generated:
        return [*gates, options_gate(rows, baseline)]
    gates += [
        golds_gate(rows, data.golds.get(name, {})),
        foil_gate(evaluation_set, rows, items),
        gold_invariance_gate(data.study, data.variant, rows, baseline, alone),
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
    differing = []
    for row in (r for r in rows if r["id"] in items):
        recomputed = rescored(evaluation_set, items[row["id"]], row)
        if any(row.get(key) != value for key, value in recomputed.items()):
            differing.append(row["id"])
    return none_of("scores recomputed", differing, len(rows), "rows score otherwise")


def finite_gate(predictions: dict[str, list[dict]], shared_text: dict) -> Gate:
    """Logits of answers, golds and foils are finite; no figure of the shared text is missing."""
    nonfinite = sum(
        r["finish_reason"] == "nonfinite" or has_nonfinite_golds(r)
        for rows in predictions.values()
        for r in rows
    )
    missing = [k for k in ("perplexity", "kl", "top1_agreement") if shared_text.get(k) is None]
    note = f"; no {' and no '.join(missing)}" if missing else ""
    return Gate(
        "finite logits",
        not nonfinite and not missing,
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
