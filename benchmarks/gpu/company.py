"""Part 4: does an answer depend on the texts it shares a batch with?

On a CPU in float32 it does not. On a card a float product of other sizes may be summed in
another order; int8 products are exact in any company. What moves is said with how far.
"""

import time
from copy import deepcopy

import torch

from benchmarks.gpu.part import Part
from helpers.inference.packed_attention import Segment, read, use_packed_attention
from helpers.inference.protocols import OptionTokens, generate_greedy, option_loglikelihoods
from helpers.quantization.int8_linear import (
    Int8Linear,
    absmax_scale,
    fuse_gated_mlps_,
    stack_siblings_,
)
from helpers.sources.models import random_model

ITEMS, ALONE, OPTIONS = 24, 8, 4
NEW_TOKENS = 24
MEDIUM = {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 4}
MEDIUM |= {"num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 64}
MEDIUM |= {"initializer_range": 0.03, "vocab_size": 4096}


def run(part: Part) -> None:
    """Log-probabilities, states and written answers, among others and alone."""
    rows = []
    drawn = random_model("qwen3", seed=5, **({} if part.dry else MEDIUM)).to(part.device)
    for kind in ("int8 in bfloat16", "bfloat16", "int8 in float32", "float32"):
        if part.over(need=2):
            return
        model = _model(drawn, kind)
        began = time.monotonic()
        row = {"runs in": kind, **_compared(part, model)}
        rows.append(row | {"seconds": round(time.monotonic() - began, 1)})
        part.note("among others and alone", rows)


def _model(drawn, kind: str):
    """A copy of the random model on one runtime."""
    model = deepcopy(drawn).to(getattr(torch, kind.split()[-1]))
    if kind.startswith("int8"):
        quantized_by_rounding_(model)
    return model


@torch.no_grad()
def quantized_by_rounding_(model) -> None:
    """Give every Linear but the head int8 weights, one scale a row of the weight."""
    head = model.get_output_embeddings()
    names = [n for n, m in model.named_modules() if type(m) is torch.nn.Linear and m is not head]
    for name in names:
        linear = model.get_submodule(name)
        weight = linear.weight.float()
        scale = absmax_scale(weight.abs().amax(1, keepdim=True))
        rounded = (weight / scale).round_().clamp_(-128, 127).to(torch.int8)
        bias = None if linear.bias is None else linear.bias.float()
        quantized = Int8Linear(rounded, scale, bias, activations="token_dynamic", input_scale=None)
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, quantized)
    stack_siblings_(model)
    fuse_gated_mlps_(model)


def drawn_items(vocabulary: int, *, count: int, longest: int, option: int) -> list[OptionTokens]:
    """Random texts of different lengths; every third one shares its beginning with another."""
    generator = torch.Generator().manual_seed(0)

    def draw(length: int) -> list[int]:
        return torch.randint(3, vocabulary, (length,), generator=generator).tolist()

    lengths = torch.randint(longest // 4, longest, (count,), generator=generator).tolist()
    start = draw(16)
    return [
        OptionTokens(
            (start if i % 3 else []) + draw(length),
            [draw(option) for _ in range(OPTIONS)],
            (len(start),) if i % 3 else (),
        )
        for i, length in enumerate(lengths)
    ]


def _compared(part: Part, model) -> dict:
    vocabulary, most = model.config.vocab_size, 64 if part.dry else 256
    items = drawn_items(vocabulary, count=ITEMS, longest=most, option=6)
    among = dict(option_loglikelihoods(model, items, batch_tokens=4096))
    alone = {
        i: next(option_loglikelihoods(model, [items[i]], batch_tokens=1))[1] for i in range(ALONE)
    }
    pairs = [(a, b) for i in alone for a, b in zip(among[i], alone[i], strict=True)]
    best = sum(_best(among[i]) != _best(alone[i]) for i in alone)
    found = {"log-probabilities that differ": sum(a != b for a, b in pairs), "of": len(pairs)}
    found |= {"by at most": max(abs(a - b) for a, b in pairs), "best options changed": best}
    found |= _states(model, items)
    prompts = [item.context for item in items]
    together = _written(part, model, prompts)
    single = {i: _written(part, model, [prompts[i]])[0] for i in range(ALONE)}
    changed = sum(together[i] != single[i] for i in single)
    again = _written(part, model, prompts) == together
    return found | {"written answers changed": changed, "asked again alike": again}


def _best(sums: list[float]) -> int:
    return max(range(len(sums)), key=sums.__getitem__)


@torch.inference_mode()
def _states(model, items: list[OptionTokens]) -> dict:
    """How many last states of whole contexts differ between a row of all and a row of one."""
    segments = [Segment(item.context) for item in items]
    with use_packed_attention(model):
        among = read(model, segments).split([len(s.tokens) for s in segments])
        alone = [read(model, [Segment(item.context)]) for item in items[:ALONE]]
    distances = [float((a - b).abs().max()) for a, b in zip(among, alone, strict=False)]
    return {"texts whose states differ": sum(d > 0 for d in distances), "by": max(distances)}


def _written(part: Part, model, prompts: list[list[int]]) -> dict[int, list[int]]:
    new = 4 if part.dry else NEW_TOKENS
    limits = {"batch_tokens": 4096, "batch_rows": 32}
    answers = generate_greedy(model, prompts, max_new_tokens=new, stop_tokens=set(), **limits)
    return {i: answer.tokens for i, answer in answers}
