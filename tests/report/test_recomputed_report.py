"""An edited number in a published summary or report is named: place, published, recomputed."""

import ast
import html
import json
import re
import shutil
from types import SimpleNamespace

import pytest
from IPython.display import Markdown

import test_report
from helpers.core.files import PROJECT
from helpers.core.records import sha256_text
from helpers.report import chapters, summary
from helpers.report.checks import recomputed_tables
from helpers.report.checks.recomputation import (
    _misread_passages,
    recompute,
    wrong_csv_lines,
    wrong_headlines,
)
from helpers.report.checks.recomputed_graded_report import _check_score_bullet, wrong_kl_tables
from helpers.report.checks.recomputed_tables import (
    RecomputedFigures,
    cell_differs,
    read_tables,
    rounds_to,
    written_numbers,
)
from helpers.report.markdown import number
from helpers.report.results import Results, load_results
from helpers.sources.sampling import shared_passages
from helpers.statistics.checks.recomputed_verdicts import PublishedAnswers, read_answers
from helpers.statistics.verdicts import VariantAnswers, study_verdicts
from test_recomputed_statistics import bootstrap_of_four_times_the_items
from test_report import make_job, one_model  # noqa: F401 - a fixture

DEMO = PROJECT / "outputs" / "demo"
OWN = {
    "recomputed_tables",
    "recomputed_graded_report",
    "recomputed_chapters",
    "recomputed_recommendation",
}


@pytest.fixture
def demo(tmp_path, monkeypatch):
    """A copy of the published demo, to edit; its texts are read again in another test."""
    from helpers.report.checks import recomputation as module

    monkeypatch.setattr(module, "_misread_answers", lambda *_: [])
    monkeypatch.setenv("STUDY_OUTPUTS", str(tmp_path / "outputs"))
    copy = tmp_path / "outputs" / "demo"
    shutil.copytree(DEMO / "answers", copy / "answers")
    for name in ("summary.json", "summary.csv", "report.md", "notebooks/04_analysis.ipynb"):
        (copy / name).parent.mkdir(exist_ok=True)
        shutil.copy(DEMO / name, copy / name)
    return copy


def bumped(text: str) -> str:
    """The text with the last digit of its first number changed."""
    number = re.search(r"\d[\d,]*(?:\.\d+)?", text)
    digit = "8" if number[0][-1] == "9" else str(int(number[0][-1]) + 1)
    return f"{text[: number.end() - 1]}{digit}{text[number.end() :]}"


def edit_cell(report, row: str, column: str, change=bumped) -> tuple[str, str]:
    """Change a cell of the first table that has both; returns (published then, before)."""
    lines, header = report.read_text("utf-8").splitlines(), []
    for at, line in enumerate(lines):
        cells = [cell.strip() for cell in line.split("|")]
        if at + 1 < len(lines) and lines[at + 1].startswith("| :--"):
            header = [html.unescape(cell) for cell in cells]
        elif line.startswith(row) and column in header:
            place = header.index(column)
            before, cells[place] = cells[place], change(cells[place])
            lines[at] = " | ".join(cells).strip() + " "
            report.write_text("\n".join(lines) + "\n", "utf-8")
            return cells[place], before
    raise LookupError(f"no table has the row {row!r} and the column {column!r}")


CELLS = [
    ("| `base` | `rtn_w8a8` |", "perplexity"),
    ("| ARC | `rtn_w8a8`", "gained"),
    ("| ARC | `smoothquant_w8a8`", "detectable loss"),
    ("| `rtn_w8a8` |", "Δ loss [nats/token]"),
    ("| `base` | `noquant` |", "finish reasons"),
    ("| `base` | `noquant_bf16` |", "accuracy"),
    ("| `11.mlp.down_proj` |", "largest"),
    ("| every q_proj", "`rtn_w8a8`"),
]


@pytest.mark.bank(
    "report", "an edited number in a table of the report", "make verdicts", at="report.md"
)
def test_an_edited_number_in_a_table_is_named(demo):
    """One in every kind of table that answers give, one that only the analysis gives."""
    edited = {cell: edit_cell(demo / "report.md", *cell) for cell in CELLS}
    differences = recompute("demo")[1]
    for (row, column), (published, before) in edited.items():
        assert published != before
        named = [line for line in differences if f"column {column.strip('`')}:" in line]
        number = written_numbers(published)[0]
        assert any(number in line.replace(",", "") for line in named), (row, column, named)
    assert len(differences) >= len(CELLS)


