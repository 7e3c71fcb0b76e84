"""A recipe's draws: two spreads told apart, and limits that hold for both."""

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from statsmodels.regression.mixed_linear_model import MixedLM

from benchmarks import coverage
from helpers.statistics.clustered import clustered_mean
from helpers.statistics.graded import (
    compare_draws,
    compare_graded,
    judge_graded,
    recipe_estimate,
    scored,
)
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


def test_pooled_differences_and_recovery_cover():
    assert outside(coverage.pooled(200, (60,)), 200) == []


def test_recipes_cover():
    assert outside(coverage.recipes(STUDIES, (4, 8))) == []


def test_passages_taken_for_independent_items_are_seen_not_to_cover(monkeypatch):
    true = coverage.clustered_mean
    monkeypatch.setattr(coverage, "clustered_mean", lambda x, c: true(x, np.arange(len(x))))
    assert outside(coverage.differences(STUDIES, (100,)))


def test_a_recipe_without_its_draws_is_seen_not_to_cover(monkeypatch):
    monkeypatch.setattr(
        coverage, "recipe_estimate", lambda table, c: clustered_mean(table.mean(axis=0), c)
    )
    assert outside(coverage.recipes(STUDIES, (4,)))


def test_the_account_names_what_lies_outside():
    rows = [coverage.Row("a part", "x", 20, 9, "coverage", share) for share in (0.95, 0.9)]
    text = coverage.text_of(rows, 2000)
    assert "1 of 2 scenarios" in text
    assert text.count("**outside**") == 1
