"""Power against enumeration, simulation, and the figures the design rests on."""

import math

import numpy as np
import pytest
from scipy.stats import multinomial, nct, norm, t, ttest_1samp
from statsmodels.stats.power import TTestPower
from tools.sample_size import (
    equivalence_power,
    items_for_equivalence,
    items_for_loss,
    smallest_claimable_margin,
)

from helpers.statistics.intervals import (
    detectable_loss,
    detectable_mean_difference,
    mcnemar_exact,
    mcnemar_power,
    tango_interval,
    tost_from_interval,
)

USUAL = {"alpha": 0.05, "power": 0.8}


def enumerated_power(n: int, loss: float, gain_rate: float, alpha: float) -> float:
    """Sum over every (losses, gains) whose own p rejects in the direction of a loss."""
    rates = [loss + gain_rate, gain_rate, 1 - loss - 2 * gain_rate]
    return sum(
        multinomial.pmf([losses, gains, n - losses - gains], n, rates)
        for losses in range(n + 1)
        for gains in range(min(losses, n + 1 - losses))
        if losses + gains <= n and mcnemar_exact(losses, gains) <= alpha
    )


# Exact McNemar


@pytest.mark.parametrize("n", [1, 5, 6, 20, 31])
@pytest.mark.parametrize("gain_rate", [0.0, 0.05, 0.2])
@pytest.mark.parametrize("alpha", [0.05, 0.0625, 0.01])  # 0.0625 is itself the p of 5 losses
def test_power_is_the_sum_over_all_outcomes(n, gain_rate, alpha):
    for loss in (0.0, 0.1, 0.6):
        computed = mcnemar_power(n, loss=loss, gain_rate=gain_rate, alpha=alpha)
        assert computed == pytest.approx(enumerated_power(n, loss, gain_rate, alpha), abs=1e-9)


def test_power_agrees_with_simulated_studies():
    rng, n, studies = np.random.default_rng(0), 1000, 20_000
    losses, gains, _ = rng.multinomial(n, [0.0428, 0.02, 0.9372], studies).T
    seen = {pair: mcnemar_exact(*map(int, pair)) for pair in set(zip(losses, gains, strict=True))}
    p = np.array([seen[pair] for pair in zip(losses, gains, strict=True)])
    simulated = np.mean((p <= 0.05) & (losses > gains))
    expected = mcnemar_power(n, loss=0.0228, gain_rate=0.02, alpha=0.05)
    assert simulated == pytest.approx(expected, abs=4 * math.sqrt(0.16 / studies))


TABLE = {  # n: smallest detectable loss in points, by background gain rate 0, 2, 5, 10 %
    20: (37, 41, 46, 53),
    50: (15, 19, 23, 28),
    100: (8, 11, 14, 18),
    200: (4, 7, 9, 11),
    500: (1.6, 3.6, 5.0, 6.8),
    1000: (0.8, 2.4, 3.4, 4.6),
}


@pytest.mark.parametrize("n", TABLE)
def test_detectable_loss_reproduces_the_design_table(n):
    """The table was searched upwards in steps of 0.2 points, then rounded; the roots are exact."""
    for gain_rate, tabled in zip((0.0, 0.02, 0.05, 0.10), TABLE[n], strict=True):
        points = 100 * detectable_loss(n, gain_rate=gain_rate, **USUAL)
        stepped = math.ceil(points / 0.2) * 0.2
        assert round(stepped, 0 if n <= 200 else 1) == tabled


@pytest.mark.parametrize(("n", "gain_rate"), [(6, 0.0), (20, 0.02), (200, 0.1), (11873, 0.05)])
def test_detectable_loss_is_the_smallest(n, gain_rate):
    loss = detectable_loss(n, gain_rate=gain_rate, **USUAL)
    at = [mcnemar_power(n, loss=x, gain_rate=gain_rate, alpha=0.05) for x in (0.999 * loss, loss)]
    assert at[0] < 0.8 == pytest.approx(at[1], abs=1e-6)


