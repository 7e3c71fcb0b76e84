"""Statistics computed a second time: right ones agree, and wrong ones make a comparison invalid."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as some

from helpers.evaluation import scoring
from helpers.statistics import intervals, verdicts
from helpers.statistics.checks import recomputed_statistics as again
from helpers.statistics.checks.recomputed_verdicts import (
    best_constant,
    checked_verdicts,
    comparison_rows,
    disagreements,
    repeats_at_its_end,
)
from helpers.statistics.intervals import (
    detectable_loss,
    detectable_mean_difference,
    mcnemar_exact,
    tango_interval,
)
from helpers.statistics.verdicts import VariantPredictions, study_verdicts
from helpers.study.loading import load_study

DRAWING = again.BootstrapSettings(0.95, 2000, 7)
ITEMS = 60


@pytest.fixture
def judged(study_settings, write_study):
    """(study, answers): a smoothed variant declared on both sets of both models."""
    settings = study_settings
    for name in ("arc", "squad_v2"):
        settings["evaluation"]["datasets"][name]["items"] = ITEMS
    settings["statistics"]["resamples"] = 2000
    settings["statistics"]["primary"] = [
        {"model": m, "dataset": d, "baseline": "noquant", "variant": "smoothquant_w8a8"}
        for m in ("base", "tuned")
        for d in ("arc", "squad_v2")
    ]
    study, rng = load_study(write_study(settings)), np.random.default_rng(5)
    answers = {}
    for model, dataset in itertools.product(study.models, study.evaluation.datasets):
        right = rng.random(ITEMS) < 0.7
        for place, variant in enumerate(study.variants):
            flipped = rng.random(ITEMS) < 0.15 * place
            rows = [row_of(i, dataset, bool(x)) for i, x in enumerate(right ^ flipped)]
            rng.shuffle(rows)
            answers[model, dataset, variant] = VariantPredictions(variant, rows)
    return study, answers


def row_of(i: int, dataset: str, right: bool) -> dict:
    gold = f"{'ABCD'[i % 4]}" if dataset == "arc" else f"answer {i}"
    answer = gold if right else f"other {i}"
    row = {"id": f"item-{i:03}", "golds": [gold], "output": answer, "parsed": answer}
    row |= {"status": "answered", "finish_reason": "stop", "score": float(right)}
    row |= {"prompt_hash": f"hash {i}", "prompt_tokens": 9, "output_tokens": 3}
    return row | {"cluster": f"passage {i // 2}" if dataset == "squad_v2" else f"item-{i:03}"}


def invalid(study, answers) -> list[str]:
    """Reasons of the comparisons that are invalid because their figures differ."""
    verdicts = checked_verdicts(study, answers).values()
    return [v.reason for v in verdicts if v.kind == "invalid" and "do not follow" in v.reason]


def test_right_figures_agree(judged):
    study, answers = judged
    assert disagreements(study, answers, study_verdicts(study, answers)) == {}
    assert checked_verdicts(study, answers) == study_verdicts(study, answers)
    assert len(study_verdicts(study, answers)) == 8


@pytest.mark.parametrize("n", [1, 2, 7, 40])
def test_two_ways_to_tango_and_mcnemar_agree(n):
    for losses, gains in itertools.product(range(0, n + 1, max(1, n // 5)), repeat=2):
        if losses + gains > n:
            continue
        interval = tango_interval(losses, gains, n, confidence=0.95)
        assert again.tango_limits(losses, gains, n, 0.95) == pytest.approx(
            (interval.low, interval.high), abs=1e-9
        )
        assert again.mcnemar_p(losses, gains) == pytest.approx(mcnemar_exact(losses, gains))


@pytest.mark.parametrize(("n", "gain_rate"), [(5, 0.0), (20, 0.0), (100, 0.05), (150, 0.3)])
def test_two_ways_to_the_detectable_loss_agree(n, gain_rate):
    expected = detectable_loss(n, gain_rate=gain_rate, alpha=0.05, power=0.8)
    recomputed = again.detectable_loss(n, gain_rate, 0.05, 0.8)
    assert (
        recomputed == expected
        if expected is None
        else recomputed == pytest.approx(expected, abs=1e-6)
    )


def test_two_ways_to_the_detectable_mean_agree():
    expected = detectable_mean_difference(0.03, clusters=20, alpha=0.05, power=0.8)
    assert again.detectable_mean_loss(0.03, 20, 0.05, 0.8) == pytest.approx(expected, abs=1e-6)
    assert again.detectable_mean_loss(0.03, 4, 0.05, 0.8) is None


def test_the_exact_sign_flip_test_is_the_sum_over_all_signs():
    changes = [1, 0, -1, 1, 1, 1, 0, 1, -1, 1]
    clusters = ["a", "a", "b", "c", "d", "e", "e", "f", "g", "g"]
    sums = [1, -1, 1, 1, 1, 1, 0]
    signs = list(itertools.product((-1, 1), repeat=len(sums)))
    extreme = sum(abs(np.dot(s, sums)) >= abs(sum(sums)) for s in signs)
    p, room = again.sign_flip_p(changes, clusters, 2000)
    assert p == pytest.approx(extreme / len(signs))
    assert room <= 1e-9


def test_the_jackknife_of_independent_items_is_the_standard_error():
    values = np.random.default_rng(3).normal(size=50)
    found = again.clustered_mean(values, [f"{i}" for i in range(50)], DRAWING)
    assert found.standard_error == pytest.approx(values.std(ddof=1) / 50**0.5)


# Failures: each leaves a plausible report.


def bootstrap_of_four_times_the_items(patch):
    """A bootstrap that resamples four times as many passages as there are; its p is right."""

    def quadrupled(true):
        def made(values, clusters, **options):
            names = [f"{c} {k}" for k in range(4) for c in clusters]
            wrong = true(list(values) * 4, names, **options)
            if not hasattr(wrong, "p"):
                return wrong
            return replace(wrong, p=true(values, clusters, **options).p)

        return made

    for name in ("bootstrap_mean", "bootstrap_difference"):
        patch.setattr(verdicts, name, quadrupled(getattr(verdicts, name)))


def sorted_rows_paired(patch):
    """Right answers paired with right answers: nearly all differences vanish."""

    def pair(baseline, variant):
        sides = (sorted(a.predictions, key=lambda row: row["score"]) for a in (baseline, variant))
        return list(zip(*sides, strict=True))

    patch.setattr(verdicts, "paired_predictions", pair)


def paired_by_position(patch):
    def pair(baseline, variant):
        return list(zip(baseline.predictions, variant.predictions, strict=True))

    patch.setattr(verdicts, "paired_predictions", pair)


def wrong_discordant_counts(patch):
    """All wrong answers of each side, those that both have wrong among them."""
    true = intervals.mcnemar_exact
    patch.setattr(intervals, "mcnemar_exact", lambda losses, gains: true(losses + 9, gains + 9))


def another_quantile(patch):
    true = intervals.tango_interval

    def narrower(losses, gains, n, *, confidence):
        return true(losses, gains, n, confidence=2 * confidence - 1)

    patch.setattr(intervals, "tango_interval", narrower)


def items_taken_for_independent(patch):
    patch.setattr(verdicts, "_cluster_of", lambda row: row["id"])


FAILURES = {
    bootstrap_of_four_times_the_items: "low",
    sorted_rows_paired: "losses",
    paired_by_position: "losses",
    wrong_discordant_counts: "p ",
    another_quantile: "low",
    items_taken_for_independent: "clusters",
}


@pytest.mark.bank("statistics", "{break_}", "figures that follow from the answers")
@pytest.mark.parametrize("break_", FAILURES, ids=lambda f: f.__name__)
def test_wrong_statistics_make_the_comparison_invalid(judged, monkeypatch, break_):
    break_(monkeypatch)
    reasons = invalid(*judged)
    assert reasons
    assert any(FAILURES[break_] in reason for reason in reasons)


@pytest.mark.bank("statistics", "Holm over the valid comparisons only")
def test_holm_over_the_valid_comparisons_only(judged, monkeypatch):
    """A variant that fails a check must not ease the tests of the others."""
    study, answers = judged
    broken = ("base", "arc", "smoothquant_w8a8")
    answers = answers | {
        broken: VariantPredictions("smoothquant_w8a8", answers[broken].predictions, "a check")
    }
    assert invalid(study, answers) == []
    true = verdicts.holm

    def eased(p_values):
        kept = {c: p for c, p in p_values.items() if p < 1}
        return dict.fromkeys(p_values, 1.0) | true(kept)

    monkeypatch.setattr(verdicts, "holm", eased)
    reasons = invalid(study, answers)
    assert reasons
    assert all("over all 4 declared" in reason for reason in reasons)


@pytest.mark.bank("statistics", "a bootstrap and its check wrong alike")
def test_a_bootstrap_and_its_check_wrong_alike_differ_from_the_jackknife(judged, monkeypatch):
    """The one assumption they share: that scipy is handed the passages once."""
    bootstrap_of_four_times_the_items(monkeypatch)
    true = again._bca_limits

    def quadrupled(sums, sizes, *options):
        return true(np.tile(sums, 4), np.tile(sizes, 4), *options)

    monkeypatch.setattr(again, "_bca_limits", quadrupled)
    assert any("by a jackknife" in reason for reason in invalid(*judged))


def test_rows_that_cannot_be_counted_again_stop_nothing(judged, monkeypatch):
    study, answers = judged
    verdicts = study_verdicts(study, answers)
    lost = {
        at: VariantPredictions(a.variant, a.predictions[at[2] != "noquant" :])
        for at, a in answers.items()
    }
    assert all(
        "cannot be computed again" in x for x in disagreements(study, lost, verdicts).values()
    )


GOLDS = {
    "arc": some.sampled_from("ABCD1234"),
    "boolq": some.sampled_from(["yes", "no"]),
    "openmath": some.sampled_from(["12", "12.0", "1,200", "1200", "3/4", "0.75", "x+1", "3x"]),
    "squad_v2": some.sampled_from(["The mill", "mill", "a mill.", "river", "the"]),
}


@pytest.mark.parametrize("adapter", GOLDS)
@given(data=some.data())
def test_two_ways_to_the_best_constant_agree(adapter, data):
    golds = some.lists(GOLDS[adapter], min_size=adapter != "squad_v2", max_size=3)
    rows = [{"golds": own} for own in data.draw(some.lists(golds, min_size=1, max_size=8))]
    best = scoring.best_fixed_answer(adapter, rows)
    assert best_constant(adapter, rows) == (best.answer, best.score)


@given(
    beginning=some.text("ab ", max_size=4),
    piece=some.text("abc\n", min_size=1, max_size=70),
    length=some.integers(0, 90),
)
def test_two_ways_to_a_repetition_agree(beginning, piece, length):
    text = beginning + (piece * 90)[:length]
    assert repeats_at_its_end(text) == scoring.ends_in_loop(text)


@pytest.mark.parametrize("score", [0.0, 1.0])
def test_a_wrong_best_constant_is_caught(judged, monkeypatch, score):
    """Too low, it would let a baseline pass that knows nothing."""
    study, answers = judged
    for (_, _, variant), side in answers.items():
        if variant == study.baseline and score == 0.0:
            side.predictions[:] = [r | {"golds": ["A"]} for r in side.predictions]
    monkeypatch.setattr(
        verdicts, "best_fixed_answer", lambda *_: scoring.FixedAnswer("answering “A”", score)
    )
    reasons = [row["reason"] for row in comparison_rows(study, answers, {}).values()]
    assert any("two computations disagree" in reason for reason in reasons)
