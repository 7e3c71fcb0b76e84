"""Checkpoints: what llmcompressor saves, read back, and held against independent arithmetic."""

import json

import pytest
import torch

from helpers.core.errors import StudyError
from helpers.quantization import variants
from helpers.quantization.calibration import run_calibration
from helpers.quantization.int8_linear import Int8Linear
from helpers.quantization.simulation import choose_alphas
from helpers.quantization.smoothing import smooth_variant_, smoothed_absmax
from helpers.quantization.variants import load_int8, load_reference, read_checkpoint_tensors
from helpers.study.schema import Variant

SMOOTH = {"alpha": 0.5, "targets": ("attention_input", "mlp_input")}
VARIANTS = {
    "rtn_w8a8": Variant(preset="w8a8"),
    "smoothquant_w8a8": Variant(preset="w8a8", smooth=SMOOTH),
    "o1": Variant(preset="o1", smooth=SMOOTH),
    "o2": Variant(preset="o2"),
    "o3": Variant(preset="o3", smooth=SMOOTH),
    "down_float": Variant(preset="w8a8", ignore=("lm_head", "down_proj")),
    "first_float": Variant(preset="w8a8", ignore=("lm_head", r"re:.*layers\.0\..*(q|k|v)_proj")),
}


@pytest.fixture
def items():
    generator = torch.Generator().manual_seed(4)
    return [torch.randint(3, 259, (n,), generator=generator).tolist() for n in (20, 12)]


@pytest.fixture
def made(request, model, tokenizer, items, tmp_path):
    """(variant, float weights after smoothing, calibrated maxima, checkpoint folder, model)."""
    variant = VARIANTS[request.param]
    statistics = run_calibration(model, items, batch_tokens=64)
    absmax = {name: of_input.absmax for name, of_input in statistics.items()}
    smoothed = smooth_variant_(model, absmax, variant, choose_alphas(model, variant, {}, []).alphas)
    weights = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    variants.quantize_variant_(model, variant, absmax, smoothed)
    folder = tmp_path / "checkpoint"
    variants.save_checkpoint(model, tokenizer, folder)
    return variant, weights, smoothed_absmax(absmax, smoothed), folder, model


all_variants = pytest.mark.parametrize("made", VARIANTS, indirect=True)


@all_variants
def test_weights_are_round_to_nearest_on_the_grid(made):
    """q = clamp(round(w / s), -128, 127) with s = max|w| / 127.5, per row or for all."""
    variant, weights, _, folder, _ = made
    tensors = read_checkpoint_tensors(folder)
    names = [k.removesuffix(".weight_scale") for k in tensors if k.endswith(".weight_scale")]
    assert names
    for name in names:
        w = weights[f"{name}.weight"].double()
        top = w.abs().amax(1, keepdim=True) if variant.scheme[0] == "channel" else w.abs().max()
        expected = (w / (top / 127.5)).round().clamp(-128, 127)
        stored = tensors[f"{name}.weight"].double()
        near_ties = (stored - expected).abs() > 0
        assert (stored - expected).abs().max() <= 1
        assert near_ties.float().mean() < 0.01  # float32 against float64 at the rounding edge


@pytest.mark.parametrize("made", ["o3"], indirect=True)
def test_static_scales_come_from_the_calibration(made):
    _, _, absmax, folder, _ = made
    for name, scale in read_checkpoint_tensors(folder).items():
        if name.endswith(".input_scale"):
            top = absmax[name.removesuffix(".input_scale")].max()
            torch.testing.assert_close(scale.reshape(()).float(), top / 127.5)


@all_variants
def test_the_head_stays_float(made):
    variant, weights, _, folder, _ = made
    tensors = read_checkpoint_tensors(folder)
    assert "lm_head.weight_scale" not in tensors
    assert torch.equal(tensors["model.embed_tokens.weight"], weights["model.embed_tokens.weight"])
    if "down_proj" in variant.ignore:
        assert not any(k.endswith("down_proj.weight_scale") for k in tensors)


