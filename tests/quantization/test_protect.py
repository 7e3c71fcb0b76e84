"""Linears to leave float: the best set for its bytes, judged on items that did not choose it."""

import itertools
import random
from math import inf

import numpy as np
import pytest
import torch
from tools import protect

from evaluated_run import asked
from helpers.core.errors import StudyError
from helpers.core.records import read_json
from helpers.quantization import protection, simulation
from helpers.quantization.calibration import load_absmax
from helpers.quantization.int8_linear import Int8Linear
from helpers.quantization.smoothing import same_alpha
from helpers.quantization.variants import describe_recipe, load_variant
from helpers.sources.models import load_model
from helpers.statistics.verdicts import is_unsmoothed_twin
from helpers.study.schema import is_ignored, speed_key
from helpers.verification.checkpoint_files import CheckpointFiles
from helpers.verification.runtime_gates import memory_layers_gate
from helpers.verification.variant_gates import _largest_sum, scheme_gate

Q0 = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize("seed", range(30))
def test_no_other_set_for_these_bytes_gains_more(seed):
    """Neither of the programme nor of the gate's own search, down to gains of a billionth."""
    rng = np.random.default_rng(seed)
    names = "abcdefgh"
    gains = dict(zip(names, rng.exponential(10.0 ** -(seed % 10), 8), strict=True))
    costs = dict(zip(names, map(int, rng.integers(1, 6 + 14 * (seed % 2), 8)), strict=True))
    budget = int(rng.integers(5, 60))
    chosen = protection.best_set(gains, costs, budget)
    assert sum(costs[n] for n in chosen) <= budget
    every = (s for size in range(9) for s in itertools.combinations(names, size))
    fitting = [s for s in every if sum(costs[n] for n in s) <= budget]
    best = max(sum(gains[n] for n in s) for s in fitting)
    assert sum(gains[n] for n in chosen) == pytest.approx(best)
    assert _largest_sum(gains, costs, budget) == pytest.approx(best)


def test_a_linear_whose_rounding_shows_nothing_is_not_protected():
    assert protection.best_set({"a": 0.0, "b": 1e-9}, {"a": 1, "b": 1}, 2) == ["b"]
    assert protection.best_set({"a": 1.0}, {"a": 3}, 2) == []


def test_a_random_set_fits_and_no_more_would():
    costs = {name: cost for cost, name in enumerate("abcdefgh", start=3)}
    for seed in range(50):
        names = protection.random_set(costs, 20, random.Random(seed))
        spent = sum(costs[n] for n in names)
        assert len({*names}) == len(names)
        assert spent <= 20 < spent + min(c for n, c in costs.items() if n not in names)


@pytest.fixture
def calibrated(sound_run):
    """(run, its float model, calibrated maxima, α of each group)."""
    run = sound_run("llama", "protected")
    with run.outputs():
        job = run.job
        model = load_model(run.root / "source", job.study.runtime)
        absmax = load_absmax(run.calibration / "activations.safetensors")
        alphas = same_alpha(model.config, job.recipe.smooth.targets, 0.5)
        yield run, model, absmax, alphas


TEXTS = [list(range(3 + i, 40 + 2 * i)) for i in range(20)]


def test_the_choice_leaves_float_what_hurts(calibrated):
    """One Linear's input gets an outlier no smoothing reaches: it is the most sensitive."""
    run, model, absmax, alphas = calibrated
    hurt, recipe = "model.layers.1.mlp.down_proj", run.job.recipe
    before = protection.choose_protected(model, recipe, absmax, alphas, TEXTS, seed=1).record
    assert before["judging_items"] == [18, 19]
    assert before["other_items"] == [0, 1, 2, 3, 4, 5]
    linear = model.get_submodule(hurt)
    linear.weight.data[:, 5] /= 200  # its input stands for a large one that counts for little
    model.get_submodule("model.layers.1.mlp.up_proj").weight.data[5] *= 200
    absmax[hurt][5] *= 200
    protected = protection.choose_protected(model, recipe, absmax, alphas, TEXTS, seed=1)
    after = protected.record
    sensitivities = {name: row["kl"] for name, row in after["linears"].items()}
    assert max(sensitivities, key=sensitivities.get) == hurt
    assert sensitivities[hurt] > 3 * before["linears"][hurt]["kl"]
    assert hurt in after["chosen"]
    assert after["kl"] > before["kl"]
    assert after["kl_chosen"] < after["kl"]
    assert all(is_ignored(name, protected.recipe.ignore) for name in (*after["chosen"], "lm_head"))
    assert after["rank"] == 1 + sum(row["kl"] <= after["kl_chosen"] for row in after["random"])
    assert f"rank {after['rank']} of 20" in protected.sentence


def test_a_pass_that_begins_at_a_later_block_gives_the_same_kl(calibrated):
    run, model, absmax, alphas = calibrated
    probe = simulation.DivergenceProbe(model, TEXTS[:3], run.job.recipe)
    in_second = [n for n, _ in model.named_modules() if n.endswith("proj") and ".layers.1." in n]
    others = [n.replace(".1.", ".0.") for n in in_second]
    variant = run.job.recipe.leaving_float(others)
    with simulation.simulated_quantization(model, variant, absmax, alphas):
        whole = probe.divergence(model)
    probe.keep_states(model)
    assert [len(batch) for batch in probe.states] == [2]
    with simulation.simulated_quantization(model, variant, absmax, alphas):
        assert probe.divergence(model, first_block=1) == whole
        model.model.embed_tokens.weight.data.zero_()  # it is not read
        assert probe.divergence(model, first_block=1)["kl"] != inf


