"""The smoke study from end to end: all six notebooks, then again, then with another α."""

import json
import os
import subprocess
import sys
import time

import pytest
import yaml

from helpers.study.paths import PROJECT

pytestmark = pytest.mark.slow
GUARDS = PROJECT / "tests" / "guards"


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """The smoke study, run in folders of its own; returns (run, study file, outputs folder)."""
    root = tmp_path_factory.mktemp("smoke")
    study = root / "smoke.yaml"
    study.write_text((PROJECT / "params" / "smoke.yaml").read_text("utf-8"), "utf-8")
    places = {"STUDY_OUTPUTS": str(root / "outputs"), "STUDY_CACHE": str(root / "cache")}
    places |= {"PYTHONPATH": str(GUARDS), "NETWORK_ATTEMPTS": str(root / "attempts")}

    def run(*options):
        command = [sys.executable, "-m", "helpers.study.jobs", "study", str(study)]
        command += ["--cores", "2", "--", *options]
        return subprocess.run(
            command, cwd=PROJECT, env=os.environ | places, capture_output=True, text=True
        )

    first = run()
    assert first.returncode == 0, first.stderr
    return run, study, root / "outputs" / "smoke"


def test_the_whole_study_asks_nobody_anything(smoke):
    """Every process of it runs with all but this machine refused, and none so much as tries."""
    attempts = smoke[1].parent / "attempts"
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


def test_every_job_leaves_its_notebook_and_its_record(smoke):
    _, _, outputs = smoke
    notebooks = {path.name for path in (outputs / "notebooks").iterdir()}
    assert len(notebooks) == 1 + 2 + 2 * 4 + 1 + 2 * 6 + 1
    assert not [name for name in notebooks if "failed" in name or "running" in name]
    assert len(list(outputs.glob("**/record.json"))) == 1 + 2 + 2 * 4 + 1 + 2 * 6


def test_a_sound_study_passes_every_gate(smoke):
    verified = [json.loads(p.read_text()) for p in smoke[2].glob("*/*/verification.json")]
    assert len(verified) == 8
    for found in verified:
        assert [g for g in found["gates"] if not g["passed"]] == []
        assert found["passed"]


def test_every_evaluation_is_checked_on_the_files_that_are_there(smoke):
    checked = [json.loads(p.read_text()) for p in smoke[2].glob("*/*/evaluation/gates.json")]
    assert len(checked) == 12
    for found in checked:
        assert [g for g in found["gates"] if not g["passed"]] == []
        assert set(found["predictions"]) == {"arc", "squad_v2", "openmath", "boolq", "shared_text"}


def test_every_control_does_its_duty(smoke):
    """Smoothing alone answers as the baseline does, and the noise floor is rounding."""
    _, _, outputs = smoke
    summary = json.loads((outputs / "summary.json").read_text("utf-8"))
    roles = {(c["variant"], c["role"]) for c in summary["controls"]}
    assert {("noquant_bf16", "noise floor"), ("smooth_only", "smoothing alone")} <= roles
    assert [c for c in summary["controls"] if not c["done"]] == []


def test_every_verdict_is_made_again_from_the_answers(smoke, monkeypatch):
    _, study, outputs = smoke
    from helpers.report.recompute import recompute

    monkeypatch.setenv("STUDY_OUTPUTS", str(outputs.parent))
    table, differing = recompute(str(study))
    assert differing == []
    assert len(table.splitlines()) == 1 + 2 * 4 * 5


def test_the_report_is_whole(smoke):
    _, _, outputs = smoke
    text = (outputs / "report.md").read_text("utf-8")
    for dataset in ("ARC", "SQuAD", "OpenMath", "BoolQ"):
        assert dataset in text
    for figure in [line for line in text.splitlines() if line.startswith("![")]:
        assert (outputs / figure.split("](")[1].rstrip(")")).is_file(), figure
    page = (outputs / "report.html").read_text("utf-8")
    assert "<img" in page
    assert 'src="report_files' not in page  # self-contained
    assert "import helpers" not in page  # without code
    assert "from helpers" not in page


def test_nothing_that_is_kept_names_this_machine(smoke):
    _, study, outputs = smoke
    kept = [outputs / "report.md", outputs / "report.html", *outputs.glob("notebooks/*.ipynb")]
    for path in kept:
        text = path.read_text("utf-8").replace(str(study), "")
        assert str(PROJECT) not in text, path.name
        assert str(outputs.parent) not in text, path.name


def test_a_second_run_does_nothing_in_seconds(smoke):
    run, _, outputs = smoke
    before = {p: p.stat().st_mtime_ns for p in outputs.rglob("*") if p.is_file()}
    started = time.monotonic()
    again = run()
    assert again.returncode == 0, again.stderr
    assert time.monotonic() - started < 60
    assert {p: p.stat().st_mtime_ns for p in outputs.rglob("*") if p.is_file()} == before


def test_another_alpha_repeats_only_what_depends_on_it(smoke):
    run, study, _ = smoke
    settings = yaml.safe_load(study.read_text("utf-8"))
    original = study.read_text("utf-8")
    settings["variants"]["smoothquant_w8a8"]["smooth"]["alpha"] = 0.7
    study.write_text(yaml.safe_dump(settings, sort_keys=False), "utf-8")
    plan = run("-n")
    study.write_text(original, "utf-8")
    assert plan.returncode == 0, plan.stderr
    stages = [
        f"{s} {m} smoothquant_w8a8"
        for s in ("quantization", "evaluation")
        for m in ("base", "finetuned")
    ]
    assert planned(plan) == {*stages, "cost base", "analysis", "report"}


def test_evaluating_again_gives_the_same_bytes(smoke):
    run, _, outputs = smoke
    folder = outputs / "base" / "smoothquant_w8a8" / "evaluation"
    files = [*sorted(folder.glob("predictions/*.jsonl")), folder / "metrics.json"]
    before = [path.read_bytes() for path in files]
    (folder / "record.json").unlink()
    again = run()
    assert again.returncode == 0, again.stderr
    assert [path.read_bytes() for path in files] == before
