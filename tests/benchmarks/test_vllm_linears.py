"""What `make serve-check` holds vLLM's Linears to, on made-up Linears that are wrong."""

import pytest
import torch
from benchmarks.serve_check import LAYER_TOLERANCE
from safetensors.torch import save_file

from benchmarks import vllm_linears

NAME, OUT, IN = "model.layers.0.mlp.down_proj", 24, 40


class Served:
    """Stands for vLLM: one Linear, computed from the files in steps of abs-max / `half`."""

    def __init__(self, tensors, *, half: float = 127.0, rounding=torch.round):
        self.tensors, self.half, self.rounding = tensors, half, rounding

    def linear(self, name, x):
        step = x.abs().amax(-1, keepdim=True) / self.half
        q = self.rounding(x / step).clamp(-128, 127)
        weight = self.tensors[f"{name}.weight"].float() * self.tensors[f"{name}.weight_scale"]
        return (q * step) @ weight.T


@pytest.fixture
def difference(tmp_path, monkeypatch):
    """difference(x, **served): as `make serve-check` computes it."""
    generator = torch.Generator().manual_seed(3)
    weight = torch.randint(-127, 128, (OUT, IN), generator=generator, dtype=torch.int8)
    scale = torch.rand(OUT, 1, generator=generator) / 100 + 0.001
    tensors = {f"{NAME}.weight": weight, f"{NAME}.weight_scale": scale}
    save_file(tensors, tmp_path / "model.safetensors")

    def found(x, **served):
        monkeypatch.setattr(vllm_linears, "capture_inputs", lambda *_: {NAME: x})
        told = Served(tensors, **served)
        return vllm_linears.largest_difference(told, None, tmp_path, [NAME], [1])

    return found


@pytest.fixture
def x():
    return torch.randn(1, 9, IN, generator=torch.Generator().manual_seed(4))


def test_a_sound_linear_agrees(difference, x):
    assert difference(x) <= LAYER_TOLERANCE


@pytest.mark.parametrize("half", [127.5, 126.0, 63.0])
def test_another_step_is_seen(difference, x, half):
    assert difference(x, half=half) > LAYER_TOLERANCE


@pytest.mark.parametrize("rounding", [torch.floor, torch.trunc, lambda x: x])
def test_another_rounding_is_seen(difference, x, rounding):
    assert difference(x, rounding=rounding) > LAYER_TOLERANCE


def test_a_tie_may_be_rounded_either_way_and_one_wrong_step_may_not(difference, x):
    """Two values in each token: one half way between two steps, one a quarter off a step."""
    x = x.clone()
    x[..., 0], x[..., 1], x[..., 2] = 127.0, 4.5, 8.25

    def up(place):
        def rounding(steps):
            rounded = steps.round()
            rounded[..., place] = steps[..., place].ceil()
            return rounded

        return rounding

    assert difference(x, rounding=up(1)) <= LAYER_TOLERANCE
    assert difference(x, rounding=up(2)) > LAYER_TOLERANCE
