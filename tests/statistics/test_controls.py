"""A control is known by what it is, has one duty, and is told from one that failed in it."""

import math

import pytest

from helpers.core.records import WHOLE_VARIANT
from helpers.statistics.verdicts import (
    VariantAnswers,
    control_outcome,
    role_of,
    tie_rate,
    unexplained_changes,
)
from helpers.study.schema import Study

SMOOTH = {"alpha": 0.5, "targets": ["attention_input", "mlp_input"]}
ROLES = {
    "plain": ({}, "baseline"),
    "again": ({}, "repetition"),
    "half": ({"dtype": "bfloat16"}, "noise floor"),
    "smoothed": ({"smooth": SMOOTH}, "smoothing alone"),
    "broken": ({"recipe": "seed", "smooth": SMOOTH}, "broken on purpose"),
    "rounded": ({"preset": "w8a8"}, "without smoothing"),
    "whole": ({"preset": "w8a8", "smooth": SMOOTH}, None),
    "coarse": ({"preset": "o2"}, None),  # no other variant differs from it by smoothing alone
}
TEXT = [{"id": f"p{i}", "tokens": 100, "kl": 1e-6, "top1_agreements": 100} for i in range(10)]
HELD = {"name": "a gate", "passed": True, "measured": "0", "limit": "0"}


@pytest.fixture
def roles(study_settings) -> Study:
    study_settings["variants"] = {name: recipe for name, (recipe, _) in ROLES.items()}
    study_settings |= {"baseline": "plain"}
    study_settings["statistics"]["primary"] = []
    return Study.model_validate(study_settings)


def gate(passed: bool, guards: str = WHOLE_VARIANT) -> dict:
    return HELD | {"passed": passed, "invalidates": guards}


def scored(n: int, **changes) -> list[dict]:
    """Choices between two options of two tokens each, A a little likelier than B."""
    row = {"parsed": "A", "status": "answered", "logprobs": [-1.0, -1.001], "output_tokens": 4}
    return [{"id": f"i{i}"} | row | changes for i in range(n)]


def written(n: int, **changes) -> list[dict]:
    row = {"parsed": "12", "status": "answered", "output_tokens": 10}
    return [{"id": f"i{i}"} | row | changes for i in range(n)]


def asked(rows, *, gates=(HELD,), passages=TEXT, name: str = "arc") -> VariantAnswers:
    return VariantAnswers({name: rows}, passages, list(gates))


def test_a_control_is_known_by_what_it_is(roles):
    assert {name: role_of(roles, name) for name in ROLES} == {n: r for n, (_, r) in ROLES.items()}


def test_what_the_study_asks_about_has_no_duty(roles):
    assert control_outcome(roles, "whole", asked(scored(3)), asked(scored(3))) is None


@pytest.mark.parametrize("name", ["again", "smoothed"])
def test_equal_answers_are_equal(roles, name):
    outcome = control_outcome(roles, name, asked(scored(50)), asked(scored(50)))
    assert outcome.ok
    assert outcome.observed.startswith("50 of 50 answers equal the baseline's")


@pytest.mark.parametrize("name", ["again", "smoothed"])
def test_a_failed_check_breaks_the_duty_even_where_answers_agree(roles, name):
    for gates in ([gate(False)], [HELD, gate(False, "arc")], []):
        assert not control_outcome(roles, name, asked(scored(5), gates=gates), asked(scored(5))).ok


def test_a_choice_between_options_a_rounding_apart_may_change(roles):
    """Of five items one changed, and no log-probability moved by more than 0.001."""
    after = [*scored(4), scored(5)[4] | {"parsed": "B", "logprobs": [-1.0008, -1.0]}]
    outcome = control_outcome(roles, "smoothed", asked(after), asked(scored(5)))
    assert outcome.ok
    assert (
        "4 of 5 answers equal the baseline's, 0 of the others differ by more than ties"
        in outcome.observed
    )


def test_a_choice_that_moved_by_more_than_rounding_is_no_tie(roles):
    after = [*scored(4), scored(5)[4] | {"parsed": "B", "logprobs": [-1.2, -1.0]}]
    outcome = control_outcome(roles, "smoothed", asked(after), asked(scored(5)))
    assert not outcome.ok
    assert "1 of the others differ by more than ties" in outcome.observed


def test_as_many_texts_may_change_as_ties_of_the_shared_text_explain():
    """By hand: 0 of 1,000 top choices changed, so at most 0.383 % of tokens are near ties."""
    rate = tie_rate(TEXT)
    assert rate == pytest.approx(1.96**2 / (1000 + 1.96**2), rel=1e-3)
    pairs = [(b, a | {"parsed": "13"}) for b, a in zip(written(100), written(100), strict=True)]
    allowed = math.floor(1000 * rate + 2 * math.sqrt(1000 * rate))
    assert unexplained_changes(pairs[:allowed], TEXT, tokens=1000) == 0
    assert unexplained_changes(pairs[: allowed + 3], TEXT, tokens=1000) == 3


def test_a_changed_parse_of_the_same_text_counts_as_another_answer(roles):
    after = written(100, parsed=None, status="unparsed")
    outcome = control_outcome(
        roles, "smoothed", asked(after, name="openmath"), asked(written(100), name="openmath")
    )
    assert not outcome.ok


def test_the_broken_recipe_has_to_fail_as_a_whole(roles):
    rows = scored(5)
    assert control_outcome(roles, "broken", asked(rows, gates=[HELD, gate(False)]), asked(rows)).ok
    for gates in ([HELD], [HELD, gate(False, "arc")], []):  # one set alone leaves the others
        assert not control_outcome(roles, "broken", asked(rows, gates=gates), asked(rows)).ok


def test_the_noise_floor_and_the_baseline_pass_every_check(roles):
    rows = scored(5)
    for name in ("plain", "half"):
        assert control_outcome(roles, name, asked(rows), asked(rows)).ok
        for gates in ([gate(False)], [gate(False, "arc")], []):
            assert not control_outcome(roles, name, asked(rows, gates=gates), asked(rows)).ok


def test_a_twin_without_smoothing_may_answer_badly_but_must_be_what_it_is(roles):
    """That plain rounding ruins a set is a finding, not a fault of the study."""
    rows = scored(5)
    assert control_outcome(
        roles, "rounded", asked(rows, gates=[HELD, gate(False, "arc")]), asked(rows)
    ).ok
    assert not control_outcome(roles, "rounded", asked(rows, gates=[gate(False)]), asked(rows)).ok