def edit_value(path, row: str) -> str:
    """Change the value of a line of summary.csv; returns it as published then."""
    lines = path.read_text("utf-8").splitlines(keepends=True)
    at = next(i for i, line in enumerate(lines) if line.startswith(row))
    cells = lines[at].split(",")
    cells[4] = f"{float(cells[4]) + 0.011:.4f}"
    lines[at] = ",".join(cells)
    path.write_text("".join(lines), "utf-8")
    return cells[4]


@pytest.mark.long
@pytest.mark.bank(
    "report", "edited numbers in the summaries", "make verdicts", at="summary.csv, summary.json"
)
def test_edited_summaries_are_named(demo):
    accuracy = edit_value(demo / "summary.csv", "base,rtn_w8a8,arc,accuracy")
    edit_value(demo / "summary.csv", "finetuned,noquant,squad_v2,f1")
    path = demo / "summary.json"
    published = json.loads(path.read_text("utf-8"))
    published["models"]["base"]["variants"]["rtn_w8a8"]["datasets"]["boolq"]["macro_f1"][
        "value"
    ] += 0.01
    published["models"]["base"]["variants"]["rtn_w8a8"]["passed"] ^= True
    published["models"]["base"]["largest_outliers"][0]["largest"] *= 1.1
    published["best_fixed_answers"]["boolq"]["score"] -= 0.1
    published["statistics"]["margin"] *= 2
    published["comparisons"][0]["holm_p"] = 0.0123
    published["comparisons"][1]["reason"] = bumped(published["comparisons"][1]["reason"])
    path.write_text(json.dumps(published), "utf-8")
    differences = "\n".join(recompute("demo")[1])
    for place in (
        f"summary.csv, row base / rtn_w8a8 / arc / accuracy, column value: published '{accuracy}",
        "summary.csv, row finetuned / noquant / squad_v2 / f1, column value",
        "summary.json, base/rtn_w8a8, datasets, boolq, macro_f1, value: published",
        "summary.json, base/rtn_w8a8, passed: published",
        "column largest: published",
        "summary.json, best_fixed_answers, boolq, score: published",
        "summary.json, statistics, margin: published",
        "summary.json, base: ARC, smoothquant_w8a8 against noquant: holm_p is",
        "summary.json, base: SQuAD v2, smoothquant_w8a8 against noquant: reason is",
    ):
        assert place in differences, place


@pytest.mark.long
@pytest.mark.bank(
    "report", "lines taken out of the summary or put in", "make verdicts", at="summary.csv"
)
def test_lines_taken_out_or_put_in_are_named(demo):
    path = demo / "summary.csv"
    lines = path.read_text("utf-8").splitlines()
    path.write_text("\n".join([*lines[:4], *lines[5:], lines[5], "base,x,arc,accuracy,1,,,1"]))
    differences = "\n".join(recompute("demo")[1])
    assert "summary.csv has no row" in differences
    assert "row base / x / arc / accuracy is none of the study's" in differences
    assert "summary.csv has a row twice" in differences


@pytest.mark.long
@pytest.mark.bank("report", "verdicts edited in the report", "make verdicts", at="report.md")
def test_verdicts_in_other_words_are_named(demo):
    report = demo / "report.md"
    edit_cell(report, "| `smoothquant_w8a8` | `base` |", "ARC", lambda _: "better")
    edit_cell(report, "| ARC | `smoothquant_w8a8`", "verdict", lambda _: "worse")
    differences = "\n".join(recompute("demo")[1])
    assert "row smoothquant_w8a8 / base, column ARC: published 'better'" in differences
    turned = r"row ARC / smoothquant_w8a8( / base)?, column verdict: published 'worse'"
    assert re.search(turned, differences)


def kl_chapters(results) -> str:
    """The chapter of all comparisons, with the tables of the KL by token."""
    shown = chapters.model_comparisons(results)
    return "\n\n".join(part.data for part in shown if isinstance(part, Markdown))


def recomputed_figures(job) -> RecomputedFigures:
    answers = read_answers(job.paths.root / "answers", job.study)
    return RecomputedFigures(answers, {}, {})


