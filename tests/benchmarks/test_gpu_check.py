"""`make gpu-check` without a card: its dry mode, what it keeps, what it runs again."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from benchmarks.gpu import page, processes, published

from benchmarks import gpu_check
from helpers.core.files import PROJECT


def options(folder, *more):
    return gpu_check._options(["--out", str(folder), "--commit", "abc", "--dry", *more])


@pytest.fixture
def parts(monkeypatch, tmp_path):
    """Two parts that say which of them ran; what `fails` names breaks off."""
    ran, fails = [], set()

    def started(name, seconds, _options, _forks):
        ran.append(name)
        return {"number": 7, "seconds": 1.0, "complete": name not in fails}

    monkeypatch.setattr(gpu_check, "PARTS", {"one": 20, "two": 30})
    monkeypatch.setattr(gpu_check, "started", started)
    monkeypatch.setattr(gpu_check, "_loaded", lambda names, _options: True)
    return ran, fails


def test_a_complete_part_is_not_run_again(parts, tmp_path):
    ran, fails = parts
    fails.add("two")
    assert gpu_check.run_all(options(tmp_path)) == 1
    fails.clear()
    assert gpu_check.run_all(options(tmp_path)) == 0
    assert ran == ["one", "two", "two"]
    assert gpu_check.run_all(options(tmp_path, "--again")) == 0
    assert ran[3:] == ["one", "two"]


def test_numbers_of_another_commit_are_not_kept(parts, tmp_path):
    ran, _ = parts
    gpu_check.run_all(options(tmp_path))
    gpu_check.run_all(options(tmp_path, "--commit", "def"))
    assert ran == ["one", "two"] * 2
    assert json.loads((tmp_path / "gpu.json").read_text("utf-8"))["commit"] == "def"


def test_no_part_begins_after_the_limit(parts, tmp_path):
    ran, _ = parts
    assert gpu_check.run_all(options(tmp_path, "--limit", "5")) == 2
    assert ran == []


def test_the_parts_fit_the_limit():
    assert sum(gpu_check.PARTS.values()) <= gpu_check.LIMIT_S


def test_what_a_part_found_before_it_broke_is_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_check, "GRACE_S", 0)
    fake = tmp_path / "python"
    fake.write_text(
        '#!/bin/sh\necho \'{"found": 1}\' > "$6/running.json"\nexec sleep 60\n', "utf-8"
    )
    fake.chmod(0o755)
    monkeypatch.setattr(gpu_check.sys, "executable", str(fake))
    outcome = gpu_check.started("card", 1, options(tmp_path), False)
    assert (outcome["found"], outcome["complete"]) == (1, False)
    assert outcome["ended"] == "stopped after 1 s"


@pytest.mark.skipif(sys.platform != "linux", reason="parts are forks on Linux alone")
@pytest.mark.parametrize(
    ("breaks", "ended"),
    [
        (lambda: time.sleep(60), "stopped after 1 s"),
        (lambda: os.kill(os.getpid(), signal.SIGKILL), "exit status -9"),
        (lambda: 1 / 0, "exit status 1"),
    ],
)
def test_a_fork_that_hangs_or_breaks_ends_alone_and_leaves_its_numbers(
    breaks, ended, tmp_path, monkeypatch
):
    def run_part(given):
        (given.out / gpu_check.RUNNING).write_text('{"found": 1}', "utf-8")
        breaks()

    monkeypatch.setattr(gpu_check, "run_part", run_part)
    monkeypatch.setattr(gpu_check, "GRACE_S", 0)
    outcome = gpu_check.started("card", 1, options(tmp_path), True)
    assert (outcome["found"], outcome["complete"], outcome["ended"]) == (1, False, ended)


@pytest.mark.skipif(sys.platform != "linux", reason="parts are forks on Linux alone")
def test_a_device_that_does_not_work_in_forks_is_seen(monkeypatch):
    assert processes.forks_work("cpu")
    monkeypatch.setattr(processes, "_compute", lambda device: 1 / 0)
    assert not processes.forks_work("cuda")


@pytest.mark.long
def test_loading_the_parts_does_not_call_cuda():
    """A driver that is called before a fork does not work in the fork."""
    process = subprocess.run([sys.executable, "-c", LOADING], cwd=PROJECT, capture_output=True)
    assert process.returncode == 0, process.stderr.decode()


LOADING = """
import torch
from benchmarks import gpu_check

