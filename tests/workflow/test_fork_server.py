"""A command done by a fork of a process that has loaded torch is done as it would be here."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

import toy_project
from helpers.workflow import fork_server
from process_tree import wait_for

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forks are for Linux alone")
SECONDS = 60
ANSWER = [sys.executable, "-m", "helpers.workflow.cli", "answer"]


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A copy of the project, to which tests add modules, beside a fork server."""
    folder = toy_project.make(tmp_path_factory.mktemp("forks"), kernels=False)
    patch = pytest.MonkeyPatch()
    patch.setattr(fork_server, "PROJECT", folder)
    for name, value in toy_project.environment(folder).items():
        patch.setenv(name, value)
    with fork_server.fork_server():
        yield folder
    patch.undo()


def module(project: Path, *lines: str) -> str:
    """Write a module with such a `main(*given)`; its name."""
    name = f"told{len(list((project / 'src/helpers/workflow').glob('told*.py')))}"
    text = "import os, sys\ndef main(*given):\n" + "".join(f"    {line}\n" for line in lines)
    (project / f"src/helpers/workflow/{name}.py").write_text(text)
    return f"helpers.workflow.{name}"


def answer(project: Path, name: str, *given: str, **more) -> subprocess.CompletedProcess:
    settings = {"capture_output": True, "text": True, "cwd": project, "timeout": SECONDS}
    return subprocess.run([*ANSWER, name, *given], check=False, **(settings | more))


@pytest.mark.long
def test_it_has_torch_its_clients_arguments_environment_folder_and_streams(project, tmp_path):
    printing_module = module(
        project,
        "print('torch' in sys.modules, given, os.environ['HERE'], os.getcwd(), sys.stdin.read())",
        "print(os.environ.get('GONE'), file=sys.stderr)",
    )
    environment = {k: v for k, v in os.environ.items() if k != "GONE"} | {"HERE": "ä\udcff\n"}
    options = {"cwd": tmp_path, "env": environment, "input": "words", "errors": "surrogateescape"}
    done = answer(project, printing_module, "a b", "", **options)
    assert done.stdout == f"True ('a b', '') ä\udcff\n {tmp_path} words\n", done
    assert (done.returncode, done.stderr) == (0, "None\n")


@pytest.mark.long
def test_it_imports_modules_as_they_are_when_it_begins(project):
    printing_module = module(project, "print(1)")
    assert answer(project, printing_module).stdout == "1\n"
    path = project / "src" / f"{printing_module.replace('.', '/')}.py"
    path.write_text("def main(): print('changed')\n")
    assert answer(project, printing_module).stdout == "changed\n"


def test_nothing_of_the_project_is_loaded_before_the_fork(project):
    loads = (
        "[n for n in sys.modules if n.startswith('helpers.')"
        " and n.split('.')[1] not in ('core', 'workflow')]"
    )
    assert answer(project, module(project, f"print({loads})")).stdout == "[]\n"


def test_warnings_of_libraries_reach_what_stderr_is_then(project):
    printing_module = module(
        project,
        "import io, transformers",
        "sys.stderr = io.StringIO()",
        "transformers.utils.logging.get_logger('transformers').warning('heard')",
        "print(sys.stderr.getvalue())",
    )
    done = answer(project, printing_module)
    assert "heard" in done.stdout
    assert done.stderr == ""


def test_figures_are_drawn_into_the_notebook(project):
    printing_module = module(project, "import matplotlib", "print(matplotlib.get_backend())")
    environment = {k: v for k, v in os.environ.items() if k != "MPLBACKEND"}
    assert "inline" in answer(project, printing_module, env=environment).stdout


def test_tables_are_as_wide_as_a_notebook_shows_them(project):
    printing_module = module(
        project, "import pandas", "print(pandas.get_option('display.max_columns'))"
    )
    assert answer(project, printing_module).stdout == "20\n"


@pytest.mark.parametrize(
    ("line", "code"),
    [
        ("sys.exit(3)", 3),
        ("raise ValueError('told')", 1),
        ("os._exit(7)", 7),
        ("os.kill(os.getpid(), 9)", -signal.SIGKILL),
        ("os.kill(os.getpid(), 15)", -signal.SIGTERM),
    ],
)
def test_it_ends_as_its_fork_does(project, line, code):
    assert answer(project, module(project, line)).returncode == code


def waiting(project: Path, where: Path) -> tuple[subprocess.Popen, int]:
    """A command that waits, and the process id of its fork."""
    waiting_module = module(
        project,
        f"import time; open({str(where)!r}, 'w').write(str(os.getpid()))",
        "try: time.sleep(300)",
        f"except KeyboardInterrupt: open({str(where)!r}, 'w').write('stopped'); sys.exit(130)",
    )
    process = subprocess.Popen([*ANSWER, waiting_module], cwd=project, start_new_session=True)
    return process, int(wait_for(lambda: where.is_file() and where.read_text(), seconds=SECONDS))


