"""The workflow under faults: nothing is lost, nothing false is green, nobody sees a traceback.

Toy notebooks stand in for the stages. docs/reliability.md lists the faults.
"""

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import nbformat
import pytest

import toy_project
from process_tree import kill, new_mark, of_role, processes, wait_for, wait_until_gone
from small_disk import fill_up, small_disk
from toy_project import planned, run_study, start

SECONDS = 20  # within which everything has to be gone, on a machine that is busy
long = pytestmark = pytest.mark.long
# A calibration that begins, says so, and waits as long as the file `wait` is there.
WAITS = """
import os, time
from helpers.core.files import PROJECT
(PROJECT / "began").write_text(f"{os.getpid()} {os.getppid()}")
while (PROJECT / "wait").is_file():
    time.sleep(0.05)
"""


@pytest.fixture
def project(tmp_path):
    """A small toy study; its calibration runs in a kernel."""
    return make(tmp_path / "project")


def make(folder, *, kernels="calibration"):
    folder.mkdir(parents=True)
    toy_project.make(folder, kernels=kernels)
    toy_project.lighten_forks(folder)
    toy_project.write_study(folder, toy_project.small())
    return folder


def add_cell(project, stage: str, code: str) -> None:
    """Let the toy of a stage run some code before it does its work."""
    [path] = (project / "notebooks").glob(f"*_{stage}.ipynb")
    notebook = nbformat.read(path, as_version=4)
    notebook.cells.insert(1, nbformat.v4.new_code_cell(code))
    nbformat.write(notebook, path)


def without_traceback(done) -> str:
    assert "Traceback" not in done.stderr + done.stdout, done.stderr
    return done.stderr


def finished(project) -> dict[str, str]:
    """The results of a study that is run to its end, by their names."""
    done = run_study(project)
    assert done.returncode == 0, done.stderr
    left = [p for p in (project / "outputs").rglob("*") if p.name.endswith((".tmp", ".progress"))]
    left += (project / "outputs").rglob("*.running.ipynb")
    assert left == []
    return {str(p.relative_to(project)): p.read_text() for p in project.rglob("*record.json")}


@pytest.fixture(params=["started", pytest.param("forked", marks=long)])
def begun(project, request):
    """(project, mark, front door) of a run whose calibration has begun and waits.

    Jobs are processes of their own, or forks of one that has loaded what they need.
    """
    forks = {"STUDY_FORKS": "yes" if request.param == "forked" else "no"}
    add_cell(project, "calibration", WAITS)
    (project / "wait").write_text("")
    mark = new_mark()
    front = start(project, *toy_project.WHOLE, **mark, **forks)
    wait_for(lambda: began(project), seconds=180)
    yield project, mark, front
    for process in processes(mark):
        kill(process)
    front.communicate()


def began(project) -> dict[str, int] | None:
    """Process ids of the waiting calibration, once it has begun."""
    path = project / "began"
    words = path.read_text().split() if path.is_file() else []
    return dict(zip(("kernel", "runner"), map(int, words), strict=True)) if words else None


@pytest.mark.parametrize("role", [pytest.param("front", marks=long), "engine"])
def test_kill_9_of_what_runs_the_jobs_leaves_nothing_running_and_blocks_nothing(begun, role):
    project, mark, front = begun
    assert set(processes(mark).values()) >= {"front", "engine", "runner", "kernel"}
    [process] = of_role(mark, role)
    kill(process)
    wait_until_gone(mark, seconds=SECONDS)
    without_traceback_of(front)
    assert not (project / "outputs/toy/base/calibration/record.json").exists()
    (project / "wait").unlink()
    assert len(finished(project)) == 5


def without_traceback_of(front) -> str:
    out, err = front.communicate(timeout=SECONDS)
    assert "Traceback" not in out + err, err
    return err


@pytest.mark.parametrize(
    ("role", "message"),
    [
        pytest.param(
            "runner",
            "exited without reporting a result: calibration base; such a job was killed",
            marks=long,
        ),
        ("kernel", "the kernel died; most often the machine ran out of memory"),
    ],
)
def test_kill_9_of_one_job_leaves_the_others_running_and_is_told(begun, role, message):
    project, mark, front = begun
    wait_for((project / "outputs/toy/base/noquant/evaluation/record.json").is_file, seconds=180)
    kill(began(project)[role])
    err = without_traceback_of(front)
    assert front.returncode == 1
    assert message in err
    assert "1 failed; finished jobs are kept, so correct the cause and run again" in err
    assert processes(mark) == {}
    (project / "wait").unlink()
    assert len(finished(project)) == 5


