"""The old rules: reproduced faithfully, shown in their chapter, and found nowhere else."""

import ast
import re

import pytest

from helpers.core.files import PROJECT
from helpers.core.records import canonical_json
from helpers.report import naive_rules_chapter, summary
from helpers.report.results import load_results
from helpers.statistics.intervals import mcnemar_exact
from helpers.statistics.verdicts import VariantPredictions
from test_report import make_job, told, whole_report  # noqa: F401 - a fixture

FORBIDDEN = r"\bwins?\b|winner|win rate|relative change|official rule|old rules"


def squad(texts: list[str | None], golds: list[list[str]]) -> list[dict]:
    """Answers to SQuAD questions; None is a text without a box."""
    rows = []
    for i, (text, gold) in enumerate(zip(texts, golds, strict=True)):
        row = {"id": f"q{i}", "cluster": f"q{i}", "golds": gold, "parsed": text}
        row |= {"status": "unparsed" if text is None else "answered", "prompt_hash": "h"}
        rows.append(row | {"score": float(text in gold), "absolute_difference": None})
    return rows


HALF = [["gold"] if i % 2 else [] for i in range(20)]
NOISY = ["gold" if i == 1 else "wrong" for i in range(20)]


def test_the_case_that_began_it():
    """5 % against 50 % of 20, half of them unanswerable: silence wins, by 900 percent."""
    before, after = (
        VariantPredictions("noquant", squad(NOISY, HALF)),
        VariantPredictions("seed", squad([None] * 20, HALF)),
    )
    conclusion = naive_rules_chapter.naive_conclusion("squad_v2", before, after)
    assert (conclusion.before, conclusion.after) == (0.05, 0.5)
    assert conclusion.relative_change == pytest.approx(9.0)
    assert conclusion.winner == "variant"
    # one question with an answer is lost, ten without one are gained: p = 24 / 2^11
    assert naive_rules_chapter.naive_mcnemar_p("squad_v2", before, after) == pytest.approx(
        mcnemar_exact(1, 10)
    )
    assert mcnemar_exact(1, 10) == pytest.approx(24 / 2**11)
    silent = naive_rules_chapter.empty_answers(after.predictions)
    assert (silent.empty, silent.unparsed, silent.unanswerable) == (20, 20, 10)
    assert (silent.has_answer, silent.no_answer, silent.exact_match) == (0.0, 1.0, 0.5)


@pytest.mark.parametrize(
    ("said", "golds", "score"),
    [
        (None, [], 1.0),
        (None, ["gold"], 0.0),
        ("the", [], 1.0),  # empty once articles are gone
        ("gold", [], 0.0),
        ("The Gold!", ["silver", "gold"], 1.0),
        ("gold ring", ["gold"], 0.0),
    ],
)
def test_the_official_exact_match(said, golds, score):
    """As SQuAD 2.0's own script counts: without golds the gold is the empty text."""
    (row,) = squad([said], [golds])
    assert naive_rules_chapter.official_exact_match(row) == score


def test_a_tie_goes_to_the_baseline_and_nothing_divides_by_zero():
    nothing = VariantPredictions("noquant", squad([None] * 4, [["a"]] * 4))
    conclusion = naive_rules_chapter.naive_conclusion("openmath", nothing, nothing)
    assert (conclusion.winner, conclusion.relative_change) == ("baseline", None)
    assert naive_rules_chapter.win_rate([conclusion, conclusion], "baseline") == 1.0


def test_the_mean_difference_improves_as_a_model_answers_less():
    """Its flaw, on purpose: two answers lost, one of them far off, and it falls."""
    rows = [{"absolute_difference": d} for d in (1.0, 3.0, 2000.0)]
    mute = [rows[0], *({"absolute_difference": None},) * 2]
    assert naive_rules_chapter.mean_absolute_difference(rows) == (pytest.approx(668.0), 3)
    assert naive_rules_chapter.mean_absolute_difference(mute) == (1.0, 1)
    assert naive_rules_chapter.mean_absolute_difference([{"absolute_difference": None}]) == (
        None,
        0,
    )


def importers(module: str) -> set[str]:
    """Files of the library that import a module, by itself or out of its room."""
    importing, (room, _, name) = set(), module.rpartition(".")
    for path in (PROJECT / "src").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.ImportFrom):
                names = {alias.name for alias in node.names}
                if node.module == module or (node.module == room and name in names):
                    importing.add(path.name)
            if isinstance(node, ast.Import) and module in {a.name for a in node.names}:
                importing.add(path.name)
    return importing


def test_one_chapter_imports_the_rules_and_nothing_imports_the_chapter():
    assert importers("helpers.report.naive_rules_chapter") == set()


@pytest.fixture
def with_chapter(make_job):  # noqa: F811
    """A made-up study that asks for the chapter."""

    def ask(settings):
        settings["old_rules_chapter"] = ["static", "smoothquant_w8a8"]

    return load_results(make_job(ask))


def chapter_text(results) -> str:
    return "\n".join(part.data for part in naive_rules_chapter.chapter(results))


def test_the_chapter_sets_both_conclusions_side_by_side(with_chapter):
    text = chapter_text(with_chapter)
    table = [line for line in text.splitlines() if line.startswith("| `static` | SQuAD v2 |")]
    assert len(table) == len(with_chapter.models)
    assert all(line.count("|") == 8 for line in table)
    assert "“relative change”" in text
    assert "Why SQuAD v2 rewards empty answers" in text
    assert "always the empty answer" in text
    assert not re.search(r"[{}]|\bnan\b|\bNone\b", told(text))


def test_a_variant_that_says_nothing_is_told_with_the_p_that_would_have_certified_it(with_chapter):
    for model in with_chapter.models:
        before, after = (
            with_chapter.evaluations[model, v].predictions["squad_v2"]
            for v in ("noquant", "static")
        )
        before[:] = [
            row | {"parsed": "wrong", "status": "answered", "score": 0.0} for row in before
        ]
        after[:] = [row | {"parsed": None, "status": "unparsed", "score": 0.0} for row in after]
    text = chapter_text(with_chapter)
    assert text.count("`static` gives no readable answer to 60 of 60 questions") == 2
    assert "33.3 % of the questions have no answer" in text
    assert "correct on 100.0 % of those without an answer, on 0.0 % of those with one" in text
    assert "p < 0.001, so a significance test alone would have certified it" in text
    assert "`smoothquant_w8a8` gives no readable answer" not in text


def test_no_old_number_leaves_the_chapter(with_chapter):
    assert re.search(FORBIDDEN, chapter_text(with_chapter))
    assert not re.search(FORBIDDEN, told(whole_report(with_chapter)))
    data = canonical_json(summary.summary(with_chapter)) + summary.csv_text(with_chapter)
    assert not re.search(FORBIDDEN, data)


def test_without_the_key_there_is_no_chapter(make_job):  # noqa: F811
    results = load_results(make_job())
    assert naive_rules_chapter.chapter(results) == []
    assert not re.search(FORBIDDEN, told(whole_report(results)))
