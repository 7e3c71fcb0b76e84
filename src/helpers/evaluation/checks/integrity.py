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
from helpers.evaluation.checks.batch_invariance import exact, invariance_gate, repeat_gate
from helpers.evaluation.checks.behavior import conduct_gates
from helpers.evaluation.checks.gold_gates import (
    DueGolds,
    company_gate,
    foil_gate,
    golds_gate,
    not_finite,
)
from helpers.evaluation.checks.item_gates import clusters_gate, leakage_gate, raw_rows_gate
from helpers.evaluation.checks.passage_gates import recomputed_gates
from helpers.evaluation.checks.prompt_gates import Shown, contents_gate, draw_gate
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
class Asked:
    """An item as it is asked: its prompt, rendered now."""

    item: Item
    hash: str
    tokens: int
    shown: Shown | None = None


@dataclass(frozen=True)
class Evidence:
    """All that the gates of one evaluation look at.

    Attributes:
        predictions, passages, metrics: what the evaluation stored, read back.
        baseline: the predictions of the study's baseline for the same model.
        baseline_passages: its rows of the shared text.
        asked: the items of every evaluation set, drawn and rendered now.
        seen: items the variant was made from, by use (calibration, training).
        alone: predictions of a few items asked in a batch of one.
        again: the same of one item of each generated set, asked once more; none where an
            answer alone has to be the one in the batch, which is asking twice.
        shaken: rows of the shared text read by the float model after one rounding of every
            weight; for float variants.
        reference: rows of the shared text read by the float model now; none for the baseline.
        loaded: gates on the model that was asked, made where it was loaded.
        recomputed: rows and token counts of the shared text computed a second time, by
            `full_logits`; None if they were not.
        training: results of the record of the model's fine-tuning; None if there was none.
        raw: by set and item id, hashes of the raw rows, taken before any adapter.
        pools: by set, the items it is drawn from.
        texts: raw passages of the shared text's source.
        trained: gates on the fine-tuning, made with the trained model's files.
        golds: by set of written answers and item id, what has to be read after its prompt.
        opinions: gates on its answers by transformers' own forward pass, with what they guard.
    """

    study: Study
    model: str
    variant: str
    predictions: dict[str, list[dict]]
    passages: list[dict]
    metrics: dict[str, dict]
    baseline: dict[str, list[dict]]
    baseline_passages: list[dict]
    asked: dict[str, list[Asked]]
    seen: dict[str, list[Item]]
    alone: dict[str, list[dict]]
    again: dict[str, list[dict]] = field(default_factory=dict)
    shaken: list[dict] = field(default_factory=list)
    reference: list[dict] = field(default_factory=list)
    loaded: tuple[Gate, ...] = ()
    recomputed: object = None
    training: dict | None = None
    raw: dict[str, dict[str, set[str]]] = field(default_factory=dict)
    opinions: tuple[tuple[str, Gate], ...] = ()
    pools: dict[str, list[Item]] = field(default_factory=dict)
    trained: tuple[Gate, ...] = ()
    texts: set[str] = field(default_factory=set)
    golds: dict[str, dict[str, DueGolds]] = field(default_factory=dict)


def evaluation_gates(e: Evidence) -> list[tuple[str, Gate]]:
    """Every gate with what it invalidates: one evaluation set, or the whole variant."""
    found = [(WHOLE_VARIANT, gate) for gate in shared_gates(e)]
    for name in e.study.evaluation.datasets:
        found += [(name, gate) for gate in dataset_gates(e, name)]
    return [*found, *e.opinions]


def shared_gates(e: Evidence) -> list[Gate]:
    """The gates on what all sets have in common: the model, the logits, the shared text."""
    dtype, before = e.study.runtime.dtype, e.baseline_passages
    held = e.variant != e.study.baseline
    return [
        *e.loaded,
        finite_gate(e.predictions, e.metrics["shared_text"]),
        owner_gate("shared text of this variant", e.passages, e.model, e.variant),
        passages_gate(e.passages, e.baseline_passages),
        prompt_gates.passages_gate(e.passages, e.texts, seed=e.study.seed),
        range_gate([], {"shared_text": e.metrics["shared_text"]}, "shared text in its range"),
        *recomputed_gates(e.passages, e.metrics["shared_text"], e.recomputed, is_baseline=not held),
        *([same_reference_gate(e.reference, before, dtype=dtype)] if held else []),
        *reference_gates(e.study.variants[e.variant], e.passages, e.shaken),
        *([] if held else absolute_gates(e)),
    ]


def absolute_gates(e: Evidence) -> list[Gate]:
    """The gates on the baseline that are held to limits of their own."""
    texts = e.recomputed.texts if e.recomputed else {}
    gates = [plain_text_gate(e.study, e.model, e.passages, texts)]
    if not e.training:
        return gates
    drawn = [item.id for item in e.seen.get("training", [])]
    return [*gates, training_gate(e.training), trained_on_gate(e.training, drawn), *e.trained]