def test_a_job_that_dies_before_its_first_word_is_named(project):
    module = project / "src/helpers/workflow/cli.py"
    first = "    report_event(START, label)\n"
    dies = "    if 'calibration' in label:\n        sys.exit(1)\n"
    text = module.read_text("utf-8")
    assert first in text
    module.write_text(text.replace(first, dies + first), "utf-8")
    done = toy_project.jobs(project, *toy_project.WHOLE)
    assert done.returncode == 1
    assert "exited without reporting a result: calibration base; such a job" in done.stderr
    assert "1 failed; finished jobs are kept" in done.stderr


@pytest.mark.parametrize(
    "number",
    [
        signal.SIGINT,
        pytest.param(signal.SIGTERM, marks=long),
        pytest.param(signal.SIGHUP, marks=long),
    ],
)
def test_a_stopped_run_is_gone_within_seconds_and_goes_on(begun, number):
    """Ctrl-C reaches the whole process group; the others only make's child."""
    project, mark, front = begun
    started = time.monotonic()
    if number == signal.SIGINT:
        os.killpg(front.pid, number)
    else:
        kill(front.pid, number)
    err = without_traceback_of(front)
    wait_until_gone(mark, seconds=SECONDS)
    assert time.monotonic() - started < SECONDS
    assert front.returncode != 0
    if number != signal.SIGHUP:  # the terminal is gone
        assert "stopped; finished jobs are kept, so run again to resume" in err
        assert "memory" not in err
    (project / "wait").unlink()
    assert len(finished(project)) == 5


@long
def test_ctrl_c_at_any_moment_ends_it_all_without_a_traceback(project):
    """While the engine loads, while a kernel starts, while it works, between two jobs."""
    chance = random.Random(20261125)
    add_cell(project, "calibration", "import time; time.sleep(4)")
    for _ in range(12):
        mark = new_mark()
        front = start(project, *toy_project.WHOLE, **mark)
        with contextlib.suppress(subprocess.TimeoutExpired):
            front.wait(timeout=chance.uniform(0.5, 9))
        if front.poll() is None:
            os.killpg(front.pid, signal.SIGINT)
        without_traceback_of(front)
        wait_until_gone(mark, seconds=SECONDS)
    assert len(finished(project)) == 5


def test_two_runs_at_once_are_one_run_and_one_line(begun):
    project, _mark, front = begun
    for options in ([], ["-n"]):
        second = run_study(project, *options)
        assert second.returncode == 2
        assert second.stderr == (
            f"study 'toy' is being run by process {front.pid}; wait for it or stop it\n"
        )
    (project / "wait").unlink()
    _, err = front.communicate()
    assert "[7/7]" in err
    assert front.returncode == 0


@long
def test_a_kernel_without_memory_is_told_with_the_remedy(project):
    limited = "import resource\nresource.setrlimit(resource.RLIMIT_AS, (2**30, 2**30))\n"
    add_cell(project, "calibration", f"{limited}hoard = bytearray(2**31)")
    done = run_study(project)
    assert done.returncode == 1
    assert "MemoryError: no message; give the jobs more memory" in without_traceback(done)
    assert "see outputs/toy/notebooks/01_calibration.base.failed.ipynb" in done.stderr
    assert (project / "outputs/toy/notebooks/01_calibration.base.failed.ipynb").is_file()
    assert (project / "outputs/toy/base/noquant/evaluation/record.json").is_file()


def test_a_full_disk_is_refused_before_anything_begins(tmp_path):
    with small_disk(tmp_path / "disk", size="32m"):
        project = make(tmp_path / "disk" / "project")
        fill_up(tmp_path / "disk", leave=2**20)
        done = run_study(project)
    assert done.returncode == 2
    [line] = without_traceback(done).splitlines()
    assert "are free on this disk; free some space and run again" in line


@pytest.mark.parametrize(
    "leave", [pytest.param(bytes_left, marks=long) for bytes_left in (0, 4096, 2**15)]
)
def test_a_disk_that_fills_up_is_told_and_with_room_again_nothing_is_lost(tmp_path, leave):
    """The engine's memory lies on the same disk; it runs out at different moments."""
    with small_disk(tmp_path / "disk", size="64m"):
        project = make(tmp_path / "disk" / "project")
        add_cell(project, "quantization", WAITS)
        (project / "wait").write_text("")
        front = start(project, *toy_project.WHOLE)
        wait_for(lambda: began(project), seconds=180)
        before = (project / "outputs/toy/base/calibration/record.json").read_bytes()
        fill_up(tmp_path / "disk", leave=leave)
        (project / "wait").unlink()
        out, err = front.communicate(timeout=60)
        assert front.returncode != 0
        assert "Traceback" not in out + err, err
        assert "free some space and run again" in err
        for path in (project / "outputs").rglob("*.json"):
            json.loads(path.read_bytes())
        (tmp_path / "disk" / "filler").unlink()
        assert len(finished(project)) == 5
        assert (project / "outputs/toy/base/calibration/record.json").read_bytes() == before


