"""The smoke study from end to end: all stages, explored, then again, then with another α.

That evaluating again gives the same bytes is shown where damaged predictions are made again
(test_real_faults).
"""

import json
import os
import statistics
import subprocess
import sys
import time

import pytest
import yaml

from helpers.core.files import PROJECT
from helpers.core.records import sha256_text
from helpers.study.loading import load_study
from smoke_study import GUARDS, Smoke
from test_report_page import check_lengths

pytestmark = [pytest.mark.slow, pytest.mark.long]


@pytest.fixture(scope="module")
def again(undisturbed, tmp_path_factory):
    """A copy of the finished study, to run again or to add to."""
    return undisturbed.copy(tmp_path_factory.mktemp("again") / "study")


def run(study: Smoke, *options: str) -> subprocess.CompletedProcess:
    """The study run again, nothing but this machine within its reach."""
    return study.front("--cores", "2", "--", *options, **study.guards(), STUDY_ESTIMATE="no")


def test_the_whole_study_asks_nobody_anything(undisturbed):
    """Every process of it ran with all but this machine refused, and none so much as tried."""
    attempts = undisturbed.root / "attempts"
    assert not attempts.exists() or attempts.read_text() == ""


def test_the_guard_refuses_what_it_should(tmp_path):
    code = "import socket; socket.create_connection(('hub.example', 443), timeout=1)"
    places = {"PYTHONPATH": str(GUARDS), "NETWORK_ATTEMPTS": str(tmp_path / "attempts")}
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | places, capture_output=True, text=True
    )
    assert "no network in this test: hub.example" in done.stderr
    assert (tmp_path / "attempts").read_text() == "hub.example\n"


def planned(done) -> set[str]:
    return {" ".join(line[:48].split()) for line in done.stdout.splitlines() if line.strip()}


def test_every_job_leaves_its_notebook_and_its_record(undisturbed):
    outputs = undisturbed.outputs
    notebooks = {path.name for path in (outputs / "notebooks").iterdir()}
    assert len(notebooks) == 1 + 2 + 2 * 4 + 1 + 2 * 6 + 1
    assert not [name for name in notebooks if "failed" in name or "running" in name]
    assert len(list(outputs.glob("**/record.json"))) == 1 + 2 + 2 * 4 + 1 + 2 * 6


def test_a_sound_study_passes_every_gate(undisturbed):
    verified = [
        json.loads(p.read_text()) for p in undisturbed.outputs.glob("*/*/verification.json")
    ]
    assert len(verified) == 8
    for record in verified:
        assert [g for g in record["gates"] if not g["passed"]] == []
        assert record["passed"]


def test_every_evaluation_is_checked_on_the_files_that_are_there(undisturbed):
    checked = [
        json.loads(p.read_text()) for p in undisturbed.outputs.glob("*/*/evaluation/gates.json")
    ]
    assert len(checked) == 12
    for record in checked:
        assert [g for g in record["gates"] if not g["passed"]] == []
        assert set(record["predictions"]) == {"arc", "squad_v2", "openmath", "boolq", "shared_text"}


def test_every_control_does_its_duty(undisturbed):
    """Smoothing alone answers as the baseline does, and the noise floor is rounding."""
    outputs = undisturbed.outputs
    summary = json.loads((outputs / "summary.json").read_text("utf-8"))
    roles = {(c["variant"], c["role"]) for c in summary["controls"]}
    assert {("noquant_bf16", "noise floor"), ("smooth_only", "smoothing alone")} <= roles
    assert [c for c in summary["controls"] if not c["done"]] == []


def test_every_verdict_is_made_again_from_the_answers(undisturbed, monkeypatch):
    study, outputs = undisturbed.file, undisturbed.outputs
    from helpers.report.checks.recomputation import recompute

    monkeypatch.setenv("STUDY_OUTPUTS", str(outputs.parent))
    table, differing = recompute(str(study))
    assert differing == []
    assert len(table.splitlines()) == 1 + 2 * 4 * 5


