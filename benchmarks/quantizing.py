"""Calibration and quantization of a grid of α, against llmcompressor's `oneshot` for one.

Both load the float model, read the same tokens, and save compressed checkpoints. Their
statistics differ (max − min there, max|X| here; NOTES.md), so that the checkpoints are
compared by what they cost the model.
"""

from functools import partial
from pathlib import Path

import torch
from datasets import Dataset

from benchmarks.agreement import Agreement
from benchmarks.material import Material
from benchmarks.turns import Comparison, take_turns
from helpers.inference.perplexity import passage_rows, read_passages
from helpers.quantization.variants import load_int8
from helpers.sources.sampling import shared_passages

ALPHAS = (0.3, 0.5, 0.65, 0.8, 0.9)
SHARED_ALPHA = 0.5
PEERS = {"sequential": "sequential pipeline, its default", "basic": 'pipeline="basic"'}
KL_FACTOR = 1.5  # two right checkpoints cost the model about the same


def compare(material: Material) -> list[Comparison]:
    """Compare five α of this project with one of llmcompressor's, by each of its pipelines."""
    ours = f"calibrated once, α = {', '.join(map(str, ALPHAS))}"
    material.calibration_texts  # noqa: B018 - tokenized beforehand, for all of them
    ways = {ours: partial(our_grid, material)}
    for pipeline in PEERS:
        ways[pipeline] = partial(one_shot, material, pipeline)
    turns = take_turns(ways, rounds=1)
    cost = costs(material, {name: found[-1] for name, found in turns.answers.items()})
    return [
        Comparison(
            what=f"calibrating on {len(material.calibration_texts)} items and quantizing",
            ours=ours,
            peer=f"llmcompressor `oneshot`, α = {SHARED_ALPHA} only ({words})",
            ours_spent=turns.seconds[ours],
            peer_spent=turns.seconds[pipeline],
            goal=1.0 if pipeline == "sequential" else None,
            agreement=_alike(cost[ours], cost[pipeline]),
        )
        for pipeline, words in PEERS.items()
    ]


def our_grid(material: Material, _turn: int) -> Path:
    """Write a checkpoint for each α; return that of the α shared with the peer."""
    absmax = material.calibrate()
    for alpha in ALPHAS:
        smooth = material.variant.smooth.model_copy(update={"alpha": alpha})
        variant = material.variant.model_copy(update={"smooth": smooth})
        material.write_checkpoint(absmax, variant, _ours(material, alpha))
    return _ours(material, SHARED_ALPHA)


def _ours(material: Material, alpha: float) -> Path:
    return material.scratch / f"alpha-{alpha}"


def one_shot(material: Material, pipeline: str, _turn: int) -> Path:
    """SmoothQuant and W8A8 as llmcompressor does them, on the same tokens without padding."""
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier

    texts = material.calibration_texts
    rows = [{"input_ids": tokens, "attention_mask": [1] * len(tokens)} for tokens in texts]
    folder = material.scratch / f"oneshot-{pipeline}"
    oneshot(
        model=material.peers_model(),
        processor=material.tokenizer,
        dataset=Dataset.from_list(rows),
        recipe=[
            SmoothQuantModifier(smoothing_strength=SHARED_ALPHA),
            QuantizationModifier(targets="Linear", scheme="W8A8", ignore=["lm_head"]),
        ],
        max_seq_length=max(map(len, texts)),
        num_calibration_samples=len(texts),
        shuffle_calibration_samples=False,
        **({"pipeline": pipeline} if pipeline != "sequential" else {}),
        output_dir=str(folder),
    )
    return folder


def costs(material: Material, checkpoints: dict[str, Path]) -> dict[str, float]:
    """KL(float ‖ checkpoint) in nats a token of the study's shared text, on our kernels."""
    limit = material.study.evaluation.batch.tokens
    tokens, passages = material.passages(None), shared_passages(material.study)
    reference = read_passages(material.float_model(), tokens, batch_tokens=limit)
    found = {}
    for name, folder in checkpoints.items():
        model = load_int8(folder, dtype=torch.float32, device="cpu")
        states = read_passages(model, tokens, batch_tokens=limit)
        rows = passage_rows(passages, tokens, states, reference)
        found[name] = sum(r["kl"] for r in rows) / sum(r["tokens"] for r in rows)
    return found


def _alike(ours: float, peer: float) -> Agreement:
    holds = max(ours, peer) <= KL_FACTOR * min(ours, peer)
    text = f"KL to float at α = {SHARED_ALPHA}: {ours:.4f} and {peer:.4f} nats a token"
    return Agreement(f"{text} (within {KL_FACTOR:g}×)", holds)
