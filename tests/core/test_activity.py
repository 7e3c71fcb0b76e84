"""What jobs tell of their work, and how it is shown: nothing acts, and nothing stands still."""

import io
import json
import os

import nbformat
import pytest
from rich.console import Console

import toy_project
from helpers.core import processes
from helpers.core.files import PROJECT
from helpers.core.processes import Activity, Bar
from helpers.study.stages import Run
from helpers.workflow import display
from hostile_text import HOSTILE
from toy_project import jobs, notebook, read

ESCAPES = "\x1b[31mred\x1b[0m\x07\r\u202e[bold]x[/bold]"


@pytest.fixture
def activity_path(tmp_path, monkeypatch):
    """The file in which the job at hand tells what it does."""
    path = tmp_path / "a job.json"
    monkeypatch.setenv(processes.ACTIVITY_VARIABLE, str(path))
    return path


def test_a_bar_tells_its_place_and_draws_nothing(activity_path, capfd):
    for number in Bar(range(3), desc="arc", unit="item"):
        assert processes.read_activity(activity_path).of == 3, number
    assert processes.read_activity(activity_path) == Activity("arc", 3, 3, "item", 0.0)
    assert capfd.readouterr() == ("", "")


def test_a_bar_that_goes_on_counts_what_was_done_before(activity_path):
    for _ in Bar(iter("ab"), total=7, initial=5, desc="arc", unit="item"):
        assert processes.read_activity(activity_path).done >= 5
    assert processes.read_activity(activity_path).done == 7


def test_a_bar_nobody_watches_is_drawn(monkeypatch, capfd):
    monkeypatch.delenv(processes.ACTIVITY_VARIABLE, raising=False)
    list(Bar(range(3), desc="arc", unit="item"))
    processes.set_activity("something")
    assert "3/3" in capfd.readouterr().err


def test_a_full_disk_stops_no_job(activity_path, monkeypatch):
    def full(*_given, **_more):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    processes.set_activity("loading a model")
    assert list(Bar(range(3), desc="arc")) == [0, 1, 2]
    assert processes.read_activity(activity_path) is None


GOOD = {"doing": "arc", "done": 1, "of": 2, "unit": "item", "left_s": 3.5}


def test_what_was_written_is_read(activity_path):
    activity_path.write_text(json.dumps(GOOD))
    assert processes.read_activity(activity_path) == Activity(**GOOD)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b'{"doing": "arc", "do',
        b"[]",
        b"7",
        b"\xff\xfe\x00",
        b"[" * 4000,
        b"{}",
        b" " * 10**6 + json.dumps(GOOD).encode(),
        *(
            json.dumps(GOOD | {key: value}).encode()
            for key in ("done", "of", "left_s")
            for value in (-1, 1e300, float("nan"), float("inf"), True, "3", [3], {})
        ),
    ],
)
def test_what_cannot_be_read_is_nothing(activity_path, content):
    activity_path.write_bytes(content)
    assert processes.read_activity(activity_path) is None


def test_nothing_is_read_where_nothing_is(tmp_path):
    assert processes.read_activity(tmp_path / "none.json") is None
    (tmp_path / "folder.json").mkdir()
    assert processes.read_activity(tmp_path / "folder.json") is None


@pytest.mark.parametrize("text", [ESCAPES, HOSTILE, "x" * 10**4, "a\nstart    b"])
def test_no_text_acts_on_the_terminal(activity_path, text):
    activity_path.write_text(json.dumps(GOOD | {"doing": text, "unit": text}))
    job_activity = processes.read_activity(activity_path)
    if job_activity is None:  # too large to be a job's own
        return
    job = display.RunningJob(f"evaluation {display.one_line(text)}"[:200], 3.0, job_activity)
    status = display.Status(1, "2", 100.0, 50.0, [job])
    lines, clock = io.StringIO(), iter([0.0, *[1000.0] * 9])
    display.Lines(lines, clock=lambda: next(clock)).update(status)
    shown = Console(file=io.StringIO(), width=2000, color_system=None, force_terminal=False)
    shown.print(display.render_status(status))
    for output in (lines.getvalue(), shown.file.getvalue()):
        assert all(c.isprintable() or c == "\n" for c in output)
        assert ("[bold]" in output) == ("[bold]" in text)  # shown as it is, not obeyed
    assert lines.getvalue().count("\n") == 1


