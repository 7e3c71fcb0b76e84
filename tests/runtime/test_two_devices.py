"""A model spread over two cards computes what a whole one does, every tensor where it is used.

The cards are pretended: a tensor knows which it lies on and refuses to meet one of the other.
Memory, streams and a driver's own copies are what only two cards can show.
"""

import time

import pytest
import torch
from benchmarks.gpu import two_cards
from benchmarks.gpu.part import Part

from evaluated_run import asked, failed
from helpers.core.records import Record, read_json
from helpers.inference import protocols
from helpers.inference.packed_attention import Segment, read, use_packed_attention
from helpers.inference.protocols import OptionTokens, generate_greedy, option_loglikelihoods
from helpers.quantization import int8_cuda, simulation, smoothing, variants
from helpers.quantization.calibration import run_calibration
from helpers.quantization.int8_linear import Int8Linear
from helpers.quantization.variants import load_int8, load_quantized, load_reference
from helpers.runtime.devices import (
    current_sequence_ids,
    modules_by_device,
    place_on_device,
    resolve_runtime,
    use_sequence_ids,
)
from helpers.sources import models
from helpers.sources.models import FAMILIES, load_model, random_model
from helpers.study.schema import Runtime, Variant
from pretended_cards import pretended
from quantized_run import NORMS

ASKED = Runtime(device="cuda", dtype="float32", threads=1, quantized="int8", device_map="auto")
CARDS = {"cuda:0", "cuda:1"}
MIXTURE = pytest.param("qwen3_moe", marks=pytest.mark.long)
LAYERS = 4
ITEMS = [
    OptionTokens([5, 6, 7, 8, *range(20, 20 + n)], [[3, 4], [9] * 5, [11]], (4,))
    for n in (3, 40, 9, 21)
]
PROMPTS = [item.context for item in ITEMS]


@pytest.fixture
def cards(monkeypatch):
    """cards(2): a context in which torch sees two cards."""
    int8_cuda.product_kind.cache_clear()
    yield lambda count: pretended(monkeypatch, cards=count)
    int8_cuda.product_kind.cache_clear()


def answers(model) -> tuple:
    """Log-probabilities of options, and written answers: packed rows and slots."""
    options = dict(option_loglikelihoods(model, ITEMS, batch_tokens=64))
    limits = {"batch_tokens": 64, "batch_rows": 3}
    written = generate_greedy(model, PROMPTS, max_new_tokens=5, stop_tokens=set(), **limits)
    return options, {i: answer.tokens for i, answer in written}


@torch.inference_mode()
def states(model) -> torch.Tensor:
    with use_packed_attention(model):
        return read(model, [Segment(prompt) for prompt in PROMPTS])


def assert_alike(one: tuple, other: tuple) -> None:
    assert one[1] == other[1]
    for index, sums in other[0].items():
        assert one[0][index] == pytest.approx(sums, abs=1e-4)


def devices_of(module) -> set[str]:
    return {str(tensor.device) for tensor in (*module.parameters(), *module.buffers())}


def test_pretended_cards_refuse_what_cuda_refuses(cards):
    with cards(2):
        one, other = torch.ones(2, device="cuda:0"), torch.ones(2).to(1)
        for wrong in (
            lambda: one + other,
            lambda: one + torch.ones(2),
            lambda: one[other.long()],
            lambda: torch.cat([one, other]),
            lambda: one.scatter_(0, torch.tensor([0], device="cuda:1"), one),
            lambda: one.masked_fill(other > 0, 1.0),
        ):
            with pytest.raises(RuntimeError, match="cuda:"):
                wrong()
        assert str((one + other.to("cuda:0") * torch.tensor(2.0)).device) == "cuda:0"
        assert (one + other.to(one.device)).tolist() == [2.0, 2.0]
        assert type(one.cpu()) is torch.Tensor
        assert str(one.to(one.device).device) == "cuda:0"