@all_variants
def test_int8_layers_equal_the_simulation_layer_by_layer(made, items):
    """The kernel and compressed-tensors' own forward, on the same inputs of every Linear."""
    _, _, _, folder, _ = made
    fast = load_int8(folder, dtype=torch.float32, device="cpu")
    simulated = load_reference(folder, dtype=torch.float32, device="cpu")
    seen: dict[str, tuple] = {}
    for name, module in fast.named_modules():
        if isinstance(module, Int8Linear):
            simulated.get_submodule(name).register_forward_hook(
                lambda _m, args, out, name=name: seen.__setitem__(name, (args[0], out))
            )
    with torch.inference_mode():
        simulated(torch.tensor([items[0]]))
        assert seen
        for name, (x, expected) in seen.items():
            output = fast.get_submodule(name)(x)
            scale = expected.abs().max().item()
            torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5 * scale)


@all_variants
def test_a_reload_computes_what_was_saved(made, items):
    _, _, _, folder, model = made
    ids = torch.tensor([items[0]])
    with torch.inference_mode():
        simulated = load_reference(folder, dtype=torch.float32, device="cpu")
        torch.testing.assert_close(simulated(ids).logits, model(ids).logits)


def test_agrees_with_llmcompressors_own_path(model, tokenizer, items, tmp_path):
    """Given the same smoothed model, `oneshot` W8A8 saves the very same tensors."""
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import QuantizationModifier

    variant = VARIANTS["smoothquant_w8a8"]
    statistics = run_calibration(model, items, batch_tokens=64)
    absmax = {name: of_input.absmax for name, of_input in statistics.items()}
    smoothed = smooth_variant_(model, absmax, variant, choose_alphas(model, variant, {}, []).alphas)
    model.save_pretrained(tmp_path / "smoothed")
    theirs = type(model).from_pretrained(tmp_path / "smoothed")
    recipe = QuantizationModifier(targets="Linear", scheme="W8A8", ignore=["lm_head"])
    oneshot(model=theirs, processor=tokenizer, recipe=recipe)
    theirs.save_pretrained(tmp_path / "theirs", save_compressed=True)
    variants.quantize_variant_(model, variant, absmax, smoothed)
    variants.save_checkpoint(model, tokenizer, tmp_path / "ours")
    expected, tensors = (
        read_checkpoint_tensors(tmp_path / "theirs"),
        read_checkpoint_tensors(tmp_path / "ours"),
    )
    assert set(tensors) == set(expected)
    assert all(torch.equal(tensors[name], expected[name]) for name in expected)


GPTQ = Variant(preset="w8a8", rounding="gptq", smooth=SMOOTH | {"alpha": 0.8})


def smoothed_by(model, variant, items):
    """(maxima before smoothing, smoothed groups); the model is smoothed in place."""
    statistics = run_calibration(model, items, batch_tokens=64)
    absmax = {name: of_input.absmax for name, of_input in statistics.items()}
    alphas = choose_alphas(model, variant, {}, []).alphas
    return absmax, smooth_variant_(model, absmax, variant, alphas)


@pytest.mark.parametrize("made", ["first_float"], indirect=True)
def test_a_patterns_linears_stay_float_for_every_reader(made):
    """Our runtime, transformers, and the config that vLLM reads name the same Linears."""
    from compressed_tensors.utils.match import match_name

    variant, _, _, folder, model = made
    pattern = variant.ignore[1]
    linears = [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)]
    kept = {n for n in linears if match_name(n, pattern)} | {"lm_head"}
    assert len(kept) == 4
    ours = load_int8(folder, dtype=torch.float32, device="cpu")
    theirs = load_reference(folder, dtype=torch.float32, device="cpu")
    assert {n for n in linears if type(ours.get_submodule(n)) is torch.nn.Linear} == kept
    simulated = {n for n in linears if hasattr(theirs.get_submodule(n), "quantization_scheme")}
    assert set(linears) - simulated == kept
    config = json.loads((folder / "config.json").read_text("utf-8"))["quantization_config"]
    assert set(config["ignore"]) == kept


