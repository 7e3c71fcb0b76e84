"""Repeats of a variant: what runs, what is drawn for each, and what is refused."""

import copy
import itertools
import json

import pytest
import yaml

import toy_project
from conftest import STUDY
from helpers.core.errors import StudyError
from helpers.core.files import StudyPaths
from helpers.evaluation.preflight import row_problems
from helpers.report.checks.recomputation import recompute
from helpers.sources.items import item_key
from helpers.sources.sampling import calibration_items, evaluation_items, training_items
from helpers.study import stages
from helpers.study.loading import load_study, open_job
from helpers.study.schema import Study
from helpers.study.stages import Run, largest_complete_part, runs, settings_text, upstream_runs

PATHS = StudyPaths("toy")


def toy(repeats: int = 1) -> Study:
    data = copy.deepcopy(toy_project.STUDY)
    if repeats > 1:
        data["variants"]["smooth"]["repeats"] = repeats
    return Study.model_validate(data)


@pytest.mark.parametrize(
    ("variant", "repeats", "problem"),
    [
        (
            "smoothquant_w8a8",
            0,
            "variants.smoothquant_w8a8.repeats = 0 is below 1; give at least 1",
        ),
        ("smoothquant_w8a8", -1, "smoothquant_w8a8.repeats = -1 is below 1; give at least 1"),
        ("smoothquant_w8a8", 1.5, "repeats = 1.5 is not a whole number"),
        ("smoothquant_w8a8", "three", "repeats = 'three' is not a whole number"),
        ("smoothquant_w8a8", True, "repeats = True is not a whole number"),
        ("noquant", 2, "repeats = 2 but nothing in it is computed from calibration items"),
        ("rtn_w8a8", 3, "repeats = 3 but nothing in it is computed from calibration items"),
    ],
)
def test_repeats_that_make_no_draws_are_refused_in_one_line(
    variant, repeats, problem, study_settings, write_study
):
    study_settings["variants"][variant]["repeats"] = repeats
    with pytest.raises(StudyError) as refused:
        load_study(write_study(study_settings))
    assert problem in str(refused.value)
    assert "\n" not in str(refused.value)


def test_static_scales_are_computed_from_the_calibration_and_can_be_repeated(
    study_settings, write_study
):
    study_settings["variants"]["static"] = {"preset": "o3", "repeats": 2}
    assert load_study(write_study(study_settings)).repeats == 2


@pytest.mark.parametrize("draw", [0, -1, 4, "2.0", "x", ""])
def test_a_draw_that_the_study_does_not_make_is_refused(draw, study_settings, write_study):
    study_settings["variants"]["smoothquant_w8a8"]["repeats"] = 3
    path = write_study(study_settings)
    with pytest.raises(StudyError, match=r"draw = .* is not one of 1 to 3"):
        open_job(path, model="base", variant="smoothquant_w8a8", draw=draw)
    with pytest.raises(StudyError, match="is not one of 1 to 1"):
        open_job(path, model="base", variant="rtn_w8a8", draw=2)
    assert open_job(path, model="base", draw="3").draw == 3


def test_further_draws_are_runs_of_their_own_in_folders_of_their_own():
    once, repeated = runs(toy()), runs(toy(3))
    assert repeated[: len(once)] == once
    further = [run.name for run in repeated[len(once) :]]
    assert set(further) == {
        f"{name}~{draw}"
        for model in ("base", "tuned")
        for draw in (2, 3)
        for name in (
            f"01_calibration.{model}",
            f"02_quantization.{model}.smooth",
            f"03_evaluation.{model}.smooth",
        )
    }
    records = [run.record(PATHS) for run in repeated]
    assert len(set(records)) == len(records)
    evaluation = Run("evaluation", "base", "smooth", 2)
    assert evaluation.record(PATHS) == PATHS.root / "base" / "smooth~2/evaluation/record.json"
    assert upstream_runs(toy(3), evaluation) == [
        Run("quantization", "base", "smooth", 2),
        Run("evaluation", "base", "noquant"),
    ]
    quantization = Run("quantization", "tuned", "smooth", 3)
    assert upstream_runs(toy(3), quantization) == [
        Run("finetuning", "tuned"),
        *(Run("calibration", "tuned", draw=draw) for draw in (1, 2, 3)),
    ]


def test_repeats_repeat_no_run_that_there_was_before():
    for run in runs(toy()):
        assert settings_text(toy(), run) == settings_text(toy(3), run), run.name
    assert '"repeats"' not in settings_text(toy(), Run("analysis"))
    assert settings_text(toy(), Run("analysis")) != settings_text(toy(2), Run("analysis"))


def test_a_draw_depends_on_its_number_and_on_what_is_trained_with():
    for stage in ("calibration", "quantization", "evaluation"):
        run = Run(stage, "base", "" if stage == "calibration" else "smooth", 2)
        other = Run(stage, "base", run.variant, 3)
        assert settings_text(toy(3), run) != settings_text(toy(3), other)
        data = copy.deepcopy(toy_project.STUDY)
        data["variants"]["smooth"]["repeats"] = 2
        data["models"]["tuned"]["finetune"]["items"] += 1
        assert settings_text(Study.model_validate(data), run) != settings_text(toy(3), run)