@pytest.mark.bank(
    "report", "an edited quantile or tail of the KL", "make verdicts", at="report.md, summary.json"
)
def test_an_edited_quantile_of_the_kl_is_named(make_job):  # noqa: F811
    job = make_job(one_model)
    results = load_results(job)
    summary.write_summary(results, job.paths.root)
    figures, text = recomputed_figures(job), kl_chapters(results)
    assert list(wrong_kl_tables(text, figures)) == []
    kl = results.evaluations["base", "static"].kl_by_token
    cells = {
        number(kl.percentile_99): "column 99th percentile",
        number(kl.percentile_99_9): "column 99.9th percentile",
        number(kl.largest): "column largest",
        f"| {kl.tail[1].token} |": f"token {kl.tail[1].token} of {kl.tail[1].passage}",
    }
    quantiles, tail = text.index("| `static` |", text.index("99th")), text.rindex("| `static` |")
    for cell, place in cells.items():
        start = quantiles if "|" not in cell else text.index(cell, text.index("<details>"))
        end = text.index(cell, start) + len(cell)
        edited = text[:start] + text[start:end].replace(cell, bumped(cell)) + text[end:]
        assert any(place in line for line in wrong_kl_tables(edited, figures)), place
    swapped = text[:tail] + text[tail:].replace("<code>", "<code>x", 1)
    (line,) = wrong_kl_tables(swapped, figures)
    assert "the text around it is another" in line
    missing = text[: text.index("KL of each")]
    assert "are others" in "".join(wrong_kl_tables(missing, figures))
    stored = json.loads((job.paths.root / "summary.json").read_text("utf-8"))
    edited = stored["models"]["base"]["variants"]["static"]
    edited["shared_text"]["kl_percentile_99_9"]["value"] *= 1.01
    edited["kl_by_token"]["tail"][0]["token"] += 1
    lines = "\n".join(wrong_headlines(stored, figures))
    assert "base/static, shared_text, kl_percentile_99_9, value: published" in lines
    assert "base/static, kl_by_token, tail: published" in lines
    assert lines.count("base/") == 2
    edit_value(job.paths.root / "summary.csv", "base,static,shared_text,kl_median")
    (line,) = wrong_csv_lines(job.paths.root / "summary.csv", figures)
    assert "base / static / shared_text / kl_median, column value" in line


def test_a_token_without_a_finite_kl_is_reported(make_job, monkeypatch):  # noqa: F811
    """Its variant has no quantile, the report says so and names the token, `make verdicts` too."""
    make_rows = test_report.text_rows

    def broken(rng, noise):
        rows = make_rows(rng, noise)
        if noise == 0.1:
            rows[7]["token_kl"][31], rows[7]["kl"] = None, None
        return rows

    monkeypatch.setattr(test_report, "text_rows", broken)
    job = make_job(one_model)
    results = load_results(job)
    summary.write_summary(results, job.paths.root)
    text, figures = kl_chapters(results), recomputed_figures(job)
    assert "**The KL of 1 of these tokens is not finite** under `rtn_w8a8`" in text
    assert "| `rtn_w8a8` | – | – | – | – | – | – |" in text
    assert "| `rtn_w8a8` | not finite | `passage-7` | 31 |" in text
    stored = json.loads((job.paths.root / "summary.json").read_text("utf-8"))
    variants = stored["models"]["base"]["variants"]
    assert variants["rtn_w8a8"]["shared_text"]["kl_median"]["value"] is None
    assert variants["rtn_w8a8"]["kl_by_token"]["nonfinite"] == 1
    assert variants["static"]["kl_by_token"]["nonfinite"] == 0
    assert [*wrong_headlines(stored, figures), *wrong_kl_tables(text, figures)] == []
    hidden = text.replace("| `rtn_w8a8` | not finite |", "| `rtn_w8a8` | – |")
    assert "token 31 of passage-7: published '–'" in "".join(wrong_kl_tables(hidden, figures))


def test_a_study_from_before_the_kl_by_token_has_no_such_table(make_job, monkeypatch):  # noqa: F811
    make_rows, lists = test_report.text_rows, ("token_kl", "token_texts")
    monkeypatch.setattr(
        test_report,
        "text_rows",
        lambda *a: [{k: v for k, v in row.items() if k not in lists} for row in make_rows(*a)],
    )
    job = make_job(one_model)
    results = load_results(job)
    summary.write_summary(results, job.paths.root)
    text, figures = kl_chapters(results), recomputed_figures(job)
    assert "percentile" not in text + (job.paths.root / "summary.csv").read_text("utf-8")
    stored = json.loads((job.paths.root / "summary.json").read_text("utf-8"))
    assert "kl_by_token" not in stored["models"]["base"]["variants"]["static"]
    assert [*wrong_headlines(stored, figures), *wrong_kl_tables(text, figures)] == []


@pytest.mark.bank("report", "edited texts of the shared text's tokens", "make verdicts")
def test_token_texts_that_are_not_the_passage_are_named(study):
    first, *_ = shared_passages(study)
    row = {"id": sha256_text(first)[:16], "token_texts": [first[:9], first[9:20]]}
    other = row | {"token_texts": [first[:9], "x", first[9:20]]}
    for rows, lines in (([row], 0), ([other], 1)):
        answers = {("base", "static"): VariantAnswers({}, rows, [])}
        assert len(_misread_passages(PublishedAnswers(study, answers))) == lines


