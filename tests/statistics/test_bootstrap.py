"""The clustered bootstrap against exact enumeration, scipy on plain items, and known truths."""

import itertools
import math
import tracemalloc

import numpy as np
import pytest
from scipy import stats

from helpers.statistics.intervals import bootstrap_difference, bootstrap_mean, mcnemar_exact

USUAL = {"confidence": 0.95, "resamples": 2000, "seed": 0}


@pytest.fixture
def passages() -> tuple[np.ndarray, list[str]]:
    """Skewed scores of 21 items in 8 passages of 1 to 5 items."""
    rng = np.random.default_rng(3)
    sizes = [1, 5, 2, 3, 1, 4, 2, 3]
    values = np.concatenate([rng.exponential(1.0) + rng.normal(0, 0.3, size) for size in sizes])
    return values, [f"passage {i}" for i, size in enumerate(sizes) for _ in range(size)]


def cluster_sums(values, clusters) -> tuple[np.ndarray, np.ndarray]:
    groups = [values[np.array(clusters) == name] for name in dict.fromkeys(clusters)]
    return np.array([g.sum() for g in groups]), np.array([g.size for g in groups])


def exact_bootstrap(sums, sizes) -> tuple[np.ndarray, np.ndarray]:
    """Every resample of the clusters: its mean and its probability, by rising mean."""
    count = sums.size
    drawn = np.array(
        [
            np.bincount(combination, minlength=count)
            for combination in itertools.combinations_with_replacement(range(count), count)
        ]
    )
    means = drawn @ sums / (drawn @ sizes)
    chances = stats.multinomial.pmf(drawn, count, np.full(count, 1 / count))
    order = np.argsort(means)
    return means[order], chances[order]


# The interval


def test_interval_is_the_exact_bca_of_all_resamples(passages):
    """Efron 1987 by enumeration: 6,435 resamples of 8 passages, with their probabilities."""
    sums, sizes = cluster_sums(*passages)
    means, chances = exact_bootstrap(sums, sizes)
    mean = sums.sum() / sizes.sum()
    bias = stats.norm.ppf(chances[means < mean - 1e-12].sum())
    left_out = np.array([np.delete(sums, i).sum() / np.delete(sizes, i).sum() for i in range(8)])
    spread = left_out.mean() - left_out
    acceleration = (spread**3).sum() / (6 * (spread**2).sum() ** 1.5)
    estimate = bootstrap_mean(*passages, confidence=0.95, resamples=100_000, seed=0)
    for limit, z in ((estimate.interval.low, -1.96), (estimate.interval.high, 1.96)):
        level = stats.norm.cdf(bias + (bias + z) / (1 - acceleration * (bias + z)))
        assert chances[means <= limit].sum() == pytest.approx(level, abs=0.004)


def test_interval_agrees_with_scipy_where_each_item_is_its_own_cluster():
    values = np.random.default_rng(0).gamma(0.5, size=60)
    estimate = bootstrap_mean(values, range(60), confidence=0.9, resamples=20_000, seed=1)
    expected = stats.bootstrap(
        (values,), np.mean, confidence_level=0.9, n_resamples=20_000, method="BCa", rng=2
    )
    tolerance = 0.05 * expected.standard_error
    assert estimate.mean == pytest.approx(values.mean())
    assert estimate.interval.low == pytest.approx(expected.confidence_interval.low, abs=tolerance)
    assert estimate.interval.high == pytest.approx(expected.confidence_interval.high, abs=tolerance)


def clustered_study(rng, passages: int) -> tuple[np.ndarray, list[int]]:
    """Skewed differences, true mean 0, one passage effect shared by 1 to 5 items."""
    sizes = rng.integers(1, 6, passages)
    effects = np.repeat(rng.exponential(1.0, passages) - 1, sizes)
    values = effects + rng.normal(0, 0.5, effects.size)
    return values, [i for i, size in enumerate(sizes) for _ in range(size)]


def test_interval_covers_the_truth_and_ignoring_passages_does_not():
    rng, studies, covered, covered_by_items = np.random.default_rng(5), 400, 0, 0
    for seed in range(studies):
        values, clusters = clustered_study(rng, 60)
        settings = {"confidence": 0.95, "resamples": 800, "seed": seed}
        estimate = bootstrap_mean(values, clusters, **settings).interval
        items = bootstrap_mean(values, range(values.size), **settings).interval
        covered += estimate.low <= 0 <= estimate.high
        covered_by_items += items.low <= 0 <= items.high
    noise = 3 * math.sqrt(0.95 * 0.05 / studies)
    assert covered / studies == pytest.approx(0.94, abs=noise)
    assert covered_by_items / studies < 0.95 - noise


def test_mean_counts_items_not_passages():
    estimate = bootstrap_mean([1.0, 1.0, 1.0, 0.0], ["a", "a", "a", "b"], **USUAL)
    assert (estimate.mean, estimate.n, estimate.clusters) == (0.75, 4, 2)


