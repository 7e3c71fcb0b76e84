"""A recipe's draws: two spreads told apart, and limits that hold for both."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from statsmodels.regression.mixed_linear_model import MixedLM

from benchmarks import coverage
from helpers.statistics.checks import recomputed_graded as again
from helpers.statistics.graded import (
    DrawsOfSet,
    compare_draws,
    compare_graded,
    judge_graded,
    pooled_recipe,
    recipe_estimate,
    scored,
)
from helpers.statistics.intervals import clustered_mean
from simulated_rows import option_rows, quantized


def table_of(rng, draws, n, *, item, own, level):
    """(draws, n) differences: what an item does in every draw, in one, and what a draw does."""
    common = item * rng.normal(size=n)
    levels = level * rng.normal(size=(draws, 1))
    return common + own * rng.normal(size=(draws, n)) + levels


def test_one_draw_is_that_checkpoint_and_says_so():
    values = np.random.default_rng(1).normal(size=(1, 30))
    found, alone = recipe_estimate(values, range(30)), clustered_mean(values[0], range(30))
    assert (found.draws, found.between_draws) == (1, None)
    assert found.interval(0.95) == alone.interval(0.95)
    assert found.p_value() == alone.p_value()
    assert found.detectable(alpha=0.05, power=0.8) == alone.detectable(alpha=0.05, power=0.8)


def test_draws_that_are_copies_add_nothing_between_them():
    values = np.random.default_rng(1).normal(size=30)
    found, alone = recipe_estimate([values] * 4, range(30)), clustered_mean(values, range(30))
    assert found.between_draws == 0
    assert found.interval(0.95).low == pytest.approx(alone.interval(0.95).low)


def test_draws_alone_have_students_limits():
    """Items all alike: the limits are those of the draws' means."""
    means = np.array([-0.4, 0.1, 0.3, -0.2, 0.6])
    found = recipe_estimate(np.repeat(means[:, None], 20, axis=1), range(20))
    due = stats.ttest_1samp(means, 0)
    limits = due.confidence_interval(0.9)
    interval = found.interval(0.9)
    assert (interval.low, interval.high) == pytest.approx((limits.low, limits.high))
    assert found.p_value() == pytest.approx(due.pvalue, abs=1e-6)


def test_the_spread_between_draws_is_that_of_a_crossed_model():
    """statsmodels' REML with crossed random effects, on a table where both spreads show."""
    rng, draws, n = np.random.default_rng(4), 6, 25
    table = table_of(rng, draws, n, item=0.5, own=0.5, level=0.5)
    frame = pd.DataFrame(
        {
            "y": table.ravel(),
            "draw": np.repeat(np.arange(draws), n),
            "item": np.tile(np.arange(n), draws),
            "all": 1,
        }
    )
    parts = {"draw": "0 + C(draw)", "item": "0 + C(item)"}
    fit = MixedLM.from_formula("y ~ 1", frame, groups="all", vc_formula=parts).fit()
    components = dict(zip(fit.model.exog_vc.names, fit.vcomp, strict=True))
    found = recipe_estimate(table, range(n))
    assert found.mean == pytest.approx(fit.params["Intercept"])
    assert found.between_draws**2 == pytest.approx(components["draw"], rel=0.02)
    assert found.standard_error == pytest.approx(fit.bse["Intercept"], rel=0.02)


def resampled_error(table: np.ndarray, weights: np.ndarray, rng, times: int = 4000) -> float:
    """Standard error of the mean, draws and items both resampled (a pigeonhole bootstrap).

    Resampling m of m shows a variance smaller by (m - 1) / m; both spreads are raised by that.
    """
    draws, n = table.shape
    at_draws, at_items = rng.integers(draws, size=(times, draws)), rng.integers(n, size=(times, n))
    whole = np.average(table, weights=weights, axis=1).mean()
    by_draws = np.average(table, axis=1, weights=weights)[at_draws].mean(axis=1) - whole
    items = table.mean(axis=0)
    by_items = np.array([np.average(items[at], weights=weights[at]) for at in at_items]) - whole
    return float(np.sqrt(by_draws.var() * draws / (draws - 1) + by_items.var() * n / (n - 1)))


