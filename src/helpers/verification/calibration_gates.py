"""Gates on the calibration: whose texts it read, all of them, and nothing but them."""

import math
from hashlib import sha256
from itertools import pairwise

from safetensors.torch import load_file
from torch import Tensor

from helpers.core.architectures import HEAD
from helpers.sources.items import Item, item_key, normalized_text
from helpers.sources.rows import load_rows
from helpers.sources.sampling import evaluation_items, load_items, training_items
from helpers.study.schema_sources import FineTunedModel
from helpers.verification.checkpoint_files import CheckpointFiles
from helpers.verification.gate_decorator import examples, gate
from helpers.verification.hooks import first_block_only, input_maxima

PRODUCTS_A_BLOCK = 4  # products between a block's input and its last Linear: q·k, ·v, o, gate·up


@gate("calibration items as declared")
def items_gate(evidence: CheckpointFiles):
    """The recorded items and token counts equal those that the study draws and tokenizes now."""
    results = evidence.calibration_record["results"]
    settings = evidence.job.study.calibration
    ids, expected = results["items"], [item.id for item in evidence.items]
    tokens = sum(map(len, evidence.tokens))
    path = evidence.calibration_folder / "activations.safetensors"
    counted_tokens = {int(t) for k, t in load_file(path).items() if k.endswith(".tokens")}
    longest = max(map(len, evidence.tokens))
    return (
        ids == expected
        and len(ids) == settings.items
        and results["tokens"] == tokens
        and counted_tokens == {tokens}
        and longest <= settings.max_tokens,
        f"{len(ids)} items on record, {len(set(ids) ^ set(expected))} of them others; "
        f"{results['tokens']} tokens on record, "
        f"{'/'.join(map(str, sorted(counted_tokens))) or 'none'} in "
        f"the statistics; the longest item has {longest}",
        f"{settings.items} items, {tokens} tokens in both, no item of more than "
        f"{settings.max_tokens}",
    )


@gate("calibration texts complete")
def texts_gate(evidence: CheckpointFiles):
    """The decoded tokens of every item contain the texts of its raw row.

    Whitespace is ignored, since a tokenizer may change it.
    """
    settings, incomplete = evidence.job.study.calibration, []
    raw_rows = load_rows(settings.dataset)
    rows = {_without_spaces(row.get("problem") or row.get("question")): row for row in raw_rows}
    for item, tokens in zip(evidence.items, evidence.tokens, strict=True):
        row = rows.get(_without_spaces(item.question), {})
        text = _without_spaces(evidence.tokenizer.decode(tokens))
        question, solution = (
            _without_spaces(item.question),
            _without_spaces(row.get("generated_solution") or ""),
        )
        passage = _without_spaces(row.get("context") or row.get("passage") or "")
        if not row or question not in text or passage not in text or not text.endswith(solution):
            incomplete.append(item.id)
    return (
        not incomplete,
        f"{len(incomplete)} of {len(evidence.items)} lack a part{examples(incomplete)}",
        "none",
    )


@gate("calibration items in seed order")
def order_gate(evidence: CheckpointFiles):
    """The items lie in the order of the seed, whichever items the draw left out."""
    seed = evidence.job.study.seed
    draw_keys = [sha256(f"{seed}:{item_key(i)}".encode()).hexdigest() for i in evidence.items]
    has_titles = any(item.title for item in evidence.items)  # drawn title by title
    misplaced = 0 if has_titles else sum(a > b for a, b in pairwise(draw_keys))
    return (
        not misplaced,
        f"{misplaced} of {len(draw_keys)} lie before one that the seed draws first",
        "none",
    )


@gate("outlier figure shows the maximum")
def surface_gate(evidence: CheckpointFiles):
    """The item of the outlier figure contains its Linear's calibrated maximum."""
    [(name, surface)] = load_file(evidence.calibration_folder / "surface.safetensors").items()
    surface_max, calibrated_max = surface.max().item(), evidence.absmax[name].max().item()
    tolerance = (
        PRODUCTS_A_BLOCK * evidence.config.num_hidden_layers * evidence.rounding(evidence.widest)
    )
    return (
        math.isclose(surface_max, calibrated_max, rel_tol=tolerance),
        f"{name}: {surface_max:.6g}",
        f"{calibrated_max:.6g}",
    )


def _without_spaces(text: str) -> str:
    return "".join(text.split())


@gate("no calibration leakage")
def leakage_gate(evidence: CheckpointFiles):
    """No text on the calibration record is an evaluation or a training item."""
    study, model = evidence.job.study, evidence.job.model
    rows = load_items(study.calibration.dataset, adapter=study.calibration.adapter)
    items_by_id = {item.id: item for item in rows}
    calibration_items = [items_by_id[i] for i in evidence.calibration_record["results"]["items"]]
    others = {d: evaluation_items(study, d) for d in study.evaluation.datasets}
    if isinstance(study.models[model], FineTunedModel):
        others["training"] = [i for part in training_items(study, model) for i in part]
    texts = {
        normalized_item_text(item): set_name for set_name, items in others.items() for item in items
    }
    shared = [
        f"{i.id} in {texts[normalized_item_text(i)]}"
        for i in calibration_items
        if normalized_item_text(i) in texts
    ]
    return (
        bool(calibration_items) and not shared,
        f"{len(shared)} of {len(calibration_items)} items are among {len(texts)} others"
        f"{examples(shared)}",
        "none",
    )


def normalized_item_text(item: Item) -> str:
    """The normalized words of a question and its passage."""
    return normalized_text(f"{item.question}\n{item.passage}")


@gate("calibration maxima recomputed")
def statistics_gate(evidence: CheckpointFiles):
    """The abs-max of the first block's Linears, computed again item by item.

    This uses no padding and no batch. The other Linears are checked on the probes, which are
    prefixes of calibration items, so that no input may exceed its calibrated maximum. Batched
    and single passes round differently: the limit is rounding() per product in the chain,
    times the depth, relative to the layer's largest value.
    """
    model, differing, exceeded = evidence.source_model, [], []
    first_block = {n for n in evidence.linears if n.startswith(f"{evidence.blocks}.0.")}
    with first_block_only(model):
        maxima = input_maxima(model, evidence.tokens)
    for name in sorted(first_block):
        if not _within(evidence, name, (maxima[name] - evidence.absmax[name]).abs(), blocks=1):
            differing.append(name)
    maxima = input_maxima(model, evidence.probes)
    for name in sorted(set(evidence.linears) - first_block - {HEAD}):
        excess = maxima[name] - evidence.absmax[name]
        if not _within(evidence, name, excess, blocks=evidence.config.num_hidden_layers):
            exceeded.append(name)
    return (
        not (differing or exceeded),
        f"{len(differing)} of {len(first_block)} Linears of the first block differ from the "
        f"items read alone{examples(differing)}; {len(exceeded)} others exceed their maxima"
        f"{examples(exceeded)}",
        "none beyond rounding",
    )


def _within(evidence: CheckpointFiles, name: str, error: Tensor, *, blocks: int) -> bool:
    calibrated = evidence.absmax[name]
    limit = PRODUCTS_A_BLOCK * blocks * evidence.rounding(evidence.widest) * calibrated.max().item()
    return math.isfinite(limit) and bool((error <= limit).all())