def test_a_partial_report_has_the_draws_that_are_complete():
    study = toy(3)
    everything = set(runs(study))
    part = largest_complete_part(study, everything - {Run("evaluation", "tuned", "smooth", 3)})
    assert list(part.study.variants) == list(study.variants)
    assert part.study.variants["smooth"].repeats == 2
    assert "evaluation tuned smooth~3" in part.missing
    part = largest_complete_part(study, everything - {Run("evaluation", "base", "smooth", 2)})
    assert part.study.variants["smooth"].repeats == 1
    assert set(runs(part.study)) <= set(part.runs)


@pytest.fixture(scope="module")
def repeated(tmp_path_factory) -> Study:
    settings = yaml.safe_load(STUDY)
    settings["variants"]["smoothquant_w8a8"]["repeats"] = 4
    path = tmp_path_factory.mktemp("repeats") / "study.yaml"
    path.write_text(yaml.safe_dump(settings))
    return load_study(path)


def keys(items) -> set[str]:
    return {item_key(item) for item in items}


def test_draws_share_no_item_with_each_other_nor_with_evaluation_and_training(repeated):
    draws = [keys(calibration_items(repeated, draw=draw)) for draw in range(1, 5)]
    assert {len(draw) for draw in draws} == {repeated.calibration.items}
    for one, other in itertools.combinations(draws, 2):
        assert not one & other
    evaluated = [keys(evaluation_items(repeated, n)) for n in repeated.evaluation.datasets]
    trained = [keys(part) for part in training_items(repeated, "tuned")]
    assert not set().union(*draws) & set().union(*evaluated, *trained)


def test_draws_are_the_same_however_many_there_are(repeated):
    fewer = repeated.model_copy(
        update={
            "variants": {
                n: v.model_copy(update={"repeats": 1}) for n, v in repeated.variants.items()
            }
        }
    )
    assert calibration_items(repeated) == calibration_items(fewer)
    assert training_items(repeated, "tuned") == training_items(fewer, "tuned")


def test_a_source_with_too_few_items_for_the_draws_is_named_before_the_first_job(repeated):
    many = repeated.calibration.model_copy(update={"items": 400})
    [line] = row_problems(repeated.model_copy(update={"calibration": many}))
    assert line.startswith("calibration, draw 4 of the variants with repeats: 400 items asked for")
    assert "ask for at most" in line


def test_a_draw_s_own_data_are_tracked(repeated):
    """A further draw depends on the rows of the training, which it leaves out."""
    for draw, tracked in ((1, False), (2, True)):
        files = stages.source_files(
            repeated.model_copy(
                update={
                    "calibration": repeated.calibration.model_copy(
                        update={"dataset": _arc(repeated)}
                    )
                }
            ),
            Run("calibration", "base", draw=draw),
        )
        assert ("openmath_train.jsonl" in {path.name for path in files}) == tracked


def _arc(study: Study):
    return study.evaluation.datasets["arc"].source


@pytest.mark.long
def test_repeats_run_their_draws_and_leave_all_else_as_it_was(undisturbed, tmp_path, monkeypatch):
    """One line more in the study file: the answers so far, and the summary, stay what they are."""
    smoke = undisturbed.copy(tmp_path / "study")
    before, summary = smoke.content(), json.loads((smoke.outputs / "summary.json").read_bytes())
    text = smoke.file.read_text("utf-8")
    smoke.file.write_text(
        text.replace("  smoothquant_w8a8:\n", "  smoothquant_w8a8:\n    repeats: 2\n"), "utf-8"
    )
    smoke.done()
    after = smoke.content()
    shared = {f"answers/{name}" for name in ("arc.jsonl", "boolq.jsonl", "shared_text.jsonl")}
    changed = {name for name in before if after.get(name) != before[name]}
    assert changed == {"summary.json", "answers/gates.json", *shared}
    assert after.keys() - before.keys()
    assert all("~2/" in name for name in after.keys() - before.keys())
    repeated = json.loads((smoke.outputs / "summary.json").read_bytes())
    assert {row["draws"] for row in repeated.pop("draws")} == {2}
    assert repeated | {"answers": {}} == summary | {"answers": {}}
    for model in ("base", "finetuned"):
        folder = smoke.outputs / model / "smoothquant_w8a8~2"
        for gates in (folder / "verification.json", folder / "evaluation" / "gates.json"):
            assert json.loads(gates.read_bytes())["passed"]
        records = [
            json.loads((smoke.outputs / model / name / "record.json").read_bytes())["results"]
            for name in ("calibration", "calibration~2")
        ]
        assert not set(records[0]["items"]) & set(records[1]["items"])
    monkeypatch.setenv("STUDY_OUTPUTS", str(smoke.outputs.parent))
    assert recompute(str(smoke.file))[1] == []