@pytest.mark.parametrize("how", ["read-only", "a file", "another user's"])
def test_outputs_that_cannot_be_written_are_one_line(tmp_path, how):
    project, outputs = make(tmp_path / "project", kernels=False), tmp_path / "outputs"
    with contextlib.ExitStack() as stack:
        if how == "read-only":
            stack.enter_context(small_disk(outputs, size="1m", options=",ro"))
        elif how == "a file":
            outputs.write_text("")
        elif os.getuid() == 0:
            pytest.skip("root may write everywhere")
        else:
            outputs.mkdir(mode=0o500)
        done = run_study(project, STUDY_OUTPUTS=str(outputs))
    assert done.returncode == 2
    [line] = without_traceback(done).splitlines()
    assert "make it writable, or name another place with STUDY_OUTPUTS" in line
    assert str(outputs) in line


def test_a_folder_that_becomes_unwritable_fails_its_jobs_in_one_line_each(tmp_path):
    project = make(tmp_path / "project", kernels=False)
    (project / "outputs" / "toy").mkdir(parents=True)
    (project / "outputs" / "toy" / "notebooks").write_text("a file where a folder belongs")
    done = run_study(project)
    assert done.returncode == 1
    assert "make it writable" in without_traceback(done)


def set_times(folder, seconds: float) -> None:
    for path in folder.rglob("*"):
        if not path.is_symlink():
            os.utime(path, (seconds, seconds))


YEAR = 365 * 86400


@pytest.fixture(scope="module")
def once_done(tmp_path_factory):
    project = make(tmp_path_factory.mktemp("done") / "project", kernels=False)
    finished(project)
    assert planned(project) == []
    return project


@pytest.fixture
def done_by_a_clock(once_done, tmp_path):
    """A finished toy study whose files were written by a clock that was off by some years."""

    def off(years: float):
        project = shutil.copytree(once_done, tmp_path / "project", symlinks=True)
        for name in ("outputs", ".snakemake"):
            set_times(project / name, time.time() + years * YEAR)
        return project

    return off


@pytest.mark.long
@pytest.mark.parametrize("years", [-30, 1])
def test_a_clock_that_jumped_neither_repeats_nor_hides_anything(done_by_a_clock, years):
    project = done_by_a_clock(years)
    assert planned(project) == []
    with open(project / "src/helpers/quantization/smoothing.py", "a") as stream:
        stream.write("\nEXTRA = 1\n")
    assert planned(project) == sorted(
        [
            *("quantization base smooth", "evaluation base smooth", "cost base"),
            *("analysis", "report"),
        ]
    )
    finished(project)


@pytest.mark.parametrize("years", [pytest.param(-10, marks=long), 10])
def test_results_changed_by_another_clock_are_seen(done_by_a_clock, years):
    """As when a stage was run again, and the run was cut short before what rests on it."""
    project = done_by_a_clock(0)
    record = project / "outputs/toy/base/calibration/record.json"
    record.write_text(json.dumps(json.loads(record.read_text()) | {"other": 1}))
    then = time.time() + years * YEAR
    os.utime(record, (then, then))
    assert "calibration base" in planned(project)
    assert "evaluation base smooth" in planned(project)


@long
def test_modules_from_the_future_are_no_change(done_by_a_clock):
    project = done_by_a_clock(0)
    for name in ("src", "notebooks", "params"):
        set_times(project / name, time.time() + YEAR)
    assert planned(project) == []
    study = toy_project.small()
    study["calibration"]["items"] = 5
    toy_project.write_study(project, study)
    finished(project)


@long
def test_swapped_values_are_seen_by_the_engine(done_by_a_clock):
    project, study = done_by_a_clock(0), toy_project.small()
    study["calibration"] |= {"max_tokens": 128, "batch_tokens": 64}
    toy_project.write_study(project, study)
    assert "calibration base" in planned(project)


