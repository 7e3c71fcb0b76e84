"""The compiled passes are torch's to the bit, and an answer is the same by every way."""

import copy

import pytest
import torch
from torch.nn.functional import silu

from helpers.inference.perplexity import read_passages
from helpers.quantization import int8_linear, int8_matmul
from helpers.quantization.int8_linear import Int8Linear, LinearStack, absmax_scale
from helpers.quantization.variants import load_int8
from helpers.runtime import devices

KINDS = ["token_dynamic", "tensor_dynamic", "tensor_static"]
needs_numba = pytest.mark.skipif(
    not int8_matmul.are_available(), reason="numba is missing, or torch's vector unit is another"
)


@pytest.fixture
def by_torch(monkeypatch):
    """call(function): its result when torch does every pass by itself."""

    def call(function):
        with monkeypatch.context() as patch:
            patch.setattr(int8_linear, "uses_fused_passes", lambda _x: False)
            return function()

    return call


def linear(kind, inner=576, outer=192, *, bias=True, seed=0) -> Int8Linear:
    generator = torch.Generator().manual_seed(seed)
    return Int8Linear(
        torch.randint(-128, 128, (outer, inner), generator=generator).to(torch.int8),
        torch.rand(outer, 1, generator=generator) * 0.01 + 1e-4,
        torch.randn(outer, generator=generator) if bias else None,
        activations=kind,
        input_scale=torch.tensor([0.02]) if kind == "tensor_static" else None,
    )


def inputs(rows: int, inner: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(rows)
    x = torch.randn(rows, inner, generator=generator)
    loud, ties = x.clone(), (torch.arange(rows * inner).reshape(rows, inner) % 255 - 127) / 2
    loud[:, 0] *= 1e6
    return {
        "usual": x,
        "outliers": loud,
        "halves": ties,
        "tiny": x * 1e-38,
        "subnormal": x * 1e-42,
        "large": x * 1e36,
        "zeros": x * 0,
        "negative zeros": -(x * 0).abs(),
    }


@needs_numba
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [(1, 576, 192), (33, 7, 13), (300, 1536, 576)])
@pytest.mark.parametrize("threads", [1, 2])
def test_a_linear_is_torchs_to_the_bit(kind, size, threads, by_torch):
    rows, inner, outer = size
    layer = linear(kind, inner, outer)
    torch.set_num_threads(threads)
    for name, x in inputs(rows, inner).items():
        expected = by_torch(lambda x=x: layer(x.clone()))
        assert torch.equal(layer(x.clone()).nan_to_num(), expected.nan_to_num()), name
    torch.set_num_threads(1)


@needs_numba
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_stays_seen(bad):
    layer, x = linear("token_dynamic"), torch.randn(4, 576)
    x[2, 5] = bad
    y = layer(x)
    assert y[[0, 1, 3]].isfinite().all()
    assert not y[2].isfinite().all()


@needs_numba
@pytest.mark.parametrize("size", [(1, 64), (6, 96), (200, 1536)])
def test_silu_is_torchs_to_the_bit(size):
    """Of whole vectors; the last few numbers of others torch computes by another exp."""
    for spread in (0.01, 1, 30, 150):
        gate, up = torch.randn(*size) * spread, torch.randn(*size)
        mixed, values, scale = int8_matmul.gated_silu(gate, up)
        expected = silu(gate) * up
        assert torch.equal(mixed, expected)
        assert torch.equal(scale, absmax_scale(expected.abs().amax(1, keepdim=True)))
        assert torch.equal(values, int8_linear.quantize_activations(expected, scale))


@needs_numba
def test_silu_reads_rows_that_lie_apart():
    both = torch.randn(9, 2 * 64)
    mixed, _, _ = int8_matmul.gated_silu(both[:, :64], both[:, 64:])
    assert torch.equal(mixed, silu(both[:, :64]) * both[:, 64:])


def test_passes_that_differ_are_not_used(monkeypatch):
    """A processor whose torch computes exp otherwise has torch's own passes."""
    real = int8_matmul.gated_silu

    def off(gate, up):
        mixed, values, scale = real(gate, up)
        return torch.nextafter(mixed, mixed + 1), values, scale

    monkeypatch.setattr(int8_matmul, "gated_silu", off)
    assert not int8_matmul.are_available.__wrapped__()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bias", [True, False])
