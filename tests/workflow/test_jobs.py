"""One job: its notebook, what the terminal says, what is kept, and that it ends with its parent."""

import json
import os
import re
import signal
import subprocess
import sys

import nbformat
import pytest

import toy_project
from helpers.core.files import PROJECT
from helpers.workflow.cli import clean_notebook, export_report, final_line_states
from process_tree import wait_for
from toy_project import environment, jobs, notebook, read

RUN = ("run", "--notebook", "notebooks/toy.ipynb", "--output", "outputs/toy/02_x.base.a.ipynb")
PIXEL = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5Erk"
PIXEL += "Jggg=="
GIVEN = ("-p", "study", "toy", "-p", "model", "base", "-p", "variant", "a")


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    return toy_project.make(tmp_path_factory.mktemp("project"), kernels=True)


def run(project, *cells, **more):
    nbformat.write(notebook(*cells), project / "notebooks" / "toy.ipynb")
    return jobs(project, *RUN, *GIVEN, **more)


def test_success_after_a_failure(project, tmp_path):
    """The failed notebook is kept and named; a success removes it."""
    final, failed = (project / f"outputs/toy/02_x.base.a{end}.ipynb" for end in ("", ".failed"))
    final.parent.mkdir(parents=True)
    final.write_text("an older success")
    done = run(project, "from helpers.core.records import Record", "[][variant]")
    assert done.returncode == 1
    assert "TypeError: list indices must be integers or slices, not str" in done.stderr
    assert "see outputs/toy/02_x.base.a.failed.ipynb" in done.stderr
    assert "Traceback" not in done.stderr
    assert [x.split()[:4] for x in done.stderr.splitlines()[:2]] == [
        ["start", "toy", "base", "a"],
        ["failed", "toy", "base", "a"],
    ]
    assert failed.is_file()
    assert not final.exists(), "an older result beside a failure looks finished"
    assert str(project) not in failed.read_text()

    # Another kernel named python3 comes first on Jupyter's path.
    spec = tmp_path / "kernels" / "python3"
    spec.mkdir(parents=True)
    wrong = {"argv": ["false", "{connection_file}"], "display_name": "x", "language": "python"}
    (spec / "kernel.json").write_text(json.dumps(wrong))
    cell = "import sys, os; print(sys.executable, os.getcwd(), model, variant, sep='\\n')"
    done = run(project, cell, JUPYTER_PATH=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert re.search(r"^done +toy +base +a +\d+ s$", done.stderr, re.M)
    assert not failed.exists()
    text = final.read_text()
    for place in (project, PROJECT, sys.prefix):
        assert str(place) not in text
    [output] = read(final)["cells"][-1]["outputs"]
    interpreter, folder, *names = "".join(output["text"]).split()
    assert interpreter.startswith("<python>/")
    assert [folder, *names] == [".", "base", "a"]
    assert sorted(p.name for p in final.parent.iterdir()) == [final.name]


def test_the_users_own_mistake_is_its_message_only(project):
    done = run(project, "from helpers.core.errors import StudyError; raise StudyError('mend x')")
    assert done.stderr.splitlines()[2].strip() == "mend x"


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have TCP ports alone")
def test_a_kernel_has_addresses_that_no_other_program_takes(project):
    lines = [
        "import ipykernel, psutil",
        "connection = ipykernel.get_connection_info(unpack=True)",
        "ports = {connection[key] for key in connection if key.endswith('_port')}",
        "sockets = {c.laddr for c in psutil.Process().net_connections('unix')}",
        "assert len(ports) == 5",
        "assert {f\"{connection['ip']}-{port}\" for port in ports} <= sockets",
    ]
    done = run(project, "\n".join(lines))
    assert done.returncode == 0, done.stderr
    assert not list(project.rglob("*study-*")), "these sockets are no files"


def test_killing_the_runner_leaves_no_kernel(project):
    """kill -9 on what started the job ends the runner, and the kernel with it."""
    pids = project / "pids"
    cell = f"import os, time; open({str(pids)!r}, 'w').write(f'{{os.getpid()}} {{os.getppid()}}')"
    nbformat.write(notebook(cell, "time.sleep(100)"), project / "notebooks" / "toy.ipynb")
    command = [sys.executable, "-m", "helpers.workflow.cli", *RUN, *GIVEN]
    script = f"import subprocess; subprocess.run({command!r})"
    parent = subprocess.Popen([sys.executable, "-c", script], cwd=project, env=environment(project))
    written = wait_for(lambda: pids.is_file() and pids.read_text().split(), seconds=60)
    started = [int(pid) for pid in written]
    assert all(map(is_alive, started))
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait()
    wait_for(lambda: not any(map(is_alive, started)), seconds=5)


def is_alive(pid: int) -> bool:
    """Whether a process runs; one that ended and is not yet collected does not."""
    shown = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True)
    return bool(shown.stdout.strip()) and not shown.stdout.startswith("Z")