def test_the_error_is_that_of_draws_and_items_resampled_also_where_passages_weigh_by_tokens():
    rng, draws, n = np.random.default_rng(12), 6, 60
    weights = rng.integers(20, 250, n).astype(float)
    table = table_of(rng, draws, n, item=1.0, own=0.05, level=0.2)
    found = recipe_estimate(table, range(n), weights)
    assert found.mean == pytest.approx(np.average(table, axis=1, weights=weights).mean())
    assert found.standard_error == pytest.approx(resampled_error(table, weights, rng), rel=0.06)


def sets_of(rng, draws: int, *, level: float) -> list[DrawsOfSet]:
    """Two sets that the same checkpoints answered, one with passages of two items."""
    shared = level * rng.normal(size=(draws, 1))
    sizes = {"alone": 30, "pairs": 50}
    return [
        DrawsOfSet(
            table_of(rng, draws, n, item=0.5, own=0.3, level=0.0) + shared,
            [str(i // (1 + (name == "pairs"))) for i in range(n)],
        )
        for name, n in sizes.items()
    ]


def test_a_checkpoint_that_is_good_on_all_sets_varies_as_much_when_they_are_pooled():
    """The draws' levels are common to the sets: averaging over sets does not make them smaller."""
    found = [
        pooled_recipe(sets_of(np.random.default_rng(seed), 40, level=0.5)) for seed in range(3)
    ]
    assert np.mean([e.between_draws for e in found]) == pytest.approx(0.5, rel=0.15)
    alone = [sets_of(np.random.default_rng(seed), 40, level=0.5)[0] for seed in range(2)]
    assert pooled_recipe(alone).between_draws < 0.45  # levels of their own


def test_planted_copies_show_no_spread_in_pooled_sets_either():
    sets = sets_of(np.random.default_rng(3), 1, level=0.0)
    copies = [replace(s, differences=np.repeat(s.differences, 3, axis=0)) for s in sets]
    found = pooled_recipe(copies)
    assert (found.between_draws, found.draws_error) == (0, 0)
    assert found.interval(0.9).low == pytest.approx(pooled_recipe(sets).interval(0.9).low)


@pytest.mark.parametrize("draws", [2, 5])
@pytest.mark.parametrize("seed", range(4))
def test_recomputed_recipes_agree(draws, seed):
    """Other algorithms, the same numbers: `make verdicts` depends on it."""
    rng = np.random.default_rng(seed)
    sets = sets_of(rng, draws, level=0.3 * seed)
    weights = rng.integers(20, 250, 40).astype(float)
    text = DrawsOfSet(table_of(rng, draws, 40, item=1, own=0.3, level=0.1), range(40), weights)
    for given in (sets, sets[:1], [text]):
        found = pooled_recipe(given)
        tables = []
        for s in given:
            names = [f"{i:03}" for i in range(s.differences.shape[1])]
            changes = [dict(zip(names, row, strict=True)) for row in s.differences.tolist()]
            own = dict(zip(names, map(str, s.clusters), strict=True))
            sizes = None if s.weights is None else dict(zip(names, s.weights, strict=True))
            tables.append((changes, own, sizes))
        other = again.recipe_mean(tables)
        assert found.draw_means == pytest.approx(other.deltas)
        assert found.between_draws == pytest.approx(other.between, abs=1e-12)
        assert found.items_error == pytest.approx(other.items_error)
        assert found.draws_error == pytest.approx(other.draws_error)
        interval = found.interval(0.95)
        assert (interval.low, interval.high) == pytest.approx(other.limits(0.95))
        assert found.p_value() == pytest.approx(other.p(), abs=1e-8)
        sizes = found.detectable(alpha=0.05, power=0.8), other.detectable(0.05, 0.8)
        assert sizes[0] == pytest.approx(sizes[1])


def test_p_is_where_the_interval_begins_to_hold_the_value():
    rng = np.random.default_rng(6)
    for _ in range(20):
        found = recipe_estimate(table_of(rng, 4, 40, item=1, own=1, level=0.2) + 0.3, range(40))
        p = found.p_value()
        if 1e-4 < p < 0.99:
            assert not found.interval(1 - 1.001 * p).low <= 0 <= found.interval(1 - 1.001 * p).high
            assert found.interval(1 - 0.999 * p).low <= 0 <= found.interval(1 - 0.999 * p).high


def test_a_table_without_draws_is_refused():
    with pytest.raises(ValueError, match="one row a draw"):
        recipe_estimate([0.1, 0.2], range(2))


def test_checkpoints_of_one_recipe_are_compared_as_one_recipe():
    rng = np.random.default_rng(8)
    before = option_rows(rng, 80)
    draws = [quantized(before, rng, noise=0.3, loss=1.5) for _ in range(4)]
    sides = [scored(rows, normalize="bytes") for rows in (before, *draws)]
    usual = {"confidence": 0.95, "alpha": 0.05, "power": 0.8}
    found = compare_draws(sides[0], sides[1:], **usual)
    assert found.estimate.draws == 4
    assert found.estimate.draw_means == pytest.approx(
        [compare_graded(sides[0], side, **usual).delta for side in sides[1:]]
    )
    assert judge_graded(found, able=True, adjusted_p=found.p, margin=0.03) == "worse"


# Simulated studies. Few of them: a share is refused if its bound could give it once in 10,000.

STUDIES = 400
SURE = 1e-4


def within(row, studies: int) -> bool:
    """Whether a share of the simulated studies is in keeping with its bounds."""
    count = round(row.share * studies)
    if row.kind == "size":
        return count <= stats.binom.isf(SURE, studies, coverage.SIZE)
    least = stats.binom.ppf(SURE, studies, coverage.LOWEST)
    return least <= count <= stats.binom.isf(SURE, studies, coverage.HIGHEST)


def outside(rows, studies: int = STUDIES) -> list[str]:
    """Scenarios whose share is not in keeping with its bound."""
    bounded = [row for row in rows if not row.stress and row.kind != "power"]
    assert bounded
    return [
        f"{row.scenario}, n = {row.n}: {row.share}" for row in bounded if not within(row, studies)
    ]


def test_intervals_of_differences_cover():
    assert outside(coverage.differences(STUDIES, (20, 100))) == []


def test_tests_have_their_size():
    assert outside(coverage.sizes_of_tests(STUDIES, (20, 100))) == []
    assert outside(coverage.interactions(STUDIES, (50,))) == []
    assert outside(coverage.equivalence(STUDIES, (50,))) == []
    assert outside(coverage.abilities(STUDIES, (50,))) == []


@pytest.mark.long
def test_pooled_differences_and_recovery_cover():
    assert outside(coverage.pooled(200, (60,)), 200) == []


@pytest.mark.long
def test_recipes_cover():
    assert outside(coverage.recipes(STUDIES, (4, 8))) == []


def test_passages_taken_for_independent_items_are_seen_not_to_cover(monkeypatch):
    true = coverage.clustered_mean
    monkeypatch.setattr(coverage, "clustered_mean", lambda x, c: true(x, np.arange(len(x))))
    assert outside(coverage.differences(STUDIES, (100,)))


def test_a_recipe_without_its_draws_is_seen_not_to_cover(monkeypatch):
    monkeypatch.setattr(
        coverage,
        "recipe_estimate",
        lambda table, c, weights: clustered_mean(table.mean(axis=0), c, weights),
    )
    assert outside(coverage.recipes(STUDIES, (4,)))


def test_the_account_names_what_lies_outside():
    rows = [coverage.Row("a part", "x", 20, 9, "coverage", share) for share in (0.95, 0.9)]
    text = coverage.text_of(rows, 2000)
    assert "1 of 2 scenarios" in text
    assert text.count("**outside**") == 1


@pytest.mark.parametrize("kind", ["two sets", "passages by tokens"])
def test_recipes_of_pooled_sets_and_of_weighted_passages_cover(kind):
    rng, holds = np.random.default_rng(17), 0
    for _ in range(STUDIES):
        sets = sets_of(rng, 5, level=0.1)
        if kind != "two sets":
            weights = rng.integers(20, 250, 32).astype(float)
            table = table_of(rng, 5, 32, item=0.5, own=0.3, level=0.1)
            sets = [DrawsOfSet(table, range(32), weights)]
        interval = pooled_recipe(sets).interval(0.95)
        holds += interval.low <= 0 <= interval.high
    least = stats.binom.ppf(SURE, STUDIES, coverage.LOWEST)
    assert least <= holds <= stats.binom.isf(SURE, STUDIES, coverage.HIGHEST)