def dataset_gates(e: Evidence, name: str) -> list[Gate]:
    """The gates on one evaluation set; an empty one has only the first."""
    wanted, asked = e.study.evaluation.datasets[name], e.asked[name]
    rows, before = e.predictions.get(name, []), e.baseline.get(name, [])
    gates = [items_gate(rows, asked)]
    if not rows or not before:
        return gates
    generated = wanted.ask.protocol == "generate"
    alone, items = e.alone.get(name, []), [a.item for a in asked]
    gates = [
        *gates,
        owner_gate("answers of this variant", rows, e.model, e.variant),
        prompts_gate(rows, asked),
        same_prompts_gate(rows, before),
        length_gate(rows, asked),
        contents_gate(wanted, [a.shown for a in asked if a.shown]),
        draw_gate(items, e.pools.get(name, []), seed=e.study.seed),
        rescored_gate(wanted, rows, asked),
        second_reading_gate(wanted, rows),
        range_gate(rows, {name: e.metrics["datasets"].get(name, {})}, "scores in their range"),
        *conduct_gates(wanted, rows, before),
        raw_rows_gate(rows, items, e.raw.get(name, {})),
        clusters_gate(rows, items),
        leakage_gate(items, e.seen),
        invariance_gate(e.study, e.variant, rows, before, alone),
    ]
    if not generated:
        return [*gates, options_gate(rows, before)]
    gates += [
        golds_gate(rows, e.golds.get(name, {})),
        foil_gate(wanted, rows, items),
        company_gate(e.study, e.variant, rows, before, alone),
    ]
    if exact(e.study, e.variant):
        return gates
    return [*gates, repeat_gate(alone, e.again.get(name, []))]


def items_gate(rows: list[dict], asked: list[Asked]) -> Gate:
    """The items drawn for the set are answered, each once, and no others."""
    due, found = {a.item.id for a in asked}, Counter(row["id"] for row in rows)
    twice = [i for i, times in found.items() if times > 1]
    missing, extra = sorted(due - found.keys()), sorted(found.keys() - due)
    odd = f" ({(missing + extra + twice)[0]})" if missing or extra or twice else ""
    return Gate(
        "every item answered once",
        bool(rows) and not odd,
        f"{len(rows)} answers: {len(missing)} items missing, {len(extra)} others, "
        f"{len(twice)} answered twice{odd}",
        f"the {len(asked)} items drawn, each once",
    )


def owner_gate(name: str, rows: list[dict], model: str, variant: str) -> Gate:
    """Every row says it is of this model and this variant."""
    owners = Counter(f"{row.get('model')}/{row.get('variant')}" for row in rows)
    told = ", ".join(f"{n} of {owner}" for owner, n in sorted(owners.items()))
    due = f"{model}/{variant}"
    return Gate(name, set(owners) == {due}, told or "no rows", f"all of {due}")


def prompts_gate(rows: list[dict], asked: list[Asked]) -> Gate:
    """The stored hashes are those of the prompts as the study renders them now."""
    due = {a.item.id: a.hash for a in asked}
    odd = [r["id"] for r in rows if r["id"] in due and r["prompt_hash"] != due[r["id"]]]
    return none_of("prompts as rendered now", odd, len(rows), "prompts were others")


def same_prompts_gate(rows: list[dict], baseline: list[dict]) -> Gate:
    """The baseline was asked the same items in the same words and as many tokens."""
    due = {b["id"]: (b["prompt_hash"], b["prompt_tokens"]) for b in baseline}
    odd = [r["id"] for r in rows if (r["prompt_hash"], r["prompt_tokens"]) != due.get(r["id"])]
    odd += sorted(due.keys() - {r["id"] for r in rows})
    return none_of("prompts of the baseline", odd, len(rows), "items were asked otherwise")


def length_gate(rows: list[dict], asked: list[Asked]) -> Gate:
    """Every prompt was read to its end."""
    due = {a.item.id: a.tokens for a in asked}
    odd = [r["id"] for r in rows if r["id"] in due and r["prompt_tokens"] != due[r["id"]]]
    return none_of("prompts not cut short", odd, len(rows), "prompts have another length")


def rescored_gate(wanted: EvaluationSet, rows: list[dict], asked: list[Asked]) -> Gate:
    """Read and scored by code of its own, the output gives the stored score, status and golds."""
    items = {a.item.id: a.item for a in asked}
    odd = []
    for row in (r for r in rows if r["id"] in items):
        again = rescored(wanted, items[row["id"]], row)
        if any(row.get(key) != value for key, value in again.items()):
            odd.append(row["id"])
    return none_of("scores follow from the answers", odd, len(rows), "rows score otherwise")


def finite_gate(predictions: dict[str, list[dict]], shared_text: dict) -> Gate:
    """No answer, gold or foil met logits that are not finite; the shared text has its figures."""
    broken = sum(
        r["finish_reason"] == "nonfinite" or not_finite(r)
        for rows in predictions.values()
        for r in rows
    )
    lacking = [k for k in ("perplexity", "kl", "top1_agreement") if shared_text.get(k) is None]
    told = f"; no {' and no '.join(lacking)}" if lacking else ""
    return Gate(
        "finite logits",
        not broken and not lacking,
        f"{broken} answers with logits that are not finite{told}",
        "none; perplexity and KL are finite",
    )


def passages_gate(rows: list[dict], baseline: list[dict]) -> Gate:
    """The shared text is the baseline's, passage by passage and token by token."""
    found, due = ([(r["id"], r["tokens"]) for r in side] for side in (rows, baseline))
    tokens = [sum(n for _, n in side) for side in (found, due)]
    return Gate(
        "shared text of the baseline",
        bool(found) and found == due,
        f"{len(found)} passages, {tokens[0]} tokens",
        f"the baseline's {len(due)} passages, {tokens[1]} tokens, in its order",
    )