def test_blocks_that_read_more_than_one_state_are_never_left_out(calibrated):
    run, model, *_ = calibrated
    read = {}
    first, last = model.model.layers
    keep = lambda _m, _args, output: read.update(state=output.mean())  # noqa: E731
    first.mlp.up_proj.register_forward_hook(keep)
    last.register_forward_hook(lambda _m, _args, output: output + read.pop("state", 0))
    probe = simulation.DivergenceProbe(model, TEXTS[:3], run.job.recipe)
    probe.keep_states(model)
    assert probe.states == []


@pytest.mark.parametrize(("share", "remedy"), [(1e-4, "give more"), (0.9, "give less")])
def test_a_share_that_protects_nothing_or_everything_is_refused(calibrated, share, remedy):
    run, model, absmax, alphas = calibrated
    recipe = run.job.recipe.model_copy(update={"protect": protect.Protect(bytes=share)})
    with pytest.raises(StudyError, match=rf"protect\.bytes = {share:g} leaves .*{remedy}"):
        protection.choose_protected(model, recipe, absmax, alphas, TEXTS, seed=1)


@pytest.mark.parametrize("scheme", ["w8a8", "o1", "o3"])
def test_the_bytes_are_those_of_the_files(sound_run, scheme):
    """Of a checkpoint with every Linear in int8 beside its source."""
    recipe = {"w8a8": "smoothquant_w8a8"}.get(scheme, scheme)
    run = sound_run("llama", recipe)
    with run.edited() as stored, run.edited(run.root / "source") as source:
        parts = [t for name, t in stored.items() if name.startswith(f"{Q0}.")]
        float_bytes = source[f"{Q0}.weight"].nbytes
        shape = source[f"{Q0}.weight"].shape
    expected = float_bytes - sum(part.nbytes for part in parts)
    assert protection.bytes_saved(shape, 4, run.job.recipe) == expected


def test_the_tool_makes_the_choice_of_the_study(calibrated, capsys):
    run, *_ = calibrated
    with run.outputs():
        study = str(run.root / "study.yaml")
        assert protect.main([study, "base", "protected", "--bytes", "0.07"]) == 0
        printed = capsys.readouterr().out.splitlines()
        path = run.job.paths.quantization("base", "protected") / "protected.json"
        chosen = read_json(path, made_by="the run")["chosen"]
        assert printed[-1] == f"ignore: [lm_head, {', '.join(chosen)}]"
        assert protect.main([study, "base", "noquant"]) == 2
        assert "variants.noquant quantizes nothing" in capsys.readouterr().err
        assert protect.main([study, "base", "protected", "--bytes", "1"]) == 2


def in_int8_after_all(name: str):
    """A change to a loaded model: one float Linear computes in int8."""

    def change(model) -> None:
        linear = model.get_submodule(name)
        step = linear.weight.abs().amax(1, keepdim=True) / 127.5
        q = (linear.weight / step).round().clamp(-128, 127).to(torch.int8)
        int8 = Int8Linear(q, step, None, activations="token_dynamic", input_scale=None)
        model.set_submodule(name, int8)

    return change


@pytest.mark.bank("int8", "a protected Linear in int8 when it is asked", at="the loaded model")
def test_a_protected_linear_in_int8_at_run_time_is_caught(sound_run):
    run = sound_run("llama", "protected")
    with run.outputs():
        job = run.job
        [name, *_] = job.claim.ignore[1:]
        model, _ = load_variant(job)
        assert memory_layers_gate((job, model)).passed
        in_int8_after_all(name)(model)
        assert not memory_layers_gate((job, model)).passed
    assert not [gate for gate in asked(run) if not gate.passed]
    assert [gate.name for gate in asked(run, in_int8_after_all(name)) if not gate.passed]


def test_a_recipe_in_words_tells_how_many_linears_were_chosen(sound_run):
    run = sound_run("llama", "protected")
    with run.outputs():
        evidence = CheckpointFiles(run.job, source_hash=run.source_hash, record={})
        path = run.job.paths.quantization("base", "protected") / "protected.json"
        record = read_json(path, made_by="the run")
        words = describe_recipe(run.job.recipe, evidence.alphas, record)
        count = f"{len(record['chosen'])} of 14 Linears"
        for text, passes in ((words, True), (words.replace(count, "5 of 14 Linears"), False)):
            evidence.record = {"scheme": text}
            assert scheme_gate(evidence).passed == passes


def test_a_twin_without_smoothing_protects_as_many_bytes(sound_run):
    smoothed = sound_run("llama", "protected").job.recipe
    plain = smoothed.model_copy(update={"smooth": None})
    assert is_unsmoothed_twin(plain, smoothed)
    assert not is_unsmoothed_twin(plain.model_copy(update={"protect": None}), smoothed)


def test_another_choice_of_linears_is_measured_on_its_own(sound_run):
    """Its speed and bytes are not those of the variant that protects none."""
    variants = sound_run("llama", "rtn_w8a8").job.study.variants
    assert speed_key(variants["protected"]) != speed_key(variants["smoothquant_w8a8"])
    assert speed_key(variants["smoothquant_w8a8"]) == speed_key(variants["rtn_w8a8"])
