"""Float32 products by oneDNN: right, the same in any company, and not where they must not be."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.functional import linear

from helpers.quantization.calibration import linear_layers
from helpers.quantization.variants import load_int8
from helpers.runtime.devices import FEWEST_ROWS, product, simulated_by_onednn, use_onednn
from helpers.sources.models import load_model, random_model

SHAPES = [(64, 64), (576, 1536), (129, 64), (60, 100), (333, 1001), (1, 7), (7, 1)]  # inner, outer
SMALLEST = torch.finfo(torch.float32).eps


def drawn(*shape, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def by_onednn(monkeypatch):
    """How often oneDNN multiplied: what falls back is right too, and must not pass for it."""
    if not torch.backends.mkldnn.is_available():
        pytest.skip("this torch has no oneDNN")
    calls, multiply = [], torch.ops.mkldnn._linear_pointwise

    def counted(*given):
        calls.append(given)
        return multiply(*given)

    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", counted)
    return calls


@pytest.mark.parametrize(("inner", "outer"), SHAPES)
@pytest.mark.parametrize("rows", [(1,), (2, 5), (3, 4, 2), ()])
@pytest.mark.parametrize("biased", [False, True])
def test_a_product_is_that_of_float64_up_to_rounding(by_onednn, inner, outer, rows, biased):
    x, weight = drawn(*rows, inner), drawn(outer, inner, seed=1)
    bias = drawn(outer, seed=2) if biased else None
    with torch.inference_mode():
        result = product(x, weight, bias)
    exact = linear(x.double(), weight.double(), None if bias is None else bias.double())
    size = linear(x.abs().double(), weight.abs().double()) + (0 if bias is None else bias.abs())
    assert len(by_onednn) == 1
    assert result.shape == exact.shape
    assert ((result - exact).abs() <= inner * SMALLEST * size).all()


@pytest.mark.parametrize(("inner", "outer"), SHAPES)
@pytest.mark.parametrize("threads", [1, 2])
def test_a_row_is_multiplied_alike_in_any_company(by_onednn, inner, outer, threads):
    x, weight = drawn(700, inner), drawn(outer, inner, seed=1)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.inference_mode():
            whole = product(x, weight)
            for rows in (FEWEST_ROWS, 17, 24, 31, 33, 64, 100, 129, 512, 513):
                assert torch.equal(product(x[:rows], weight), whole[:rows])
                assert torch.equal(product(x[-rows:], weight), whole[-rows:])
    finally:
        torch.set_num_threads(before)
    assert len(by_onednn) == 21


def test_what_does_not_lie_in_one_piece(by_onednn):
    x, weight = drawn(8, 20)[:, ::2], drawn(10, 5, seed=1).t()
    with torch.inference_mode():
        torch.testing.assert_close(product(x, weight), linear(x, weight))
    assert len(by_onednn) == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_types_go_the_usual_way(by_onednn, dtype, monkeypatch):
    """bfloat16 where the processor has units for it; elsewhere see test_processors."""
    monkeypatch.setattr("helpers.runtime.devices.has_bfloat16_units", lambda: True)
    x, weight = drawn(8, 10).to(dtype), drawn(5, 10, seed=1).to(dtype)
    with torch.inference_mode():
        assert torch.equal(product(x, weight), linear(x, weight))
    assert not by_onednn


def test_nothing_gives_nothing():
    with torch.inference_mode():
        assert product(drawn(0, 10), drawn(5, 10)).shape == (0, 5)


def test_autocast_still_casts(by_onednn):
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        assert product(drawn(8, 10), drawn(5, 10)).dtype == torch.bfloat16
    assert not by_onednn


@pytest.mark.parametrize("shape", [(6, 10), (2, 3, 10), (10,)])
@pytest.mark.parametrize("biased", [False, True])
def test_gradients_are_those_of_float64_up_to_rounding(by_onednn, shape, biased):
    plain = nn.Sequential(nn.Linear(10, 8, bias=biased), nn.ReLU(), nn.Linear(8, 3, bias=biased))
    ours, exact = use_onednn(copy.deepcopy(plain)), copy.deepcopy(plain).double()
    x, y = drawn(*shape).requires_grad_(), drawn(*shape).double().requires_grad_()
    for model, given in ((ours, x), (exact, y)):
        model(given).square().sum().backward()
    assert len(by_onednn) == 6  # forward, and two gradients of two Linears
    torch.testing.assert_close(x.grad.double(), y.grad)
    for one, other in zip(ours.parameters(), exact.parameters(), strict=True):
        torch.testing.assert_close(one.grad.double(), other.grad, rtol=1e-5, atol=1e-5)


def test_what_needs_no_gradient_is_given_none(by_onednn):
    model = use_onednn(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)))
    model[0].requires_grad_(False)
    model(drawn(3, 4)).sum().backward()
    assert model[0].weight.grad is None
    assert len(by_onednn) == 3  # forward of both, one weight's gradient


def test_a_gradient_of_a_gradient_is_refused():
    model = use_onednn(nn.Linear(4, 4))
    x = drawn(3, 4).requires_grad_()
    (first,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


def test_a_model_stays_what_it_was_but_for_its_forward(by_onednn):
    class Wider(nn.Linear):
        pass

    taken = nn.Linear(4, 4)
    taken.forward = lambda x: x
    model = use_onednn(nn.ModuleList([nn.Linear(4, 4), Wider(4, 4), taken]))
    x = drawn(2, 4)
    with torch.no_grad():
        assert [type(m) for m in model] == [nn.Linear, Wider, nn.Linear]
        assert model[2](x) is x  # what has a forward of its own keeps it
        model[1](x)
        assert not by_onednn
        model[0](x)
        assert len(by_onednn) == 1


def test_a_copy_multiplies_its_own_weights():
    model = use_onednn(nn.Sequential(nn.Linear(4, 4, bias=False)))
    other = copy.deepcopy(model)
    with torch.no_grad():
        other[0].weight.zero_()
        assert not other(drawn(2, 4)).any()
        assert model(drawn(2, 4)).any()


def test_a_study_multiplies_by_it(by_onednn, sound_run):
    run, tokens = sound_run("llama", "rtn_w8a8"), torch.tensor([[5, 6, 7]])
    with run.outputs(), torch.inference_mode():
        model = load_model(run.root / "source", run.job.study.runtime)
        by_onednn.clear()  # of making the run
        model(tokens)
        assert len(by_onednn) == len(linear_layers(model))  # the head among them
        folder = run.job.paths.checkpoint(run.job.model, run.job.variant)
        model = load_int8(folder, dtype=torch.float32, device="cpu")
        by_onednn.clear()
        model(tokens)
        assert len(by_onednn) == 1  # the head


def test_what_is_simulated_is_multiplied_by_it_for_a_while(by_onednn):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    model[0].forward = lambda x: type(model[0]).forward(model[0], x)  # as compressed-tensors does
    with torch.no_grad():
        model(drawn(3, 4))
        assert not by_onednn
        with simulated_by_onednn(model):
            model(drawn(3, 4))
        assert len(by_onednn) == 2
        assert {type(m) for m in model} == {nn.Linear}


def test_the_class_is_taken_back_after_a_fault_too():
    model = nn.Sequential(nn.Linear(4, 4))

    def failing() -> None:
        with simulated_by_onednn(model):
            assert type(model[0]) is not nn.Linear
            raise KeyError

    with pytest.raises(KeyError):
        failing()
    assert type(model[0]) is nn.Linear


class Router(nn.Module):
    """As mixtures have it: a matrix, and no Linear."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(drawn(4, 32))

    def forward(self, x):
        return linear(x, self.weight).softmax(-1)


def test_a_router_is_multiplied_by_it_and_a_row_alike_in_any_company(by_onednn):
    router, x = use_onednn(Router()), drawn(70, 32)
    with torch.inference_mode():
        whole = router(x)
        assert len(by_onednn) == 1
        for rows in range(2, 70):
            assert torch.equal(router(x[:rows]), whole[:rows])


def test_a_mixture_has_its_router_multiplied_by_it():
    model = use_onednn(random_model("qwen3_moe", seed=1))
    routers = [m for n, m in model.named_modules() if n.endswith("mlp.gate")]
    assert routers
    assert all("forward" in vars(router) for router in routers)