def test_the_report_is_whole(undisturbed):
    outputs = undisturbed.outputs
    text = (outputs / "report.md").read_text("utf-8")
    for dataset in ("ARC", "SQuAD", "OpenMath", "BoolQ"):
        assert dataset in text
    for figure in [line for line in text.splitlines() if line.startswith("![")]:
        assert (outputs / figure.split("](")[1].rstrip(")")).is_file(), figure
    check_lengths(text)
    page = (outputs / "report.html").read_text("utf-8")
    assert "<img" in page
    assert 'src="report_files' not in page  # self-contained
    assert "import helpers" not in page  # without code
    assert "from helpers" not in page


def test_nothing_that_is_kept_names_this_machine(undisturbed):
    study, outputs = undisturbed.file, undisturbed.outputs
    published = [outputs / "report.md", outputs / "report.html", *outputs.glob("notebooks/*.ipynb")]
    for path in published:
        text = path.read_text("utf-8").replace(str(study), "")
        assert str(PROJECT) not in text, path.name
        assert str(outputs.parent) not in text, path.name


def test_exploring_it_writes_nothing(undisturbed, monkeypatch):
    """The cells of explore.ipynb, run here one after the other."""
    study, outputs = undisturbed.file, undisturbed.outputs
    monkeypatch.setenv("STUDY_OUTPUTS", str(outputs.parent))
    monkeypatch.setenv("STUDY_CACHE", str(outputs.parents[1] / "cache"))
    before = {p: p.stat().st_mtime_ns for p in outputs.rglob("*")}
    notebook = json.loads((PROJECT / "notebooks" / "explore.ipynb").read_text("utf-8"))
    names = {}
    for cell in (c for c in notebook["cells"] if c["cell_type"] == "code"):
        exec("".join(cell["source"]).replace('"demo"', repr(str(study))), names)
    assert {"results", "linears", "reader"} <= set(names)
    assert {p: p.stat().st_mtime_ns for p in outputs.rglob("*")} == before


def test_a_second_run_does_nothing_in_seconds(again):
    outputs = again.outputs
    before = {p: p.stat().st_mtime_ns for p in outputs.rglob("*") if p.is_file()}
    started = time.monotonic()
    done = run(again)
    assert done.returncode == 0, done.stderr
    assert time.monotonic() - started < 60
    assert {p: p.stat().st_mtime_ns for p in outputs.rglob("*") if p.is_file()} == before


def test_another_alpha_repeats_only_what_depends_on_it(again):
    original = again.file.read_text("utf-8")
    settings = yaml.safe_load(original)
    settings["variants"]["smoothquant_w8a8"]["smooth"]["alpha"] = 0.7
    again.file.write_text(yaml.safe_dump(settings, sort_keys=False), "utf-8")
    plan = run(again, "-n")
    again.file.write_text(original, "utf-8")
    assert plan.returncode == 0, plan.stderr
    stages = [
        f"{s} {m} smoothquant_w8a8"
        for s in ("quantization", "evaluation")
        for m in ("base", "finetuned")
    ]
    assert planned(plan) == {*stages, "cost base", "analysis", "report"}