def gone(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except FileNotFoundError:
        return True


def test_a_fork_ends_with_its_client_at_once(project, tmp_path):
    process, fork = waiting(project, tmp_path / "id")
    assert fork != process.pid
    process.kill()
    process.wait()
    wait_for(lambda: gone(fork), seconds=5)


def test_a_fork_ends_silently_with_a_client_killed_before_it_read_the_forks_number(
    project, tmp_path
):
    """The unread number turns the end of the connection into a reset: no traceback follows."""
    number, errors = tmp_path / "id", tmp_path / "errors"
    waiting_module = module(
        project,
        "import time",
        f"open({str(number)!r}, 'w').write(str(os.getpid()))",
        "time.sleep(300)",
    )
    job = {
        "arguments": ["answer", waiting_module],
        "environment": dict(os.environ),
        "folder": str(project),
    }
    message = json.dumps(job).encode()
    with socket.socket(socket.AF_UNIX) as client, errors.open("wb") as stream:
        client.connect(f"\0{os.environ[fork_server.ADDRESS]}")
        sent = fork_server.LENGTH.pack(len(message)) + message
        socket.send_fds(client, [sent], [stream.fileno()] * 3)
        fork = int(wait_for(lambda: number.is_file() and number.read_text(), seconds=SECONDS))
    wait_for(lambda: gone(fork), seconds=5)
    assert errors.read_bytes() == b""


def test_ctrl_c_and_terminate_reach_the_fork(project, tmp_path):
    process, _ = waiting(project, tmp_path / "a")
    process.send_signal(signal.SIGINT)
    assert process.wait(SECONDS) == 130
    assert (tmp_path / "a").read_text() == "stopped"
    process, fork = waiting(project, tmp_path / "b")
    process.terminate()
    assert process.wait(SECONDS) == -signal.SIGTERM
    assert gone(fork)


def test_an_client_that_is_killed_while_it_asks_harms_no_other(project):
    printing_module = module(project, "print('served')")
    job = {"arguments": ["answer", printing_module], "environment": {}, "folder": str(project)}
    message = json.dumps(job).encode()
    length = fork_server.LENGTH.pack(len(message))
    for sent in (b"", length, length + message):
        with socket.socket(socket.AF_UNIX) as client, open(os.devnull, "r+b") as nothing:
            client.connect(f"\0{os.environ[fork_server.ADDRESS]}")
            if sent:
                socket.send_fds(client, [sent], [nothing.fileno()] * 3)
            if sent.endswith(message):  # the fork is made, and nobody waits for its number
                client.shutdown(socket.SHUT_RD)
        assert answer(project, printing_module).stdout == "served\n"


def test_without_it_and_for_other_commands_all_is_done_here(monkeypatch):
    assert fork_server.run_in_fork(["engine"]) is None
    monkeypatch.delenv(fork_server.ADDRESS, raising=False)
    assert fork_server.run_in_fork(["run"]) is None


@pytest.mark.long
def test_what_is_forked_off_ends_with_it_and_then_nothing_waits(tmp_path, monkeypatch):
    project = toy_project.make(tmp_path / "p", kernels=False)
    toy_project.lighten_forks(project)
    monkeypatch.setattr(fork_server, "PROJECT", project)
    for name, value in toy_project.environment(project).items():
        monkeypatch.setenv(name, value)
    with fork_server.fork_server():
        address = os.environ[fork_server.ADDRESS]
        process, fork = waiting(project, tmp_path / "id")
    assert process.wait(SECONDS) != 0
    wait_for(lambda: gone(fork), seconds=5)
    monkeypatch.setenv(fork_server.ADDRESS, address)  # it is gone: done by the client itself
    began = time.monotonic()
    assert answer(project, module(project, "print('here')")).stdout == "here\n"
    assert time.monotonic() - began < SECONDS


def test_jobs_of_a_gpu_or_elsewhere_are_not_forked(monkeypatch):
    monkeypatch.delenv("STUDY_FORKS", raising=False)
    assert fork_server.is_supported(gpu=False)
    assert not fork_server.is_supported(gpu=True)
    with monkeypatch.context() as refused:
        refused.setattr(os, "pidfd_open", lambda _: (_ for _ in ()).throw(OSError))
        assert not fork_server.is_supported(gpu=False)
    monkeypatch.setattr(sys, "platform", "darwin")
    assert not fork_server.is_supported(gpu=False)
