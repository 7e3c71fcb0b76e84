"""Each figure against another way to get it: enumeration, closed form, or another library."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar
from scipy.stats import binomtest, multinomial, norm
from statsmodels.stats.contingency_tables import mcnemar

from helpers.statistics.intervals import (
    Interval,
    holm,
    mcnemar_exact,
    paired_binary,
    tango_interval,
    tost_from_interval,
    wilson_interval,
)

repeatable = settings(derandomize=True, deadline=None, max_examples=80)


@st.composite
def flip_counts(draw) -> tuple[int, int, int]:
    """losses, gains, n with losses + gains <= n."""
    n = draw(st.integers(1, 300))
    losses = draw(st.integers(0, n))
    return losses, draw(st.integers(0, n - losses)), n


# One proportion


@repeatable
@given(st.integers(1, 500), st.data(), st.sampled_from([0.8, 0.9, 0.95, 0.99]))
def test_wilson_agrees_with_scipy(n, data, confidence):
    k = data.draw(st.integers(0, n))
    interval = wilson_interval(k, n, confidence=confidence)
    expected = binomtest(k, n).proportion_ci(confidence, method="wilson")
    assert (interval.low, interval.high) == pytest.approx((expected.low, expected.high), abs=1e-12)
    assert 0 <= interval.low <= k / n <= interval.high <= 1


def test_wilson_limits_are_where_the_score_test_turns():
    """At each limit p, |k/n - p| is z standard errors of p itself."""
    k, n, z = 26, 100, norm.isf(0.025)
    interval = wilson_interval(k, n, confidence=0.95)
    for p in (interval.low, interval.high):
        assert abs(k / n - p) == pytest.approx(z * math.sqrt(p * (1 - p) / n))


def test_wilson_at_the_ends_has_width():
    none, every = (wilson_interval(k, 20, confidence=0.95) for k in (0, 20))
    assert none.low == 0
    assert none.high == pytest.approx(3.8415 / (20 + 3.8415), abs=1e-4)
    assert every.high == 1
    assert every.low == pytest.approx(1 - none.high)


# McNemar


@pytest.mark.parametrize("flips", range(11))
def test_mcnemar_is_the_share_of_sign_patterns_as_lopsided(flips):
    gains_of = [sum(pattern) for pattern in itertools.product((0, 1), repeat=flips)]
    for gains in range(flips + 1):
        lopsided = abs(2 * gains - flips)
        extreme = sum(abs(2 * other - flips) >= lopsided for other in gains_of)
        assert mcnemar_exact(flips - gains, gains) == pytest.approx(extreme / 2**flips)


@repeatable
@given(flip_counts())
def test_mcnemar_agrees_with_statsmodels_and_ignores_direction(counts):
    losses, gains, n = counts
    p = mcnemar_exact(losses, gains)
    table = [[n - losses - gains, losses], [gains, 0]]
    assert p == pytest.approx(min(mcnemar(table, exact=True).pvalue, 1.0), rel=1e-9)
    assert p == pytest.approx(mcnemar_exact(gains, losses))


def test_mcnemar_needs_six_flips_one_way():
    assert mcnemar_exact(0, 0) == 1.0
    assert mcnemar_exact(5, 0) == pytest.approx(0.0625)
    assert mcnemar_exact(6, 0) == pytest.approx(0.03125)


# Tango


def brute_force_score(delta: float, losses: int, gains: int, n: int) -> float:
    """Tango's statistic with the constrained likelihood maximised numerically."""

    def minus_loglikelihood(loss_rate):
        cells = (loss_rate, loss_rate + delta, 1 - 2 * loss_rate - delta)
        counts = (losses, gains, n - losses - gains)
        terms = zip(counts, cells, strict=True)
        return -sum(count * math.log(max(cell, 1e-300)) for count, cell in terms if count)

    least, most = max(0.0, -delta), (1 - delta) / 2
    fit = minimize_scalar(
        minus_loglikelihood, bounds=(least, most), method="bounded", options={"xatol": 1e-13}
    )
    variance = n * (2 * fit.x + delta - delta**2)
    return (gains - losses - n * delta) / math.sqrt(variance)


