"""Repeated variants in the report: one chapter and one block, and nothing else is touched."""

import json
import re
from dataclasses import replace

import numpy as np
import pytest

import test_report
from helpers.core.errors import StudyError
from helpers.core.records import read_json, write_json
from helpers.report import chapters, graded_chapter, summary
from helpers.report.checks import recomputation
from helpers.report.results import load_results
from helpers.statistics.checks.recomputed_verdicts import read_answers
from simulated_rows import option_rows, quantized
from test_graded_study import complete
from test_report import make_job  # noqa: F401 - a fixture

NAME, DRAWS = "smoothquant_w8a8", 3


def write_draws(job, *, failed: int = 0) -> None:
    """The records of all further draws of a made-up study; a check of one of them fails."""
    for seed, model in enumerate(job.study.models):
        for draw in range(2, DRAWS + 1):
            paths = replace(job.paths, draw=draw, drawn=NAME)
            of_draw = replace(job, paths=paths, draw=draw).of_option_sets
            test_report.write_calibration(of_draw, model, 900.0 + draw, None)
            test_report.write_quantization(of_draw, model, NAME, draw != failed)
            test_report.write_evaluation(of_draw, model, NAME, 50 * draw + seed, 0.8, 0.1)
            checkpoint = f"checkpoint of {NAME}, draw {draw}"
            path = paths.variant(model, NAME) / "verification.json"
            write_json(path, read_json(path, made_by="") | {"checkpoint": checkpoint})
            path = paths.evaluation(model, NAME) / "record.json"
            record = read_json(path, made_by="")
            record["inputs"]["variant"], record["parameters"]["draw"] = checkpoint, draw
            write_json(path, record)


@pytest.fixture
def repeated_job(make_job, monkeypatch):  # noqa: F811
    """A function that makes a study with three draws of one variant, or with one."""

    def arc_rows(rng, accuracy):
        rows = option_rows(np.random.default_rng(4), 80, know=6.0)
        return [complete(row, is_text=False) for row in quantized(rows, rng, noise=0.2)]

    def make(*, repeats=DRAWS, failed=0):
        monkeypatch.setattr(test_report, "arc_rows", arc_rows)
        monkeypatch.setattr(recomputation, "_misread_answers", lambda *_: [])
        job = make_job(
            lambda s: s["variants"][NAME].update({"repeats": repeats} if repeats > 1 else {})
        )
        if repeats > 1:
            write_draws(job, failed=failed)
        return job

    return make


def study_path(job) -> str:
    return str(job.paths.root.parents[1] / "study.yaml")


def chapter_text(results) -> str:
    return "\n\n".join(part.data for part in graded_chapter.draws_chapter(results))


def figure(results, place: str, measure: str, model: str = "base"):
    recipe = next(r for r in results.recipes if (r.model, r.start) == (model, ""))
    return next(f for f in recipe.figures if (f.place, f.measure) == (place, measure))


@pytest.mark.long
def test_draws_change_nothing_but_their_own_chapter_and_block(repeated_job, tmp_path):
    results = load_results(repeated_job())
    alone = replace(
        results,
        study=results.study.model_copy(
            update={
                "variants": {
                    name: variant.model_copy(update={"repeats": 1})
                    for name, variant in results.study.variants.items()
                }
            }
        ),
        draws={},
    )
    repeated, once = summary.summary(results), summary.summary(alone)
    assert repeated.pop("draws")
    assert repeated == once
    assert summary.csv_text(results) == summary.csv_text(alone)
    assert graded_chapter.draws_chapter(alone) == []
    shown = [[str(part) for part in graded_chapter.chapter(r)[:1]] for r in (results, alone)]
    assert shown[0] == shown[1]


def test_a_draw_answers_option_sets_only_and_its_answers_are_published(repeated_job):
    job = repeated_job()
    results = load_results(job)
    summary.write_summary(results, job.paths.root)
    answers = read_answers(job.paths.root / "answers", job.study)
    assert {len(further) for further in answers.draws.values()} == {DRAWS - 1}
    for at, further in answers.draws.items():
        for read_back, of_draw in zip(further, results.draws[at], strict=True):
            assert list(read_back.predictions) == ["arc"]
            logprobs = [
                {row["id"]: row["logprobs"] for row in rows}
                for rows in (read_back.predictions["arc"], of_draw.predictions["arc"])
            ]
            assert logprobs[0] == logprobs[1]


def test_the_interval_over_draws_is_wider_than_that_of_the_items_alone(repeated_job):
    results = load_results(repeated_job())
    over_draws = figure(results, "arc", "graded score")
    estimate = over_draws.estimate
    assert estimate.draws == DRAWS
    alone = replace(estimate.items, standard_error=estimate.items_error).interval(0.95)
    assert over_draws.interval.low < alone.low < alone.high < over_draws.interval.high


def test_what_fine_tuning_adds_is_taken_draw_by_draw(repeated_job):
    """Both models' draws of one number have the same calibration items."""
    results = load_results(repeated_job())
    [cost] = [r for r in results.recipes if r.start]
    assert (cost.model, cost.start, cost.draws) == ("tuned", "base", DRAWS)
    sides = [figure(results, "arc", "graded score", model) for model in ("tuned", "base")]
    of_draws = [np.array(side.estimate.draw_means) for side in sides]
    added = next(f for f in cost.figures if (f.place, f.measure) == ("arc", "graded score"))
    assert added.estimate.draw_means == pytest.approx(of_draws[0] - of_draws[1])
    assert "of `tuned` minus `base`, 3 draws" in chapter_text(results)