def test_interval_moves_and_scales_with_the_scores(passages):
    values, clusters = passages
    plain = bootstrap_mean(values, clusters, **USUAL)
    moved = bootstrap_mean(3 - 2 * values, clusters, **USUAL)
    assert moved.mean == pytest.approx(3 - 2 * plain.mean)
    assert moved.interval.low == pytest.approx(3 - 2 * plain.interval.high, abs=0.02)
    assert moved.standard_error == pytest.approx(2 * plain.standard_error)


def test_standard_error_is_the_textbook_one_for_independent_items():
    values = np.random.default_rng(0).normal(size=30)
    estimate = bootstrap_mean(values, range(30), **USUAL)
    assert estimate.standard_error == pytest.approx(values.std(ddof=1) / math.sqrt(30))


def test_standard_error_sees_that_copies_bring_nothing():
    values = np.random.default_rng(0).normal(size=30)
    once = bootstrap_mean(values, range(30), **USUAL)
    copied = bootstrap_mean(np.repeat(values, 4), np.repeat(range(30), 4), **USUAL)
    assert copied.standard_error == pytest.approx(once.standard_error)
    assert copied.interval.low == pytest.approx(once.interval.low)


def test_weights_are_repetitions():
    """A document's mean loss weighted by its tokens is the mean over the tokens."""
    losses, tokens, names = [2.0, 3.5, 2.5], [4, 1, 3], ["a", "b", "c"]
    weighted = bootstrap_mean(losses, names, weights=tokens, **USUAL)
    repeated = bootstrap_mean(np.repeat(losses, tokens), np.repeat(names, tokens), **USUAL)
    assert weighted.mean == pytest.approx(repeated.mean)
    assert weighted.interval.high == pytest.approx(repeated.interval.high)
    assert weighted.n == 3


def test_same_seed_same_numbers_whatever_the_item_order(passages):
    values, clusters = passages
    order = np.random.default_rng(1).permutation(values.size)
    first = bootstrap_difference(values, clusters, **USUAL)
    repeated = bootstrap_difference(values, clusters, **USUAL)
    shuffled = bootstrap_difference(values[order], [clusters[i] for i in order], **USUAL)
    assert first == repeated
    assert shuffled.interval.low == pytest.approx(first.interval.low)
    assert shuffled.p == first.p


def test_memory_stays_small():
    values = np.random.default_rng(0).normal(size=500)
    tracemalloc.start()
    bootstrap_difference(values, range(500), confidence=0.95, resamples=10_000, seed=0)
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak_bytes < 50e6


# The test


def enumerated_p(sums) -> float:
    signs = np.array(list(itertools.product((-1, 1), repeat=len(sums))))
    totals = np.abs(signs @ sums)
    return float(np.mean(totals >= abs(np.sum(sums)) - 1e-9))


def test_p_is_the_share_of_sign_patterns_as_extreme(passages):
    values, clusters = passages
    for shift in (0.0, 0.5, 1.0):
        estimate = bootstrap_difference(values - shift, clusters, **USUAL)
        assert estimate.p_method == "exact"
        assert estimate.p == pytest.approx(enumerated_p(cluster_sums(values - shift, clusters)[0]))


def test_drawn_p_agrees_with_the_exact_one():
    values = np.random.default_rng(4).normal(0.5, 1.0, 14)
    drawn = bootstrap_difference(values, range(14), confidence=0.95, resamples=16_383, seed=0)
    exact = bootstrap_difference(values, range(14), confidence=0.95, resamples=16_384, seed=0)
    assert (drawn.p_method, exact.p_method) == ("monte carlo", "exact")
    assert exact.p == pytest.approx(enumerated_p(values))
    noise = 4 * math.sqrt(exact.p * (2 - exact.p) / 16_383)  # twice a one-sided share
    assert drawn.p == pytest.approx(exact.p, abs=noise)


@pytest.mark.parametrize(("losses", "gains"), [(6, 0), (5, 1), (9, 3), (4, 4)])
def test_p_of_single_flips_is_exact_mcnemar(losses, gains):
    differences = [-1] * losses + [1] * gains + [0] * 40
    estimate = bootstrap_difference(
        differences, range(len(differences)), **{**USUAL, "resamples": 5000}
    )
    assert estimate.p_method == "exact"
    assert estimate.p == pytest.approx(mcnemar_exact(losses, gains))


def test_drawn_p_is_never_zero():
    estimate = bootstrap_difference(np.linspace(1, 2, 40), range(40), **USUAL)
    assert estimate.p == pytest.approx(2 / 2001)


def test_p_errs_as_often_as_it_says():
    """No true difference, passages shared: 5 % false alarms; without passages, more."""
    rng, studies, alarms, alarms_by_items = np.random.default_rng(6), 400, 0, 0
    settings = {"confidence": 0.95, "resamples": 400}
    for seed in range(studies):
        effects = np.repeat(rng.normal(0, 1, 30), 4)
        values = effects + rng.normal(0, 0.5, 120)
        by_passage = bootstrap_difference(values, np.repeat(range(30), 4), seed=seed, **settings)
        alarms += by_passage.p <= 0.05
        alarms_by_items += bootstrap_difference(values, range(120), seed=seed, **settings).p <= 0.05
    noise = 3 * math.sqrt(0.95 * 0.05 / studies)
    assert alarms / studies == pytest.approx(0.05, abs=noise)
    assert alarms_by_items / studies > 0.05 + noise