@pytest.mark.parametrize("confidence", [0.90, 0.95])
@pytest.mark.parametrize(
    "counts",
    [(3, 9, 200), (9, 3, 200), (7, 1, 21), (1, 0, 20), (0, 6, 20), (10, 10, 40), (0, 0, 20)],
)
def test_tango_limits_are_where_the_score_test_turns(counts, confidence):
    interval = tango_interval(*counts, confidence=confidence)
    z = norm.isf((1 - confidence) / 2)
    assert brute_force_score(interval.low, *counts) == pytest.approx(z, abs=1e-4)
    assert brute_force_score(interval.high, *counts) == pytest.approx(-z, abs=1e-4)


@pytest.mark.parametrize(
    ("losses", "gains", "n", "confidence", "low", "high"),
    [
        (9, 3, 200, 0.95, -0.071, 0.005),
        (7, 1, 21, 0.95, -0.517, -0.026),  # Bentur 2009, in Fagerland, Lydersen and Laake
        (25, 28, 618, 0.90, -0.0148, 0.0247),  # R, PropCIs::scoreci.mp(25, 28, 618)
    ],
)
def test_tango_reproduces_published_figures(losses, gains, n, confidence, low, high):
    interval = tango_interval(losses, gains, n, confidence=confidence)
    places = len(str(low).split(".")[1])
    assert (round(interval.low, places), round(interval.high, places)) == (low, high)


@pytest.mark.parametrize("n", [1, 2, 20, 100, 11873])
def test_tango_without_flips_has_the_closed_form_width(n):
    z2 = norm.isf(0.025) ** 2
    interval = tango_interval(0, 0, n, confidence=0.95)
    assert (interval.low, interval.high) == pytest.approx((-z2 / (n + z2), z2 / (n + z2)), rel=1e-9)


@repeatable
@given(flip_counts())
def test_tango_contains_the_estimate_and_mirrors(counts):
    losses, gains, n = counts
    interval = tango_interval(losses, gains, n, confidence=0.95)
    swapped = tango_interval(gains, losses, n, confidence=0.95)
    wider = tango_interval(losses, gains, n, confidence=0.99)
    assert (
        -1 <= wider.low <= interval.low <= (gains - losses) / n <= interval.high <= wider.high <= 1
    )
    assert (-swapped.high, -swapped.low) == pytest.approx((interval.low, interval.high), abs=1e-10)
    assert interval.high > interval.low


@repeatable
@given(flip_counts())
def test_tango_excludes_zero_exactly_when_mcnemar_chi_square_does(counts):
    losses, gains, n = counts
    interval = tango_interval(losses, gains, n, confidence=0.95)
    rejected = (gains - losses) ** 2 > norm.isf(0.025) ** 2 * (gains + losses)
    assert (interval.low > 0 or interval.high < 0) == rejected


@pytest.mark.parametrize("n", [20, 60])
@pytest.mark.parametrize("rates", [(0.05, 0.05), (0.10, 0.02), (0.02, 0.02), (0.25, 0.15)])
def test_tango_covers_the_truth(n, rates):
    """Coverage by enumeration of every outcome: near 95 %, never far below."""
    loss_rate, gain_rate = rates
    truth, coverage = gain_rate - loss_rate, 0.0
    for losses in range(n + 1):
        for gains in range(n + 1 - losses):
            outcome = [losses, gains, n - losses - gains]
            chance = multinomial.pmf(outcome, n, [loss_rate, gain_rate, 1 - loss_rate - gain_rate])
            if chance > 1e-7:
                interval = tango_interval(losses, gains, n, confidence=0.95)
                coverage += chance * (interval.low <= truth <= interval.high)
    assert 0.93 < coverage <= 1.0


# Pairs


def test_paired_binary_counts_flips_both_ways():
    baseline = np.array([1, 1, 1, 1, 0, 0, 0, 1])
    variant = np.array([1, 0, 0, 1, 1, 0, 0, 0])
    paired = paired_binary(baseline, variant, confidence=0.95)
    assert (paired.n, paired.losses, paired.gains) == (8, 3, 1)
    assert paired.delta == pytest.approx(variant.mean() - baseline.mean())
    assert paired.flip_rate == 0.5
    assert paired.p == mcnemar_exact(3, 1)
    assert paired.interval == tango_interval(3, 1, 8, confidence=0.95)


def test_a_variant_that_loses_answers_has_a_negative_difference():
    paired = paired_binary([True] * 20, [False] * 8 + [True] * 12, confidence=0.95)
    assert paired.delta == -0.4
    assert paired.interval.high < 0
    assert paired.p < 0.05


def test_identical_answers_are_not_proof_of_no_difference():
    paired = paired_binary([0, 1] * 10, [0, 1] * 10, confidence=0.95)
    assert (paired.delta, paired.p, paired.flip_rate) == (0, 1, 0)
    assert paired.interval.high == pytest.approx(0.161, abs=5e-4)


