"""Named calibrations: what runs, which items they read, what rests on them, what is refused."""

import copy
import subprocess

import pytest
import yaml

from conftest import STUDY
from helpers.core.errors import StudyError
from helpers.core.files import StudyPaths
from helpers.evaluation.checks.evaluation_data import used_items
from helpers.evaluation.preflight import row_problems
from helpers.sources.items import item_key
from helpers.sources.sampling import calibration_items, evaluation_items, training_items
from helpers.study.loading import load_study, open_job
from helpers.study.schema import Study
from helpers.study.stages import (
    Run,
    largest_complete_part,
    run_of,
    runs,
    settings_text,
    source_files,
    upstream_runs,
)
from helpers.workflow import launcher

PATHS = StudyPaths("study")
ARC = {"adapter": "arc", "dataset": {"shipped": "arc"}}


def with_calibrations(settings: dict) -> dict:
    """A study whose smoothed variant is made three times: as before, of few items, of others."""
    settings = copy.deepcopy(settings)
    own, smooth = settings["calibration"], settings["variants"]["smoothquant_w8a8"]
    settings["calibrations"] = {
        "few": own | {"items": 3},
        "stories": own | ARC | {"items": 4},
    }
    settings["variants"]["of_few"] = smooth | {"calibration": "few"}
    settings["variants"]["of_stories"] = smooth | {"calibration": "stories", "repeats": 2}
    return settings


@pytest.fixture(scope="module")
def study(tmp_path_factory) -> Study:
    path = tmp_path_factory.mktemp("calibrations") / "study.yaml"
    path.write_text(yaml.safe_dump(with_calibrations(yaml.safe_load(STUDY))))
    return load_study(path)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (
            lambda s: s["variants"]["of_few"].update(calibration="many"),
            "variants.of_few.calibration = 'many' is not one of calibrations (few, stories)",
        ),
        (
            lambda s: s["variants"].pop("of_few"),
            "calibrations.few is named by no variant; give one calibration: few, or remove it",
        ),
        (
            lambda s: s["variants"]["rtn_w8a8"].update(calibration="few"),
            "calibration = 'few' but nothing in it is computed from calibration items; leave it",
        ),
        (
            lambda s: s["calibrations"]["few"].pop("items"),
            "calibrations.few.items is missing",
        ),
        (
            lambda s: s["calibrations"].update({"a+b": s["calibrations"]["few"]}),
            "calibrations",
        ),
        (
            lambda s: s["calibrations"]["few"].update(
                dataset={"file": "rows.jsonl", "columns": {"query": "q"}}
            ),
            "calibrations.few.dataset",
        ),
    ],
)
def test_calibrations_that_serve_nothing_or_do_not_exist_are_refused_in_one_line_each(
    change, problem, study_settings, write_study
):
    settings = with_calibrations(study_settings)
    change(settings)
    with pytest.raises(StudyError) as refused:
        load_study(write_study(settings))
    assert any(problem in line for line in str(refused.value).splitlines())


def test_a_job_knows_its_calibration(study_settings, write_study):
    path = write_study(with_calibrations(study_settings))
    job = open_job(path, model="base", variant="of_few")
    assert job.calibration == "few"
    assert job.calibration_settings.items == 3
    assert job.paths.calibration("base").name == "calibration+few"
    named = open_job(path, model="base", calibration="stories", draw=2)
    assert run_of(named, "calibration") == Run("calibration", "base", "stories", 2)
    assert named.paths.calibration("base").name == "calibration+stories~2"
    plain = open_job(path, model="base", variant="smoothquant_w8a8")
    assert plain.paths.calibration("base").name == "calibration"
    with pytest.raises(StudyError, match="calibration = 'many' is not one of few, stories"):
        open_job(path, model="base", calibration="many")
    with pytest.raises(StudyError, match=r"draw = 2 is not one of 1 to 1"):
        open_job(path, model="base", calibration="few", draw=2)
    with pytest.raises(StudyError, match="is none: the study has none"):
        open_job(write_study(study_settings), model="base", calibration="few")


def test_named_calibrations_are_runs_of_their_own_in_folders_of_their_own(study):
    names = [run.name for run in runs(study)]
    assert {"01_calibration.base", "01_calibration.base+few"} < set(names)
    assert "01_calibration.tuned+stories~2" in names
    assert "01_calibration.base+few~2" not in names
    records = [run.record(PATHS) for run in runs(study)]
    assert len(set(records)) == len(records)
    made_from = {
        run.variant: [r for r in upstream_runs(study, run) if r.stage == "calibration"]
        for run in runs(study)
        if run.stage == "quantization" and run.model == "base" and run.draw == 1
    }
    assert made_from["of_few"] == [Run("calibration", "base", "few")]
    assert made_from["smoothquant_w8a8"] == [Run("calibration", "base")]
    further = upstream_runs(study, Run("quantization", "base", "of_stories", 2))
    assert further == [Run("calibration", "base", "stories", draw) for draw in (1, 2)]


