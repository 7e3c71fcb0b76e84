"""A fork server for jobs: a process that has imported torch and forks once for every job.

Importing the packages of a notebook takes some five seconds of a core. On Linux, while jobs run on
this machine and use no GPU, one process imports them once, computes nothing, and forks. It holds
no module of this project but what it serves with: a fork imports those from the files as they are
when it begins, which is what its account says. A fork has the client's environment, folder and
streams, receives its signals, and ends with it. Its client stays until the fork has ended,
forwards signals to it, and exits as it did. Without a server a client runs the command itself.

multiprocessing has a fork server for functions of one Python program; here every client is a
program of its own, started by Snakemake or Jupyter.
"""

import contextlib
import gc
import importlib
import json
import os
import selectors
import signal
import socket
import struct
import sys
import threading
import uuid
from collections.abc import Iterator
from subprocess import Popen

from helpers.core.files import PROJECT
from helpers.core.processes import (
    TQDM_VARIABLE,
    allow_interrupts,
    begin_child,
    die_with_parent,
)

ADDRESS = "STUDY_FORK_SERVER"  # names its socket in Linux' abstract namespace
COMMANDS = ("answer", "export", "kernel", "run")  # of helpers.workflow.cli, run by a fork
FORWARDED = (signal.SIGINT, signal.SIGTERM)
PARENT = "JPY_PARENT_PID"  # tells a Jupyter kernel the process that started it
LENGTH = struct.Struct("<I")  # of a request, before it
STATUS = struct.Struct("<i")  # a process id, then an exit status
JOB_ENVIRONMENT = {  # of the server, of Snakemake and of a job
    "PYTHONHASHSEED": "0",
    "PYTHONUTF8": "1",  # whatever the locale is
    "PYDEVD_DISABLE_FILE_VALIDATION": "1",  # silences the debugger's start-up warning
    "TOKENIZERS_PARALLELISM": "false",
}
INLINE = "module://matplotlib_inline.backend_inline"  # the backend that a kernel sets


def is_supported(*, gpu: bool) -> bool:
    """Whether jobs on this machine can be forks; a GPU's driver does not survive a fork."""
    if sys.platform != "linux" or gpu or os.environ.get("STUDY_FORKS", "yes") == "no":
        return False
    try:
        os.close(os.pidfd_open(os.getpid()))
    except OSError:  # a kernel before 5.3, or a sandbox
        return False
    return True


def is_running() -> bool:
    """Whether commands that this process starts find a server."""
    return ADDRESS in os.environ


@contextlib.contextmanager
def fork_server() -> Iterator[None]:
    """Inside the context a server runs, and commands that this process starts find it."""
    address = f"study-{uuid.uuid4().hex}"
    with socket.socket(socket.AF_UNIX) as listener:  # clients that connect early wait
        listener.bind(f"\0{address}")
        listener.listen(64)
        server = Popen(
            [sys.executable, "-m", "helpers.workflow.fork_server", str(listener.fileno())],
            cwd=PROJECT,
            env={"MPLBACKEND": INLINE} | os.environ | JOB_ENVIRONMENT | {TQDM_VARIABLE: "1"},
            pass_fds=[listener.fileno()],
            preexec_fn=begin_child,
        )
    os.environ[ADDRESS] = address
    try:
        yield
    finally:
        os.environ.pop(ADDRESS, None)
        server.kill()
        server.wait()


def run_in_fork(arguments: list[str]) -> int | None:
    """Run a command of `helpers.workflow.cli` in a fork of the server; its exit code.

    Returns None if there is no server: the caller runs the command. If a signal ended the
    fork, this process ends by the same signal.
    """
    address = os.environ.get(ADDRESS)
    if not address or arguments[:1] not in [[command] for command in COMMANDS]:
        return None
    die_with_parent(int(os.environ[PARENT]) if arguments[0] == "kernel" else None)
    request = {"arguments": arguments, "environment": dict(os.environ), "folder": os.getcwd()}
    message = json.dumps(request).encode()
    connection = socket.socket(socket.AF_UNIX)
    try:
        connection.connect(f"\0{address}")
        socket.send_fds(connection, [LENGTH.pack(len(message))], [0, 1, 2])
        connection.sendall(message)
        fork_pid = STATUS.unpack(receive_exactly(connection, STATUS.size))[0]
    except (OSError, EOFError):  # the server has ended; no fork was made
        return None
    for number in FORWARDED:
        signal.signal(number, lambda number, _: _send_signal(fork_pid, number))
    try:
        status = STATUS.unpack(receive_exactly(connection, STATUS.size))[0]
    except (OSError, EOFError):  # the server was killed, and its forks end with it
        return 1
    code = os.waitstatus_to_exitcode(status)
    if code < 0:
        if -code != signal.SIGKILL:
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    return code


