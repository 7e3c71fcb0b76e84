"""Gates on the calibration: whose texts it read, all of them, and nothing but them."""

import math
from contextlib import contextmanager

import torch
from safetensors.torch import load_file
from torch import Tensor

from helpers.quantization.evidence import Evidence
from helpers.quantization.gates import gate, named
from helpers.sources.datasets import evaluation_items, load_items, training_items
from helpers.sources.items import Item, normalized_text
from helpers.study.schema import FineTunedModel

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
        and results["truncated_items"] == 0
        and longest <= asked.max_tokens,
        f"{len(ids)} items on record, {len(set(ids) ^ set(expected))} of them others; "
        f"{results['tokens']} tokens on record, {'/'.join(map(str, sorted(seen))) or 'none'} in "
        f"the statistics; {results['truncated_items']} truncated",
        f"{asked.items} items, {tokens} tokens in both, none truncated",
    )


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
    first = {n for n in evidence.linears if n.startswith("model.layers.0.")}
    for name, found in _first_block_maxima(evidence).items():
        if not _within(evidence, name, (found - evidence.absmax[name]).abs(), blocks=1):
            off.append(name)
    with _maxima(model) as maxima:
        _read(model, evidence.probes)
    for name in sorted(set(evidence.linears) - first - {"lm_head"}):
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
    size = evidence.rounding(max(len(calibrated), evidence.config.intermediate_size))
    limit = CHAIN * blocks * size * calibrated.max().item()
    return math.isfinite(limit) and bool((error <= limit).all())


def _first_block_maxima(evidence: Evidence) -> dict[str, Tensor]:
    """Linear name to abs-max over all items; later blocks are not run."""
    base = evidence.source_model.base_model
    blocks = base.layers
    base.layers = blocks[:1]
    try:
        with _maxima(evidence.source_model) as maxima:
            _read(evidence.source_model, evidence.tokens)
    finally:
        base.layers = blocks
    return maxima


def _read(model, items: list[list[int]]) -> None:
    for tokens in items:
        ids = torch.tensor([tokens], device=model.device)
        with torch.inference_mode():
            model.base_model(input_ids=ids, use_cache=False)


@contextmanager
def _maxima(model):
    """Linear name to (in_features,) abs-max of all its inputs inside the block."""
    maxima: dict[str, Tensor] = {}

    def observe(name: str):
        def keep(_module, args: tuple) -> None:
            top = args[0].float().abs().flatten(0, -2).amax(0).cpu()
            maxima[name] = torch.maximum(maxima[name], top) if name in maxima else top

        return keep

    linears = [(n, m) for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)]
    handles = [m.register_forward_pre_hook(observe(n)) for n, m in linears]
    try:
        yield maxima
    finally:
        for handle in handles:
            handle.remove()
