"""A stage leaves a record if it is finished, and none if it fails."""

import json
from pathlib import Path

import pytest

from helpers.core.errors import StudyError
from helpers.core.records import sha256_folder
from helpers.cost import operations
from helpers.cost.operations import quantization_stage_operations
from helpers.evaluation.prompts import prompt_examples, record_prompts, study_prompts
from helpers.sources.models import open_stage, start_of
from helpers.study.loading import open_job


def open_calibration(study: Path):
    return open_stage(
        "calibration",
        study,
        model="base",
        count=quantization_stage_operations,
    )


@pytest.fixture
def record_path(study_path, tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("STUDY_OUTPUTS", str(tmp_path / "outputs"))
    return tmp_path / "outputs" / "study" / "base" / "calibration" / "record.json"


def test_a_stage_that_fails_leaves_no_record_nor_that_of_an_earlier_run(study_path, record_path):
    open_calibration(study_path).finish(tokens=3)
    assert json.loads(record_path.read_text())["results"] == {"tokens": 3}
    run = open_calibration(study_path)
    assert not record_path.exists()
    with pytest.raises(ZeroDivisionError):
        run.finish(tokens=1 // 0)  # its last cell
    assert not record_path.exists()
    with pytest.raises(ValueError, match="not JSON compliant"):
        run.finish(tokens=float("nan"))  # what no record may hold
    assert not record_path.exists()


def test_a_stage_whose_opening_fails_leaves_no_record(study_path, record_path, monkeypatch):
    open_calibration(study_path).finish(tokens=3)

    def count(*_given, **_named):
        raise StudyError("not counted")

    with pytest.raises(StudyError, match="not counted"):
        open_stage("calibration", study_path, model="base", count=count)
    assert not record_path.exists()


def test_the_record_names_the_model_and_the_operations(study_path, record_path):
    run = open_calibration(study_path)
    run.finish(b=1, a=2)
    record = json.loads(record_path.read_text())
    assert record["inputs"] == {"model": sha256_folder(run.source)}
    counted = quantization_stage_operations(run.job, run.tokenizer, stage="calibration")
    assert record["operations"] == counted
    assert record["parameters"] == run.job.parameters
    assert list(record["results"]) == ["b", "a"]  # as given


def test_a_fine_tuning_starts_from_another_model_of_the_study(study_path, record_path):
    run = open_stage(
        "finetuning",
        study_path,
        model="tuned",
        count=operations.finetuning_operations,
        starts_from=start_of,
    )
    assert run.source == open_calibration(study_path).source
    assert list(run.record.inputs) == ["source_model"]
    assert run.folder == record_path.parents[2] / "tuned" / "model"
    with pytest.raises(StudyError, match=r"models\.base is not made by this study"):
        open_stage(
            "finetuning",
            study_path,
            model="base",
            count=operations.finetuning_operations,
            starts_from=start_of,
        )


def test_the_prompts_that_are_shown_are_those_that_are_asked(study_path, record_path):
    """Of each set, what the baseline's own record of its first prompt says."""
    run = open_calibration(study_path)
    job = open_job(study_path, model="base", variant="noquant")
    prompts = study_prompts(job.study, run.tokenizer)
    record_prompts(job, prompts)
    shown = prompt_examples(prompts)
    files = list(job.paths.evaluation("base", "noquant").glob("prompts/*.jsonl"))
    assert len(files) == len(job.study.evaluation.datasets)
    for path in files:
        first = json.loads(path.read_text("utf-8").splitlines()[0])
        assert first["prompt"] in shown
        assert all(repr(text) in shown for text in first["continuations"])
