"""vLLM's Linears, one by one, held to the int8 product of the tensors on disk.

Whole models cannot be compared logit by logit: rounding cascades (NOTES.md). A single
Linear on given inputs can, to float32 rounding. vLLM fuses projections that read the same
input, and its dynamic step is abs-max / 127 where compressed-tensors has abs-max / 127.5.
"""

from pathlib import Path

import torch
from torch import Tensor

from helpers.inference.vllm_client import VllmModel
from helpers.sources.model_files import TensorFiles
from helpers.verification.checkpoint_files import capture_inputs

VLLM_HALF_RANGE = 127
TIE = 4 * 2**-24  # float32 roundings of a quotient, relative: by 1 / step, or by the step
FUSED = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
}
INT8_KERNEL = "Int8"


def linear_kernels(model: VllmModel) -> dict[str, str]:
    """The kernel of each Linear of the decoder, by vLLM's name; without head and cache."""
    kernels = model.kernels()
    return {n: k for n, k in kernels.items() if n.endswith("_proj") or ".fc" in n}


def parts(name: str) -> list[str]:
    """The checkpoint's Linears that one of vLLM's Linears combines, in their order."""
    before, _, last = name.rpartition(".")
    return [f"{before}.{part}" for part in FUSED.get(last, (last,))]


def largest_difference(
    model: VllmModel, ours, folder: Path, names: list[str], tokens: list[int]
) -> float:
    """The largest difference of a Linear from its int8 product, relative to its largest output.

    Args:
        ours: the checkpoint on this project's runtime, for real inputs.
        names: vLLM's names of the Linears.
        tokens: a text.
    """
    files = TensorFiles(folder, dtype=None)
    inputs = capture_inputs(ours, [parts(name)[0] for name in names], tokens)
    worst = 0.0
    for name in names:
        x = inputs[parts(name)[0]].flatten(0, -2).float()
        made = [int8_product(files, part, x) for part in parts(name)]
        expected, ties = (torch.cat(each, dim=-1) for each in zip(*made, strict=True))
        difference = (model.linear(name, x).double() - expected).abs() - ties
        worst = max(worst, (difference.max() / expected.abs().max()).item())
    return worst


def int8_product(files: TensorFiles, name: str, x: Tensor) -> tuple[Tensor, Tensor]:
    """(tokens, out_features) float64 product of int8 activations, in vLLM's steps, and weights.

    Beside it how far it may be off because of ties: a value that float32 cannot tell from
    one half way between two steps may be rounded to either.
    """
    weight = files[f"{name}.weight"].double()
    weight = weight * files[f"{name}.weight_scale"].double().reshape(-1, 1)
    if f"{name}.input_scale" in files:
        step = files[f"{name}.input_scale"].float().reshape(1, 1)
    else:
        step = x.abs().amax(-1, keepdim=True) / VLLM_HALF_RANGE
    steps = x / torch.where(step == 0, 1.0, step)
    tie = (steps.abs().frac() - 0.5).abs() <= TIE * steps.abs()
    step = step.double()
    product = (steps.round().clamp(-128, 127).double() * step) @ weight.T
    return product, (tie.double() * step) @ weight.abs().T
