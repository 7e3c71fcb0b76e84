"""Linears to leave float: the best set for its bytes, judged on items that did not choose it."""

import itertools
import random

import numpy as np
import pytest
from tools import protect

from helpers.core.errors import StudyError
from helpers.study.schema import is_ignored


@pytest.mark.parametrize("seed", range(30))
def test_no_other_set_for_these_bytes_gains_more(seed):
    rng = np.random.default_rng(seed)
    names = "abcdefgh"
    gains = dict(zip(names, rng.exponential(1, 8), strict=True))
    costs = dict(zip(names, map(int, rng.integers(1, 20, 8)), strict=True))
    budget = int(rng.integers(5, 60))
    chosen = protect.best_set(gains, costs, budget)
    assert sum(costs[n] for n in chosen) <= budget
    every = (s for size in range(9) for s in itertools.combinations(names, size))
    fitting = [s for s in every if sum(costs[n] for n in s) <= budget]
    best = max(sum(gains[n] for n in s) for s in fitting)
    assert sum(gains[n] for n in chosen) == pytest.approx(best)


def test_a_random_set_fits_and_no_more_would():
    costs = {name: cost for cost, name in enumerate("abcdefgh", start=3)}
    for seed in range(50):
        names = protect.random_set(costs, 20, random.Random(seed))
        spent = sum(costs[n] for n in names)
        assert len({*names}) == len(names)
        assert spent <= 20 < spent + min(c for n, c in costs.items() if n not in names)


@pytest.fixture
def calibrated(sound_run):
    run = sound_run("llama", "smoothquant_w8a8")
    with run.outputs():
        yield run


def test_the_choice_leaves_float_what_hurts(calibrated, monkeypatch):
    """One Linear's input gets an outlier no smoothing reaches: it is among the chosen."""
    search = protect.Search(calibrated.job)
    hurt = "model.layers.1.mlp.down_proj"
    plain = search.kl(search.confirming, [])
    linear = search.model.get_submodule(hurt)
    before = search.sensitivities()
    linear.weight.data[:, 5] /= 200  # its input stands for a large one that counts for little
    search.model.get_submodule("model.layers.1.mlp.up_proj").weight.data[5] *= 200
    search.absmax[hurt][5] *= 200
    search.judging, search.confirming = (
        protect.DivergenceProbe(search.model, probe.texts, search.recipe)
        for probe in (search.judging, search.confirming)
    )
    after = search.sensitivities()
    assert set(after) == set(search.targets)
    assert max(after, key=after.get) == hurt
    assert after[hurt] > 3 * before[hurt]
    assert search.kl(search.confirming, []) > plain
    lines = protect.report(search, 0.1, 3, seed=1)
    [ignore] = [line for line in lines if line.startswith("ignore: [lm_head, ")]
    names = ignore.removeprefix("ignore: [").removesuffix("]").split(", ")
    assert hurt in names
    assert all(any(is_ignored(t, [n]) for t in (*search.targets, "lm_head")) for n in names)
    assert "p = 0.25" in lines[2] or "at least as good" in lines[2]
    spent = sum(search.costs[n] for n in names if n != "lm_head")
    assert spent <= 0.1 * search.bytes


def test_the_bytes_are_those_of_the_files(calibrated):
    search = protect.Search(calibrated.job)
    kept = search.targets[3]
    rows, columns = search.model.get_submodule(kept).weight.shape
    assert search.costs[kept] == rows * columns * (4 - 1) - rows * 4


def test_a_float_variant_is_refused(calibrated):
    assert calibrated.job.recipe.quantized  # its study file is written now
    job = protect.open_job(calibrated.root / "study.yaml", model="base", variant="noquant")
    with pytest.raises(StudyError, match=r"quantizes nothing"):
        protect.Search(job)
