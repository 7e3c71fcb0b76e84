"""Part 7: tokens a second, read and written, here and by transformers; how near the peak."""

from importlib.util import find_spec

import torch
from transformers import AutoModelForCausalLM

from benchmarks.gpu import full_size
from benchmarks.gpu.part import Part
from benchmarks.gpu.timing import eager_seconds
from helpers.core.architectures import HEAD
from helpers.inference.packed_attention import Segment, read, use_packed_attention
from helpers.inference.protocols import generate_greedy
from helpers.quantization import variants
from helpers.runtime.discovery import linear_names
from helpers.study.loading import load_study

TEXTS, LENGTH = 8, 512
ANSWERS, PROMPT, NEW = 64, 32, 32
DRY = {"texts": 2, "length": 16, "answers": 4, "prompt": 8, "new": 4}


def run(part: Part) -> None:
    """int8 and bfloat16 first, then float32; ours beside transformers' own."""
    full_size.scratch()
    part.note("vLLM", "imports" if find_spec("vllm") else "is not installed here; not compared")
    if not full_size.checkpoint_folder(part).is_dir():  # full_size did not run here
        variants.quiet_llmcompressor()
        full_size.quantized(part, [], load_study(full_size.STUDY), full_size.float_folder(part))
    rows: list[dict] = []
    for kind in ("int8", "bfloat16", "float32"):
        for whose in ("ours", "transformers"):
            if kind == "int8" and whose == "transformers":
                continue  # it simulates int8
            if part.over(need=6):
                return
            rows.append({"runs in": kind, "whose": whose, **_measured(part, kind, whose)})
            part.note("tokens a second", rows)


def _sizes(part: Part) -> dict[str, int]:
    whole = {"texts": TEXTS, "length": LENGTH, "answers": ANSWERS, "prompt": PROMPT, "new": NEW}
    return DRY if part.dry else whole


@torch.inference_mode()
def _measured(part: Part, kind: str, whose: str) -> dict:
    sizes = _sizes(part)
    if whose == "ours":
        model, reader, writer = full_size.load(part, kind), _read, _write
    else:
        folder, dtype = full_size.float_folder(part), getattr(torch, kind)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(part.device).eval()
        reader, writer = _forward, _generate
    ids = torch.randint(3, 250, (sizes["texts"], sizes["length"]), generator=_generator())
    starts = torch.randint(3, 250, (sizes["answers"], sizes["prompt"]), generator=_generator())
    part.forget_peak()
    reading = eager_seconds([lambda: reader(model, ids)], part.device)
    writer(model, starts, 2)  # what is compiled on first use
    with_one = _seconds(part, lambda: writer(model, starts, 1))
    writing = _seconds(part, lambda: writer(model, starts, sizes["new"])) - with_one
    steps, weights = sizes["new"] - 1, _linear_weights(model)
    row = {"read": ids.numel() / reading, "written": len(starts) * steps / writing}
    row |= {"ms a step": 1000 * writing / steps, "peak [GiB]": part.peak_gib()}
    peak = part.of("card", f"{kind}, operations a second")
    if isinstance(peak, float):
        row["reading, share of peak"] = 2 * weights * ids.numel() / reading / peak
    bandwidth = part.of("card", "copy_bytes_a_second")
    if isinstance(bandwidth, float):
        size = weights * {"int8": 1, "bfloat16": 2, "float32": 4}[kind]
        row["a step, share of bandwidth"] = size * steps / writing / bandwidth
    return row


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def _seconds(part: Part, call) -> float:
    return eager_seconds([call], part.device) if part.dry else _once(part, call)


def _once(part: Part, call) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1000


def _linear_weights(model) -> int:
    modules = [model.get_submodule(n) for n in linear_names(model.config) if n != HEAD]
    return sum(m.in_features * m.out_features for m in modules)


def _read(model, ids: torch.Tensor):
    with use_packed_attention(model):
        return read(model, [Segment(row) for row in ids.tolist()])


def _forward(model, ids: torch.Tensor):
    return model.base_model(input_ids=ids.to(model.device), use_cache=False).last_hidden_state


def _write(model, starts: torch.Tensor, new: int) -> None:
    prompts, size = starts.tolist(), starts.numel()
    limits = {"batch_tokens": size, "batch_rows": len(prompts)}
    answers = generate_greedy(model, prompts, max_new_tokens=new, stop_tokens=set(), **limits)
    assert all(len(answer.tokens) == new for _, answer in answers)


def _generate(model, starts: torch.Tensor, new: int) -> None:
    ids = starts.to(model.device)
    inputs = {"attention_mask": torch.ones_like(ids), "pad_token_id": 0, "do_sample": False}
    output = model.generate(ids, max_new_tokens=new, min_new_tokens=new, **inputs)
    assert output.shape[1] == starts.shape[1] + new
