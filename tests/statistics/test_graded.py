"""Graded scores: what they are made of, their limits, and what is found and not found by them."""

import dataclasses
import math

import numpy as np
import pytest
import statsmodels.api as sm
from scipy import special, stats

from helpers.core.errors import StudyError
from helpers.evaluation.scoring import gold_score
from helpers.statistics.checks import recomputed_graded as again
from helpers.statistics.graded import (
    ability,
    compare_graded,
    comparison_of,
    cost_difference,
    judge_graded,
    kl_difference,
    missing_scores,
    option_probabilities,
    pooled_cost_difference,
    pooled_difference,
    recovery,
    right_options,
    scored,
    token_kl,
)
from helpers.statistics.intervals import (
    clustered_mean,
    combine,
    mcnemar_exact,
    satterthwaite_degrees,
)
from simulated_rows import option_rows, passages, quantized, written_rows

USUAL = {"confidence": 0.95, "alpha": 0.05, "power": 0.8}


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(11)


def cost(before, after, normalize="none"):
    return compare_graded(
        scored(before, normalize=normalize), scored(after, normalize=normalize), **USUAL
    )


# Scores


def test_options_of_one_length_have_the_plain_softmax(rng):
    sums = rng.normal(size=5) * 20
    expected = special.softmax(sums)
    np.testing.assert_allclose(option_probabilities(sums), expected)
    np.testing.assert_allclose(option_probabilities(sums, [7] * 5), expected)


def test_the_most_probable_option_is_the_one_chosen_by_the_byte(rng):
    for _ in range(200):
        sums, lengths = -rng.gamma(3, 5, 4), rng.integers(1, 60, 4)
        assert option_probabilities(sums, lengths).argmax() == (sums / lengths).argmax()


def test_probabilities_do_not_depend_on_the_unit_of_length(rng):
    sums, lengths = -rng.gamma(3, 5, 4), rng.integers(1, 60, 4)
    np.testing.assert_allclose(
        option_probabilities(sums, lengths), option_probabilities(sums, 8 * lengths)
    )


def test_a_written_answer_takes_its_best_gold_by_the_token():
    row = {"gold_loglikelihoods": [-6.0, -2.5, -9.0], "gold_tokens": [3, 1, 6]}
    assert gold_score(row) == pytest.approx(-1.5)


def test_a_written_answer_is_its_gold_less_the_foil(rng):
    """Geometric means over the tokens; without a foil there is no score."""
    rows = written_rows(rng, 30)
    found = scored(rows)
    expected = {}
    for row in rows:
        if row["foil_tokens"]:
            golds = zip(row["gold_loglikelihoods"], row["gold_tokens"], strict=True)
            best = max(math.exp(total) ** (1 / count) for total, count in golds)
            foil = math.exp(row["foil_loglikelihood"]) ** (1 / row["foil_tokens"])
            expected[row["id"]] = best - foil
    assert 0 < len(expected) < len(rows)
    assert dict(zip(found.ids, found.scores, strict=True)) == pytest.approx(expected)
    assert again.item_scores(rows, "none") == pytest.approx(expected)
    assert set(found.chance) == {0.0}


def test_a_taste_for_the_form_of_answers_is_no_loss_of_ability(rng):
    """What golds and foils gain alike moves a model that tells them apart little, others not."""

    def moved(rows, by):
        return [
            row
            | {
                "gold_loglikelihoods": [
                    x + by * n
                    for x, n in zip(row["gold_loglikelihoods"], row["gold_tokens"], strict=True)
                ],
                "foil_loglikelihood": row["foil_tokens"]
                and row["foil_loglikelihood"] + by * row["foil_tokens"],
            }
            for row in rows
        ]

    unable = [
        row | {"gold_loglikelihoods": [row["foil_loglikelihood"]], "gold_tokens": [5]}
        for row in written_rows(rng, 40)
        if row["foil_tokens"]
    ]
    assert cost(unable, moved(unable, -0.7)).delta == pytest.approx(0, abs=1e-12)
    weak = written_rows(rng, 200, lead=0.4)
    golds = [np.exp(gold_score(row)) for row in weak]
    change = cost(weak, moved(weak, 0.06)).delta
    assert 0 < change < 0.4 * np.mean(golds) * np.expm1(0.06)


def test_a_strong_model_has_something_to_lose(rng):
    """It never prefers a foil, so that a choice between the two could not show the loss."""
    rows = written_rows(rng, 60, lead=8.0)
    worse = quantized(rows, rng, noise=0.01, loss=0.2)
    assert cost(rows, worse).delta < -0.03
    assert cost(rows, worse).p < 1e-6