@pytest.mark.parametrize(
    "damage",
    [pytest.param(b"", marks=long), b"\0" * 200, pytest.param(b'{"params": ["', marks=long)],
)
def test_a_torn_memory_of_the_engine_hides_no_change(done_by_a_clock, damage):
    """What a power cut can leave of files that were not handed to the disk."""
    project, study = done_by_a_clock(0), toy_project.small()
    for path in (project / ".snakemake" / "metadata").rglob("*"):
        if path.is_file():
            path.write_bytes(damage)
    assert planned(project) == []
    study["variants"]["smooth"]["smooth"]["alpha"] = 0.9
    toy_project.write_study(project, study)
    assert "quantization base smooth" in planned(project)
    assert "calibration base" not in planned(project)


@long
def test_an_account_that_is_lost_or_torn_means_that_the_run_is_repeated(done_by_a_clock):
    project = done_by_a_clock(0)
    accounts = project / "outputs" / "toy" / ".accounts"
    (accounts / "01_calibration.base.json").write_bytes(b"{")
    (accounts / "03_evaluation.base.smooth.json").unlink()
    assert {"calibration base", "evaluation base smooth"} <= set(planned(project))
    finished(project)


def test_durations_do_not_follow_the_clock(tmp_path, monkeypatch):
    from datetime import UTC, datetime

    from helpers.core import records

    class Jumping(datetime):
        now = classmethod(lambda cls, zone=UTC: datetime(2031, 1, 1, tzinfo=zone))

    monkeypatch.setattr(records, "datetime", Jumping)
    monkeypatch.setattr(time, "time", lambda: 0.0)
    record = records.Record(tmp_path, stage="calibration", parameters={})
    written = json.loads(record.write({}).read_text())
    assert written["started"].startswith("2031")
    assert 0 <= written["duration_s"] < 60


@pytest.fixture(scope="module")
def latin_1(tmp_path_factory):
    """The environment of a Latin-1 locale, made for the test."""
    folder = tmp_path_factory.mktemp("locale")
    command = ["localedef", "-i", "en_US", "-f", "ISO-8859-1", str(folder / "en_US.ISO-8859-1")]
    if shutil.which("localedef") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("localedef cannot make a Latin-1 locale here")
    return {"LOCPATH": str(folder), "LC_ALL": "en_US.ISO-8859-1", "LANG": "en_US.ISO-8859-1"}


ASCII = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}


@pytest.mark.parametrize(
    "locale", [pytest.param(name, marks=long) for name in ("C", "Latin-1", "ASCII only")]
)
def test_a_locale_and_a_path_with_spaces_and_other_letters_change_nothing(
    tmp_path, locale, request
):
    chosen = {"C": {"LC_ALL": "C"}, "ASCII only": ASCII}
    more = chosen.get(locale) or request.getfixturevalue("latin_1")
    project = make(tmp_path / "Prüf stand's 日本 (1)")
    study = toy_project.small() | {"title": "Ein Prüfstand: 日本"}
    (project / "params" / "toy.yaml").write_text(json.dumps(study, ensure_ascii=False), "utf-8")
    add_cell(project, "calibration", "print('Größe 日本')")
    done = run_study(project, **more)
    assert done.returncode == 0, done.stderr
    without_traceback(done)
    executed = project / "outputs/toy/notebooks/01_calibration.base.ipynb"
    assert "Größe 日本" in executed.read_text("utf-8")
    assert "Ein Prüfstand: 日本" in (project / "outputs/toy/report.html").read_text("utf-8")
    add_cell(project, "calibration", "raise ValueError('Größe 日本')")
    failed = run_study(project, **more)
    assert failed.returncode == 1
    assert "Größe" in without_traceback(failed) or "Gr\\xf6" in failed.stderr


@long
def test_the_front_door_ends_with_the_process_that_opened_it(project):
    """kill -9 of make: what it started is killed by the system, not left to itself."""
    add_cell(project, "calibration", WAITS)
    (project / "wait").write_text("")
    mark = new_mark()
    command = [sys.executable, "-m", "helpers.workflow.cli", *toy_project.WHOLE]
    opener = subprocess.Popen(
        [sys.executable, "-c", f"import subprocess; subprocess.run({command!r})"],
        cwd=project,
        env=toy_project.environment(project) | mark,
        stderr=subprocess.DEVNULL,
    )
    wait_for(lambda: began(project), seconds=180)
    kill(opener.pid)
    opener.wait()
    wait_until_gone(mark, seconds=SECONDS)
    (project / "wait").unlink()
    finished(project)
