"""The executive summary reads well, and says no more than the verdicts, for any mixture."""

import itertools
import re

import pytest

from helpers.report import narrative
from helpers.report.markdown import markdown_table
from helpers.report.results import Results
from helpers.statistics.intervals import Interval
from helpers.statistics.verdicts import ControlOutcome, PairedComparison, Verdict
from helpers.study.schema import Comparison, Study

KINDS = ("worse", "better", "equivalent", "inconclusive", "uninformative", "invalid")
DELTAS = {"worse": -0.2, "better": 0.12, "equivalent": 0.0, "inconclusive": -0.03}
PLACES = [("base", "arc"), ("tuned", "arc"), ("base", "squad_v2"), ("tuned", "squad_v2")]


def paired(delta: float, detectable: float | None) -> PairedComparison:
    interval = Interval(delta - 0.1, delta + 0.1, 0.95)
    return PairedComparison(
        100, 100, 3, 3, delta, interval, interval, 0.5, "a test", detectable, False
    )


def verdict(kind: str, detectable: float | None = 0.155) -> Verdict:
    reason = {
        "invalid": "it failed a check: quantized layers as declared (3 | of 4 `Linears`)",
        "uninformative": "noquant itself does not beat always abstaining",
    }.get(kind, "")
    holm = None if kind == "invalid" else 0.5
    return Verdict(kind, reason, True, holm, paired(DELTAS.get(kind, 0.0), detectable))


@pytest.fixture
def summary_of(study_settings):
    """Results in which only verdicts and controls exist: the summary may look at nothing else."""

    def make(kinds, *, variants=("smoothquant_w8a8",), outcomes=None, **options):
        pairs = [
            Comparison(model=m, dataset=d, baseline="noquant", variant=v)
            for v in variants
            for m, d in PLACES
        ][: len(kinds)]
        study_settings["statistics"]["primary"] = [c.model_dump() for c in pairs]
        results = Results("study", Study.model_validate(study_settings), {}, {}, {}, {}, {})
        judged = zip(pairs, kinds, strict=True)
        results.__dict__["verdicts"] = {c: verdict(k, **options) for c, k in judged}
        results.__dict__["control_outcomes"] = outcomes or {}
        return results

    return make


def whole(results) -> str:
    table = narrative.verdict_table(results)
    parts = [*narrative.failed_control_bullets(results), narrative.answer_sentences(results)]
    parts.append(markdown_table(table) if table else "")
    return "\n".join([*parts, *narrative.verdict_bullets(results)])


def sound(text: str) -> None:
    """No trace of the machinery, no sentence without an end, and no praise."""
    prose = re.sub(r"`[^`]*`", "X", text)
    assert not re.search(r"[{}]|\bnan\b|\bNone\b|\.\.|,\s*\.|\(\)| {2}|\b1 are\b|\b0 of\b", prose)
    assert not re.search(r"\bwins?\b|winner|improve|outperform|80\.0|95\.0", prose)
    for line in prose.splitlines():
        if line and not line.startswith(("|", "**Answer.**")):
            assert line.endswith("."), line


def test_every_mixture_of_four_reads_well(summary_of):
    for kinds in itertools.combinations_with_replacement(KINDS, 4):
        text = whole(summary_of(kinds))
        sound(text)
        for kind in ("worse", "better", "invalid"):
            assert (f"**{kind.capitalize()}**" in text) == (kind in kinds), kinds
        lead = text.splitlines()[0]
        assert ("is worse than" in lead) == ("worse" in kinds), kinds
        assert ("No loss" in lead) <= ("worse" not in kinds), kinds


def test_every_mixture_of_two_variants_reads_well(summary_of):
    variants = ("rtn_w8a8", "smoothquant_w8a8")
    for kinds in itertools.product(KINDS, repeat=2):
        text = whole(summary_of([kinds[0]] * 4 + [kinds[1]] * 4, variants=variants))
        sound(text)
        assert text.startswith("**Answer.**\n\n- "), kinds
        assert all(f"`{v}`" in text.split("|")[0] for v in variants), kinds