def test_one_run_at_a_time(project):
    lock = project / "outputs" / ".toy.lock"
    lock.parent.mkdir(exist_ok=True)
    hold = f"import fcntl, time; f = open({str(lock)!r}, 'w'); fcntl.flock(f, fcntl.LOCK_EX); "
    holder = subprocess.Popen(
        [sys.executable, "-c", hold + "print('held', flush=True); time.sleep(60)"],
        stdout=subprocess.PIPE,
    )
    holder.stdout.readline()
    result = jobs(project, "study", "toy", "--cores", "1")
    holder.kill()
    holder.wait()
    assert result.returncode == 2
    assert result.stderr == "study 'toy' is being run by another process; wait for it or stop it\n"


def test_progress_bars_keep_their_last_state():
    assert final_line_states("a\r 10%\r 50%\r100%\nnext\r\n") == "100%\nnext\n"
    assert final_line_states("50%\r") == "50%"


def test_cleaning_merges_streams_and_drops_widgets_and_clock_times():
    def bar(text):
        return {"output_type": "stream", "name": "stderr", "text": text}

    widget = {"application/vnd.jupyter.widget-view+json": {}, "text/plain": "0%"}
    cell = {
        "cell_type": "code",
        "metadata": {"papermill": {"duration": 1.0, "start_time": "x"}, "execution": {}},
        "outputs": [
            bar("\r 1%"),
            bar(["\r 2%", "\r 3%"]),
            {"output_type": "display_data", "data": widget},
            {"output_type": "error", "traceback": [f"{PROJECT}/src/helpers/x.py in f"]},
        ],
    }
    about = {"papermill": {"input_path": "/x", "duration": 2.0}, "widgets": {}}
    cleaned = clean_notebook({"metadata": about, "cells": [cell]})
    assert cleaned["metadata"] == {"papermill": {"duration": 2.0}}
    [cell] = cleaned["cells"]
    assert cell["metadata"] == {"papermill": {"duration": 1.0}}
    assert cell["outputs"][0]["text"] == [" 3%"]
    assert cell["outputs"][1]["traceback"] == ["src/helpers/x.py in f"]
    assert len(cell["outputs"]) == 2


def test_the_report_has_no_code_and_needs_no_network(tmp_path):
    v4 = nbformat.v4
    figure = v4.new_output("display_data", {"image/png": PIXEL, "text/plain": "<Figure>"})
    table = v4.new_output("execute_result", {"text/html": "<table><td>7</td></table>"})
    noise = v4.new_output("stream", name="stderr", text="printed_warning")
    hidden = v4.new_output("stream", name="stdout", text="hidden_output")
    cells = [
        v4.new_markdown_cell("# Claim"),
        v4.new_code_cell("written_code()", outputs=[noise, figure, table]),
        v4.new_code_cell("written_code()", outputs=[hidden], metadata={"tags": ["hide-in-report"]}),
    ]
    path = tmp_path / "04_analysis.ipynb"
    nbformat.write(v4.new_notebook(cells=cells), path)
    (tmp_path / "report_files").mkdir()
    (tmp_path / "report_files" / "stale.png").write_bytes(b"")
    study = tmp_path / "toy.yaml"
    study.write_text(json.dumps(toy_project.STUDY))
    export_report(path, str(study), tmp_path)
    html, markdown = (tmp_path / f"report.{end}" for end in ("html", "md"))
    for text in (html.read_text("utf-8"), markdown.read_text("utf-8")):
        assert "Claim" in text
        assert "<td>7</td>" in text
        for absent in ("written_code", "printed_warning", "hidden_output"):
            assert absent not in text
    text = html.read_text("utf-8")
    assert "<title>A toy study</title>" in text
    assert not re.search(r"""(src|href)=["']?(https?:)?//|@import|import\(?["']http""", text)
    [image] = (tmp_path / "report_files").iterdir()
    assert f"report_files/{image.name}" in markdown.read_text("utf-8")
