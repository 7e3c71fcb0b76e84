"""A notebook that is opened in JupyterLab, and saved, is what it was to the byte."""

import asyncio
import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import closing

import nbformat
import pytest
from jupyter_client.manager import start_new_kernel
from tools.lab_notebooks import LabNotebooks

from chromium import CHROMIUM, WHY_NOT, Chromium
from helpers.core.files import PROJECT
from helpers.workflow.cli import run_notebook

NOTEBOOKS = sorted(PROJECT.glob("notebooks/*.ipynb"))
each = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)


@pytest.fixture(scope="module")
def kernel():
    """(kernelspec, language_info) as JupyterLab gets them of a kernel that has started."""
    environment = os.environ | {"PATH": f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}"}
    manager, client = start_new_kernel(kernel_name="python3", env=environment)
    spec = manager.kernel_spec
    info = client.kernel_info(reply=True, timeout=60)["content"]["language_info"]
    client.stop_channels()
    manager.shutdown_kernel(now=True)
    named = {"name": "python3", "display_name": spec.display_name, "language": spec.language}
    return named, info


def opened(folder, name: str) -> tuple[LabNotebooks, dict]:
    files = LabNotebooks(root_dir=str(folder))
    return files, asyncio.run(files.get(name))


@each
def test_the_file_is_what_nbformat_writes(path):
    text = path.read_text("utf-8")
    stream = io.StringIO()
    nbformat.write(nbformat.reads(text, as_version=4), stream, version=nbformat.NO_CONVERT)
    assert stream.getvalue() == text


@each
def test_its_cells_have_ids_and_nothing_of_a_run_is_left(path):
    notebook = json.loads(path.read_text("utf-8"))
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    ids = [cell["id"] for cell in notebook["cells"]]
    assert ids == [str(place) for place in range(len(ids))]  # as nbstripout numbers them
    assert set(notebook["metadata"]) == {"kernelspec", "language_info"}
    assert "version" not in notebook["metadata"]["language_info"]
    for cell in notebook["cells"]:
        assert set(cell["metadata"]) <= {"tags"}


@each
def test_the_kernel_says_of_itself_what_the_opened_notebook_says(path, kernel):
    """JupyterLab compares the two, and marks the notebook as changed if they differ."""
    _, model = opened(path.parent, path.name)
    metadata = json.loads(json.dumps(model["content"]["metadata"]))
    assert (metadata["kernelspec"], metadata["language_info"]) == kernel


@each
def test_saving_it_writes_the_same_bytes(path, tmp_path):
    shutil.copy(path, tmp_path)
    files, model = opened(tmp_path, path.name)
    content = json.loads(json.dumps(model["content"]))  # as it goes through the browser
    asyncio.run(files.save({"type": "notebook", "format": "json", "content": content}, path.name))
    assert (tmp_path / path.name).read_bytes() == path.read_bytes()


def test_other_files_and_notebooks_of_other_languages_are_left_alone(tmp_path):
    (tmp_path / "a.txt").write_text("words")
    assert opened(tmp_path, "a.txt")[1]["content"] == "words"
    notebook = {"cells": [], "metadata": {"language_info": {"name": "R"}}}
    (tmp_path / "r.ipynb").write_text(json.dumps(notebook | {"nbformat": 4, "nbformat_minor": 5}))
    assert opened(tmp_path, "r.ipynb")[1]["content"]["metadata"]["language_info"] == {"name": "R"}
    (tmp_path / "bare.ipynb").write_text(
        json.dumps({"cells": [], "metadata": {}, "nbformat": 4, "nbformat_minor": 5})
    )
    assert opened(tmp_path, "bare.ipynb")[1]["content"]["metadata"] == {}


STATE = """(() => {
  const lab = window.jupyterapp;
  const panel = lab && [...lab.shell.widgets('main')].find(w => w.context);
  const kernel = panel?.context.sessionContext.session?.kernel;
  if (!panel?.context.isReady || kernel?.status !== 'idle') return null;
  return {dirty: panel.context.model.dirty, told: panel.context.model.getMetadata('language_info')};
})()"""


