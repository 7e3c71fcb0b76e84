"""Faults of real stages: damaged files, a full disk, odd places, a report of a part."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from helpers.core.files import PROJECT
from helpers.workflow import fork_server
from small_disk import fill_up, small_disk
from smoke_study import NAME, content

pytestmark = pytest.mark.long


@pytest.fixture(autouse=True, scope="module")
def forks():
    """Jobs that are started one by one are forks of one process: each import takes seconds."""
    with fork_server.fork_server():
        yield


@pytest.fixture
def study(undisturbed, tmp_path):
    """A finished smoke study, the test's own to break."""
    return undisturbed.copy(tmp_path / "study")


def flip(path) -> None:
    """Change one bit in the middle of a file, and none of its times that matter."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


RTN = {"model": "base", "variant": "rtn_w8a8"}
DAMAGE = {
    "cached model": ("cache/models/*/model.safetensors", "calibration", {"model": "base"}),
    "trained model": (
        f"outputs/{NAME}/finetuned/model/model.safetensors",
        "calibration",
        {"model": "finetuned"},
    ),
    "calibration": (
        f"outputs/{NAME}/base/calibration/activations.safetensors",
        "quantization",
        RTN,
    ),
    "checkpoint": (
        f"outputs/{NAME}/base/rtn_w8a8/checkpoint/model.safetensors",
        "evaluation",
        RTN,
    ),
    "baseline's predictions": (
        f"outputs/{NAME}/base/noquant/evaluation/predictions/arc.jsonl",
        "evaluation",
        RTN,
    ),
    "predictions": (
        f"outputs/{NAME}/finetuned/rtn_w8a8/evaluation/predictions/boolq.jsonl",
        "analysis",
        {},
    ),
    "outlier picture": (
        f"outputs/{NAME}/base/calibration/surface.safetensors",
        "analysis",
        {},
    ),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_a_damaged_file_is_named_before_it_is_used_and_the_remedy_works(study, undisturbed, what):
    pattern, stage, parameters = DAMAGE[what]
    [path] = study.root.glob(pattern)
    flip(path)
    done = study.job(stage, **parameters)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    [line] = [x for x in done.stderr.splitlines() if "checksum differs" in x]
    assert f"{path.parent.name}/{path.name} is not what" in line
    assert "delete " in line
    if what == "predictions":  # the whole remedy once: it costs a few jobs
        (path.parents[1] / "record.json").unlink()
        study.done()
        assert study.content() == undisturbed.content()


def test_a_disk_that_fills_up_under_a_checkpoint(study, undisturbed):
    folder = study.outputs / "base" / "rtn_w8a8"
    shutil.rmtree(folder)
    with small_disk(folder, size="4m"):
        fill_up(folder, leave=65536)
        done = study.job("quantization", **RTN)
        assert done.returncode == 1
        assert "Traceback" not in done.stderr
        assert "free some space and run again" in done.stderr
        assert not (folder / "checkpoint").exists()
        assert not (folder / "quantization" / "record.json").exists()
        assert [p.name for p in folder.iterdir() if p.name.endswith(".tmp")] == []
        (folder / "filler").unlink()
        done = study.job("quantization", **RTN)
        assert done.returncode == 0, done.stderr
        (folder / "quantization" / "record.json").unlink()
        actual, expected = content(folder), content(undisturbed.outputs / "base" / "rtn_w8a8")
        assert actual
        assert actual == {k: v for k, v in expected.items() if k in actual}


def test_a_disk_that_fills_up_under_the_predictions(study, undisturbed):
    """Most of the answers are there; with room again they are not asked a second time."""
    evaluation = study.outputs / "base" / "rtn_w8a8" / "evaluation"
    (evaluation / "record.json").unlink()
    shutil.rmtree(evaluation / "predictions")
    partial = evaluation / ".partial"
    with small_disk(partial, size="8k"):
        done = study.job("evaluation", **RTN)
        assert done.returncode == 1
        assert "Traceback" not in done.stderr
        assert "No space left on device" in done.stderr
        assert "free some space and run again" in done.stderr
        assert not (evaluation / "predictions").exists()
        subprocess.run(["mount", "-o", "remount,size=1m", str(partial)], check=True)
        done = study.job("evaluation", **RTN)
        assert done.returncode == 0, done.stderr
    executed = study.outputs / "notebooks" / "03_evaluation.base.rtn_w8a8.ipynb"
    assert "goes on after" in executed.read_text("utf-8")
    partial.rmdir()
    assert study.content() == undisturbed.content()


def test_a_report_of_what_is_complete_names_what_is_missing(study):
    before = (study.outputs / "report.md").read_bytes()
    (study.outputs / "finetuned/smoothquant_o3/evaluation/record.json").unlink()
    refused = study.make("report")
    _, output = refused.communicate()
    assert refused.returncode == 2
    assert "make report PARTIAL=yes for the completed part" in output
    output = study.done("report", "PARTIAL=yes")
    assert "missing: " in output
    assert "evaluation finetuned smoothquant_o3" in output
    report = (study.outputs / "partial" / "report.md").read_text("utf-8")
    assert report.lstrip().startswith("**This report is partial.**")
    assert "- evaluation finetuned smoothquant_o3\n" in report
    summary = json.loads((study.outputs / "partial" / "summary.json").read_text("utf-8"))
    assert "evaluation finetuned smoothquant_o3" in summary["missing"]
    shown = {(c["model"], c["variant"]) for c in summary["comparisons"]}
    assert ("finetuned", "smoothquant_o3") not in shown
    assert ("finetuned", "rtn_w8a8") in shown
    assert (study.outputs / "report.md").read_bytes() == before


def test_a_clone_at_a_path_with_spaces_and_other_letters_in_a_plain_locale(
    undisturbed_part, tmp_path
):
    """As `git clone` and `make study` would have it, but for the packages, which are shared."""
    clone = tmp_path / "Prüf stand's 日本" / "clone (1)"
    clone.mkdir(parents=True)
    for name in ("src", "notebooks", "params"):
        shutil.copytree(PROJECT / name, clone / name)
    shutil.copy(undisturbed_part.file, clone / "params")
    for name in (
        "Makefile",
        "Snakefile",
        "pyproject.toml",
        "requirements.lock",
        "requirements-lm-eval.txt",
    ):
        shutil.copy2(PROJECT / name, clone)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", clone / ".venv"], check=True)
    [packages] = (clone / ".venv").glob("lib/*/site-packages")
    ours = next(path for path in sys.path if path.endswith("site-packages"))
    (packages / "shared.pth").write_text(f"../../../../src\nimport site; site.addsitedir({ours!r})")
    (clone / ".venv" / "share").symlink_to(Path(sys.prefix) / "share")  # nbconvert's templates
    plain = {"PATH": "/usr/bin:/bin", "LC_ALL": "C", "HOME": str(tmp_path)}
    done = subprocess.run(
        ["make", "-o", ".venv/.study-ready", "study", f"STUDY={NAME}"],
        cwd=clone,
        env=plain,
        capture_output=True,
        text=True,
        encoding="utf-8",
    )
    assert done.returncode == 0, done.stderr
    assert f"current: outputs/{NAME}/report.html" in done.stderr
    assert content(clone / "outputs" / NAME) == undisturbed_part.content()