def test_gptq_agrees_with_llmcompressors_own_path(model, tokenizer, items, tmp_path):
    """Given the same smoothed model and texts, `oneshot` rounds nearly all weights alike.

    Batches with masked padding here, texts one by one there: a sum in another order may move a
    weight at the edge of two steps, and with it a few that make up for it.
    """
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier

    absmax, smoothed = smoothed_by(model, GPTQ, items)
    model.save_pretrained(tmp_path / "smoothed")
    theirs = type(model).from_pretrained(tmp_path / "smoothed")
    rows = [{"input_ids": tokens, "attention_mask": [1] * len(tokens)} for tokens in items]
    oneshot(
        model=theirs,
        processor=tokenizer,
        dataset=Dataset.from_list(rows),
        recipe=GPTQModifier(targets="Linear", scheme="W8A8", ignore=["lm_head"]),
        max_seq_length=max(map(len, items)),
        num_calibration_samples=len(items),
        shuffle_calibration_samples=False,
    )
    theirs.save_pretrained(tmp_path / "theirs", save_compressed=True)
    variants.quantize_variant_(model, GPTQ, absmax, smoothed, items, batch_tokens=64)
    variants.save_checkpoint(model, tokenizer, tmp_path / "ours")
    expected = read_checkpoint_tensors(tmp_path / "theirs")
    tensors = read_checkpoint_tensors(tmp_path / "ours")
    assert set(tensors) == set(expected)
    for name, tensor in tensors.items():
        if tensor.dtype == torch.int8:
            assert (tensor != expected[name]).float().mean() < 0.01, name
        else:
            assert torch.equal(tensor, expected[name]), name


def test_gptq_answers_nearer_to_the_float_linears_than_nearest(model, items):
    """On the texts it read, the output error of every Linear is below that of nearest weights."""
    weights, inputs = {}, {}
    absmax, smoothed = smoothed_by(model, GPTQ, items)
    first = {n: m for n, m in model.named_modules() if ".layers.0." in n and hasattr(m, "weight")}
    linears = {n: m for n, m in first.items() if isinstance(m, torch.nn.Linear)}
    handles = [
        m.register_forward_pre_hook(lambda _m, args, n=n: inputs.setdefault(n, []).append(args[0]))
        for n, m in linears.items()
    ]
    with torch.inference_mode():
        for tokens in items:
            model(torch.tensor([tokens]))
    for handle in handles:
        handle.remove()
    weights = {n: m.weight.detach().double() for n, m in linears.items()}
    variants.quantize_variant_(model, GPTQ, absmax, smoothed, items, batch_tokens=64)
    for name, linear in linears.items():
        x = torch.cat([rows[0] for rows in inputs[name]]).double()
        step = weights[name].abs().amax(1, keepdim=True) / 127.5
        nearest = (weights[name] / step).round().clamp(-128, 127) * step
        ours = (x @ (linear.weight.double() - weights[name]).T).norm()
        assert ours < (x @ (nearest - weights[name]).T).norm(), name


def test_clipped_weights_err_less_than_whole_ones(model, items):
    """The observer's own measure, the 2.4th power of the error, falls or stays row by row."""
    variant = Variant(preset="w8a8", rounding="mse")
    weights = {n: t.double() for n, t in model.state_dict().items()}
    for name in variants.quantize_variant_(model, variant, {}, []):
        weight, linear = weights[f"{name}.weight"], model.get_submodule(name)
        whole = weight.abs().amax(1, keepdim=True) / 127.5
        errors = []
        for step in (linear.weight_scale.double(), whole):
            rounded = (weight / step).round().clamp(-128, 127) * step
            errors.append((rounded - weight).abs().pow(2.4).sum(1))
        assert (errors[0] <= errors[1] * 1.0001).all()
        assert (linear.weight_scale < whole * 0.999).any()


def test_gptq_without_calibration_items_is_refused(model, items):
    absmax, smoothed = smoothed_by(model, GPTQ, items)
    with pytest.raises(StudyError, match="reads the calibration items, and none were given"):
        variants.quantize_variant_(model, GPTQ, absmax, smoothed)


def test_a_pattern_that_matches_every_linear_is_refused(model, items):
    with pytest.raises(StudyError, match=r"ignore: re:\. match every Linear"):
        variants.quantize_variant_(model, Variant(preset="w8a8", ignore=("re:.",)), {}, [])


def test_an_ignored_name_that_matches_nothing_is_refused(model, items):
    absmax = {n: f.absmax for n, f in run_calibration(model, items, batch_tokens=64).items()}
    variant = Variant(preset="w8a8", ignore=("lm_heed",))
    with pytest.raises(StudyError, match="'lm_heed' matches no Linear"):
        variants.quantize_variant_(model, variant, absmax, [])