@pytest.mark.parametrize(("count", "expected"), [(1, None), (2, "auto")])
def test_the_device_map_reaches_transformers_only_where_two_cards_are(
    cards, count, expected, tmp_path, monkeypatch
):
    random_model("llama", seed=1).save_pretrained(tmp_path)
    load, seen = models.AutoModelForCausalLM.from_pretrained, []

    def noted(*args, **how):
        seen.append(how["device_map"])
        return load(*args, **how)

    monkeypatch.setattr(models.AutoModelForCausalLM, "from_pretrained", noted)
    with cards(count):
        model = load_model(tmp_path, resolve_runtime(ASKED))
    assert seen == [expected]
    assert devices_of(model) == (CARDS if count == 2 else {"cuda:0"})


@pytest.mark.parametrize(
    "family",
    [f if f == "qwen3" else pytest.param(f, marks=pytest.mark.long) for f in sorted(FAMILIES)],
)
def test_a_spread_float_model_answers_as_a_whole_one(cards, family, tmp_path):
    sizes = {"num_hidden_layers": LAYERS, "max_position_embeddings": 128}
    model = random_model(family, seed=1, **sizes, **kinds_of_layers(family))
    model.save_pretrained(tmp_path)
    expected, whole = answers(model), states(model)
    with cards(2):
        runtime = resolve_runtime(ASKED)
        for spread in (load_model(tmp_path, runtime), place_on_device(model, runtime)):
            assert devices_of(spread) == CARDS
            for layer in spread.base_model.modules():
                if type(layer).__name__ in model._no_split_modules:
                    assert len(devices_of(layer)) == 1
            assert_alike(answers(spread), expected)
            assert states(spread).cpu().equal(whole)


def kinds_of_layers(family: str) -> dict:
    kinds = FAMILIES[family].get("layer_types")
    return {"layer_types": (kinds * LAYERS)[:LAYERS]} if kinds else {}


@pytest.mark.parametrize("tied", [True, False])
def test_the_head_answers_from_another_card_than_the_last_layers(cards, tied):
    """Tied it lies beside the embeddings on the first card, else behind the layers on the last."""
    model = random_model("llama", seed=1, num_hidden_layers=LAYERS, tie_word_embeddings=tied)
    expected = answers(model)
    with cards(2):
        spread = place_on_device(model, resolve_runtime(ASKED))
        last = spread.base_model.layers[-1].mlp.up_proj.weight.device
        assert str(spread.device) == "cuda:0"
        assert str(last) == "cuda:1"
        assert (spread.lm_head.weight.device == last) == (not tied)
        assert_alike(answers(spread), expected)


@pytest.mark.parametrize(
    "variant", ["o2", *(pytest.param(v, marks=pytest.mark.long) for v in ("rtn_w8a8", "o3"))]
)
@pytest.mark.parametrize("family", ["qwen3", MIXTURE])
def test_a_spread_int8_checkpoint_gives_the_integers_of_a_whole_one(
    cards, sound_runs, family, variant
):
    """Scales a token, a text and none: whose a token is has to be known on every card."""
    folder = sound_runs(family, variant, num_hidden_layers=LAYERS).checkpoint
    if family == "qwen3":
        model = load_int8(folder, dtype=torch.float32, device="cpu")
        expected, whole = answers(model), states(model)
    else:  # a mixture's router is multiplied by oneDNN on a CPU, so that rounding may differ
        with cards(1):
            model = load_quantized(load_int8, folder, resolve_runtime(ASKED))
            expected, whole = answers(model), states(model).cpu()
    with cards(2):
        spread = load_quantized(load_int8, folder, resolve_runtime(ASKED))
        assert_alike(answers(spread), expected)
        assert states(spread).cpu().equal(whole)
        linears = [m for m in spread.modules() if isinstance(m, Int8Linear) and m.stack.packed]
        for linear in linears:
            held = [*linear.stack.packed, linear.stack.scales, linear.weight_scale]
            assert len({tensor.device for tensor in held}) == 1
        assert {str(linear.weight_scale.device) for linear in linears} == CARDS