def test_no_loss_is_detectable_with_five_items():
    assert detectable_loss(5, gain_rate=0.0, **USUAL) is None
    assert detectable_loss(6, gain_rate=0.0, **USUAL) == pytest.approx(0.8 ** (1 / 6))
    assert detectable_loss(20, gain_rate=0.45, **USUAL) is None


@pytest.mark.parametrize(("loss", "gain_rate"), [(0.1, 0.0), (0.05, 0.02), (0.2, 0.1)])
def test_items_for_loss_is_where_a_scan_first_and_finally_arrives(loss, gain_rate):
    power = np.array(
        [mcnemar_power(n, loss=loss, gain_rate=gain_rate, alpha=0.05) for n in range(1, 500)]
    )
    fewest = items_for_loss(loss, gain_rate=gain_rate, **USUAL)
    assert fewest == np.flatnonzero(power >= 0.8)[0] + 1
    assert fewest == np.flatnonzero(power < 0.8)[-1] + 2
    assert detectable_loss(fewest, gain_rate=gain_rate, **USUAL) <= loss


def test_no_benchmark_detects_a_vanishing_loss():
    assert items_for_loss(1e-5, gain_rate=0.05, **USUAL) is None


# Equivalence


@pytest.mark.parametrize(("n", "points"), [(20, 11.9), (100, 2.6), (200, 1.3), (1000, 0.3)])
def test_smallest_margin_without_flips(n, points):
    margin = smallest_claimable_margin(n, alpha=0.05)
    assert round(100 * margin, 1) == points
    interval = tango_interval(0, 0, n, confidence=0.90)
    assert interval.high == pytest.approx(margin, rel=1e-9)
    assert tost_from_interval(interval, margin=1.001 * margin, alpha=0.05)
    assert not tost_from_interval(interval, margin=0.999 * margin, alpha=0.05)


def test_items_for_equivalence_reproduces_the_design_figure():
    assert items_for_equivalence(0.03, flip_rate=0.05, **USUAL) == 476


def enumerated_equivalence(n: int, margin: float, flip_rate: float) -> float:
    """Sum over every (losses, gains) that the report would call equivalent."""
    power = 0.0
    for losses in range(min(n, 50) + 1):
        for gains in range(min(n - losses, 50) + 1):
            rates = [flip_rate / 2, flip_rate / 2, 1 - flip_rate]
            chance = multinomial.pmf([losses, gains, n - losses - gains], n, rates)
            if chance > 1e-10:
                interval = tango_interval(losses, gains, n, confidence=0.90)
                power += chance * tost_from_interval(interval, margin=margin, alpha=0.05)
    return power


@pytest.mark.parametrize(
    ("n", "margin", "flip_rate"),
    [(20, 0.2, 0.1), (30, 0.3, 1.0), (40, 0.01, 0.1), (100, 0.05, 0.0), (476, 0.03, 0.05)],
)
def test_equivalence_power_is_the_sum_over_all_outcomes(n, margin, flip_rate):
    computed = equivalence_power(n, margin=margin, flip_rate=flip_rate, alpha=0.05)
    assert computed == pytest.approx(enumerated_equivalence(n, margin, flip_rate), abs=1e-6)


def test_the_approximate_item_count_falls_short_of_its_power():
    """Why both functions exist: the figure for planning is a first guess."""
    assert equivalence_power(476, margin=0.03, flip_rate=0.05, alpha=0.05) < 0.75
    assert equivalence_power(600, margin=0.03, flip_rate=0.05, alpha=0.05) > 0.8


@pytest.mark.parametrize("margin", [0.01, 0.03, 0.1])
def test_equivalence_never_needs_fewer_items_than_zero_flips_do(margin):
    n = items_for_equivalence(margin, flip_rate=0.0, **USUAL)
    assert smallest_claimable_margin(n, alpha=0.05) < margin
    assert smallest_claimable_margin(n - 1, alpha=0.05) >= margin