@pytest.mark.long
@pytest.mark.skipif(not CHROMIUM, reason=WHY_NOT)
@pytest.mark.parametrize("stored", ["as it is", "as Jupyter alone would read it"])
def test_a_browser_that_opens_it_calls_it_unchanged(tmp_path, stored):
    """JupyterLab itself, with a kernel; without the version it is called changed."""
    shutil.copy(NOTEBOOKS[0], tmp_path)
    manager = ["--ServerApp.contents_manager_class=tools.lab_notebooks.LabNotebooks"]
    with closing(Browser(tmp_path, manager if stored == "as it is" else [])) as browser:
        state = browser.state(NOTEBOOKS[0].name)
    assert state["told"]["version"] == sys.version.split()[0]
    assert state["dirty"] == (stored != "as it is")


class Browser:
    """JupyterLab on a folder, and Chromium to look at it with; both end when it is closed."""

    def __init__(self, folder, options: list[str]):
        debugging = free_port()
        chromium = [CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu"]
        chromium += [f"--remote-debugging-port={debugging}", "--remote-allow-origins=*"]
        chromium += [f"--user-data-dir={folder / 'chromium'}", "about:blank"]
        lab, self.port = start_lab(folder, options)
        self.processes = [lab, subprocess.Popen(chromium, **APART)]
        self.tab = answer(f"http://localhost:{debugging}/json/new?about:blank", method="PUT")

    def state(self, notebook: str, *, seconds: float = 120) -> dict:
        """Whether the notebook is marked as changed, some seconds after its kernel has started."""
        import websocket

        with closing(websocket.create_connection(self.tab["webSocketDebuggerUrl"])) as tab:
            place = f"http://localhost:{self.port}/lab/tree/{notebook}"
            command(tab, "Page.navigate", url=place)
            ends, idle = time.monotonic() + seconds, 0
            while time.monotonic() < ends:
                time.sleep(1)
                given = {"expression": STATE, "returnByValue": True}
                state = command(tab, "Runtime.evaluate", **given)["result"].get("value")
                idle += state is not None
                if idle > 3:
                    return state
        raise AssertionError("no kernel has started")

    def close(self) -> None:
        for process in self.processes:
            end(process)


APART = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "start_new_session": True}


def start_lab(folder, options: list[str], **environment: str) -> tuple[subprocess.Popen, int]:
    """(JupyterLab on a folder, its port), once it answers."""
    port = free_port()
    own = {f"JUPYTER_{kind}_DIR": str(folder / kind) for kind in ("CONFIG", "RUNTIME")}
    own |= {"PATH": f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}"}
    lab = [sys.executable, "-m", "jupyterlab", f"--port={port}", "--no-browser"]
    lab += ["--allow-root", "--IdentityProvider.token=", "--LabApp.expose_app_in_browser=True"]
    lab += ["--LabApp.news_url=None", f"--ServerApp.root_dir={folder}", *options]
    process = subprocess.Popen(lab, env=os.environ | environment | own, **APART)
    answer(f"http://localhost:{port}/api/status")
    return process, port


def end(process: subprocess.Popen) -> None:
    """End a process and all that it started."""
    os.killpg(process.pid, signal.SIGTERM)
    process.wait()


def command(tab, method: str, **given) -> dict:
    """What the browser's debugging protocol answers to a command."""
    tab.send(json.dumps({"id": 1, "method": method, "params": given}))
    while (found := json.loads(tab.recv())).get("id") != 1:
        pass
    return found["result"]


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return found.getsockname()[1]


def answer(url: str, *, method: str = "GET", seconds: float = 60) -> dict:
    """The JSON at an address, once something answers there."""
    ends = time.monotonic() + seconds
    while True:
        try:
            with urllib.request.urlopen(urllib.request.Request(url, method=method)) as found:
                return json.load(found)
        except OSError:
            if time.monotonic() > ends:
                raise
            time.sleep(0.5)


# --- explore.ipynb: its controls, moved in a browser -----------------------------------------

RUN_ALL = "jupyterapp.commands.execute('notebook:run-all-cells').then(() => true)"
IDLE = f"({STATE}) !== null"
SHOWN = "[...document.querySelectorAll('.explore')].map(e => e.textContent).join('\\n')"
CHOOSE_CHANGED = """(() => {
  const lists = [...document.querySelectorAll('.widget-dropdown select')];
  const list = lists.find(e => /lost.and.gained/.test(e.options[0].text));
  list.selectedIndex = list.options.length - 1;
  list.dispatchEvent(new Event('change', {bubbles: true}));
})()"""
HOSTILE = "<img src=x onerror=\"document.title='owned'\"> two words"