def test_a_simulated_checkpoint_is_spread_too(cards, sound_runs):
    folder = sound_runs("qwen3", "rtn_w8a8", num_hidden_layers=LAYERS).checkpoint
    expected = answers(load_reference(folder, dtype=torch.float32, device="cpu"))
    with cards(2):
        runtime = resolve_runtime(ASKED.model_copy(update={"quantized": "reference"}))
        spread = load_quantized(load_reference, folder, runtime)
        assert devices_of(spread) == CARDS
        assert_alike(answers(spread), expected)


@pytest.mark.parametrize(
    "variant", ["o2", *(pytest.param(v, marks=pytest.mark.long) for v in ("noquant", "rtn_w8a8"))]
)
@pytest.mark.parametrize("family", ["qwen3", MIXTURE])
def test_the_gates_on_calls_hold_of_a_spread_model(cards, sound_runs, tmp_path, family, variant):
    run = sound_runs(family, variant, num_hidden_layers=LAYERS).copy(tmp_path / "run")
    run.settings = run.settings | {"runtime": ASKED.model_dump()}
    with cards(2):
        gates = asked(run)
    assert failed(gates) == set(), "\n".join(g.measured for g in gates)


def test_keys_values_and_masks_lie_with_the_layer_that_reads_them(cards, monkeypatch):
    model = random_model("mistral", seed=1, num_hidden_layers=LAYERS)
    slots, segments = [], []
    make, keep = protocols.KVCache, Segment.__post_init__
    monkeypatch.setattr(
        protocols, "KVCache", lambda *given, **more: slots.append(make(*given, **more)) or slots[-1]
    )
    monkeypatch.setattr(Segment, "__post_init__", lambda self: segments.append(self) or keep(self))
    with cards(2):
        spread = place_on_device(model, resolve_runtime(ASKED))
        answers(spread)
        places = [layer.mlp.up_proj.weight.device for layer in spread.base_model.layers]
        assert len(set(places)) == 2
        kept = [s.memory for s in segments if s.memory] + [s._own for s in slots]
        assert kept
        for by_layer in kept:
            for layer, pair in by_layer.items():
                assert {tensor.device for tensor in pair} == {places[layer]}
        masks = [(k, m) for s in segments for k, m in s._masks.items() if m is not None]
        assert {str(mask.device) for _, mask in masks} == CARDS
        assert all(mask.device == device for (_, device), mask in masks)


def test_whose_a_token_is_is_copied_to_a_card_once(cards):
    with cards(2):
        there = torch.device("cuda", 1)
        with use_sequence_ids(torch.tensor([0, 0, 1], device="cuda:0")):
            assert str(current_sequence_ids().device) == "cuda:0"
            assert current_sequence_ids(there).device == there
            assert current_sequence_ids(there) is current_sequence_ids(there)
            assert current_sequence_ids(there).tolist() == [0, 0, 1]
        with use_sequence_ids(None):
            assert current_sequence_ids(there) is None


@pytest.mark.parametrize("family", ["qwen3", pytest.param("qwen3_moe", marks=pytest.mark.long)])
def test_a_spread_model_is_calibrated_and_smoothed_alike(cards, family):
    def smoothed(model) -> tuple:
        statistics = run_calibration(model, PROMPTS, batch_tokens=64)
        absmax = {name: each.absmax for name, each in statistics.items()}
        variant = Variant(preset="w8a8", smooth={"alpha": "auto", "targets": NORMS})
        chosen = simulation.choose_alphas(model, variant, absmax, PROMPTS[:2])
        smoothing.smooth_variant_(model, absmax, variant, chosen.alphas)
        return absmax, chosen.alphas, answers(model)

    whole = smoothed(random_model(family, seed=1, num_hidden_layers=LAYERS))
    model = random_model(family, seed=1, num_hidden_layers=LAYERS)
    with cards(2):
        spread = smoothed(place_on_device(model, resolve_runtime(ASKED)))
    torch.testing.assert_close(spread[0], whole[0])
    assert spread[1] == whole[1]
    assert_alike(spread[2], whole[2])