def test_several_right_options_add_up():
    row = {"id": "x", "cluster": "", "golds": ["A", "C"], "labels": ["A", "B", "C"]}
    rows = [row | {"id": str(i), "logprobs": [0.0, 1.0, 2.0]} for i in range(4)]
    shares = special.softmax([0.0, 1.0, 2.0])
    assert scored(rows).scores == pytest.approx(shares[0] + shares[2])
    assert scored(rows).chance == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("golds", "count", "place"), [(["no"], 2, 1), (["C"], 4, 2), (["4"], 4, 3), (["B"], 2, 1)]
)
def test_rows_without_labels_are_read_by_their_golds(golds, count, place):
    assert right_options({"id": "x", "golds": golds, "logprobs": [0.0] * count}) == [place]


def test_a_row_that_lacks_its_score_is_named(rng):
    rows = option_rows(rng, 4)
    assert missing_scores(rows) is None
    assert "item-002" in missing_scores([*rows[:2], {"id": "item-002", "golds": []}])
    with pytest.raises(StudyError, match="no option_bytes"):
        scored([{k: v for k, v in row.items() if k != "option_bytes"} for row in rows],
               normalize="bytes")  # fmt: skip
    written = written_rows(rng, 4)
    assert "not finite" in missing_scores([written[0] | {"gold_loglikelihoods": [None]}])
    alone = [row | {"foil_loglikelihood": None, "foil_tokens": None} for row in written]
    assert "another item's gold" in missing_scores(alone)


def test_variants_that_answered_other_items_are_refused(rng):
    rows = option_rows(rng, 8)
    with pytest.raises(StudyError, match="different items"):
        cost(rows, rows[1:])


# Limits


def test_the_mean_of_independent_items_is_students(rng):
    values = rng.normal(size=40)
    found, due = clustered_mean(values, range(40)), stats.ttest_1samp(values, 0.3)
    assert found.standard_error == pytest.approx(values.std(ddof=1) / 40**0.5)
    assert found.degrees == pytest.approx(39)
    plain = dataclasses.replace(found, skewness=0.0)
    assert plain.p_value(0.3) == pytest.approx(due.pvalue)
    limits = due.confidence_interval(0.95)
    interval = plain.interval(0.95)
    assert (interval.low, interval.high) == pytest.approx((limits.low, limits.high))
    outer = found.interval(0.95)
    assert outer.low <= interval.low
    assert interval.high <= outer.high


def test_many_clusters_have_statsmodels_cluster_robust_error(rng):
    clusters = np.repeat(np.arange(400), rng.integers(1, 5, 400))
    values = rng.normal(size=400)[clusters] + rng.normal(size=clusters.size)
    fit = sm.OLS(values, np.ones(clusters.size)).fit(
        cov_type="cluster", cov_kwds={"groups": clusters}
    )
    found = clustered_mean(values, clusters)
    assert found.mean == pytest.approx(fit.params[0])
    assert found.standard_error == pytest.approx(fit.bse[0], rel=0.01)


def test_the_error_is_unbiased_for_independent_items_in_uneven_clusters(rng):
    """CR2's defining property, which the usual cluster-robust error lacks."""
    clusters = np.repeat(np.arange(5), [1, 2, 3, 6, 8])
    found = [clustered_mean(rng.normal(size=20), clusters).standard_error ** 2 for _ in range(4000)]
    assert np.mean(found) == pytest.approx(1 / 20, rel=0.04)


def test_degrees_fall_with_uneven_clusters():
    assert satterthwaite_degrees(np.full(12, 3.0)) == pytest.approx(11)
    assert satterthwaite_degrees(np.array([1.0] * 11 + [30.0])) < 6


def test_a_larger_weight_counts_as_more_items(rng):
    values, clusters = rng.normal(size=9), np.repeat(np.arange(3), 3)
    thrice = clustered_mean(np.repeat(values, 3), np.repeat(clusters, 3))
    weighed = clustered_mean(values, clusters, np.full(9, 3.0))
    assert weighed.mean == pytest.approx(thrice.mean)
    assert weighed.standard_error == pytest.approx(thrice.standard_error)


