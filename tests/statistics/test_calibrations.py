"""Where the KL of one more draw lies, and which calibrations give another."""

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import STUDY
from helpers.statistics.checks.recomputed_graded_study import calibrations_block
from helpers.statistics.recipe_parts import calibration_effects
from helpers.statistics.verdicts import VariantAnswers
from helpers.study.schema import Study

NAME = "smoothquant_w8a8"
FAILED = {"name": "a gate", "passed": False, "measured": "1", "limit": "0"}


def study_of(draws: int) -> Study:
    data = yaml.safe_load(STUDY)
    smooth = data["variants"][NAME]
    data["models"] = {"base": data["models"]["base"]}
    data["calibrations"] = {"few": data["calibration"] | {"items": 3}}
    data["variants"][NAME] = smooth | {"repeats": draws}
    data["variants"]["of_few"] = smooth | {"calibration": "few"}
    data["variants"]["alone"] = {"preset": "o3", "calibration": "few"}  # no other like it
    return Study.model_validate(data)


def answered(kl: float | None, gates: tuple = ()) -> VariantAnswers:
    """A variant with this KL a token, over two passages of unequal length."""
    tokens = (10, 30)
    rows = [
        {"id": str(n), "tokens": t, "kl": None if kl is None else kl * t, "nll": 1.0}
        for n, t in enumerate(tokens)
    ]
    return VariantAnswers({}, rows, list(gates))


def effects(kls: list, of_few, gates: tuple = ()):
    """(effects by the report, the same by the second program)."""
    study = study_of(len(kls))
    first, *further = [answered(kl) for kl in kls]
    answers = {("base", name): answered(0.0) for name in study.variants}
    answers |= {("base", NAME): first, ("base", "of_few"): answered(of_few, gates)}
    draws = {("base", NAME): further} if further else {}
    return calibration_effects(study, answers, draws), calibrations_block(study, answers, draws)


def test_the_interval_of_three_draws_is_the_one_of_the_table():
    """t of two degrees of freedom is 4.3027; mean 2, standard deviation 1."""
    [effect], _ = effects([1.0, 2.0, 3.0], 6.9)
    assert (effect.variant, effect.reference, effect.draws) == ("of_few", NAME, 3)
    half = 4.30265 * np.sqrt(1 + 1 / 3)
    assert [effect.low, effect.high] == pytest.approx([2 - half, 2 + half], rel=1e-5)
    assert effect.place == "within"
    assert effects([1.0, 2.0, 3.0], 2 + half + 0.001)[0][0].place == "above"
    assert effects([1.0, 2.0, 3.0], 2 - half - 0.001)[0][0].place == "below"


@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.floats(0.001, 1.0), min_size=1, max_size=6),
    st.one_of(st.none(), st.floats(0.0, 2.0)),
)
def test_a_second_program_finds_the_same(kls, kl):
    [effect], [row] = effects(kls, kl)
    assert (
        row["place"] == effect.place
        or min(abs(effect.kl - effect.low), abs(effect.kl - effect.high)) < 1e-9
    )
    for key in ("kl", "low", "high"):
        ours, theirs = getattr(effect, key), row[key]
        assert (ours is None) == (theirs is None)
        assert ours is None or ours == pytest.approx(theirs, rel=1e-6, abs=1e-9)


def test_of_draws_of_one_kind_as_many_lie_outside_as_the_confidence_says():
    rng = np.random.default_rng(7)
    outside = 0
    for _ in range(400):
        *draws, one_more = rng.normal(0.05, 0.004, 5)
        outside += effects(list(draws), one_more)[0][0].place != "within"
    assert 0.02 < outside / 400 < 0.09  # 0.05, and four standard errors of 400


@pytest.mark.parametrize(
    ("kls", "kl", "gates"),
    [
        ([0.1, 0.2], 0.9, ()),  # two draws say too little
        ([0.1, 0.2, None], 0.9, ()),  # leaving a draw out would choose by its result
        ([0.1, 0.2, 0.3], None, ()),
        ([0.1, 0.2, 0.3], 0.9, (FAILED | {"invalidates": "shared_text"},)),
        ([0.1, 0.2, 0.3], 0.9, (FAILED | {"invalidates": "whole variant"},)),
    ],
)
def test_nothing_is_said_without_draws_or_where_a_check_fails(kls, kl, gates):
    [effect], [row] = effects(kls, kl, gates)
    assert effect.place == row["place"] == "unknown"


def test_a_failed_check_on_a_set_does_not_touch_the_text():
    [effect], _ = effects([0.1, 0.2, 0.3], 5.0, (FAILED | {"invalidates": "arc"},))
    assert effect.place == "above"