def test_they_repeat_no_run_that_there_was_before(study):
    before = Study.model_validate(yaml.safe_load(STUDY))
    for run in runs(before):
        if run.stage == "cost":  # it measures the new variants too
            continue
        assert settings_text(before, run) == settings_text(study, run), run.name
    assert '"calibrations"' not in settings_text(before, Run("analysis"))
    assert '"calibrations"' in settings_text(study, Run("analysis"))


def test_a_variant_depends_on_its_own_calibration_alone(study):
    more = study.calibrations["few"].model_copy(update={"items": 5})
    changed = study.model_copy(update={"calibrations": study.calibrations | {"few": more}})
    for run in runs(study):
        if run.stage == "cost":
            continue
        differs = settings_text(study, run) != settings_text(changed, run)
        assert differs == (run.variant in ("few", "of_few")), run.name


def test_rows_of_its_own_source_are_tracked(study):
    for name, rows in (("stories", "arc.jsonl"), ("few", "openmath_train.jsonl")):
        tracked = {p.name for p in source_files(study, Run("calibration", "base", name))}
        assert rows in tracked


def keys(items) -> set[str]:
    return {item_key(item) for item in items}


def test_the_items_are_no_others_and_the_smaller_draw_is_part_of_the_larger(study):
    few, own = calibration_items(study, "few"), calibration_items(study)
    assert few == own[:3]
    stories = [calibration_items(study, "stories", draw=draw) for draw in (1, 2)]
    assert [len(items) for items in stories] == [4, 4]
    assert not keys(stories[0]) & keys(stories[1])
    evaluated = [keys(evaluation_items(study, n)) for n in study.evaluation.datasets]
    trained = [keys(part) for part in training_items(study, "tuned")]
    for items in (few, *stories):
        assert not keys(items) & set().union(*evaluated, *trained)
    assert used_items(study, "base", "of_few")["calibration"] == few
    assert used_items(study, "base", "of_stories", draw=2)["calibration"] == stories[1]


def test_training_items_do_not_change(study):
    before = Study.model_validate(yaml.safe_load(STUDY))
    assert training_items(study, "tuned") == training_items(before, "tuned")
    larger = study.calibration.model_copy(update={"items": study.calibration.items + 20})
    more = study.model_copy(update={"calibrations": {"few": larger}})
    trained = [keys(part) for part in training_items(more, "tuned")]
    assert not keys(calibration_items(more, "few")) & set().union(*trained)


def test_a_source_with_too_few_items_is_named_before_the_first_job(study):
    many = study.calibrations["stories"].model_copy(update={"items": 10**5})
    changed = study.model_copy(update={"calibrations": study.calibrations | {"stories": many}})
    [line] = row_problems(changed)
    assert line.startswith("calibrations.stories: 100000 items asked for")


def test_a_partial_report_leaves_out_the_variants_without_their_calibration(study):
    everything = set(runs(study))
    lacking = {
        run for run in everything if run.model == "base" and run.variant in ("few", "of_few")
    }
    part = largest_complete_part(study, everything - lacking)
    assert list(part.study.models) == list(study.models)
    assert "of_few" not in part.study.variants
    assert list(part.study.calibrations) == ["stories"]
    assert "calibration base+few" in part.missing


def test_items_are_counted_before_the_first_job_where_a_study_names_calibrations(
    study, monkeypatch, tmp_path
):
    """Shipped items are enough for one calibration; a named one may ask for any number."""
    asked = []

    def run(command, **_):
        asked.append(command)
        return subprocess.CompletedProcess(command, 1)

    monkeypatch.setattr(launcher.subprocess, "run", run)
    monkeypatch.setenv("STUDY_CACHE", str(tmp_path))
    shipped = study.model_copy(update={"models": {"base": study.models["base"]}})
    assert launcher.check_sources("study", shipped, dry=True) == 2
    assert "helpers.evaluation.preflight" in asked[0]
    plain = shipped.model_copy(update={"calibrations": {}})
    plain = plain.model_copy(update={"variants": {"noquant": study.variants["noquant"]}})
    assert launcher.check_sources("study", plain, dry=True) == 0
