"""The numbers behind notebooks/explore.ipynb, worked out again from the files alone."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from scipy.special import rel_entr, softmax

from helpers.core.errors import StudyError
from helpers.quantization import exploration
from helpers.quantization.variants import load_variant
from helpers.runtime.devices import prepare
from helpers.study.schema import Variant
from hostile_text import HOSTILE

GATE = "model.layers.1.mlp.gate_proj"
TEXT = "Ein Käse für 3 € und <b>ein</b> 😀.\n"
W8A8 = Variant(preset="w8a8")


@pytest.fixture(scope="module")
def run(sound_runs):
    return sound_runs("llama", "smoothquant_w8a8")


@pytest.fixture(scope="module")
def job(run):
    with run.outputs():
        yield prepare(run.job)


@pytest.fixture(scope="module")
def linears(job):
    return exploration.StudyLinears(job).of("base")


@pytest.fixture(scope="module")
def reader(job):
    return exploration.TextReader(job)


def maxima(run, *names) -> tuple[np.ndarray, np.ndarray]:
    """(in_features,) abs-max of the first Linear's input and of all the Linears' weights."""
    calibrated = load_file(run.calibration / "activations.safetensors")
    weights = load_file(run.root / "source" / "model.safetensors")
    tops = [np.abs(weights[f"{name}.weight"]).max(0) for name in names]
    return calibrated[f"{names[0]}.absmax"].astype(float), np.max(tops, axis=0).astype(float)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 1.0])
def test_scales_are_equation_4_over_all_linears_that_share_the_input(run, linears, alpha):
    act, weight = maxima(run, GATE, GATE.replace("gate", "up"))
    shown = linears.smoothing(GATE, alpha=alpha)
    for channel in (0, 7):  # by hand
        s = act[channel] ** alpha / weight[channel] ** (1 - alpha)
        assert shown.scales[channel] == pytest.approx(s, rel=1e-5)
        assert shown.act_after[channel] == pytest.approx(act[channel] / s, rel=1e-5)
        assert shown.weight_after[channel] == pytest.approx(weight[channel] * s, rel=1e-5)
    assert shown.channel == act.argmax()
    assert shown.group.producer == "model.layers.1.post_attention_layernorm"


def test_without_alpha_nothing_is_smoothed(run, linears):
    shown = linears.smoothing(GATE, alpha=None)
    act, weight = maxima(run, GATE, GATE.replace("gate", "up"))
    np.testing.assert_array_equal(shown.act_after, act.astype(np.float32))
    np.testing.assert_array_equal(shown.weight_after, weight.astype(np.float32))


def quantized(values: np.ndarray, top: np.ndarray) -> np.ndarray:
    """Rounded to 256 steps that reach from -top to top."""
    step = top / 127.5
    return np.clip(np.round(values / step), -128, 127) * step


@pytest.mark.parametrize("alpha", [None, 0.5, 0.8])
def test_the_sqnr_is_that_of_a_product_of_rounded_factors(run, linears, alpha):
    calibrated = load_file(run.calibration / "activations.safetensors")
    parts = (torch.from_numpy(calibrated[f"{GATE}.{k}"]) for k in ("absmax", "p99", "median"))
    tokens = int(calibrated[f"{GATE}.tokens"])
    x = exploration.drawn_tokens(*parts, calibrated=tokens, rows=exploration.DRAWN_TOKENS).numpy()
    weight = load_file(run.root / "source" / "model.safetensors")[f"{GATE}.weight"].astype(float)
    act, top = maxima(run, GATE, GATE.replace("gate", "up"))
    s = 1.0 if alpha is None else act**alpha / top ** (1 - alpha)
    x, weight = x / s, weight * s
    exact = x @ weight.T
    rounded = (
        quantized(x, np.abs(x).max(1, keepdims=True))
        @ quantized(weight, np.abs(weight).max(1, keepdims=True)).T
    )
    expected = 10 * np.log10((exact**2).sum() / ((exact - rounded) ** 2).sum())
    assert linears.sqnr(GATE, alpha=alpha, variant=W8A8) == pytest.approx(expected, abs=0.05)


def test_a_static_scale_is_the_calibrated_maximum(linears):
    """Coarser steps than per token, as every drawn token lies below the maximum."""
    static = linears.sqnr(GATE, alpha=0.5, variant=Variant(preset="o3"))
    assert static < linears.sqnr(GATE, alpha=0.5, variant=W8A8)


def test_drawn_tokens_have_the_calibrated_quantiles():
    absmax, p99, median = torch.tensor([[9.0, 3000.0], [2.0, 5.0], [0.5, 1.0]])
    x = exploration.drawn_tokens(absmax, p99, median, calibrated=1000, rows=20_000).numpy()
    size = np.abs(x)
    np.testing.assert_allclose((size > median.numpy()).mean(0), 0.5, atol=0.02)
    np.testing.assert_allclose((size > p99.numpy()).mean(0), 0.01, atol=0.003)
    assert (size.max(0) == absmax.numpy()).all()  # 20 of 20,000 lie beyond one of 1,000
    assert np.abs(np.sign(x).mean(0)).max() < 0.03
    assert abs(np.corrcoef(size.T)[0, 1]) < 0.03


def test_every_calibrated_linear_is_there_and_none_twice(run, linears):
    calibrated = load_file(run.calibration / "activations.safetensors")
    names = [key.removesuffix(".tokens") for key in calibrated if key.endswith(".tokens")]
    assert sorted(linears.names) == sorted(names)


def test_a_linear_whose_producer_cannot_take_scales_says_why(linears):
    assert "heads" in linears.unfoldable_reason("model.layers.0.self_attn.o_proj")
    assert linears.unfoldable_reason(GATE) is None


def test_another_source_than_the_calibrated_one_is_refused(sound_run):
    own = sound_run("llama", "smoothquant_w8a8")
    with own.edited(own.root / "source") as tensors:
        tensors[f"{GATE}.weight"] *= 2
    with own.outputs(), pytest.raises(StudyError, match="not those that were calibrated"):
        exploration.StudyLinears(prepare(own.job)).of("base")


# --- A text, token by token ----------------------------------------------------------------


def logits(job, variant: str, tokens: list[int]) -> np.ndarray:
    """(tokens, vocabulary) by transformers' own forward pass."""
    model, _ = load_variant(replace(job, variant=variant))
    with torch.no_grad():
        return model(torch.tensor([tokens])).logits[0].double().numpy()


