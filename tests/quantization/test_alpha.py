"""α by number, by grid, or for each group: chosen on items that judge, and on nothing else."""

import copy
import itertools
from functools import partial

import pytest
import torch

from helpers.core.errors import StudyError
from helpers.quantization import calibration, simulation, variants
from helpers.quantization.calibration import smoothing_groups
from helpers.quantization.simulation import DivergenceProbe, sensitivity_rows
from helpers.quantization.smoothing import replaced_weights, smooth_
from helpers.sources.models import random_model
from helpers.study.schema import Variant
from quantized_run import at_millionth

NORMS = ("attention_input", "mlp_input")
GRID = (0.2, 0.5, 0.8)


DOWN = ("mlp_down",)


def variant(choice, preset: str = "w8a8", optional=()) -> Variant:
    return Variant(preset=preset, smooth={"alpha": choice, "targets": NORMS, "optional": optional})


@pytest.fixture(scope="module")
def texts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(3, 259, (n,), generator=generator).tolist() for n in (31, 12, 22, 40)]


@pytest.fixture(scope="module")
def network(texts):
    """A tiny model one channel of whose norms is loud, as a real one's are."""
    torch.set_num_threads(1)
    model = random_model("llama", seed=6)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.input_layernorm.weight[3] *= 60
            layer.post_attention_layernorm.weight[7] *= 40
    return model


@pytest.fixture(scope="module")
def fit(network, texts):
    found = calibration.run_calibration(network, texts, batch_tokens=64)
    return {name: statistics.fit_absmax for name, statistics in found.items()}


def test_the_maxima_of_a_choice_leave_the_judges_out(network, texts):
    judged = calibration.first_judging_item(len(texts))
    assert judged == len(texts) - 1
    whole = calibration.run_calibration(network, texts, batch_tokens=64)
    without = calibration.run_calibration(network, texts[:judged], batch_tokens=64)
    for name, of_input in whole.items():
        torch.testing.assert_close(of_input.fit_absmax, without[name].absmax)
    assert any((f.fit_absmax < f.absmax).any() for f in whole.values())


def test_a_number_is_every_groups(network, fit):
    chosen = simulation.choose_alphas(network, variant(0.4), fit, [])
    assert set(chosen.alphas.values()) == {0.4}
    assert len(chosen.alphas) == len(NORMS) * network.config.num_hidden_layers


@pytest.mark.parametrize(
    ("preset", "optional", "grid"), [("w8a8", (), GRID), ("o3", (), GRID), ("o3", DOWN, GRID[:2])]
)
def test_a_grid_takes_the_best_by_an_independent_look(network, fit, texts, preset, optional, grid):
    """Each α built by hand, and its KL computed from whole-model logits in float64.

    The grid never builds the models it judges. A rounding that tips moves a KL: as far at
    most as the built model's own moves with embeddings a millionth off, and not at all
    where no rounding is near an edge.
    """
    chosen = simulation.choose_alphas(network, variant(grid, preset, optional), fit, texts[-1:])
    ids = torch.tensor([texts[-1]])
    with torch.inference_mode():
        expected = network(ids).logits.double().log_softmax(-1)

    def kl(logits) -> float:
        logprobs = logits.double().log_softmax(-1)
        return (expected.exp() * (expected - logprobs)).sum(-1).mean().item()

    by_hand = []
    for row in chosen.curve:
        copied = copy.deepcopy(network)
        targets = (*NORMS, *(optional if row.get("optional") else ()))
        groups = smoothing_groups(copied.config, targets)
        alphas = {group.consumers[0]: row["alpha"] for group in groups}
        smoothed = smooth_(copied, fit, targets, alphas)
        variants.quantize_variant_(copied, variant(row["alpha"], preset), fit, smoothed)
        with torch.inference_mode():
            built = kl(copied(ids).logits)
            tips = [abs(kl(at_millionth(copied, ids, k)) - built) for k in range(5)]
        by_hand.append(built)
        assert abs(row["kl"] - built) <= max(tips) + 1e-3 * built
    tried = [(row.get("optional", False), row["alpha"]) for row in chosen.curve]
    assert tried == list(itertools.product([False, True][: 1 + bool(optional)], grid))
    folded, best = tried[min(range(len(tried)), key=by_hand.__getitem__)]
    assert set(chosen.alphas.values()) == {best}
    assert chosen.recipe.smooth.targets == (*NORMS, *(optional if folded else ()))
    groups = smoothing_groups(network.config, chosen.recipe.smooth.targets)
    assert list(chosen.alphas) == [group.consumers[0] for group in groups]