def test_nothing_declared(summary_of):
    results = summary_of([])
    assert "no verdict" in narrative.answer_sentences(results)
    assert narrative.verdict_table(results) == narrative.verdict_bullets(results) == []


def test_all_invalid_says_nothing_of_quantization(summary_of):
    text = whole(summary_of(["invalid"] * 4))
    assert (
        "No conclusion about `smoothquant_w8a8` is possible: all 4 comparisons are invalid." in text
    )
    assert "`smoothquant_w8a8`: it failed a check: quantized layers as declared." in text
    assert "of 4" not in text  # stands in the tables


def test_all_null_says_what_could_have_been_seen(summary_of):
    text = whole(summary_of(["inconclusive"] * 4))
    assert "No loss of `smoothquant_w8a8` against `noquant` was detected" in text
    assert "This does not prove that there is none." in text
    assert "detected with 80 % power is 16 points." in text


def test_null_results_of_different_reach_name_the_nearest_and_the_furthest(summary_of):
    results = summary_of(["inconclusive"] * 3)
    verdicts = results.verdicts
    for c, loss in zip(verdicts, (0.2, 0.11, 0.3), strict=True):
        verdicts[c] = verdict("inconclusive", loss)
    assert "ranges from 11 points (ARC of `tuned`) to 30 points (SQuAD v2 of `base`)." in (
        whole(results)
    )


def test_too_few_items_to_see_anything(summary_of):
    text = whole(summary_of(["inconclusive"] * 2, detectable=None))
    sound(text)
    assert (
        "On ARC of `base` and `tuned`, the items are too few to detect even a total loss." in text
    )


def test_one_worse_among_many(summary_of):
    text = whole(summary_of(["equivalent", "worse", "equivalent", "uninformative"]))
    assert "`smoothquant_w8a8` is worse than `noquant` in 1 of 4 declared comparisons." in text
    assert "ARC of `tuned`: −20.0 points [−30.0,\u00a0−10.0]" in text


def test_all_equivalent_is_said_with_its_margin(summary_of):
    lead = narrative.answer_sentences(summary_of(["equivalent"] * 4))
    assert "equivalent to `noquant` within ±5 points in the 4 comparisons declared" in lead
    lead = narrative.answer_sentences(summary_of(["equivalent", "uninformative"]))
    assert (
        "within ±5 points in the 1 of 2 declared comparisons that could show a difference" in lead
    )


def test_one_comparison_alone(summary_of):
    for kind in KINDS:
        sound(whole(summary_of([kind])))
    assert "its one comparison is invalid" in narrative.answer_sentences(summary_of(["invalid"]))


def test_the_table_has_a_cell_for_every_declared_verdict(summary_of):
    rows = narrative.verdict_table(summary_of(["worse", "invalid", "equivalent"]))
    assert [list(row) for row in rows] == [["variant", "model", "ARC", "SQuAD v2"]] * 2
    assert rows[0]["ARC"] == "**worse**"
    assert rows[1] | {"ARC": "**invalid**", "SQuAD v2": "–"} == rows[1]


def outcome(done: bool) -> ControlOutcome:
    return ControlOutcome(
        "smoothing alone", "answer as the baseline does", "3 of 9 answers do", done
    )


def test_a_control_that_failed_is_shouted_before_anything_else(summary_of):
    outcomes = {("base", "smooth_only"): outcome(False), ("tuned", "smooth_only"): outcome(True)}
    text = whole(summary_of(["equivalent"] * 4, outcomes=outcomes))
    bullets = text.splitlines()
    assert bullets[0].startswith("**⚠ 1 of 2 controls FAILED. Do not rely on any result below")
    assert (
        "`smooth_only` of `base` was expected to answer as the baseline does, but 3 of 9"
        in bullets[0]
    )
    assert "behaved as expected" not in text
    sound(text)


def test_controls_that_held_are_named(summary_of):
    outcomes = {("base", "smooth_only"): outcome(True), ("tuned", "smooth_only"): outcome(True)}
    bullets = narrative.verdict_bullets(summary_of(["equivalent"] * 4, outcomes=outcomes))
    assert bullets[-1].startswith("**All controls behaved as expected**")
    assert bullets[-1].count("`smooth_only`") == 1