@pytest.fixture(scope="module")
def handed_on(again):
    """The smoke study's results in lm-evaluation-harness's format: (folder, their source)."""
    study, outputs = again.file, again.outputs
    places = os.environ | {"STUDY_OUTPUTS": str(outputs.parent)}
    command = [sys.executable, "-m", "tools.lm_eval_export", str(study)]
    done = subprocess.run(command, cwd=PROJECT, env=places, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return outputs / "lm-eval", outputs


# What lm-evaluation-harness 0.4.13 writes (lm_eval/result_schema.py, SampleResult).
SAMPLE = {"doc_id", "doc", "target", "arguments", "resps", "filtered_resps", "filter", "metrics"}
SAMPLE |= {"doc_hash", "prompt_hash", "target_hash"}
AGGREGATED = {"results", "group_subtasks", "configs", "versions", "n-shot", "higher_is_better"}
AGGREGATED |= {"n-samples", "config", "git_hash", "date", "task_hashes", "model_name"}
AGGREGATED |= {"model_source", "model_name_sanitized", "total_evaluation_time_seconds"}


def test_every_variant_is_handed_on_in_the_harness_format(handed_on):
    folder, outputs = handed_on
    variants = {f"{p.parts[-4]}__{p.parts[-3]}" for p in outputs.glob("*/*/evaluation/gates.json")}
    assert {p.name for p in folder.iterdir()} == variants
    for place in folder.iterdir():
        (path,) = place.glob("results_*.json")
        exported = json.loads(path.read_text("utf-8"))
        assert set(exported) >= AGGREGATED
        for task, values in exported["results"].items():
            assert exported["n-samples"][task]["effective"] == values["sample_len"]
            assert task in exported["configs"]
            assert task in exported["versions"]


def test_its_figures_are_those_of_its_samples_and_of_the_predictions(handed_on):
    """Means and standard errors computed again here, and each row beside its prediction."""
    folder, outputs = handed_on
    for place in folder.iterdir():
        (path,) = place.glob("results_*.json")
        exported = json.loads(path.read_text("utf-8"))
        for file in place.glob("samples_*.jsonl"):
            task = file.name[len("samples_") : file.name.rfind("_")]  # as the harness reads it
            rows = [json.loads(line) for line in file.read_text("utf-8").split("\n")[:-1]]
            known = outputs.joinpath(*place.name.split("__"), "evaluation", "predictions")
            answers = (known / f"{task}.jsonl").read_text("utf-8").split("\n")[:-1]
            assert [row["doc"]["id"] for row in rows] == [json.loads(a)["id"] for a in answers]
            for row, answer in zip(rows, map(json.loads, answers), strict=True):
                assert set(row) == SAMPLE | set(row["metrics"])
                assert row[row["metrics"][0]] == answer["score"]
                assert row["prompt_hash"] == sha256_text(row["arguments"]["gen_args_0"]["arg_0"])
                assert row["target_hash"] == sha256_text(row["target"])
                if "logprobs" in answer:
                    assert [float(r[0][0]) for r in row["resps"]] == answer["logprobs"]
                else:
                    assert row["resps"] == [[answer["output"]]]
            for metric in rows[0]["metrics"]:
                values, name = [row[metric] for row in rows], rows[0]["filter"]
                figures = exported["results"][task]
                assert figures[f"{metric},{name}"] == pytest.approx(statistics.mean(values))
                error = statistics.stdev(values) / len(values) ** 0.5
                assert figures[f"{metric}_stderr,{name}"] == pytest.approx(error)


def test_variants_were_asked_the_same(handed_on):
    hashes = {}
    for path in handed_on[0].glob("*/results_*.json"):
        prompt_hashes = json.loads(path.read_text("utf-8"))
        model = prompt_hashes["model_name"].split("/")[0]
        hashes.setdefault(model, []).append(prompt_hashes["task_hashes"])
    for prompt_hashes in hashes.values():
        assert all(each == prompt_hashes[0] for each in prompt_hashes)


def test_others_readers_take_the_samples(handed_on):
    """One schema a file, as pandas and Arrow want it."""
    import pandas
    import pyarrow.json

    for path in handed_on[0].glob("*/samples_*.jsonl"):
        rows = path.read_text("utf-8").count("\n")
        assert len(pandas.read_json(path, lines=True)) == rows
        assert pyarrow.json.read_json(path).num_rows == rows


def test_every_checkpoint_has_its_card(undisturbed):
    folders = list(undisturbed.outputs.glob("*/*/checkpoint"))
    study = load_study("smoke")
    changed = [v for v in study.variants.values() if v.needs_checkpoint]
    assert len(folders) == len(changed) * len(study.models)
    for folder in folders:
        text = (folder / "README.md").read_text("utf-8")
        assert yaml.safe_load(text.split("---")[1])["library_name"] == "transformers"
        assert "checks on these files pass" in text
