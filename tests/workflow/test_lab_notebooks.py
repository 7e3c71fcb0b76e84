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

from helpers.core.files import PROJECT

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


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
STATE = """(() => {
  const lab = window.jupyterapp;
  const panel = lab && [...lab.shell.widgets('main')].find(w => w.context);
  const kernel = panel?.context.sessionContext.session?.kernel;
  if (!panel?.context.isReady || kernel?.status !== 'idle') return null;
  return {dirty: panel.context.model.dirty, told: panel.context.model.getMetadata('language_info')};
})()"""


@pytest.mark.long
@pytest.mark.skipif(not CHROMIUM, reason="chromium is not installed")
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
        self.port, debugging = free_port(), free_port()
        own = {f"JUPYTER_{kind}_DIR": str(folder / kind) for kind in ("CONFIG", "RUNTIME")}
        own |= {"PATH": f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}"}
        lab = [sys.executable, "-m", "jupyterlab", f"--port={self.port}", "--no-browser"]
        lab += ["--allow-root", "--IdentityProvider.token=", "--LabApp.expose_app_in_browser=True"]
        lab += ["--LabApp.news_url=None", f"--ServerApp.root_dir={folder}", *options]
        chromium = [CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu"]
        chromium += [f"--remote-debugging-port={debugging}", "--remote-allow-origins=*"]
        chromium += [f"--user-data-dir={folder / 'chromium'}", "about:blank"]
        settings = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        settings |= {"start_new_session": True, "env": os.environ | own}
        self.processes = [subprocess.Popen(command, **settings) for command in (lab, chromium)]
        answer(f"http://localhost:{self.port}/api/status")
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