def with_study(path, study) -> None:
    """Write explore.ipynb with another study and its fine-tuned model in the parameters."""
    notebook = nbformat.read(PROJECT / "notebooks" / "explore.ipynb", as_version=4)
    [cell] = [c for c in notebook.cells if "parameters" in c.metadata.get("tags", [])]
    cell.source = cell.source.replace('"demo"', repr(str(study))).replace("base", "finetuned")
    nbformat.write(notebook, path)


@pytest.mark.long
def test_explore_runs_without_a_browser_and_writes_nothing(undisturbed, tmp_path, monkeypatch):
    for key, place in undisturbed.environment().items():
        monkeypatch.setenv(key, place)
    before = {p: p.stat().st_mtime_ns for p in undisturbed.root.rglob("*")}
    executed, given = tmp_path / "executed.ipynb", {"study": str(undisturbed.file)}
    run_notebook(PROJECT / "notebooks" / "explore.ipynb", executed, given)
    outputs = [
        o for cell in nbformat.read(executed, as_version=4).cells for o in cell.get("outputs", [])
    ]
    assert [o for o in outputs if "lost" in str(o) or "smoothquant_w8a8" in str(o)]
    assert {p: p.stat().st_mtime_ns for p in undisturbed.root.rglob("*")} == before


@pytest.fixture
def explored(undisturbed, tmp_path):
    """explore.ipynb of the smoke study in JupyterLab, its cells run."""
    with_study(tmp_path / "explore.ipynb", undisturbed.file)
    places = {key: undisturbed.environment()[key] for key in ("STUDY_OUTPUTS", "STUDY_CACHE")}
    lab, port = start_lab(tmp_path, [], **places)
    browser = Chromium(tmp_path / "chromium")
    try:
        browser.look(width=1300, height=3000)  # JupyterLab draws the cells that are in view
        browser.send("Page.navigate", url=f"http://localhost:{port}/lab/tree/explore.ipynb")
        browser.wait(IDLE)
        browser.evaluate(RUN_ALL)
        browser.wait("document.querySelectorAll('.explore .tokens span').length > 0")
        yield browser
    finally:
        browser.close()
        end(lab)


def changed_text(browser: Chromium, selector: str, before: str) -> str:
    """The text of an element, once it differs."""
    text = f"document.querySelector({json.dumps(selector)})?.textContent ?? ''"
    browser.wait(f"![{json.dumps(before)}, ''].includes({text})")
    return browser.evaluate(text)


@pytest.mark.long
@pytest.mark.skipif(not CHROMIUM, reason=WHY_NOT)
def test_every_control_of_explore_answers_in_a_browser(explored, undisturbed):
    content = undisturbed.content()
    text_of = "document.querySelector('{}').textContent"
    # A random model answers nothing right: no item is lost or gained, but some answers change.
    explored.evaluate(CHOOSE_CHANGED)
    item = changed_text(explored, ".explore h4", "")
    explored.click(".widget-select option:nth-child(2)")
    assert changed_text(explored, ".explore h4", item) != item

    source = "document.querySelector('.widget-image').src"
    figure = explored.evaluate(source)
    assert "α = 0.50" in explored.evaluate(SHOWN)
    explored.evaluate("document.querySelector('.noUi-handle').focus()")
    explored.press("ArrowRight")
    explored.wait(f"{source} !== {json.dumps(figure)}")
    explored.wait(f"{SHOWN}.includes('α = 0.55')")
    assert "α = 0.50" not in explored.evaluate(SHOWN)

    tokens = explored.evaluate(text_of.format(".explore .tokens"))
    explored.evaluate("document.querySelector('.widget-textarea textarea').select()")
    explored.write(HOSTILE)
    explored.click(".widget-button")
    assert changed_text(explored, ".explore .tokens", tokens) == HOSTILE
    assert explored.evaluate("document.querySelectorAll('.explore img').length") == 0
    assert "owned" not in explored.evaluate("document.title")
    assert explored.evaluate("document.querySelector('.explore .problem')") is None
    assert undisturbed.content() == content