def test_a_draw_that_fails_a_check_makes_every_figure_of_its_recipe_invalid(repeated_job):
    results = load_results(repeated_job(failed=2))
    for recipe in results.recipes:
        for of_recipe in recipe.figures:
            assert of_recipe.estimate is None
            assert of_recipe.reason.startswith(f"{NAME}~2 failed a check")
    assert "no figure is valid" in chapter_text(results)
    kinds = {c.variant: v.kind for c, v in results.verdicts.items() if c.dataset == "arc"}
    assert kinds[NAME] != "invalid"  # of the first draw


def test_a_draw_with_the_checkpoint_of_another_is_refused(repeated_job):
    job = repeated_job()
    path = replace(job.paths, draw=3, drawn=NAME).evaluation("base", NAME) / "record.json"
    record, verified = read_json(path, made_by=""), path.parents[1] / "verification.json"
    record["inputs"]["variant"] = f"checkpoint of {NAME}"
    write_json(path, record)
    checks = read_json(verified, made_by="") | {"checkpoint": f"checkpoint of {NAME}"}
    write_json(verified, checks)
    with pytest.raises(StudyError, match=f"base/{NAME}~3: is the checkpoint of an earlier draw"):
        load_results(job)


def test_a_draw_made_from_the_calibration_of_another_is_refused(repeated_job):
    job = repeated_job()
    first = job.paths.quantization("base", NAME) / "record.json"
    path = replace(job.paths, draw=2, drawn=NAME).quantization("base", NAME) / "record.json"
    record = read_json(path, made_by="")
    record["inputs"] = read_json(first, made_by="")["inputs"]
    write_json(path, record)
    with pytest.raises(StudyError, match="its checkpoint has another calibration"):
        load_results(job)


def test_a_variant_made_once_says_so(repeated_job):
    results = load_results(repeated_job())
    shown = [getattr(part, "data", "") for part in chapters.opening(results)]
    summary_text = "\n\n".join(text for text in shown if isinstance(text, str))
    for text in (chapter_text(results), summary_text):
        assert "Made once: `rtn_w8a8` and `static`." in text
        assert "holds for that one checkpoint" in text
    assert summary_text.count("**Recipe** `smoothquant_w8a8`") == len(results.models) + 1


@pytest.fixture
def published(repeated_job):
    """A study with draws and its summary and chapters, as the analysis leaves them."""
    job = repeated_job()
    results = load_results(job)
    summary.write_summary(results, job.paths.root)
    text = "\n\n".join(
        part.data
        for part in [*graded_chapter.chapter(results), *graded_chapter.draws_chapter(results)]
        if hasattr(part, "data")
    )
    (job.paths.root / "report.md").write_text(text, "utf-8")
    return job


def draws_lines(job) -> list[str]:
    """What the recomputation says of draws."""
    lines = recomputation.recompute(study_path(job))[1]
    return [line for line in lines if re.search(r"draws|Draws|[Rr]ecipe|made once|Made once", line)]


def test_the_numbers_follow_from_the_answers(published):
    assert draws_lines(published) == []


def edited(value):
    if isinstance(value, list):
        return [edited(value[0]), *value[1:]]
    if isinstance(value, str):
        return "better"
    return not value if isinstance(value, bool) else (value or 0) + 0.01


@pytest.mark.bank(
    "report", "an edited figure of a recipe", "make verdicts", at="summary.json, draws"
)
def test_every_edited_number_of_the_block_is_named(published):
    path = published.paths.root / "summary.json"
    untouched = json.loads(path.read_text("utf-8"))
    graded = untouched["draws"][0]["figures"][0]
    assert {"delta", "low", "high", "between_draws", "draw_deltas", "holm_p"} <= graded.keys()
    data = json.loads(json.dumps(untouched))
    row = data["draws"][0]["figures"][0]
    keys = [key for key in row if key not in ("dataset", "measure", "unit")]
    row.update({key: edited(row[key]) for key in keys})
    write_json(path, data)
    lines = draws_lines(published)
    for key in keys:
        assert any(f"arc / graded score, {key}" in line for line in lines), key


@pytest.mark.long
@pytest.mark.bank(
    "report", "an edited sentence on a recipe", "make verdicts", at="report.md, Draws of a recipe"
)
def test_edited_cells_and_sentences_of_the_chapter_are_named(published):
    path = published.paths.root / "report.md"
    text = path.read_text("utf-8")
    sentence = next(line for line in text.splitlines() if line.startswith("- **Recipe** `"))
    row = next(line for line in text.splitlines() if line.startswith("| `base`") and "KL" in line)
    number = re.compile(r"(\d)(?=\.\d)")
    for line, place in ((sentence, "Recipe"), (row, "shared text, KL")):
        assert line
        path.write_text(text.replace(line, number.sub(lambda m: str((int(m[1]) + 3) % 10), line)))
        assert any(place in told or "row base" in told for told in draws_lines(published)), place
    path.write_text(text.replace("Made once: `rtn_w8a8` and `static`", "Made once: `static`"))
    assert any("made once are rtn_w8a8, static" in told for told in draws_lines(published))