def test_the_test_rejects_exactly_where_the_interval_leaves_the_value_out(rng):
    for _ in range(60):
        found = clustered_mean(rng.lognormal(0, 1, 25) - 1.2, np.arange(25) // 2)
        p = found.p_value()
        if 0.001 < p < 0.9:
            narrow, wide = found.interval(1 - 1.001 * p), found.interval(1 - 0.999 * p)
            assert not narrow.low <= 0 <= narrow.high
            assert wide.low <= 0 <= wide.high


def test_order_and_names_of_items_change_nothing(rng):
    values, clusters = rng.normal(size=30), [f"c{i // 3}" for i in range(30)]
    order = rng.permutation(30)
    a = clustered_mean(values, clusters)
    b = clustered_mean(values[order], [clusters[i] for i in order])
    assert (b.mean, b.standard_error, b.p_value()) == pytest.approx(
        (a.mean, a.standard_error, a.p_value())
    )


def test_identical_models_are_null_and_equivalent(rng):
    rows = option_rows(rng)
    found = cost(rows, list(reversed(rows)), "bytes")
    assert (found.delta, found.p, found.identical) == (0, 1, True)
    assert judge_graded(found, able=True, adjusted_p=1.0, margin=0.03) == "equivalent"


def test_a_shift_without_spread_is_a_sign_test():
    found = clustered_mean([-0.1] * 12, np.arange(12) // 2)
    assert found.degenerate
    assert found.p_value() == pytest.approx(2 * 0.5**6)
    assert found.detectable(alpha=0.05, power=0.8) is None


def test_the_detectable_difference_is_found_as_often_as_it_says():
    """A t test of normal scores: the noncentral t is its exact power."""
    rng, hits = np.random.default_rng(2), 0
    size = clustered_mean(rng.normal(size=2000), range(2000)).detectable(alpha=0.05, power=0.8)
    small = size * math.sqrt(2000 / 50)
    for _ in range(1500):
        hits += clustered_mean(rng.normal(size=50) + small, range(50)).p_value() <= 0.05
    assert hits / 1500 == pytest.approx(0.8, abs=0.04)


# Ability and verdicts


def test_ability_is_knowing_and_not_guessing(rng):
    assert ability(scored(option_rows(rng, know=3), normalize="bytes"), confidence=0.95).able
    assert not ability(scored(option_rows(rng, know=0), normalize="bytes"), confidence=0.95).able
    assert ability(scored(written_rows(rng)), confidence=0.95).able
    assert not ability(scored(written_rows(rng, lead=-0.1)), confidence=0.95).able


def test_a_constant_answer_is_no_ability_however_the_set_leans(rng):
    """Always "yes" where 70 % are yes: far above 1 / 2, and nothing to lose."""
    golds = ["yes" if rng.random() < 0.7 else "no" for _ in range(200)]
    rows = [
        {"id": f"{i}", "cluster": "", "golds": [gold], "logprobs": [2.0 + 0.1 * rng.normal(), 0.0]}
        for i, gold in enumerate(golds)
    ]
    found = ability(scored(rows), confidence=0.95)
    assert found.mean_low > 0.5
    assert not found.able


@pytest.mark.parametrize(
    ("loss", "expected"), [(2.0, "worse"), (-2.0, "better"), (0.0, "equivalent")]
)
def test_verdicts_of_a_planted_loss(rng, loss, expected):
    before = option_rows(rng, 200)
    found = cost(before, quantized(before, rng, noise=0.1, loss=loss), "bytes")
    kind = judge_graded(found, able=True, adjusted_p=found.p, margin=0.03)
    assert kind == expected
    assert judge_graded(found, able=False, adjusted_p=0.0, margin=0.03) == "uninformative"


def test_a_rise_of_kl_is_worse(rng):
    first = passages(rng)
    found = kl_difference(first, [row | {"kl": 1.5 * row["kl"]} for row in first])
    assert found.mean > 0
    made = comparison_of(found, unit="nats a token", **USUAL)
    verdict = judge_graded(made, able=True, adjusted_p=made.p, margin=0.01, higher_is_better=False)
    assert verdict == "worse"


# Difference of differences


def test_a_planted_interaction_is_found_and_a_copy_is_null(rng):
    base = option_rows(rng, 200)
    pairs = [
        tuple(scored(rows, normalize="bytes") for rows in (before, after))
        for before, after in (
            (base, quantized(base, rng, noise=0.2, loss=0.1)),
            (base, quantized(base, rng, noise=0.2, loss=1.5)),
        )
    ]
    assert cost_difference(*pairs).mean < 0
    assert cost_difference(*pairs).p_value() < 0.001
    assert cost_difference(pairs[0], pairs[0]).p_value() == 1
    assert cost_difference(pairs[0], pairs[0]).mean == 0


def test_passages_cut_otherwise_are_not_compared(rng):
    first = passages(rng)
    other = [first[0] | {"tokens": 7}, *first[1:]]
    with pytest.raises(StudyError, match="other tokens"):
        kl_difference(first, other)


# Pooled and recovery


def three_sets(rng, *, noise=0.3, loss=0.0):
    found = {}
    for name, before, normalize in (
        ("choice", option_rows(rng, know=3), "bytes"),
        ("written", written_rows(rng), "none"),
        ("more", option_rows(rng, 80, know=3), "none"),
    ):
        after = quantized(before, rng, noise=noise, loss=loss)
        found[name] = (before, after, normalize)
    return found


def as_scored(sets):
    return {n: (scored(b, normalize=k), scored(a, normalize=k)) for n, (b, a, k) in sets.items()}


def test_each_set_counts_the_same_however_many_items_it_has(rng):
    pairs = as_scored(three_sets(rng, loss=0.5))
    single = [pooled_difference({name: pair}).mean for name, pair in pairs.items()]
    assert pooled_difference(pairs).mean == pytest.approx(np.mean(single))


def test_welchs_degrees_of_two_means_are_scipys(rng):
    x, y = rng.normal(size=12), 3 * rng.normal(size=30)
    both = combine([clustered_mean(x, range(12)), clustered_mean(y, range(30))], [1, -1])
    due = stats.ttest_ind(x, y, equal_var=False)
    assert both.degrees == pytest.approx(due.df)
    assert dataclasses.replace(both, skewness=0.0).p_value() == pytest.approx(due.pvalue)


def test_recovery_of_the_float_model_is_one_and_of_a_loss_less(rng):
    sets = three_sets(rng, loss=1.0)
    pairs = as_scored(sets)
    whole = recovery({n: (p[0], p[0]) for n, p in pairs.items()}, confidence=0.95)
    assert whole.value == pytest.approx(1)
    lost = recovery(pairs, confidence=0.95)
    assert lost.interval.low < lost.value < lost.interval.high < 1


def test_recovery_is_fiellers_interval_where_scores_are_not_skewed(rng):
    """Fieller's quadratic, for one set of independent items, against the limits without skew."""
    before = option_rows(rng, 300, know=3)
    before = [row | {"cluster": row["id"]} for row in before]
    pair = as_scored({"x": (before, quantized(before, rng, noise=0.5, loss=0.5), "none")})
    found = recovery(pair, confidence=0.95)
    b = pair["x"][0].scores - 0.25
    a = pair["x"][1].scores - 0.25
    q, n = stats.t.ppf(0.975, 299) ** 2, 300
    cov = np.cov(a, b) / n
    quadratic = [b.mean() ** 2 - q * cov[1, 1], -2 * (a.mean() * b.mean() - q * cov[0, 1]),
                 a.mean() ** 2 - q * cov[0, 0]]  # fmt: skip
    assert (found.interval.low, found.interval.high) == pytest.approx(
        sorted(np.roots(quadratic)), abs=0.005
    )


def test_no_recovery_where_the_float_model_knows_nothing(rng):
    before = option_rows(rng, know=0)
    pairs = as_scored({"x": (before, quantized(before, rng, noise=0.1), "none")})
    assert recovery(pairs, confidence=0.95) is None
    assert recovery({}, confidence=0.95) is None


# KL


def test_the_tail_is_where_it_was_put():
    rows = {"a": [0.01] * 600, "b": [0.01] * 399 + [3.0]}
    kl = token_kl(rows, shown=2)
    assert (kl.tail[0].passage, kl.tail[0].token, kl.tail[0].kl) == ("b", 399, 3.0)
    assert (kl.tail[1].passage, kl.tail[1].token) == ("a", 0)  # of equal ones the first
    assert (kl.median, kl.percentile_99, kl.largest) == (0.01, 0.01, 3.0)
    assert kl.tail_share == pytest.approx((3 + 9 * 0.01) / (3 + 999 * 0.01))


def test_quantiles_lie_between_their_neighbours_on_a_straight_line():
    """Of the values 0, 1, ... n - 1 the quantile q is q (n - 1), and numpy's default gives it."""
    values = [float(x) for x in np.random.default_rng(0).permutation(1201)]
    kl = token_kl({"a": values[:500], "b": values[500:]}, shown=0)
    assert (kl.median, kl.percentile_99, kl.percentile_99_9) == pytest.approx((600, 1188, 1198.8))
    skewed = np.random.default_rng(1).lognormal(-4, 2, 777)
    kl = token_kl({"a": skewed.tolist()}, shown=0)
    expected = np.percentile(skewed, [50, 99, 99.9])
    assert (kl.median, kl.percentile_99, kl.percentile_99_9) == pytest.approx(tuple(expected))
    assert again.kl_quantiles([0.25]) == dict.fromkeys(again.kl_quantiles([1.0]), 0.25)


@pytest.mark.parametrize("value", [None, math.nan, math.inf])
def test_a_token_without_a_finite_kl_is_named_and_leaves_no_quantile(value):
    kl = token_kl({"a": [0.1, 5.0], "b": [0.2, value]}, shown=2)
    assert (kl.nonfinite, kl.tokens) == (1, 4)
    assert (kl.tail[0].passage, kl.tail[0].token, kl.tail[0].kl) == ("b", 1, None)
    assert kl.tail[1].kl == 5.0
    quantiles = (kl.median, kl.percentile_99, kl.percentile_99_9, kl.largest, kl.tail_share)
    assert quantiles == (None,) * 5
    with pytest.raises(StudyError, match="no tokens"):
        token_kl({}, shown=1)


# The second opinion


def both_ways(estimate, mean) -> None:
    interval = estimate.interval(0.95)
    assert (mean.value, mean.error) == pytest.approx((estimate.mean, estimate.standard_error))
    assert mean.degrees == pytest.approx(estimate.degrees)
    assert mean.limits(0.95) == pytest.approx((interval.low, interval.high), rel=1e-6, abs=1e-9)
    assert mean.p() == pytest.approx(estimate.p_value(), rel=1e-6, abs=1e-12)
    assert mean.detectable(0.05, 0.8) == pytest.approx(
        estimate.detectable(alpha=0.05, power=0.8), rel=1e-5
    )
    assert 0.7 < mean.plain_error / mean.error < 1.1


@pytest.mark.parametrize("seed", range(4))
def test_two_ways_to_every_figure_agree(seed):
    rng = np.random.default_rng(seed)
    sets, other = three_sets(rng, loss=0.4), {}
    for name, (before, _, normalize) in sets.items():
        other[name] = (before, quantized(before, rng, noise=0.3, loss=0.8), normalize)
    ways = {name: normalize for name, (*_, normalize) in sets.items()}
    raw = [{n: (b, a) for n, (b, a, _) in found.items()} for found in (sets, other)]
    pairs = [as_scored(found) for found in (sets, other)]
    for name, normalize in ways.items():
        found = cost(*raw[0][name], normalize)
        both_ways(found.estimate, again.difference(raw[0][name], normalize))
        both_ways(
            cost_difference(pairs[0][name], pairs[1][name]),
            again.cost_difference(raw[0][name], raw[1][name], normalize),
        )
        for rows in raw[0][name]:
            due = ability(scored(rows, normalize=normalize), confidence=0.95).able
            assert again.able(rows, normalize, 0.95) == due
    both_ways(pooled_difference(pairs[0]), again.pooled(raw[0], ways))
    both_ways(pooled_cost_difference(*pairs), again.pooled_cost_difference(*raw, ways))
    found = recovery(pairs[0], confidence=0.95)
    assert again.recovered(raw[0], ways, 0.95) == pytest.approx(
        (found.value, found.interval.low, found.interval.high), abs=1e-6
    )
    first = passages(rng)
    second = [row | {"kl": 1.1 * row["kl"] + 0.2 * rng.random()} for row in first]
    both_ways(kl_difference(first, second), again.kl_difference(first, second))
    text = {row["id"]: rng.lognormal(-4, 2, row["tokens"]).tolist() for row in first}
    quantiles = dataclasses.asdict(token_kl(text, shown=3))
    for name, value in again.kl_quantiles([kl for row in text.values() for kl in row]).items():
        assert quantiles[name] == pytest.approx(value)


# Simulation; `benchmarks.coverage` has all scenarios with 2,000 studies each


def test_graded_scores_see_what_accuracy_does_not(rng):
    """The same hundred items, a loss of a tenth of a logit."""
    graded = counted = 0
    for _ in range(200):
        odds = 0.5 + 2 * rng.normal(size=100)
        moved = odds - 0.1 + 0.3 * rng.normal(size=100)
        graded += (
            clustered_mean(special.expit(moved) - special.expit(odds), range(100)).p_value() <= 0.05
        )
        lost, won = ((odds > 0) & (moved < 0)).sum(), ((odds < 0) & (moved > 0)).sum()
        counted += mcnemar_exact(int(lost), int(won)) <= 0.05
    assert graded > 5 * counted
    assert graded > 100