@pytest.mark.parametrize("scheme", ["w8a8", "o2", "o3"])
def test_texts_read_side_by_side_are_read_as_if_alone(network, fit, texts, scheme):
    """Padding and company must not reach a scale, one for a whole tensor least of all."""
    recipe = variant(0.5, scheme)
    copied = copy.deepcopy(network)
    variants.quantize_variant_(copied, recipe, fit, [])
    together = DivergenceProbe(network, texts, recipe).divergence(copied)
    alone = [DivergenceProbe(network, [text], recipe).divergence(copied) for text in texts]
    sizes = list(map(len, texts))
    for key, of_input in together.items():
        mean = sum(a[key] * n for a, n in zip(alone, sizes, strict=True)) / sum(sizes)
        assert of_input == pytest.approx(mean, rel=0.02), key


@pytest.mark.parametrize("preset", ["w8a8", "o3"])
def test_auto_takes_for_each_group_the_least_error_of_its_outputs(network, fit, texts, preset):
    """One group looked at by hand: its smoothed Linears, rounded, on the judging text."""
    chosen = simulation.choose_alphas(network, variant("auto", preset), fit, texts[-1:])
    name = "model.layers.1.self_attn.q_proj"
    seen = []
    hook = network.get_submodule(name).register_forward_pre_hook(lambda _, a: seen.append(a[0][0]))
    with torch.inference_mode():
        network(torch.tensor([texts[-1]]))
    hook.remove()
    consumers = [name, name.replace("q_proj", "k_proj"), name.replace("q_proj", "v_proj")]
    weights = [network.get_submodule(c).weight.detach() for c in consumers]
    top = torch.stack([w.abs().amax(0) for w in weights]).amax(0)

    def rounded(values, limit):
        step = limit / 127.5
        return (values / step).round().clamp(-128, 127) * step

    def error(value: float) -> float:
        s = fit[name] ** value / top ** (1 - value)
        x, total = seen[0] / s, 0.0
        limit = x.abs().amax(1, keepdim=True) if preset == "w8a8" else (fit[name] / s).max()
        for w in weights:
            scaled = w * s
            per = scaled.abs().amax(1, keepdim=True) if preset == "w8a8" else scaled.abs().max()
            made = rounded(x, limit) @ rounded(scaled, per).T
            total += (made - seen[0] @ w.T).square().sum().item()
        return total

    best = min(simulation.AUTO_ALPHAS, key=error)
    assert error(chosen.alphas[name]) <= error(best) * 1.01


def test_choosing_changes_no_weight(network, fit, texts):
    before = {n: p.clone() for n, p in network.named_parameters()}
    simulation.choose_alphas(network, variant(GRID), fit, texts[-1:])
    simulation.choose_alphas(network, variant("auto"), fit, texts[-1:])
    assert all(torch.equal(p, before[n]) for n, p in network.named_parameters())
    assert not any(m._forward_pre_hooks for m in network.modules())


def overflowing(network):
    """The network with an infinite weight in a norm of its last layer."""
    copied = copy.deepcopy(network)
    with torch.no_grad():
        copied.model.layers[-1].post_attention_layernorm.weight[0] = float("inf")
    return copied


@pytest.mark.parametrize("preset", ["w8a8", "o3"])
def test_a_divergence_that_is_not_finite_is_none_and_is_never_chosen(
    network, fit, texts, preset, monkeypatch
):
    recipe = variant(GRID, preset)
    broken = overflowing(network)
    assert DivergenceProbe(network, texts[-1:], recipe).divergence(broken)["kl"] is None
    with pytest.raises(StudyError, match=r"KL is finite at no α of 0\.2, 0\.5, 0\.8;"):
        simulation.choose_alphas(broken, recipe, fit, texts[-1:])
    with pytest.raises(StudyError, match=r"layers\.1\.mlp\.gate_proj is finite at no"):
        simulation.choose_alphas(broken, variant("auto", preset), fit, texts[-1:])

    divergences = iter([{"kl": None}, {"kl": 0.4}, {"kl": 0.2}])
    monkeypatch.setattr(DivergenceProbe, "divergence", lambda *_: next(divergences))
    assert set(simulation.choose_alphas(network, recipe, fit, texts[-1:]).alphas.values()) == {
        GRID[2]
    }


def test_leaving_everything_float_leaves_no_loss(network, fit, texts):
    probe = DivergenceProbe(network, texts[-1:], Variant(preset="o3"))
    copied = copy.deepcopy(network)
    targets = variants.quantize_variant_(copied, Variant(preset="o3"), fit, [])
    rows = {row["float"]: row for row in sensitivity_rows(copied, targets, fit, probe)}
    assert rows["nothing"]["kl"] == pytest.approx(probe.divergence(copied)["kl"])
    assert rows["nothing"]["kl"] > 0
    assert {f"every {kind}" for kind in ("q_proj", "down_proj")} <= set(rows)
    for name in targets:
        copied.get_submodule(name).quantization_enabled = False
    assert probe.divergence(copied)["kl"] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("preset", ["w8a8", "o2", "o3"])
