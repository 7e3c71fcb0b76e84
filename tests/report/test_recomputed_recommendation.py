"""The published recommendation follows from the published answers; every edit of it is named."""

import re

import pytest

from helpers.core.files import PROJECT
from helpers.core.records import read_json
from helpers.report.checks.recomputed_recommendation import wrong_recommendation
from helpers.report.checks.recomputed_tables import RecomputedFigures
from helpers.statistics.checks.recomputed_verdicts import comparison_rows, read_answers
from helpers.study.loading import load_study

pytestmark = pytest.mark.long  # all figures of the study are recomputed once
FOLDER = PROJECT / "outputs" / "recipes"


@pytest.fixture(scope="module")
def published():
    """(recommendation.md, report.md, the recomputed figures) of the committed study."""
    study = load_study("recipes")
    answers = read_answers(FOLDER / "answers", study)
    summary = read_json(FOLDER / "summary.json", made_by="04_analysis")
    rows = comparison_rows(study, answers.answers, {})
    figures = RecomputedFigures(answers, rows, summary)
    texts = [(FOLDER / name).read_text("utf-8") for name in ("recommendation.md", "report.md")]
    return *texts, figures


def test_nothing_differs_as_published(published):
    assert wrong_recommendation(*published) == []


def cell_of(text: str, variant: str, column: int) -> tuple[str, str]:
    """(a line of the table, one of its cells)."""
    line = next(one for one in text.splitlines() if one.startswith(f"| `{variant}` |"))
    return line, line.split(" | ")[column]


CELLS = {
    1: ("0.5", "KL"),
    2: ("+9.9 &#91;+9.0, +10.0&#93;", "difference"),
    3: ("better", "verdict"),
    4: ("12.0 %", "bytes"),
    5: ("9.99×", "speeds"),
    6: ("9.99×", "speeds"),
    8: ("3 fail |", "checks"),
}


@pytest.mark.bank("report", "an edited recommendation", "make verdicts", at="recommendation.md")
@pytest.mark.parametrize("column", CELLS)
def test_an_edited_cell_is_named(published, column):
    text, report, figures = published
    line, cell = cell_of(text, "rtn_w8a8", column)
    other, words = CELLS[column]
    assert cell != other
    cells = line.split(" | ")
    edited = " | ".join([*cells[:column], other, *cells[column + 1 :]])
    lines = wrong_recommendation(text.replace(line, edited), report, figures)
    assert any("rtn_w8a8" in told and words in told for told in lines), lines


def test_another_choice_or_reason_is_named(published):
    text, report, figures = published
    chosen = re.search(r"take `([^`]+)`", text)
    edits = {
        "a choice": (f"`{chosen[1]}`:", "`rtn_w8a8`:") if chosen else ("nothing can be", "all is"),
        "a ratio": (re.search(r"[\d.]+ times the KL", text)[0], "9.3 times the KL"),
        "an excluded loss": (re.search(r"losses above [\d.]+", text)[0], "losses above 0.05"),
        "flattery": (re.search(r"would look [\d.]+", text)[0], "would look 3.1"),
        "a title": ("# Which variant to use: ", "# Which variant to use: not "),
        "a model": ("## `base`", "## `other`"),
        "a missing row": (cell_of(text, "rtn_w8a8", 1)[0] + "\n", ""),
    }
    for what, (before, after) in edits.items():
        assert before in text, what
        assert wrong_recommendation(text.replace(before, after), report, figures), what


def test_a_front_that_is_none_is_named(published):
    text, report, figures = published
    line, cell = cell_of(text, "rtn_w8a8", 7)
    assert cell == "–"
    cells = line.split(" | ")
    edited = text.replace(line, " | ".join([*cells[:7], "yes", *cells[8:]]))
    assert any("Pareto" in told for told in wrong_recommendation(edited, report, figures))


def test_costs_of_another_model_are_not_taken(published):
    """Two models of a study may each have a table of costs."""
    text, report, figures = published
    heading = next(line for line in report.splitlines() if line.startswith("### Model `base`"))
    table = report[report.index("| against float32 |") :].split("\n\n")[0]
    other = heading.replace("base", "other") + "\n\n" + re.sub(r"\d\.\d\d×", "7.77×", table)
    assert "7.77×" in other
    assert wrong_recommendation(text, f"{report}\n\n{other}\n", figures) == []
    swapped = report.replace(table, re.sub(r"\d\.\d\d×", "7.77×", table))
    assert wrong_recommendation(text, swapped, figures)
