"""The card beside a checkpoint says what its files and its records say, and no more."""

import json
import re
import shutil

import pytest
import yaml
from safetensors.numpy import load_file, save_file

from helpers.core.errors import StudyError
from helpers.core.files import outputs_root
from helpers.core.records import write_json
from helpers.report.summary import front_matter, write_card
from helpers.study.loading import open_job
from helpers.study.schema import HubModel

SIZES = {"Linears": 4_000_000, "embeddings and head": 1_000_000}
AFTER = SIZES | {"Linears": 1_000_000}
VARIANT = "smoothquant_w8a8"


@pytest.fixture
def job(sound_runs, study_path, tmp_path, monkeypatch):
    """A real checkpoint of a tiny model, with the records its card is made from."""
    run = sound_runs("llama", VARIANT)
    monkeypatch.setenv("STUDY_OUTPUTS", str(tmp_path / "outputs"))
    study_run = open_job(study_path, model="base", variant=VARIANT)
    saved = next(run.root.rglob("checkpoint"))
    shutil.copytree(saved, study_run.paths.checkpoint("base", VARIANT))
    results = {"items": ["a", "b"], "tokens": 1234}
    record = {"inputs": {"model": "0123456789abcdef"}, "results": results}
    write_json(study_run.paths.calibration("base") / "record.json", record)
    gates = [{"name": "grid | <b>", "passed": True, "measured": "0.5 | $x$", "limit": "0.5"}]
    verify(study_run, gates)
    return study_run


def verify(job, gates) -> None:
    verification = {"passed": all(g["passed"] for g in gates), "gates": gates}
    write_json(job.paths.variant("base", VARIANT) / "verification.json", verification)


def card(job) -> str:
    return write_card(job, SIZES, AFTER).read_text("utf-8")


def test_the_scheme_is_the_files_and_not_the_requests(job):
    """The study file says int8 per channel; a checkpoint that is otherwise is told as it is."""
    folder = job.paths.checkpoint("base", VARIANT)
    assert "| weights (group_0) | int8 per channel, symmetric |" in card(job)
    assert "| input activations (group_0) | int8 per token, dynamic, symmetric |" in card(job)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["config_groups"]["group_0"]["weights"]["strategy"] = "tensor"
    (folder / "config.json").write_text(json.dumps(config))
    assert "| weights (group_0) | int8 per tensor, symmetric |" in card(job)


def test_int8_is_counted_in_the_tensors(job):
    """2 layers of 7 Linears; then one of them is made float behind the config's back."""
    folder = job.paths.checkpoint("base", VARIANT)
    assert "| tensors in int8 | 14 |" in card(job)
    tensors = load_file(folder / "model.safetensors")
    name = next(n for n, t in tensors.items() if t.dtype == "int8")
    save_file(tensors | {name: tensors[name].astype("float32")}, folder / "model.safetensors")
    assert "| tensors in int8 | 13 |" in card(job)


def test_sizes_and_calibration_are_those_on_record(job):
    text = card(job)
    assert "| Linears | 1.00 MB, 4.00 MB before |" in text
    assert "| all | 40.0 % of the model it was made from |" in text
    assert "calibrated on 2 items of 1,234 tokens, and written" in text
    assert "`0123456789ab`" in text


def test_a_failed_check_is_said_before_anything_else_about_them(job):
    assert "All 1 checks on these files pass." in card(job)
    verify(
        job,
        [{"name": "quantized layers as declared", "passed": False, "measured": "4", "limit": "5"}],
    )
    text = card(job)
    assert "**Not to be used.** 1 of 1 checks fail: quantized layers as declared." in text
    assert text.index("Not to be used") < text.index("## Quality")
    assert "smoothquant" not in yaml.safe_load(text.split("---")[1])["tags"]


def test_the_same_records_make_the_same_card(job):
    first = card(job)
    assert card(job) == first
    assert str(outputs_root()) not in first
    assert not re.search(r"20\d\d-\d\d", first)  # no date: the folder's hash must repeat


def test_it_claims_no_quality_and_points_to_who_may(job):
    text = card(job)
    pointed = job.paths.checkpoint("base", VARIANT) / re.search(r"`(\S+report\.md)`", text)[1]
    assert pointed.resolve() == (job.paths.root / "report.md").resolve()
    assert not re.search(r"accuracy|better|lossless|recovery", text)


def test_without_checks_there_is_no_card(job):
    (job.paths.variant("base", VARIANT) / "verification.json").unlink()
    with pytest.raises(StudyError, match=r"verification\.json is missing; run 02_quantization"):
        card(job)


def test_the_front_matter_is_yaml_with_what_is_known(study):
    """Of a model of unknown origin neither base nor license is made up."""

    def told(model="base", **models) -> dict:
        renamed = study.model_copy(update={"models": study.models | models})
        return yaml.safe_load(front_matter(renamed, model, ["int8"]).strip("-"))

    assert "base_model" not in told()
    assert "license" not in told()
    hub = HubModel(hub="someone/model", revision="main")
    assert told(base=hub)["base_model"] == "someone/model"
    assert told(base=hub)["base_model_relation"] == "quantized"
    assert told("tuned", base=hub)["base_model_relation"] == "finetune"
    assert "license" not in told(base=hub)
    assert told()["tags"] == ["int8"]