# Families of comparisons


def closed_testing(p_values: dict[str, float]) -> dict[str, float]:
    """Holm as the closure of Bonferroni: the largest p of any family a comparison belongs to."""
    names = list(p_values)
    families = [
        family
        for size in range(1, len(names) + 1)
        for family in itertools.combinations(names, size)
    ]
    bonferroni = {f: min(1.0, len(f) * min(p_values[name] for name in f)) for f in families}
    return {name: max(bonferroni[f] for f in families if name in f) for name in names}


@settings(repeatable, max_examples=25)  # statsmodels collects garbage on every call, 50 ms
@given(st.lists(st.floats(0, 1), min_size=1, max_size=6))
def test_holm_is_closed_testing(p_values):
    family = {f"comparison {i}": p for i, p in enumerate(p_values)}
    adjusted = holm(family)
    assert list(adjusted) == list(family)
    assert adjusted == pytest.approx(closed_testing(family), rel=1e-12)


def test_holm_of_no_comparisons_is_empty():
    assert holm({}) == {}


# Equivalence


def test_equivalence_is_strictly_inside_the_margin():
    interval = Interval(-0.02, 0.01, 0.90)
    assert tost_from_interval(interval, margin=0.021, alpha=0.05)
    assert not tost_from_interval(interval, margin=0.02, alpha=0.05)
    assert not tost_from_interval(Interval(-0.01, 0.03, 0.90), margin=0.02, alpha=0.05)


def test_equivalence_refuses_an_interval_of_another_confidence():
    with pytest.raises(ValueError, match=r"confidence = 0.95 .* needs an interval at 0.9"):
        tost_from_interval(Interval(-0.01, 0.01, 0.95), margin=0.03, alpha=0.05)


# What cannot be computed is refused, on one line


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: wilson_interval(3, 0, confidence=0.95), "n = 0 .* from 1 up"),
        (lambda: wilson_interval(4, 3, confidence=0.95), "successes = 4 exceeds n = 3"),
        (lambda: wilson_interval(-1, 3, confidence=0.95), "successes = -1"),
        (lambda: wilson_interval(0.5, 3, confidence=0.95), "successes = 0.5 .* whole"),
        (lambda: wilson_interval(1, 3, confidence=95), r"confidence = 95 .* \(0, 1\): .* percent"),
        (lambda: wilson_interval(1, 3, confidence=math.nan), "confidence = nan"),
        (lambda: mcnemar_exact(-1, 3), "losses = -1"),
        (lambda: mcnemar_exact(1, 2.5), "gains = 2.5"),
        (lambda: tango_interval(3, 9, 11, confidence=0.95), r"losses \+ gains = 12 exceeds n = 11"),
        (lambda: tango_interval(0, 0, 0, confidence=0.95), "n = 0"),
        (lambda: tango_interval(1, 1, 9, confidence=1.0), "confidence = 1.0"),
        (lambda: paired_binary([], [], confidence=0.95), "baseline has shape"),
        (lambda: paired_binary([1], [1, 0], confidence=0.95), "1 items, variant 2: pair them"),
        (lambda: paired_binary([1, 0], [1, 0.5], confidence=0.95), r"variant\[1\] = 0.5 .* 0 or 1"),
        (lambda: paired_binary([1, None], [1, 0], confidence=0.95), r"baseline\[1\] = nan"),
        (lambda: paired_binary(["A"], [1], confidence=0.95), "baseline is not all numbers"),
        (lambda: paired_binary([[1], [0]], [1, 0], confidence=0.95), r"shape \(2, 1\)"),
        (lambda: holm({"a": 0.01, "b": math.nan}), "p of b = nan"),
        (lambda: holm({"a": 1.2}), r"p of a = 1.2 is outside \[0, 1\]"),
        (lambda: tost_from_interval(Interval(0, 0, 0.9), margin=0, alpha=0.05), "margin = 0 "),
        (lambda: tost_from_interval(Interval(0, 0, 0.9), margin=1, alpha=0.5), "alpha = 0.5"),
        (lambda: tost_from_interval(Interval(math.nan, 0, 0.9), margin=1, alpha=0.05), "NaN"),
    ],
)
def test_bad_input_names_the_value(call, message):
    with pytest.raises(ValueError, match=message) as refusal:
        call()
    assert "\n" not in str(refusal.value)