def test_stacked_linears_compute_what_they_do_alone(kind, bias):
    def three():
        return [linear(kind, 64, outer, bias=bias, seed=outer) for outer in (32, 16, 8)]

    alone, stacked, x = three(), three(), torch.randn(2, 5, 64)
    stack = LinearStack(stacked)
    for layer in stacked:
        layer.stack = stack
    for _ in range(2):  # the second call finds the weights packed
        for one, other in zip(alone, stacked, strict=True):
            assert torch.equal(one(x.clone()), other(x))
            assert torch.equal(one.weight_t, other.weight_t)
            assert {*one.state_dict()} == {*other.state_dict()}


def test_a_copy_of_a_model_has_linears_of_its_own():
    mlp, x = MLP(), torch.randn(2, 16, 64)
    int8_linear.stack_siblings_(mlp)
    expected = mlp(x.clone())
    twin = copy.deepcopy(mlp)
    assert twin.gate_proj.stack is twin.up_proj.stack
    assert twin.gate_proj.stack is not mlp.gate_proj.stack
    assert torch.equal(twin(x.clone()), expected)


def test_a_changed_input_is_quantized_anew():
    first, second, x = (
        linear("token_dynamic", seed=1),
        linear("token_dynamic", seed=2),
        torch.ones(4, 576),
    )
    first(x)
    x[1] *= torch.linspace(0, 3, 576)
    assert torch.equal(second(x), second(x.clone()))


def test_texts_of_another_packing_are_quantized_anew():
    from helpers.runtime.devices import use_sequence_ids

    layer, x = linear("tensor_dynamic"), torch.randn(4, 576) * torch.tensor([[1.0], [1], [9], [9]])
    with use_sequence_ids(torch.tensor([0, 0, 1, 1])):
        apart = layer(x)
    assert not torch.equal(apart, layer(x))
    assert torch.equal(layer(x), layer(x.clone()))


class MLP(torch.nn.Module):
    """As Llama's."""

    def __init__(self):
        super().__init__()
        self.gate_proj, self.up_proj = (linear("token_dynamic", 64, 128, seed=s) for s in (1, 2))
        self.down_proj, self.act_fn = linear("token_dynamic", 128, 64, seed=3), torch.nn.SiLU()

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


@needs_numba
def test_a_gated_mlp_is_its_parts_to_the_bit(by_torch):
    mlp, x = MLP(), torch.randn(2, 16, 64)
    expected = by_torch(lambda: mlp(x.clone()))
    assert int8_linear.fuse_gated_mlps_(mlp) == 1
    assert torch.equal(mlp(x.clone()), expected)


@needs_numba
@pytest.mark.parametrize("name", ["act_fn", "up_proj"])
def test_a_part_that_is_exchanged_later_is_used(name):
    mlp, x = MLP(), torch.randn(2, 16, 64)
    int8_linear.fuse_gated_mlps_(mlp)
    before = mlp(x.clone())
    part = torch.nn.ReLU() if name == "act_fn" else linear("token_dynamic", 64, 128, seed=9)
    setattr(mlp, name, part)
    assert not torch.equal(mlp(x.clone()), before)
    assert torch.equal(mlp(x.clone()), MLP.forward(mlp, x.clone()))


def test_an_mlp_of_another_function_keeps_its_own_forward():
    class Squared(MLP):
        def forward(self, x):
            return self.down_proj(self.gate_proj(x).relu().square() * self.up_proj(x))

    model = Squared()
    assert int8_linear.fuse_gated_mlps_(model) == 0
    assert "forward" not in vars(model)


@pytest.mark.parametrize("variant", ["rtn_w8a8", "o2", "o3"])
def test_an_evaluation_is_the_same_by_every_way(sound_run, family, variant, monkeypatch):
    """Whatever the processor multiplies with, and with or without numba: equal bytes."""
    run = sound_run(family, variant)
    texts, seen = [[5, 9, 2, 7, 30, 11, 12] * 3, [8, 3, 1, 4] * 2], {}
    own = set(devices.features())
    with run.outputs():
        folder = run.job.paths.checkpoint("base", variant)
        for cpu_product in int8_matmul.CPU_PRODUCTS.values():
            for fused in (True, False):
                if cpu_product.features and not own & set(cpu_product.features):
                    continue
                monkeypatch.setattr(
                    int8_matmul, "cpu_product", lambda cpu_product=cpu_product: cpu_product
                )
                if not fused:
                    monkeypatch.setattr(int8_matmul, "are_available", lambda: False)
                model = load_int8(folder, dtype=torch.float32, device="cpu")
                states = read_passages(model, texts, batch_tokens=64)
                seen[cpu_product.name, fused] = states.hidden.numpy().tobytes()
                monkeypatch.undo()
    assert len(seen) >= 2
    assert len(set(seen.values())) == 1
