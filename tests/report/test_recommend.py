"""Which variant to use: chosen by judging items, never one that fails, praised for what it is."""

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
from tools import recommend
from tools.recommend import Candidate, choose, mean_flattery, pareto_front

from helpers.report.estimates import Spread
from helpers.statistics.graded_study import GradedVerdict

DECLARED = SimpleNamespace(primary=[SimpleNamespace(model="m", variant="a")])
STUDY = SimpleNamespace(study=SimpleNamespace(statistics=DECLARED))


def candidate(name, kl, share=0.4, reading=2.0, *, quantized=True, failed=(), kind="equivalent"):
    speeds = {q: Spread(reading, reading, reading) for q in recommend.SPEEDS}
    verdict = GradedVerdict(kind, "", None, 0.03)
    return Candidate(name, quantized, kl, share, speeds, verdict, failed)


def test_the_least_kl_on_judging_items_is_chosen():
    of_model = [
        candidate("a", 0.3),
        candidate("fails", 0.1, failed=("weights on the declared grid",)),
        candidate("large", 0.2, share=0.6),
        candidate("float", 0.0, quantized=False),
    ]
    assert choose(of_model).name == "large"
    assert choose(of_model, most_bytes=0.5).name == "a"
    assert choose(of_model, most_bytes=0.3) is None


@pytest.mark.parametrize("seed", range(20))
def test_the_front_holds_what_no_other_beats(seed):
    rng = np.random.default_rng(seed)
    drawn = rng.integers(0, 4, (8, 3))
    of_model = [candidate(str(i), *map(float, row)) for i, row in enumerate(drawn)]
    losses = drawn * [1, 1, -1]
    beaten = {
        str(i)
        for i, j in itertools.permutations(range(8), 2)
        if (losses[j] <= losses[i]).all() and (losses[j] < losses[i]).any()
    }
    assert set(pareto_front(of_model)) == {str(i) for i in range(8)} - beaten


def test_the_sentence_takes_what_is_confirmed_and_says_why_not_the_others():
    of_model = [
        candidate("a", 0.1),
        candidate("b", 0.3),
        candidate("c", 0.5, failed=("answers parse",)),
        candidate("d", 0.2, kind="worse"),
        candidate("f", None, 0.5, quantized=False),
    ]
    said = recommend.recommendation(STUDY, "m", of_model)
    assert said.startswith("For `m` on this machine take `a`: it reads 2.00× and writes 2.00×")
    assert "exploratory" not in said
    for words in ("Not `b`: 3.0 times the KL.", "Not `c`: 1 of its checks fail (answers parse)",
                  "Not `d`: it is worse", "Unquantized, `f` reads 2.00×"):  # fmt: skip
        assert words in said
    undeclared = recommend.recommendation(STUDY, "other", of_model)
    assert "exploratory; declare them" in undeclared


@pytest.mark.parametrize("kind", ["worse", "inconclusive", "uninformative", "invalid"])
def test_nothing_is_recommended_that_the_evaluation_does_not_confirm(kind):
    said = recommend.recommendation(STUDY, "m", [candidate("a", 0.1, kind=kind)])
    assert said.startswith("For `m` nothing can be recommended")
    assert f"it is {kind}" in said
    failing = [candidate("a", 0.1, failed=("x",))]
    assert "keep the float model" in recommend.recommendation(STUDY, "m", failing)


@pytest.mark.long
def test_the_best_of_equals_is_flattered_by_what_chance_gives():
    """Of two equal variants with normal errors: the mean larger of two normals, times the error."""
    rng, items, sets, spread = np.random.default_rng(5), 400, 3, 0.2
    clusters = [[str(i) for i in range(items)] for _ in range(sets)]
    largest_of_two = 1 / np.sqrt(np.pi)
    error = spread / np.sqrt(items / 2 * sets)
    draws = []
    for _ in range(60):  # halvings of one draw share its errors
        differences = rng.normal(0, spread, (2, sets, items))
        draws.append(mean_flattery(list(map(list, differences)), clusters, seed=1))
    assert np.mean(draws) == pytest.approx(largest_of_two * error, rel=0.2)


def test_a_clear_winner_is_not_flattered():
    rng = np.random.default_rng(2)
    clusters = [[str(i // 2) for i in range(100)]]
    noise = rng.normal(0, 0.1, (2, 1, 100))
    noise[1] -= 1.0
    assert abs(mean_flattery(list(map(list, noise)), clusters, seed=3)) < 0.01
