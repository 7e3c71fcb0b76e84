"""Part 9: a model spread over two cards answers as the same model on one of them.

The same random weights both times, loaded as a study with `device_map: auto` loads them. The
integers and the products of int8 Linears are equal, given the same input; log-probabilities may
differ by the rounding of float products, since two cards may take other kernels.
"""

import tempfile
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.gpu.company import MEDIUM, drawn_items, quantized_by_rounding_
from benchmarks.gpu.part import Part
from helpers.inference.packed_attention import Segment, read, use_packed_attention
from helpers.inference.protocols import OptionTokens, generate_greedy, option_loglikelihoods
from helpers.quantization import int8_matmul
from helpers.quantization.int8_linear import Int8Linear
from helpers.quantization.variants import load_quantized
from helpers.runtime.devices import modules_by_device, resolve_runtime
from helpers.sources.models import load_model, random_model
from helpers.study.schema import Runtime

ITEMS, NEW_TOKENS = 24, 16
# Of a summed log-probability: as in part 5, and six tokens' logits, below 10, at 2^-8.
ROUNDING = {"float32": 1e-3, "bfloat16": 0.25}


def run(part: Part) -> None:
    """Log-probabilities, written answers and integers on one card and over two."""
    cards = torch.cuda.device_count() if part.device == "cuda" else 0
    if cards < 2:
        reason = "one card" if cards else "a dry run on the CPU, no card"
        return part.note("outcome", f"{reason}: not run")
    rows = []
    for kind in ("float32", "bfloat16", "int8 in float32", "int8 in bfloat16"):
        if part.over(need=4):
            return
        rows.append({"runs in": kind, **compared(part, kind)})
        part.note("two cards and one", rows)
    part.note("outcome", outcome(rows))


def outcome(rows: list[dict]) -> str:
    """Whether the required equalities hold, in words."""
    wrong = [row["runs in"] for row in rows if not row["as announced"]]
    return f"differs beyond rounding: {', '.join(wrong)}" if wrong else "alike but for rounding"


def compared(part: Part, kind: str) -> dict:
    """Differences between the answers over two cards and on one card."""
    dtype = kind.split()[-1]
    asked = Runtime(device="cuda", dtype=dtype, threads=1, quantized="int8", device_map="auto")
    one = loaded(kind, resolve_runtime(asked.model_copy(update={"device_map": None})))
    two = loaded(kind, resolve_runtime(asked))
    items = drawn_items(one.config.vocab_size, count=ITEMS, longest=256, option=6)
    (options, written), (others, rewritten) = answered(one, items), answered(two, items)
    pairs = [pair for i in options for pair in zip(options[i], others[i], strict=True)]
    off = max(abs(a - b) for a, b in pairs)
    integers, where = integers_off(one, two, items[0].context), modules_by_device(two)
    alike = off <= ROUNDING[dtype] and not any(integers)
    return {
        "log-probabilities that differ": sum(a != b for a, b in pairs),
        "by at most": off,
        "allowed": ROUNDING[dtype],
        "products compared": len(integers),
        "products that differ": sum(integers),
        "written answers changed": sum(rewritten[i] != written[i] for i in written),
        "where": str(where.get("modules", "on one card")),
        "as announced": alike and bool(where),
    }


def loaded(kind: str, runtime: Runtime):
    """The drawn model where the runtime has it: float from files, int8 quantized here."""
    drawn = random_model("qwen3", seed=6, **MEDIUM).to(getattr(torch, runtime.dtype))
    with tempfile.TemporaryDirectory() as folder:
        if not kind.startswith("int8"):
            drawn.save_pretrained(folder)
            return load_model(Path(folder), runtime)
        quantized_by_rounding_(drawn)
        return load_quantized(
            lambda _folder, dtype, device: drawn.to(device), Path(folder), runtime
        )


def answered(model, items: list[OptionTokens]) -> tuple[dict, dict]:
    """Log-probabilities of options, and written tokens, by item."""
    limits = {"batch_tokens": 4096, "batch_rows": 32, "max_new_tokens": NEW_TOKENS}
    prompts = [item.context for item in items]
    written = generate_greedy(model, prompts, stop_tokens=set(), **limits)
    options = dict(option_loglikelihoods(model, items, batch_tokens=4096))
    return options, {i: answer.tokens for i, answer in written}


@torch.inference_mode()
def integers_off(one, two, prompt: list[int]) -> list[bool]:
    """Of each int8 Linear: whether its integers or its product differ, given the same input."""
    inputs: dict[str, Tensor] = {}

    def keep(name: str):
        def hook(_module, args: tuple) -> None:
            inputs[name] = args[0].cpu()

        return hook

    linears = {n: m for n, m in one.named_modules() if isinstance(m, Int8Linear)}
    hooks = [linear.register_forward_pre_hook(keep(n)) for n, linear in linears.items()]
    with use_packed_attention(one):
        read(one, [Segment(prompt)])
    for hook in hooks:
        hook.remove()
    return [
        any(
            not torch.equal(a, b)
            for a, b in zip(
                integers(linears[name], x), integers(two.get_submodule(name), x), strict=True
            )
        )
        for name, x in inputs.items()
    ]


def integers(linear: Int8Linear, x: Tensor) -> tuple[Tensor, Tensor]:
    """(tokens, in_features) int8 of x, and their (tokens, stacked out_features) product."""
    values, _ = linear.quantized(x.to(linear.weight_scale.device))
    return values.cpu(), int8_matmul.multiply(values, linear.stack.packed).cpu()