def test_weights_and_activations_alone_equal_models_rounded_by_hand(network, fit, texts, preset):
    """Weights alone: a float model with rounded weights. Activations alone: inputs rounded."""
    recipe = Variant(preset=preset)
    probe = DivergenceProbe(network, texts[-1:], recipe)
    alone = simulation.activations_alone(network, recipe, fit, {}, probe)
    copied, by_hand = copy.deepcopy(network), copy.deepcopy(network)
    targets = variants.quantize_variant_(copied, recipe, fit, [])
    rows = sensitivity_rows(copied, targets, fit, probe, with_float_weights=alone)
    by_label = {row["float"]: row["kl"] for row in rows}
    steps = {name: fit[name].max() / 127.5 for name in targets}

    def rounded(x, step):
        return (x / step).round().clamp(-128, 127) * step

    def round_input(linear, args, name):
        top = args[0].abs().amax(-1, keepdim=True) if preset == "w8a8" else args[0].abs().max()
        return (rounded(args[0], steps[name] if preset == "o3" else top / 127.5),)

    with torch.no_grad():
        for name in targets:
            weight = by_hand.get_submodule(name).weight
            top = weight.abs().amax(1, keepdim=True) if preset == "w8a8" else weight.abs().max()
            weight.copy_(rounded(weight, top / 127.5))
    assert by_label["every activation"] == pytest.approx(probe.divergence(by_hand)["kl"], rel=0.05)
    by_hand = copy.deepcopy(network)
    for name in targets:
        by_hand.get_submodule(name).register_forward_pre_hook(partial(round_input, name=name))
    assert by_label["every weight"] == pytest.approx(probe.divergence(by_hand)["kl"], rel=0.05)
    assert by_label["every weight"] > 0
    assert by_label["every activation"] > 0


def test_after_gptq_linears_left_float_have_the_smoothed_weights_of_the_source(
    network, fit, texts, tmp_path
):
    recipe = variant(0.5).model_copy(update={"rounding": "gptq"})
    network.save_pretrained(tmp_path)
    copied, probe = copy.deepcopy(network), DivergenceProbe(network, texts[-1:], recipe)
    alphas = simulation.choose_alphas(network, recipe, fit, []).alphas
    smoothed = smooth_(copied, fit, NORMS, alphas)
    weights = {name: tensor.clone() for name, tensor in copied.state_dict().items()}
    targets = variants.quantize_variant_(copied, recipe, fit, smoothed, texts)
    weight_of = replaced_weights(tmp_path, smoothed, recipe, dtype=torch.float32)
    assert all(torch.equal(weight_of(name), weights[f"{name}.weight"]) for name in targets)
    quantized = {name: tensor.clone() for name, tensor in copied.state_dict().items()}
    rows = sensitivity_rows(copied, targets, fit, probe, weight_of)
    assert all(torch.equal(tensor, quantized[name]) for name, tensor in copied.state_dict().items())
    assert min(row["kl"] for row in rows) < rows[0]["kl"]
    plain = variant(0.5)
    assert replaced_weights(tmp_path, smoothed, plain, dtype=torch.float32) is None


@pytest.mark.parametrize("choice", ["w8a8_grid", "o3_auto"])
def test_the_gates_hold_a_chosen_alpha_to_the_tensors(sound_run, choice):
    run = sound_run("llama", choice)
    assert run.failed() == set()
    path = run.checkpoint.parent / "quantization" / "alpha.json"
    text = path.read_text("utf-8")
    other = text.replace("0.3", "0.9").replace("0.6", "0.3").replace("0.9", "0.6")
    if choice == "o3_auto":
        import json

        record = json.loads(text)
        first = next(iter(record["alphas"]))
        record["alphas"][first] = 1.0 if record["alphas"][first] < 0.5 else 0.0
        other = json.dumps(record)
    path.write_text(other, "utf-8")
    assert "smoothing scales as declared" in run.failed()
    path.write_text(text.replace('": 0.', '": 7.'), "utf-8")
    assert "smoothing scales as declared" in run.failed()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"alpha": [0.5]}, "two values or more"),
        ({"alpha": [0.5, 0.5]}, "each once"),
        ({"alpha": [0.5, 1.7]}, r"smooth\.alpha\.1 = 1\.7 is outside"),
        ({"optional": ["mlp_input"]}, "optional = .mlp_input. is among targets too"),
        ({"optional": ["mlp_down"], "alpha": "auto"}, "by the error of each group; give alpha a"),
        ({"alpha": "best"}, r"smooth\.alpha = .best. is not known; use one of .auto"),
    ],
)
def test_a_choice_that_is_none_is_refused(study_settings, write_study, settings, said):
    from helpers.study.loading import load_study

    study_settings["variants"]["smoothquant_w8a8"]["smooth"] |= settings
    with pytest.raises(StudyError, match=said):
        load_study(write_study(study_settings))


def test_a_float_variant_has_no_error_to_choose_by(study_settings, write_study):
    from helpers.study.loading import load_study

    study_settings["variants"]["smooth_only"] = {"smooth": {"alpha": "auto", "targets": [*NORMS]}}
    with pytest.raises(StudyError, match="give a number"):
        load_study(write_study(study_settings))
