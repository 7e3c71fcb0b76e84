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
from helpers.verification.checkpoint_files import Evidence
from helpers.verification.gate_decorator import gate, named
from helpers.verification.hooks import first_block_only, input_maxima

CHAIN = 4  # products between a block's input and its last Linear: q·k, ·v, o, gate·up


@gate("calibration items as asked")
def items_gate(evidence: Evidence):
    """The record names the items that the study draws now, every token of them."""
    results = evidence.calibration_record["results"]
    asked = evidence.job.study.calibration
    ids, expected = results["items"], [item.id for item in evidence.items]
    tokens = sum(map(len, evidence.tokens))
    path = evidence.calibration_folder / "activations.safetensors"
    seen = {int(t) for k, t in load_file(path).items() if k.endswith(".tokens")}
    longest = max(map(len, evidence.tokens))
    return (
        ids == expected
        and len(ids) == asked.items
        and results["tokens"] == tokens
        and seen == {tokens}
        and longest <= asked.max_tokens,
        f"{len(ids)} items on record, {len(set(ids) ^ set(expected))} of them others; "
        f"{results['tokens']} tokens on record, {'/'.join(map(str, sorted(seen))) or 'none'} in "
        f"the statistics; the longest item has {longest}",
        f"{asked.items} items, {tokens} tokens in both, no item of more than {asked.max_tokens}",
    )


@gate("calibration reads questions and solutions whole")
def texts_gate(evidence: Evidence):
    """The tokens of every item, as text again, hold what its raw row says.

    Spaces are left out, since a tokenizer may write them otherwise.
    """
    asked, odd = evidence.job.study.calibration, []
    raw = load_rows(asked.dataset)
    rows = {_bare(row.get("problem") or row.get("question")): row for row in raw}
    for item, tokens in zip(evidence.items, evidence.tokens, strict=True):
        row = rows.get(_bare(item.question), {})
        text = _bare(evidence.tokenizer.decode(tokens))
        question, solution = _bare(item.question), _bare(row.get("generated_solution") or "")
        passage = _bare(row.get("context") or row.get("passage") or "")
        if not row or question not in text or passage not in text or not text.endswith(solution):
            odd.append(item.id)
    return not odd, f"{len(odd)} of {len(evidence.items)} lack a part{named(odd)}", "none"


@gate("calibration items in the seed's order")
def order_gate(evidence: Evidence):
    """Whatever was left out of the draw, the others lie in the order of the seed."""
    seed = evidence.job.study.seed
    lots = [sha256(f"{seed}:{item_key(i)}".encode()).hexdigest() for i in evidence.items]
    titled = any(item.title for item in evidence.items)  # drawn title by title
    odd = 0 if titled else sum(a > b for a, b in pairwise(lots))
    return not odd, f"{odd} of {len(lots)} lie before one that the seed draws first", "none"


@gate("the pictured input is the largest")
def picture_gate(evidence: Evidence):
    """The item of the outlier picture has the largest value that its Linear was given."""
    [(name, seen)] = load_file(evidence.calibration_folder / "surface.safetensors").items()
    top, due = seen.max().item(), evidence.absmax[name].max().item()
    room = CHAIN * evidence.config.num_hidden_layers * evidence.rounding(evidence.widest)
    return math.isclose(top, due, rel_tol=room), f"{name}: {top:.6g}", f"{due:.6g}"


def _bare(text: str) -> str:
    return "".join(text.split())


@gate("calibration apart from evaluation and training")
def leak_gate(evidence: Evidence):
    """No text that calibration read (by its own record) is asked later or was trained on."""
    study, model = evidence.job.study, evidence.job.model
    rows = load_items(study.calibration.dataset, adapter=study.calibration.adapter)
    known = {item.id: item for item in rows}
    read = [known[i] for i in evidence.calibration_record["results"]["items"]]
    others = {d: evaluation_items(study, d) for d in study.evaluation.datasets}
    if isinstance(study.models[model], FineTunedModel):
        others["training"] = [i for part in training_items(study, model) for i in part]
    texts = {text_of(item): where for where, items in others.items() for item in items}
    shared = [f"{i.id} in {texts[text_of(i)]}" for i in read if text_of(i) in texts]
    return (
        bool(read) and not shared,
        f"{len(shared)} of {len(read)} items are among {len(texts)} others{named(shared)}",
        "none",
    )


def text_of(item: Item) -> str:
    """The question and its passage, as their normalized words."""
    return normalized_text(f"{item.question}\n{item.passage}")


@gate("calibration statistics over real tokens")
def statistics_gate(evidence: Evidence):
    """The abs-max of the first block's Linears, made anew from the items one by one.

    No padding, no batch. The other Linears are seen on the probes, which are beginnings
    of calibration items, so that none may exceed its calibrated maximum. Batched and
    single passes round differently: rounding() for each product in the chain, times the
    depth, as a part of the layer's largest value.
    """
    model, off, exceeded = evidence.source_model, [], []
    first = {n for n in evidence.linears if n.startswith(f"{evidence.blocks}.0.")}
    with first_block_only(model):
        maxima = input_maxima(model, evidence.tokens)
    for name in sorted(first):
        if not _within(evidence, name, (maxima[name] - evidence.absmax[name]).abs(), blocks=1):
            off.append(name)
    maxima = input_maxima(model, evidence.probes)
    for name in sorted(set(evidence.linears) - first - {HEAD}):
        over = maxima[name] - evidence.absmax[name]
        if not _within(evidence, name, over, blocks=evidence.config.num_hidden_layers):
            exceeded.append(name)
    return (
        not (off or exceeded),
        f"{len(off)} of {len(first)} Linears of the first block differ from the items read "
        f"alone{named(off)}; {len(exceeded)} others exceed their maxima{named(exceeded)}",
        "none beyond rounding",
    )


def _within(evidence: Evidence, name: str, error: Tensor, *, blocks: int) -> bool:
    calibrated = evidence.absmax[name]
    limit = CHAIN * blocks * evidence.rounding(evidence.widest) * calibrated.max().item()
    return math.isfinite(limit) and bool((error <= limit).all())