@pytest.mark.bank(
    "report",
    "a summary made by wrong statistics",
    "make verdicts",
    at="statistics.verdicts.bootstrap_mean, report.results.Results.verdicts",
)
def test_a_summary_made_by_wrong_statistics_is_caught(make_job, monkeypatch):  # noqa: F811
    """Nothing of the report's statistics is used to make its numbers again."""
    from helpers.report.checks import recomputation as module

    monkeypatch.setattr(module, "_misread_answers", lambda *_: [])
    job = make_job()

    def unchecked(results):
        return study_verdicts(results.study, results.published.answers)

    bootstrap_of_four_times_the_items(monkeypatch)
    monkeypatch.setattr(Results, "verdicts", property(unchecked))
    summary.write_summary(load_results(job), job.paths.root)
    differences = recompute(str(job.paths.root.parents[1] / "study.yaml"))[1]
    assert any("smoothquant_w8a8 against noquant: low is" in line for line in differences)
    assert any("summary.csv" in line and "column low" in line for line in differences)


def test_none_of_the_reports_code_makes_its_numbers_again():
    for name in (*OWN, "recomputation"):
        tree = ast.parse((PROJECT / "src/helpers/report/checks" / f"{name}.py").read_text("utf-8"))
        statements = [n for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)]
        imported = {  # ControlOutcome is a record without any computation
            n.module for n in statements if [a.name for a in n.names] != ["ControlOutcome"]
        }
        report = {m.split(".")[-1] for m in imported if m.startswith("helpers.report")}
        assert report <= OWN, name
        statistics_modules = {
            "helpers.statistics." + m for m in ("intervals", "graded", "verdicts")
        }
        assert not imported & (statistics_modules | {"helpers.evaluation.scoring"}), name


def test_a_cell_shows_numbers_to_its_decimals():
    assert rounds_to("0.0418", 0.04184)
    assert not rounds_to("0.0418", 0.04186)
    assert rounds_to("3065", 3064.8)
    assert rounds_to("1.3e-05", 1.26e-5)
    assert written_numbers("`o3` **x**: 6.7\u00a0% [1.7,\u00a014.8] and 3,940 −2.0 +1") == [
        *("6.7", "1.7", "14.8", "3940", "-2.0", "+1")
    ]
    assert cell_differs("51.0 %", [51.0, 41.3])
    assert not cell_differs("–", [None])
    assert cell_differs("–", [1.0])


def test_tables_are_read_with_their_headings():
    text = "### Scores\n\n| a | `b` |\n| :--- | ---: |\n| x | 1 |\n\ntext\n"
    (table,) = read_tables(text)
    assert (table.heading, table.columns, table.rows) == ("Scores", ("a", "b"), (("x", "1"),))
    assert recomputed_tables.plain_text("<code>1 &#42; 2</code>") == "1 * 2"


POOLED_SENTENCE = (
    "**Answer.** `x` against `noquant`, by graded scores (the right answer's "
    "probability): equivalent within ±3 points in 1 of 1 "
    "comparison. Pooled over the informative sets, it is worse on `tuned` (−0.8 points), and "
    "losses above 0.5 points of probability (`base`) and 1.4 (`tuned`) are excluded."
)


@pytest.mark.parametrize(
    ("published", "fault"),
    [
        (POOLED_SENTENCE, ""),
        (POOLED_SENTENCE.replace("it is worse on `tuned` (−0.8 points), and ", ""), "as worse"),
        (POOLED_SENTENCE.replace("worse on `tuned`", "worse on `base`"), "as worse"),
        (POOLED_SENTENCE.replace("(`tuned`) are", "(`base`) are"), "pooled differences"),
        (POOLED_SENTENCE.replace("equivalent within", "no loss within"), "equivalent within"),
    ],
)
def test_a_pooled_loss_is_in_the_sentence_and_an_edited_one_is_named(published, fault):
    """A reader who sees no loss in any set must not miss the one that all sets show together."""
    rows = [
        {"variant": "x", "model": "base", "delta": -0.001, "low": -0.005, "verdict": "equivalent"},
        {"variant": "x", "model": "tuned", "delta": -0.008, "low": -0.014, "verdict": "worse"},
    ]
    figures = SimpleNamespace(
        graded_blocks={"graded": {"comparisons": [SET_ROW]}, "pooled": rows},
        study=SimpleNamespace(
            baseline="noquant",
            statistics=SimpleNamespace(graded_margins=SimpleNamespace(probability=0.03)),
        ),
    )
    *lines, (_, numbers) = _check_score_bullet(published, figures)
    assert numbers == pytest.approx([3, 1, 1, -0.8, 0.5, 1.4])
    assert [fault in line for line in lines] == ([True] if fault else [])


SET_ROW = {"variant": "x", "baseline": "noquant", "model": "base", "verdict": "equivalent"}