@pytest.mark.parametrize("ignore", [("lm_head",), ()])
def test_a_spread_model_is_quantized_alike(cards, ignore):
    """compressed-tensors takes the place of a forward, and so do the hooks that move inputs."""

    def quantized(model) -> tuple:
        statistics = run_calibration(model, PROMPTS, batch_tokens=64)
        variant = Variant(preset="w8a8", ignore=ignore)
        names = variants.quantize_(
            model, variant, {n: each.absmax for n, each in statistics.items()}
        )
        scales = {name: model.get_submodule(name).weight_scale.cpu() for name in names}
        ids = torch.tensor([PROMPTS[1]], device=model.device)
        with torch.no_grad():
            logits = model.get_output_embeddings()(model.base_model(ids).last_hidden_state)
        return scales, logits.cpu()

    untied = {"num_hidden_layers": LAYERS, "tie_word_embeddings": False}
    whole = quantized(random_model("llama", seed=1, **untied).double())
    model = random_model("llama", seed=1, **untied).double()  # no rounding flips
    with cards(2):
        spread = quantized(place_on_device(model, resolve_runtime(ASKED)))
        assert devices_of(model) == CARDS
        for layer in model.base_model.layers:
            assert len(devices_of(layer)) == 1
    torch.testing.assert_close(spread[0], whole[0])
    torch.testing.assert_close(spread[1], whole[1])


def test_a_record_says_which_part_ran_where(cards, tmp_path):
    model = random_model("llama", seed=1, num_hidden_layers=6)
    assert modules_by_device(model) == {}
    with cards(2):
        spread = place_on_device(model, resolve_runtime(ASKED))
        where = modules_by_device(spread)["modules"]
        assert set(where) == CARDS
        for name, module in spread.named_modules():
            if tensors := devices_of(module) if not list(module.children()) else ():
                assert len(tensors) == 1, name
        last = [str(layer.mlp.up_proj.weight.device) for layer in spread.base_model.layers]
    for device, names in where.items():
        lines = [name for name in names.split(", ") if name.startswith("model.layers.")]
        first, _, end = lines[0].removeprefix("model.layers.").partition("-")
        assert len(lines) == 1
        assert last[int(first) : int(end or first) + 1] == [device] * last.count(device)
    record = Record(tmp_path, stage="evaluation", parameters={})
    record.add_machine(modules_by_device(spread))
    record.write({})
    written = read_json(tmp_path / "record.json", made_by="03_evaluation")
    assert written["machine"]["modules"] == where


@pytest.mark.long
def test_the_gpu_checks_part_for_two_cards_runs_on_them(cards, monkeypatch, tmp_path):
    small = {"num_hidden_layers": LAYERS, "hidden_size": 64, "intermediate_size": 96}
    monkeypatch.setattr(two_cards, "MEDIUM", small)
    monkeypatch.setattr(two_cards, "ITEMS", 3)
    with cards(2):
        part = Part("cuda", False, time.monotonic() + 60, tmp_path / "running.json")
        two_cards.run(part)
    assert part.found["outcome"] == "alike but for rounding"
    rows = part.found["two cards and one"]
    assert [row["products compared"] > 0 for row in rows] == [False, False, True, True]
    with cards(1):
        part = Part("cuda", False, time.monotonic() + 60, tmp_path / "running.json")
        two_cards.run(part)
    assert part.found == {"outcome": "one card: not run"}


def test_the_part_says_what_differs():
    row = {"runs in": "int8 in float32", "as announced": True}
    assert two_cards.outcome([row]) == "alike but for rounding"
    wrong = two_cards.outcome([row, row | {"as announced": False, "runs in": "float32"}])
    assert wrong == "differs beyond rounding: float32"


def test_one_device_is_not_told_of():
    model = random_model("llama", seed=1)
    model.hf_device_map = {"": 0}
    assert modules_by_device(model) == {}
    spread = {"model.embed_tokens": 0, "model.layers.0": 0, "model.layers.1": "cpu", "lm_head": 0}
    model.hf_device_map = spread
    assert modules_by_device(model)["modules"] == {
        "cuda:0": "model.embed_tokens, model.layers.0, lm_head",
        "cpu": "model.layers.1",
    }
