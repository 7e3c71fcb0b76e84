"""Named calibrations in the report: one chapter and one block, each number recomputed."""

import json
from dataclasses import replace

import pytest

import test_report
from helpers.core.errors import StudyError
from helpers.core.records import read_json, write_json
from helpers.report import chapters, graded_chapter, summary
from helpers.report.checks import recomputation
from helpers.report.results import load_results
from test_draws_report import DRAWS, NAME, study_path, write_draws
from test_report import make_job  # noqa: F401 - a fixture

NAMED = {"few": "of_few", "stories": "of_stories"}
PLACE = "Calibration"


@pytest.fixture
def calibrated_job(make_job, monkeypatch):  # noqa: F811
    """A study with draws of one variant, and the same recipe from two other calibrations."""
    monkeypatch.setattr(recomputation, "_misread_answers", lambda *_: [])

    def change(settings):
        own, smooth = settings["calibration"], dict(settings["variants"][NAME])
        settings["calibrations"] = {
            "few": own | {"items": 3},
            "stories": own | {"adapter": "arc", "dataset": {"shipped": "arc"}, "items": 4},
        }
        settings["variants"] |= {v: smooth | {"calibration": c} for c, v in NAMED.items()}
        settings["variants"][NAME]["repeats"] = DRAWS

    job = make_job(change)
    write_draws(job)
    for number, (name, variant) in enumerate(NAMED.items()):
        of_named = replace(job, paths=replace(job.paths, calibrated=name))
        for model in job.study.models:
            test_report.write_calibration(of_named, model, 700.0 + number, None)
            test_report.write_quantization(of_named, model, variant, True)
            noise = 0.1 if name == "few" else 0.9
            test_report.write_evaluation(job, model, variant, 60 + number, 0.8, noise)
    return job


@pytest.fixture
def published(calibrated_job):
    """A study with its summary and the chapter, as the analysis leaves them."""
    results = load_results(calibrated_job)
    summary.write_summary(results, calibrated_job.paths.root)
    parts = [
        *graded_chapter.chapter(results),
        *graded_chapter.draws_chapter(results),
        *graded_chapter.calibrations_chapter(results),
    ]
    text = "\n\n".join(part.data for part in parts if hasattr(part, "data"))
    (calibrated_job.paths.root / "report.md").write_text(text, "utf-8")
    return calibrated_job


def calibration_lines(job) -> list[str]:
    """What the recomputation says of calibrations."""
    lines = recomputation.recompute(study_path(job))[1]
    words = ("alibration", "recomputed no difference", "recomputed higher", "row base")
    return [line for line in lines if any(word in line for word in words)]


def test_the_chapter_says_which_calibrations_differ_beyond_the_draws(calibrated_job):
    results = load_results(calibrated_job)
    [chapter] = graded_chapter.calibrations_chapter(results)
    sentence = f"**Calibration** of `base`, `{NAME}`: "
    assert sentence in chapter.data
    places = {(e.model, e.variant): e.place for e in results.calibration_effects}
    assert places["base", "of_few"] == "within"
    assert places["base", "of_stories"] == "above"
    assert "no difference beyond the draws: `of_few` (3 items of OpenMath)" in chapter.data
    assert "higher KL than another draw: `of_stories` (4 items of ARC" in chapter.data
    opening = [getattr(part, "data", "") for part in chapters.opening(results)]
    assert any(sentence in text for text in opening if isinstance(text, str))


def test_without_named_calibrations_there_is_no_chapter_and_no_block(calibrated_job):
    results = load_results(calibrated_job)
    own = {n: v for n, v in results.study.variants.items() if n not in NAMED.values()}
    plain = results.study.model_copy(update={"variants": own, "calibrations": {}})
    evaluations = {at: e for at, e in results.evaluations.items() if at[1] in own}
    alone = replace(results, study=plain, evaluations=evaluations)
    assert graded_chapter.calibrations_chapter(alone) == []
    assert "calibrations" not in summary.summary(alone)


def test_a_checkpoint_of_another_calibration_is_refused(calibrated_job):
    path = calibrated_job.paths.quantization("base", "of_few") / "record.json"
    own = read_json(calibrated_job.paths.quantization("base", NAME) / "record.json", made_by="")
    record = read_json(path, made_by="")
    record["inputs"]["calibration"] = own["inputs"]["calibration"]
    write_json(path, record)
    with pytest.raises(StudyError, match="base/of_few: its checkpoint has another calibration"):
        load_results(calibrated_job)


def test_the_numbers_follow_from_the_answers(published):
    assert calibration_lines(published) == []


@pytest.mark.bank(
    "report", "an edited effect of a calibration", "make verdicts", at="summary.json, calibrations"
)
def test_every_edited_number_of_the_block_is_named(published):
    path = published.paths.root / "summary.json"
    data = json.loads(path.read_text("utf-8"))
    row = data["calibrations"][0]
    keys = ("reference", "draws", "kl", "low", "high", "place")
    row.update({k: "other" if isinstance(row[k], str) else row[k] + 1 for k in keys})
    write_json(path, data)
    lines = calibration_lines(published)
    for key in keys:
        assert any(line.startswith("summary.json, calibrations") and key in line for line in lines)


@pytest.mark.bank(
    "report",
    "an edited sentence or cell on a calibration",
    "make verdicts",
    at="report.md, Calibration items",
)
@pytest.mark.long
def test_edited_sentences_and_cells_of_the_chapter_are_named(published):
    path = published.paths.root / "report.md"
    text = path.read_text("utf-8")
    row = next(line for line in text.splitlines() if "`of_few`" in line and line.startswith("|"))
    edits = [
        ("no difference beyond the draws: `of_few`", "lower KL than another draw: `of_few`"),
        ("(3 items of OpenMath)", "(30 items of OpenMath)"),
        (row, row.replace("within", "above")),
        (row, row.replace("| 3 |", "| 8 |")),
        (row, row.replace("OpenMath", "BoolQ")),
        ("## Calibration items", "## Items"),
    ]
    for before, after in edits:
        assert before in text
        assert before != after
        path.write_text(text.replace(before, after), "utf-8")
        assert calibration_lines(published), after
