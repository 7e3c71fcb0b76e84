"""The study of Qwen3-0.6B, made small, from end to end out of a Hub on loopback."""

import json
import os
import subprocess
import sys

import pytest
import yaml

import hub_repositories
from helpers.core.files import PROJECT
from hub_standin import Hub

pytestmark = pytest.mark.long

KEPT = ("noquant", "rtn_w8a8", "smoothquant_w8a8")


def small() -> dict:
    """params/qwen3-0.6b.yaml with few items and variants, on a CPU; its sources as they are."""
    text = (PROJECT / "params" / "qwen3-0.6b.yaml").read_text("utf-8")
    study = yaml.safe_load(text)
    study["runtime"] = {"device": "cpu", "dtype": "float32", "threads": 1, "quantized": "int8"}
    study["variants"] = {name: study["variants"][name] for name in KEPT}
    study["calibration"] |= {"items": 8, "max_tokens": 1024, "batch_tokens": 4096}
    training = study["models"]["finetuned"]["finetune"]
    training |= {"items": 16, "heldout_items": 8, "learning_rate": 1e-3, "max_tokens": 1024}
    training["autocast"] = "none"
    study["evaluation"]["batch"] = {"tokens": 4096, "rows": 64}
    for dataset in study["evaluation"]["datasets"].values():
        dataset["items"] = 6
        if dataset["ask"]["protocol"] == "generate":
            dataset["ask"] |= {"max_new_tokens": 8}
    study["evaluation"]["shared_text"] |= {"passages": 3, "max_tokens": 128}
    study["statistics"]["resamples"] = 200
    return study


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """(outputs, requests to the Hub by the study, the command that runs it, the Hub's mark)."""
    root = tmp_path_factory.mktemp("hub")
    study = root / "small.yaml"
    study.write_text(yaml.safe_dump(small(), sort_keys=False), "utf-8")
    gone = ("HF_HUB_OFFLINE", "HF_TOKEN")
    places = {k: v for k, v in os.environ.items() if k not in gone}
    places |= {"HF_HOME": str(root / "hf"), "STUDY_OUTPUTS": str(root / "outputs")}
    places |= {"STUDY_CACHE": str(root / "cache")}

    def run(*command, **more):
        done = subprocess.run(
            [sys.executable, "-m", *command],
            cwd=PROJECT,
            env=places | more,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done

    whole = ("helpers.workflow.cli", "study", str(study), "--cores", "2")
    with Hub() as hub:
        hub_repositories.fill(hub, root / "ran")
        run("helpers.sources.fetching", str(study), HF_ENDPOINT=hub.url)
        hub.calm()
        run(*whole, HF_ENDPOINT=hub.url)
        requests = list(hub.requests)
    return root / "outputs" / "small", requests, lambda *more: run(*whole, *more), root / "ran"


def test_the_jobs_ask_no_hub_and_run_no_code_of_it(ran):
    assert ran[1] == []
    assert not ran[3].exists()


# The models of this Hub are random, and the study file cannot know that.
NO_LANGUAGE = "plain text beats compression"


def test_every_gate_holds(ran):
    gate_files = [*ran[0].glob("*/*/verification.json"), *ran[0].glob("*/*/evaluation/gates.json")]
    assert len(gate_files) == 2 * (len(KEPT) - 1) + 2 * len(KEPT)
    for path in gate_files:
        failed = {g["name"] for g in json.loads(path.read_text())["gates"] if not g["passed"]}
        assert failed == ({NO_LANGUAGE} if path.parts[-3] == "noquant" else set()), path


def test_the_report_is_whole(ran):
    text = (ran[0] / "report.md").read_text("utf-8")
    for dataset in ("ARC", "SQuAD", "OpenMath", "BoolQ"):
        assert dataset in text


def test_the_records_say_what_was_drawn_from_what(ran):
    pins = json.loads((ran[0] / "sources.json").read_text())
    rows = {pin["hub"]: pin["rows"] for pin in pins["datasets"]}
    record = json.loads((ran[0] / "base" / "noquant" / "evaluation" / "record.json").read_text())
    drawn = record["results"]["drawn_from"]
    assert {name: part["rows"] for name, part in drawn.items()} == {
        "arc": rows["allenai/ai2_arc"],
        "squad_v2": rows["rajpurkar/squad_v2"],
        "openmath": rows["nvidia/OpenMathInstruct-2"],
        "boolq": rows["google/boolq"],
    }
    assert drawn["openmath"]["left_out"] == drawn["openmath"]["answers_not_numeric"]
    calibrated = json.loads((ran[0] / "base" / "calibration" / "record.json").read_text())
    assert calibrated["results"]["chat_template"]["enable_thinking"] is False
    trained = json.loads((ran[0] / "finetuned" / "model" / "record.json").read_text())
    assert {name: len(ids) for name, ids in trained["results"]["items"].items()} == {
        "training": 16,
        "heldout": 8,
    }


def test_without_the_hub_there_is_nothing_left_to_run(ran):
    """The Hub is gone by now; what it gave is in the cache."""
    assert "nothing to run" in ran[2]("--", "-n").stderr
    assert "current: " in ran[2]().stderr