def test_a_line_comes_at_least_every_30_seconds():
    now, times, lines = 0.0, [0.0], io.StringIO()
    screen = display.Lines(lines, clock=lambda: now)
    status = display.Status(0, "5", 0.0, None, [])
    for _ in range(400):
        now += 1.0
        before = lines.tell()
        screen.update(status)
        if lines.tell() > before:
            times.append(now)
    gaps = [b - a for a, b in zip(times, [*times[1:], now], strict=True)]
    assert 5 < len(times) < 40
    assert max(gaps) <= 30


def event(word, job):
    return json.dumps({"word": word, "label": job, "text": ""}) + "\n"


def test_the_time_left_follows_how_far_off_finished_jobs_were(study, tmp_path):
    """Jobs that took twice their estimate double what the rest is thought to take."""
    shared, now = tmp_path / ".s.progress", 0.0
    runs = [Run("calibration", "base"), Run("evaluation", "base", "noquant")]
    known = display.Estimate(study, display.Capacity(1, 9), dict.fromkeys(runs, 10.0))
    shared.write_text("2\n")
    processes.activity_folder(shared).mkdir()
    watch = display.Watch(shared, known, clock=lambda: now)
    assert watch.status().left_s == 20
    shared.write_text("2\n" + event(processes.START, "calibration  base"))
    watch.status()
    now = 20.0
    assert watch.status().left_s > 20  # it should have ended after ten
    shared.write_text(shared.read_text() + event(processes.DONE, "calibration  base"))
    status = watch.status()
    assert (status.done, status.total, status.left_s, status.running) == (1, "2", 20.0, [])
    shared.write_text(shared.read_text() + event(processes.START, "evaluation base noquant"))
    place = processes.activity_folder(shared) / "evaluation base noquant.json"
    place.write_text(json.dumps(GOOD | {"left_s": 500.0}))
    [job] = watch.status().running
    assert job.activity.done == 1
    assert watch.status().left_s == 500  # the job itself knows better
    shared.write_text(shared.read_text() + event(processes.LOST, "evaluation base noquant"))
    assert watch.status().running == []
    assert watch.status().left_s == 0


def test_a_job_tells_what_it_does_and_its_notebook_has_no_bars(tmp_path):
    """Neither this project's bars nor those of libraries are in what is kept for review."""
    (tmp_path / "project").mkdir()
    project = toy_project.make(tmp_path / "project", kernels=True)
    cell = "import os; from helpers.core.processes import Bar; from tqdm import tqdm\n"
    cell += "for i in Bar(range(3), desc='arc'): list(tqdm(range(9)))\n"
    cell += "print(open(os.environ['STUDY_ACTIVITY']).read())"
    nbformat.write(notebook(cell), project / "notebooks" / "toy.ipynb")
    shared = tmp_path / ".toy.progress"
    shared.write_text("1\n")
    processes.activity_folder(shared).mkdir()
    command = ("run", "--notebook", "notebooks/toy.ipynb", "--output", "outputs/x.ipynb")
    done = jobs(project, *command, "-p", "study", "toy", STUDY_PROGRESS=str(shared))
    assert done.returncode == 0, done.stderr
    [output] = read(project / "outputs" / "x.ipynb")["cells"][-1]["outputs"]
    assert output["name"] == "stdout"
    assert json.loads("".join(output["text"]))["done"] == 3
    assert list(processes.activity_folder(shared).iterdir()) == []


def test_every_bar_of_a_job_is_one_that_tells():
    """A bar of tqdm's own would be seen by nobody. Fetching is no job, and draws its own."""
    sources = PROJECT / "src" / "helpers"
    using = {p.name for p in sources.rglob("*.py") if "import tqdm" in p.read_text("utf-8")}
    assert using == {"processes.py", "fetching.py"}
