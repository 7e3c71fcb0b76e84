"""What a Linear of a checkpoint has to compute, from its tensors on disk, in float64.

An opinion of its own: tensors are read by safetensors, and the rules of int8 are written out
again. Nothing here is shared with what loads, quantizes or multiplies in an evaluation.
"""

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

STEPS = 127.5  # compressed-tensors: abs-max in steps, for 256 levels
TIE = 1e-3  # in steps; a value this close to a midpoint may round either way
EPS32 = 2.0**-23
HEADS = ("lm_head.weight", "model.embed_tokens.weight", "model.decoder.embed_tokens.weight")


class TensorReader:
    """The tensors of a folder by name, from its index, its single file, or all its files."""

    def __init__(self, folder: Path):
        index, whole = folder / "model.safetensors.index.json", folder / "model.safetensors"
        if index.is_file():
            places = json.loads(index.read_text("utf-8"))["weight_map"]
            self._places = {name: folder / file for name, file in places.items()}
            return
        self._places = {}
        for path in [whole] if whole.is_file() else sorted(folder.glob("*.safetensors")):
            with safe_open(path, framework="pt") as file:
                self._places |= dict.fromkeys(file.keys(), path)

    def __contains__(self, name: str) -> bool:
        return name in self._places

    def __iter__(self):
        return iter(self._places)

    def __getitem__(self, name: str) -> Tensor:
        with safe_open(self._places[name], framework="pt") as file:
            return file.get_tensor(name)

    def weight_name(self, module: str) -> str:
        """The name of a module's weight tensor; for a tied head, that of the embeddings."""
        names = HEADS if module == "lm_head" else (f"{module}.weight",)
        return next((name for name in names if name in self), names[0])


@dataclass(frozen=True)
class Products:
    """Expected outputs of a Linear for some rows, each (rows, columns) float64.

    Attributes:
        exact: by the declared scheme.
        allowed: the largest rounding error of a correct implementation.
        unrounded: with float activations.
    """

    exact: Tensor
    allowed: Tensor
    unrounded: Tensor


@dataclass(frozen=True)
class LinearFile:
    """Some columns of one Linear, from the files of a variant.

    Attributes:
        weight: (columns, in_features), int8 or float.
        step: (columns,) of the int8 weights; None for a float Linear.
        bias: (columns,) float, or None.
        activations: the declared granularity; None for a float Linear.
        input_scale: () float32 of `tensor_static`, else None.
        eps: relative spacing of the float type that inputs and outputs have.
        simulated: whether int8 is simulated in that float type.
    """

    weight: Tensor
    step: Tensor | None
    bias: Tensor | None
    activations: str | None
    input_scale: Tensor | None
    eps: float
    simulated: bool = False

    def products(self, x: Tensor, absmax: Tensor | None = None) -> Products:
        """The expected outputs.

        Args:
            x: (rows, in_features), the Linear's inputs.
            absmax: (rows,) largest magnitude in each row's text, for `tensor_dynamic`.
        """
        x = x.float()
        weight = self.weight.double() * (1 if self.step is None else self.step.double()[:, None])
        bias = 0 if self.bias is None else self.bias.double()
        unrounded = x.double() @ weight.T + bias
        if self.activations is None:
            rounded, scale, ties = x.double(), None, None
        else:
            rounded, scale, ties = self._rounded(x, absmax)
        exact = rounded @ weight.T + bias
        size = rounded.norm(dim=1, keepdim=True) * weight.norm(dim=1)
        bound = size + (0 if self.bias is None else bias.abs())
        allowed = 8 * EPS32 * bound + 2 * self.eps * exact.abs() + self._narrow(size, weight)
        if ties is not None:  # each tie may be one step off
            allowed += (ties.double() * scale.double()) @ weight.abs().T
            if self.simulated and self.eps > EPS32:
                allowed += 4 * scale.double() * weight.norm(dim=1) + 2 * self.eps * size
        return Products(exact, allowed, unrounded)

    def _narrow(self, size: Tensor, weight: Tensor) -> Tensor | float:
        """The rounding error of sums of products in a float type narrower than float32."""
        if self.eps <= EPS32 or self.activations is not None:
            return 0.0
        return 4 * self.eps * size / weight.shape[1] ** 0.5

    def _rounded(self, x: Tensor, absmax: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """((rows, in) float64 quantized values, (rows, 1) step, (rows, in) bool: near a tie)."""
        if self.activations == "tensor_static":
            scale = self.input_scale.float().expand(len(x))
        else:
            top = x.abs().amax(1) if self.activations == "token_dynamic" else absmax.float()
            scale = top / STEPS
        scale = torch.where(scale == 0, torch.full_like(scale, EPS32), scale)[:, None]
        steps = x.double() / scale.double()
        levels = (x / scale).round().clamp(-128, 127).double()
        ties = (steps - steps.floor() - 0.5).abs() < TIE
        ties &= (steps > -128) & (steps < 127)
        return levels * scale.double(), scale, ties


@dataclass(frozen=True)
class LinearFiles:
    """Every Linear of a variant's folder.

    Attributes:
        folder: the checkpoint, or the source of a variant without one.
        quantized: names of the Linears that the variant declares as int8.
        activations: their declared granularity.
        dtype: the declared float type of everything else.
        simulated: whether int8 is simulated in that type.
    """

    folder: Path
    quantized: frozenset[str]
    activations: str | None
    dtype: torch.dtype
    simulated: bool

    @cached_property
    def tensors(self) -> TensorReader:
        return TensorReader(self.folder)

    def linear(self, name: str, columns: Tensor) -> LinearFile:
        """Some columns of a Linear.

        Raises:
            KeyError: a tensor of the Linear is missing.
        """
        tensors, int8 = self.tensors, name in self.quantized
        weight = tensors[tensors.weight_name(name)][columns]
        bias = tensors[f"{name}.bias"][columns] if f"{name}.bias" in tensors else None
        eps = torch.finfo(self.dtype).eps
        if not int8:
            if not weight.is_floating_point():
                raise TypeError(f"{name} is {weight.dtype} on disk and claimed to be float")
            bias = None if bias is None else bias.to(self.dtype)
            return LinearFile(weight.to(self.dtype), None, bias, None, None, eps)
        step = tensors[f"{name}.weight_scale"].float().reshape(-1)
        step = step[columns] if len(step) > 1 else step.expand(len(columns))
        static = self.activations == "tensor_static"
        scale = tensors[f"{name}.input_scale"].float().reshape(()) if static else None
        return LinearFile(weight, step, bias, self.activations, scale, eps, self.simulated)
