"""One INT8 checkpoint read by our kernels, and as plain transformers simulates it."""

from functools import partial

import torch
from torch import nn

from benchmarks.agreement import Agreement
from benchmarks.material import Material
from benchmarks.turns import Comparison, take_turns
from helpers.inference.perplexity import read_passages
from helpers.quantization.int8_linear import Int8Linear
from helpers.quantization.variants import load_reference
from helpers.verification.checkpoint_files import capture_inputs

PEER = "the same checkpoint in plain transformers (simulated)"
FLOAT = "float32 model in plain transformers"
LINEAR_TOLERANCE = 1e-5  # of a Linear's largest output, on the same inputs
MEMORY_GOAL = 1 / 0.27


def compare(material: Material) -> list[Comparison]:
    """Reading the study's shared text, and the memory that the Linears take."""
    ours, float_model = material.int8_model(), material.peers_model()
    peer = load_reference(material.checkpoint, dtype=torch.float32, device="cpu")
    limit = material.study.evaluation.batch.tokens
    ways = {
        "INT8": lambda turn: (
            read_passages(ours, material.passages(turn), batch_tokens=limit) and None
        ),
        PEER: partial(read_plainly, peer, material),
        FLOAT: partial(read_plainly, float_model, material),
    }
    turns = take_turns(ways, rounds=material.rounds)
    agreed = by_linear(ours, peer, material.passages(0)[0])
    tokens = sum(len(p) for turn in range(material.rounds) for p in material.passages(turn))
    what = f"reading {tokens:,} tokens in passages, head left out"
    none = Agreement("another model")
    row = partial(Comparison, what, "INT8", ours_spent=turns.seconds["INT8"])
    return [
        row(peer=PEER, peer_spent=turns.seconds[PEER], goal=None, agreement=agreed),
        row(peer=FLOAT, peer_spent=turns.seconds[FLOAT], goal=None, agreement=none),
        _memory(ours, float_model, FLOAT, MEMORY_GOAL),
        _memory(ours, peer, PEER, None),
    ]


@torch.inference_mode()
def read_plainly(model, material: Material, turn: int) -> None:
    """Read each passage of the round's share alone, so that there is no padding."""
    for tokens in material.passages(turn):
        model.base_model(input_ids=torch.tensor([tokens[:-1]]), use_cache=False)


@torch.inference_mode()
def by_linear(ours, peer, tokens: list[int]) -> Agreement:
    """The largest difference of any Linear's output on the same inputs, of its largest output."""
    names = [name for name, module in ours.named_modules() if isinstance(module, Int8Linear)]
    worst = 0.0
    for name, x in capture_inputs(peer, names, tokens).items():
        a, b = (model.get_submodule(name)(x) for model in (ours, peer))
        worst = max(worst, ((a - b).abs().max() / b.abs().max()).item())
    text = f"each of {len(names)} Linears within {worst:.1g} of its largest output"
    return Agreement(f"{text} (tolerance {LINEAR_TOLERANCE:g})", worst <= LINEAR_TOLERANCE)


def _memory(ours, peer, name: str, goal: float | None) -> Comparison:
    quantized = [n for n, m in ours.named_modules() if isinstance(m, Int8Linear)]
    held, theirs = (linear_megabytes(model, quantized) for model in (ours, peer))
    part = Agreement(f"{held / theirs:.3f}× the memory")
    what = f"memory of the {len(quantized)} Linears once a text was read"
    return Comparison(what, "INT8", name, [held], [theirs], goal, part, unit="MB")


def linear_megabytes(model, names: list[str]) -> float:
    """Size of the parameters and buffers of these modules, in MB."""
    tensors = [tensor for name in names for tensor in _held_by(model.get_submodule(name))]
    return sum(t.numel() * t.element_size() for t in tensors) / 1e6


def _held_by(module: nn.Module) -> list[torch.Tensor]:
    return [*module.parameters(), *module.buffers()]
