"""The fork server's client: starts the server, and runs a command of a job in one of its forks.

The client stays until its fork has ended, forwards signals to it, and exits as it did.
"""

import contextlib
import json
import os
import signal
import socket
import struct
import sys
import uuid
from collections.abc import Iterator
from subprocess import Popen

from helpers.core.activity import TQDM_VARIABLE
from helpers.core.parent_process import die_with_parent
from helpers.core.paths import PROJECT
from helpers.workflow.notebook_execution import JOB_ENVIRONMENT

ADDRESS = "STUDY_FORK_SERVER"  # names its socket in Linux' abstract namespace
COMMANDS = ("answer", "export", "kernel", "run")  # of helpers.workflow.cli, run by a fork
FORWARDED = (signal.SIGINT, signal.SIGTERM)
PARENT = "JPY_PARENT_PID"  # tells a Jupyter kernel the process that started it
LENGTH = struct.Struct("<I")  # of a request, before it
STATUS = struct.Struct("<i")  # a process id, then an exit status
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
            preexec_fn=die_with_parent,
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