# Nothing to resample


def test_no_difference_anywhere_is_flagged():
    estimate = bootstrap_difference([0.0] * 6, list("aabbcc"), **USUAL)
    assert estimate.degenerate
    assert (estimate.mean, estimate.interval.low, estimate.interval.high) == (0, 0, 0)
    assert (estimate.standard_error, estimate.p, estimate.p_method) == (0, 1, "exact")


def test_the_same_difference_everywhere_is_flagged_but_tested():
    estimate = bootstrap_difference([0.1] * 8, range(8), **USUAL)
    assert estimate.degenerate
    assert estimate.interval.low == estimate.interval.high == pytest.approx(0.1)
    assert estimate.p == pytest.approx(2 / 2**8)


def test_rounding_noise_is_not_spread():
    estimate = bootstrap_mean([0.1, 0.2, 0.3, 0.3, 0.3 - 1e-16, 0.0], list("aaabbb"), **USUAL)
    assert estimate.degenerate


def test_a_tiny_real_difference_is_not_degenerate():
    estimate = bootstrap_difference([1e-9, 3e-9, 2e-9, 2.5e-9], range(4), **USUAL)
    assert not estimate.degenerate
    assert estimate.interval.low < estimate.interval.high


@pytest.mark.filterwarnings("ignore:.*:RuntimeWarning")
def test_an_undefined_interval_is_refused():
    """A spread whose square is 0 in floating point leaves no acceleration."""
    with pytest.raises(ValueError, match=r"undefined .* 3 clusters at resamples = 2000: raise it"):
        bootstrap_mean([1e-200, 3e-200, 2.5e-200], ["a", "b", "c"], **USUAL)


# What cannot be computed is refused, on one line


@pytest.mark.parametrize("function", [bootstrap_mean, bootstrap_difference])
@pytest.mark.parametrize(
    ("values", "clusters", "changed", "message"),
    [
        ([], [], {}, "has shape"),
        ([0.1, math.nan], ["a", "b"], {}, r"\[1\] = nan"),
        ([0.1, 0.2], ["a", "a"], {}, "all 2 items are in cluster 'a': .* more passages"),
        ([0.1, 0.2], ["a"], {}, "clusters has 1 entries for 2 items"),
        ([0.1, 0.2], ["a", None], {}, r"clusters\[1\] = None"),
        ([0.1, 0.2], ["a", math.nan], {}, r"clusters\[1\] = nan"),
        ([0.1, 0.2], ["a", "b"], {"weights": [1.0]}, "weights has 1 entries"),
        ([0.1, 0.2], ["a", "b"], {"weights": [1.0, 0.0]}, "weight is 0.0, not above 0"),
        ([0.1, 0.2], ["a", "b"], {"confidence": 95}, "confidence = 95"),
        ([0.1, 0.2], ["a", "b"], {"resamples": 99}, "resamples = 99 .* from 100 up"),
        ([0.1, 0.2], ["a", "b"], {"resamples": 1e4}, "resamples = 10000.0"),
        ([0.1, 0.2], ["a", "b"], {"seed": -1}, "seed = -1"),
    ],
)
def test_bad_input_names_the_value(function, values, clusters, changed, message):
    with pytest.raises(ValueError, match=message) as refusal:
        function(values, clusters, **{**USUAL, **changed})
    assert "\n" not in str(refusal.value)


def test_errors_use_the_name_of_the_argument():
    with pytest.raises(ValueError, match=r"^differences\[0\] = nan"):
        bootstrap_difference([math.nan, 0.1], ["a", "b"], **USUAL)


def test_one_differing_cluster_is_as_likely_either_way():
    estimate = bootstrap_difference(
        [0, 0, 1, 0, 0], list("abcde"), confidence=0.95, resamples=200, seed=1
    )
    assert estimate.p == 1.0


@pytest.mark.parametrize("size", [1.0, 1e-9])
def test_last_bits_of_a_few_clusters_change_nothing(size):
    """Two in nine resamples of three clusters are the sample in another order: they tie."""
    clusters, chance = ["a", "a", "b", "b", "c", "c"], np.random.default_rng(3)
    for seed in range(40):
        scores = size * chance.normal(1, 0.5, 6)
        shaken = scores * (1 + chance.choice([-1, 0, 1], 6) * 2.0**-52)
        settings = {"confidence": 0.95, "resamples": 200, "seed": seed}
        first, second = (bootstrap_mean(x, clusters, **settings) for x in (scores, shaken))
        ends = [(x.interval.low / size, x.interval.high / size) for x in (first, second)]
        assert ends[0] == pytest.approx(ends[1], rel=1e-9)