def _send_signal(process: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(process, number)


def receive_exactly(connection: socket.socket, size: int) -> bytes:
    """Exactly `size` bytes.

    Raises:
        EOFError: the other side closed the connection first.
    """
    received = b""
    while len(received) < size:
        if not (part := connection.recv(size - len(received))):
            raise EOFError
        received += part
    return received


TIMEOUT_S = 10  # for one request
NOTEBOOK_COLUMNS = 20  # pandas' default outside a terminal
PACKAGES = (
    "accelerate",
    "compressed_tensors",
    "IPython.core.interactiveshell",
    "ipykernel.kernelapp",
    "jsonschema",
    "matplotlib.figure",
    "nbformat",
    "pandas",
    "papermill",
    "pydantic",
    "scipy.optimize",
    "scipy.stats",
    "torch",
    "transformers.masking_utils",
    "transformers.modeling_utils",
    "transformers.models.auto.modeling_auto",
    "transformers.models.llama.modeling_llama",
    "yaml",
)


class CurrentStderr:
    """Forwards to the `sys.stderr` of the moment; loggers keep the one they see at import."""

    def __getattr__(self, name: str):
        return getattr(sys.__stderr__ if sys.stderr is self else sys.stderr, name)


def _import_packages() -> None:
    """Import PACKAGES in the state that they would find in a kernel."""
    sys.stderr = CurrentStderr()
    for package in PACKAGES:
        with contextlib.suppress(Exception):  # a fork that needs it fails with the reason
            importlib.import_module(package)
    sys.stderr = sys.__stderr__
    if "pandas" in sys.modules:  # pandas read the width of a terminal at import
        sys.modules["pandas"].set_option("display.max_columns", NOTEBOOK_COLUMNS)
    gc.freeze()  # pages that no collection touches stay shared


def serve(listener: socket.socket) -> dict:
    """Fork for every client until this process is killed; returns in a fork alone: its request."""
    _import_packages()
    with selectors.DefaultSelector() as selector:
        selector.register(listener, selectors.EVENT_READ)
        while True:
            for key, _ in selector.select():
                if key.fileobj is not listener:
                    _report_exit(selector, key)
                elif request := _fork_for_client(selector, listener):
                    return request


def _fork_for_client(selector: selectors.BaseSelector, listener: socket.socket) -> dict | None:
    """Fork for one client; returns its request in the fork, None in the server."""
    connection, streams, server = None, [], os.getpid()
    try:
        connection, _ = listener.accept()
        connection.settimeout(TIMEOUT_S)
        credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
        if struct.unpack("3i", credentials)[1] != os.getuid():
            raise PermissionError
        head, streams, *_ = socket.recv_fds(connection, LENGTH.size, 3)
        request = json.loads(receive_exactly(connection, LENGTH.unpack(head)[0]))
        connection.settimeout(None)
        fork = os.fork()
    except (OSError, EOFError, ValueError, struct.error):  # killed meanwhile, or another user
        fork = None
    if fork == 0:
        listener.close()
        _take_over(request, connection, streams, server)
        return request
    for stream in streams:
        os.close(stream)
    if fork:
        with contextlib.suppress(OSError):  # the client was killed meanwhile; the fork will end
            connection.sendall(STATUS.pack(fork))
        selector.register(os.pidfd_open(fork), selectors.EVENT_READ, (fork, connection))
    elif connection:
        connection.close()
    return None


def _report_exit(selector: selectors.BaseSelector, key: selectors.SelectorKey) -> None:
    """Send the exit status of a fork that has ended to its client."""
    fork, connection = key.data
    selector.unregister(key.fileobj)
    os.close(key.fileobj)
    _, status = os.waitpid(fork, 0)
    with connection, contextlib.suppress(OSError):  # the client has ended
        connection.sendall(STATUS.pack(status))


def _take_over(request: dict, connection: socket.socket, streams: list[int], server: int) -> None:
    """In a fork: take the client's streams, environment and folder; end when it ends."""
    die_with_parent(server)
    os.setsid()  # signals come from the client alone
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    os.environ.clear()
    os.environ.update(request["environment"])
    if PARENT in os.environ:  # a kernel checks that its parent is still there
        os.environ[PARENT] = str(os.getppid())
    os.chdir(request["folder"])
    sys.argv[1:] = request["arguments"]
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for name in [name for name in sys.modules if name.partition(".")[0] == "helpers"]:
        del sys.modules[name]
    importlib.invalidate_caches()

    def end_with_client() -> None:
        # The client sends nothing more: recv returns when it ends, or fails if it was killed
        # before it read this process' number.
        with contextlib.suppress(OSError):
            connection.recv(1)
        os._exit(1)

    threading.Thread(target=end_with_client, daemon=True).start()


def main() -> int:
    """Serve; in a fork, run the command of its request."""
    die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # on Ctrl-C the jobs end first
    allow_interrupts()
    request = serve(socket.socket(fileno=int(sys.argv[1])))
    from helpers.workflow import cli

    try:
        return cli.main(request["arguments"])
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # nothing is left to interrupt


if __name__ == "__main__":
    sys.exit(main())