def called(*_given):
    raise SystemExit("CUDA is called while the parts are loaded")

for name in dir(torch._C):
    if name.startswith("_cuda_getDevice") or name == "_cuda_init":
        setattr(torch._C, name, called)
assert gpu_check.processes.load(list(gpu_check.PARTS)) == []
"""


def test_without_a_card_it_says_so(tmp_path, capsys):
    assert gpu_check.main(["--out", str(tmp_path), "--commit", "abc"]) == 1
    assert "no CUDA device here; --dry" in capsys.readouterr().err


def test_the_page_shows_every_number(tmp_path):
    part = {"rows": [{"a": 1.5, "b": True}, {"a": 2}], "pair": {"x": 1, "y": None}, "way": "TRITON"}
    account = {"commit": "abc", "dry": True, "date": "2026-11-27"}
    account["parts"] = {"linears": part | {"complete": True, "seconds": 3.0}}
    text = page.as_markdown(account)
    assert "| a | b |\n| --- | --- |\n| 1.5 | yes |\n| 2 | – |" in text
    assert "- pair: x 1; y –" in text
    assert "TRITON" in text
    assert "dry run" in text


def test_the_published_table_is_made_of_the_accounts():
    text = published.PAGE.read_text("utf-8")
    assert published.with_table(text) == text
    text = published.README.read_text("utf-8")
    assert published.with_line(text) == text


def test_a_part_that_was_complete_is_published_whatever_failed_later(tmp_path, monkeypatch):
    def kept(date, **parts):
        card = {"card": {"name": "a card"}, "complete": True}
        account = {"commit": date, "dry": False, "date": date, "parts": {"card": card} | parts}
        (tmp_path / f"{date}.json").write_text(json.dumps(account), "utf-8")

    monkeypatch.setattr(published, "FOLDER", tmp_path)
    kept("1", memory={"complete": True}, smoke={"complete": False}, company={"complete": False})
    kept("2", memory={"complete": False}, smoke={"complete": False}, company={"complete": True})
    kept("3", company={"complete": False})
    shown = {row["part"]: (row["commit"], row["complete"]) for row in published.rows()}
    assert shown == {
        "card": ("3", "yes"),
        "memory": ("1", "yes"),
        "smoke": ("2", "no"),
        "company": ("2", "yes"),
    }


def dry(folder, only=""):
    command = [sys.executable, "-m", "benchmarks.gpu_check", "--dry", "--out", str(folder)]
    command += ["--commit", "abc", "--only", only]
    process = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True)
    assert process.returncode == 0, process.stdout[-3000:] + process.stderr[-3000:]
    return json.loads((folder / "gpu.json").read_text("utf-8"))["parts"]


@pytest.mark.long
def test_a_dry_run_of_the_first_parts(tmp_path):
    outcome = dry(tmp_path, "card,parity,two_cards")
    assert outcome["parity"]["products"]["off"] == []
    assert outcome["parity"]["linears alike"]
    assert outcome["two_cards"]["outcome"] == "a dry run on the CPU, no card: not run"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["gpu.json", "report.md"]


@pytest.mark.long
def test_a_whole_dry_run(tmp_path):
    """The same code as on a card; what holds of a CPU is asserted."""
    outcome = dry(tmp_path)
    assert list(outcome) == list(gpu_check.PARTS)
    rows = outcome["company"]["among others and alone"]
    assert {
        row["log-probabilities that differ"] for row in rows if "float32" in row["runs in"]
    } == {0}
    assert outcome["smoke"]["what must not differ does not"]
    assert outcome["smoke"]["gates of smoothquant_w8a8 on the device"]["failed"] == []
    assert outcome["memory"]["room for half a batch"]["outcome"] == "24 of 24 items answered"
    assert "set evaluation.batch to" in outcome["memory"]["too little room"]["outcome"]