def test_kl_and_both_top_fives_are_those_of_the_two_models(job, reader):
    rows = reader.read(TEXT, model="base", variant="smoothquant_w8a8")
    _, tokenizer = load_variant(replace(job, variant="noquant"))
    tokens = tokenizer(TEXT).input_ids
    p, q = (softmax(logits(job, v, tokens), axis=-1) for v in ("noquant", "smoothquant_w8a8"))
    assert rows[0].kl is None
    expected = rel_entr(p, q).sum(-1)[:-1]
    np.testing.assert_allclose([row.kl for row in rows[1:]], expected, rtol=1e-3, atol=1e-6)
    for row, *pair in zip(rows[1:], p, q, strict=False):
        for shown, shares in zip((row.float_top, row.variant_top), pair, strict=True):
            np.testing.assert_allclose([s for _, s in shown], np.sort(shares)[:-6:-1], rtol=1e-3)
            best = tokenizer.convert_ids_to_tokens(int(shares.argmax()))
            assert tokenizer.convert_tokens_to_string([best]) == shown[0][0]


def test_a_model_does_not_differ_from_itself(reader):
    rows = reader.read(TEXT, model="base", variant="noquant")
    assert {row.kl for row in rows[1:]} == {0.0}


@pytest.mark.parametrize("text", [*HOSTILE, TEXT, " a  b\t", "日本語 naïve"])
def test_the_tokens_make_the_text(tokenizer, text):
    text = text.encode("utf-8", "replace").decode("utf-8")
    tokens, pieces = exploration.token_pieces(tokenizer, text)
    assert "".join(pieces) == text
    assert len(tokens) == len(pieces)


def test_tokens_put_before_a_text_are_shown_before_it(tokenizer, monkeypatch):
    monkeypatch.setattr(exploration, "plain_tokens", lambda t, text: [1, *t(text).input_ids])
    tokens, pieces = exploration.token_pieces(tokenizer, "ab")
    assert (tokens[0], pieces) == (1, ["<|im_start|>", "a", "b"])


def test_a_text_without_a_predicted_token_is_refused(reader):
    for text in ("", "a"):
        with pytest.raises(StudyError, match="give at least 2"):
            reader.read(text, model="base", variant="smoothquant_w8a8")


def test_a_text_beyond_the_context_is_refused(reader):
    with pytest.raises(StudyError, match="5000 tokens but the model reads 4096"):
        reader.read("a" * 5000, model="base", variant="smoothquant_w8a8")


def test_nothing_is_written(run, job, reader):
    before = {p: p.stat().st_mtime_ns for p in run.root.rglob("*")}
    exploration.StudyLinears(job).of("base").sqnr(GATE, alpha=0.5, variant=W8A8)
    reader.read(TEXT, model="base", variant="smoothquant_w8a8")
    assert {p: p.stat().st_mtime_ns for p in run.root.rglob("*")} == before
    assert json.loads((run.calibration / "record.json").read_text())["files"]
