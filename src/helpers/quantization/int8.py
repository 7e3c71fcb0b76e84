"""The INT8 runtime: Linears that multiply int8 by int8 into int32 (`kernels`).

Activations are quantized at the granularity the checkpoint declares, by the rule
compressed-tensors uses (scale = abs-max / 127.5, round half to even, clamp to
[-128, 127]), so that the simulated checkpoint and this runtime agree. Weights are held
once, as int8, in the layout the kernel reads.
"""

import json
from pathlib import Path

import torch
from torch import Tensor, nn

from helpers.quantization.kernels import int8_matmul
from helpers.sources.batching import token_owners
from helpers.sources.models import empty_model, load_config, take_generation_config_
from helpers.sources.onednn import multiplied_by_onednn
from helpers.sources.tensor_files import TensorFiles
from helpers.study.architectures import HEAD
from helpers.study.errors import StudyError

HALF_RANGE = 127.5  # of 256 levels: compressed-tensors' symmetric int8
SMALLEST_SCALE = torch.finfo(torch.float32).eps


def quantize_activations(x: Tensor, scale: Tensor) -> Tensor:
    """round(x / scale) as int8, clamped; scale broadcasts against x."""
    return torch.div(x, scale).round_().clamp_(-128, 127).to(torch.int8)


def absmax_scale(absmax: Tensor) -> Tensor:
    """The step that makes `absmax` 127.5 steps; a zero row gets the smallest float step."""
    scale = absmax / HALF_RANGE
    return torch.where(scale == 0, torch.full_like(scale, SMALLEST_SCALE), scale)


def _tensor_absmax(x: Tensor) -> Tensor:
    """(1,) or (tokens, 1) abs-max of all of x, or of each text where several are read at once."""
    owners = token_owners()
    if owners is None:
        return x.abs().amax().reshape(1)
    each = x.abs().amax(-1)
    tops = each.new_zeros(int(owners.max()) + 1).scatter_reduce_(0, owners, each, "amax")
    return tops[owners][:, None]


class Int8Linear(nn.Module):
    """y = (x_int8 @ w_int8ᵀ) · activation scale · weight scale + bias.

    Args:
        weight: (out_features, in_features) int8.
        weight_scale: (out_features, 1) or (1,) float.
        bias: (out_features,) or None.
        activations: `token_dynamic`, `tensor_dynamic` or `tensor_static`.
        input_scale: (1,) float for `tensor_static`, else None.
    """

    def __init__(self, weight, weight_scale, bias, *, activations: str, input_scale):
        super().__init__()
        if weight.dtype != torch.int8:
            raise ValueError(f"weight is {weight.dtype}; an INT8 Linear needs torch.int8")
        if (activations == "tensor_static") != (input_scale is not None):
            raise ValueError(f"activations = {activations!r} and input_scale do not fit together")
        self.out_features, self.in_features = weight.shape
        self.activations = activations
        self.register_buffer("weight_t", weight.t().contiguous())  # (in, out)
        self.register_buffer("weight_scale", weight_scale.float().reshape(1, -1))
        self.register_buffer("input_scale", None if input_scale is None else input_scale.float())
        self.register_buffer("bias", bias)

    def scale_of(self, x: Tensor) -> Tensor:
        """The activation scale of x (tokens, in_features): (tokens, 1) or (1,).

        One dynamic scale a tensor is one a text: what is read beside it has its own.
        """
        if self.activations == "token_dynamic":
            return absmax_scale(x.abs().amax(-1, keepdim=True))
        if self.activations == "tensor_dynamic":
            return absmax_scale(_tensor_absmax(x))
        return self.input_scale.reshape(1)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, self.in_features)
        if not len(rows):
            return x.new_zeros(*x.shape[:-1], self.out_features)
        scale = self.scale_of(rows.float())
        product = int8_matmul(quantize_activations(rows.float(), scale), self.weight_t)
        y = product.float().mul_(scale).mul_(self.weight_scale)
        if self.bias is not None:
            y += self.bias.float()
        return y.to(x.dtype).reshape(*x.shape[:-1], self.out_features)


def load_int8(folder: Path, *, dtype: torch.dtype, device: str):
    """A saved checkpoint on INT8 kernels, its float parts at `dtype`.

    Raises:
        StudyError: the checkpoint is not an int8 compressed-tensors one.
    """
    tensors = read_tensors(folder)
    config = load_config(folder)
    activations = declared_activations(folder)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.tie_word_embeddings = f"{HEAD}.weight" not in tensors
    model = empty_model(config, dtype=dtype)  # all of it comes from the file; checked below
    for name in [k.removesuffix(".weight_scale") for k in tensors if k.endswith(".weight_scale")]:
        linear = Int8Linear(
            tensors.pop(f"{name}.weight"),
            tensors.pop(f"{name}.weight_scale"),
            tensors.pop(f"{name}.bias", None),
            activations=activations,
            input_scale=tensors.pop(f"{name}.input_scale", None),
        )
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, linear)
    _load_float_parts_(model, tensors)
    take_generation_config_(model, folder)
    model.scale_scope = "text" if activations == "tensor_dynamic" else "token"
    return multiplied_by_onednn(model.to(device)).eval()


def _load_float_parts_(model, tensors: dict[str, Tensor]) -> None:
    int8_names = {n for n, m in model.named_modules() if isinstance(m, Int8Linear)}
    expected = {k for k in model.state_dict() if k.rpartition(".")[0] not in int8_names}
    if model.config.tie_word_embeddings:
        expected.discard(f"{HEAD}.weight")
    if expected != set(tensors):
        odd = sorted(expected ^ set(tensors))
        raise StudyError(
            f"the checkpoint and its architecture differ in {odd[0]} ({len(odd)} in all)"
        )
    model.load_state_dict(tensors, strict=False)
    model.tie_weights()


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """The checkpoint's tensors, one copy of each; the head is missing if it is the embeddings."""
    return TensorFiles(folder, dtype=None).all_at_once()


def declared_activations(folder: Path) -> str:
    """The activation granularity a checkpoint's config declares, in the study's words.

    Raises:
        StudyError: it is not 8-bit symmetric integer activations of a known granularity.
    """
    config = json.loads((Path(folder) / "config.json").read_text("utf-8"))
    groups = config.get("quantization_config", {}).get("config_groups", {})
    if len(groups) != 1:
        raise StudyError(
            f"{Path(folder).name}: {len(groups)} quantization groups; one is supported"
        )
    inputs = next(iter(groups.values()))["input_activations"]
    kind = f"{inputs['strategy']}_{'dynamic' if inputs['dynamic'] else 'static'}"
    known = ("token_dynamic", "tensor_dynamic", "tensor_static")
    if kind not in known or inputs["num_bits"] != 8 or not inputs["symmetric"]:
        raise StudyError(
            f"{Path(folder).name}: activations are {kind}, not one of {known} in 8 bits"
        )
    return kind