# Means


@pytest.mark.parametrize("clusters", [3, 20, 300])
def test_detectable_mean_difference_solves_the_noncentral_t(clusters):
    difference = detectable_mean_difference(0.02, clusters=clusters, **USUAL)
    critical = t.isf(0.025, clusters - 1)
    shift = difference / 0.02
    power = nct.sf(critical, clusters - 1, shift) + nct.cdf(-critical, clusters - 1, shift)
    assert power == pytest.approx(0.8, abs=1e-6)


def test_detectable_mean_difference_tends_to_the_normal_figure():
    detectable = detectable_mean_difference(0.01, clusters=10**5, **USUAL)
    assert detectable == pytest.approx(0.01 * (norm.isf(0.025) + norm.ppf(0.8)), rel=1e-4)


def test_detectable_mean_difference_is_detected_in_simulation():
    rng, clusters, studies = np.random.default_rng(1), 25, 10_000
    difference = detectable_mean_difference(1 / 5, clusters=clusters, **USUAL)
    p = ttest_1samp(rng.normal(difference, 1.0, (studies, clusters)), 0, axis=1).pvalue
    assert np.mean(p <= 0.05) == pytest.approx(0.8, abs=4 * math.sqrt(0.16 / studies))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: detectable_loss(0, gain_rate=0.0, **USUAL), "n = 0"),
        (lambda: detectable_loss(20, gain_rate=0.5, **USUAL), "gain_rate = 0.5"),
        (lambda: detectable_loss(20, gain_rate=math.nan, **USUAL), "gain_rate = nan"),
        (lambda: detectable_loss(20, gain_rate=0.0, alpha=5, power=0.8), "alpha = 5 is outside"),
        (lambda: detectable_loss(20, gain_rate=0.0, alpha=0.05, power=0.05), "not above alpha"),
        (lambda: mcnemar_power(20, loss=0.9, gain_rate=0.1, alpha=0.05), "loss = 0.9"),
        (lambda: items_for_loss(0.0, gain_rate=0.1, **USUAL), "items_for_equivalence"),
        (lambda: items_for_loss(-0.1, gain_rate=0.1, **USUAL), "loss = -0.1"),
        (lambda: smallest_claimable_margin(20, alpha=0.5), r"alpha = 0.5 is outside \(0, 0.5\)"),
        (lambda: items_for_equivalence(3, flip_rate=0.05, **USUAL), "margin = 3"),
        (lambda: items_for_equivalence(0.03, flip_rate=5, **USUAL), "flip_rate = 5"),
        (lambda: equivalence_power(0, margin=0.03, flip_rate=0.05, alpha=0.05), "n = 0"),
        (lambda: detectable_mean_difference(0.0, clusters=9, **USUAL), "standard_error = 0.0"),
        (lambda: detectable_mean_difference(math.nan, clusters=9, **USUAL), "standard_error = nan"),
        (lambda: detectable_mean_difference(0.1, clusters=1, **USUAL), "clusters = 1"),
    ],
)
def test_bad_input_names_the_value(call, message):
    with pytest.raises(ValueError, match=message) as refusal:
        call()
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("clusters", [3, 20, 59, 60, 400])
@pytest.mark.parametrize("alpha", [0.0125, 0.05])
def test_detectable_mean_difference_has_its_power_by_statsmodels(clusters, alpha):
    """59 clusters at 0.0125 is where statsmodels' own solver goes astray."""
    detectable = detectable_mean_difference(1.0, clusters=clusters, alpha=alpha, power=0.8)
    effect = detectable / math.sqrt(clusters)
    power = TTestPower().power(effect, nobs=clusters, alpha=alpha, alternative="larger")
    two_sided = TTestPower().power(effect, nobs=clusters, alpha=alpha)
    assert detectable > 0
    assert two_sided == pytest.approx(0.8, abs=1e-3)
    assert power > two_sided
