"""A study whose evaluation sets are tasks of lm-evaluation-harness, from end to end."""

import json

import pytest
import yaml
from benchmarks.lm_eval_tasks import ROWS, task_settings, write_tasks

from smoke_study import Smoke

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """The smoke study with every kind of task in place of its sets, run by make."""
    root = tmp_path_factory.mktemp("tasks")
    files = write_tasks(root / "tasks", items=8)
    study = Smoke(root / "study")
    settings = yaml.safe_load(study.file.read_text("utf-8"))
    settings["models"] = {"base": {"random": "llama"}}
    kept = ("noquant", "noquant_bf16", "smoothquant_w8a8")
    settings["variants"] = {name: settings["variants"][name] for name in kept}
    settings["runtime"]["cost"] = False
    settings["evaluation"]["datasets"] = {
        kind: task_settings(kind, files[kind], items=6) for kind in ROWS
    }
    settings["statistics"]["primary"][0]["dataset"] = "arc"
    study.file.write_text(yaml.safe_dump(settings, sort_keys=False), "utf-8")
    study.done()
    return study


def test_every_check_passes_and_every_verdict_is_recomputed(ran):
    checked = sorted(ran.outputs.glob("base/*/evaluation/gates.json"))
    assert len(checked) == 3
    for path in checked:
        gates = json.loads(path.read_text("utf-8"))["gates"]
        assert [gate["name"] for gate in gates if not gate["passed"]] == []
    ran.done("verdicts")
    summary = json.loads((ran.outputs / "summary.json").read_text("utf-8"))
    assert {row["verdict"] for row in summary["comparisons"]}.isdisjoint({"invalid"})
    assert {row["dataset"] for row in summary["comparisons"]} == set(ROWS)


def test_the_report_says_what_only_the_harness_can_say(ran):
    report = (ran.outputs / "report.md").read_text("utf-8")
    [line] = [x for x in report.splitlines() if "task hellaswag.yaml of lm-eval" in x]
    assert "not checked apart from the harness: prompts and right answers" in line
    [line] = [x for x in report.splitlines() if "task boolq.yaml of lm-eval" in x]
    assert "not checked" not in line


def test_the_results_are_exported_in_the_harnesss_format(ran):
    ran.done("export")
    [results] = ran.outputs.glob("lm-eval/base__noquant/results_*.json")
    content = json.loads(results.read_text("utf-8"))
    assert set(ROWS) <= set(content["results"])
    assert content["configs"]["lambada"]["output_type"] == "loglikelihood"
