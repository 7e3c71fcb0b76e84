"""A process that has loaded torch and its like: a job that is a fork of it begins at once.

Every notebook would load the same packages, which takes some five seconds of a core. On Linux,
while jobs run on this machine and on no GPU, one process loads them once, computes nothing, and
forks. It loads no module of this project: a fork imports those as the files are when it begins,
as its account of them says. A fork has its asker's environment, folder and streams, gets its
signals, and ends with it. Without such a process a job is done where it was asked for.
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

from helpers.study.execution import JOB_ENVIRONMENT, die_with_parent
from helpers.study.paths import PROJECT

ADDRESS = "STUDY_WARM"  # where it listens: a socket in Linux' abstract namespace
FORKED = ("answer", "export", "kernel", "run")  # commands of helpers.study.jobs
PASSED_ON = (signal.SIGINT, signal.SIGTERM)
PATIENCE_S = 10  # for one message
PARENT = "JPY_PARENT_PID"  # by it Jupyter tells a kernel who started it
LENGTH = struct.Struct("<I")
STATUS = struct.Struct("<i")
INLINE = "module://matplotlib_inline.backend_inline"  # as a kernel sets it, if nobody has
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


def is_possible(*, gpu: bool) -> bool:
    """Whether jobs on this machine can be forks: a driver of a GPU does not outlive a fork."""
    if sys.platform != "linux" or gpu or os.environ.get("STUDY_FORKS", "yes") == "no":
        return False
    try:
        os.close(os.pidfd_open(os.getpid()))
    except OSError:  # a kernel before 5.3, or a sandbox
        return False
    return True


def is_there() -> bool:
    """Whether commands that are started from here can be forks."""
    return ADDRESS in os.environ


@contextlib.contextmanager
def beside() -> Iterator[None]:
    """While inside there is such a process, and commands that are started from here find it."""
    address = f"study-{uuid.uuid4().hex}"
    with socket.socket(socket.AF_UNIX) as listener:  # who asks before it has loaded waits
        listener.bind(f"\0{address}")
        listener.listen(64)
        server = Popen(
            [sys.executable, "-m", "helpers.study.warm", str(listener.fileno())],
            cwd=PROJECT,
            env={"MPLBACKEND": INLINE} | os.environ | JOB_ENVIRONMENT,
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


def done_by_a_fork(arguments: list[str]) -> int | None:
    """Have a command of `helpers.study.jobs` done by a fork; its exit code.

    Returns None if there is no process to fork: the command is still to be done. Ends by the
    signal that ended the fork, if one did.
    """
    address = os.environ.get(ADDRESS)
    if not address or arguments[:1] not in [[command] for command in FORKED]:
        return None
    die_with_parent(int(os.environ[PARENT]) if arguments[0] == "kernel" else None)
    connection = socket.socket(socket.AF_UNIX)
    wanted = {"arguments": arguments, "environment": dict(os.environ), "folder": os.getcwd()}
    message = json.dumps(wanted).encode()
    try:
        connection.connect(f"\0{address}")
        socket.send_fds(connection, [LENGTH.pack(len(message))], [0, 1, 2])
        connection.sendall(message)
        fork = STATUS.unpack(_received(connection, STATUS.size))[0]
    except (OSError, EOFError):  # it has ended: nothing has begun
        return None
    for number in PASSED_ON:
        signal.signal(number, lambda number, _: _send(fork, number))
    try:
        status = STATUS.unpack(_received(connection, STATUS.size))[0]
    except (OSError, EOFError):  # it was killed, and its forks end with it
        return 1
    code = os.waitstatus_to_exitcode(status)
    if code < 0:
        signal.signal(-code, signal.SIG_DFL) if -code != signal.SIGKILL else None
        os.kill(os.getpid(), -code)
    return code


def _send(process: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(process, number)


def _received(connection: socket.socket, size: int) -> bytes:
    """So many bytes.

    Raises:
        EOFError: the other side closed before.
    """
    found = b""
    while len(found) < size:
        if not (part := connection.recv(size - len(found))):
            raise EOFError
        found += part
    return found


class CurrentStderr:
    """What is `sys.stderr` when something is written: loggers keep what they find at import."""

    def __getattr__(self, name: str):
        return getattr(sys.__stderr__ if sys.stderr is self else sys.stderr, name)


def _load(packages: tuple[str, ...]) -> None:
    sys.stderr = CurrentStderr()
    for package in packages:
        with contextlib.suppress(Exception):  # a fork that needs it says so
            importlib.import_module(package)
    sys.stderr = sys.__stderr__
    if "pandas" in sys.modules:  # it looks whether a terminal's width limits its tables: here, none
        sys.modules["pandas"].set_option("display.max_columns", 20)
    gc.freeze()  # pages that no collection touches stay shared


def forked_jobs(listener: socket.socket) -> dict:
    """Fork for whoever asks, until this process is killed. Returns in a fork alone: its job."""
    _load(PACKAGES)
    with selectors.DefaultSelector() as awaited:
        awaited.register(listener, selectors.EVENT_READ)
        while True:
            for key, _ in awaited.select():
                if key.fileobj is not listener:
                    _tell_end(awaited, key)
                elif job := _forked(awaited, listener):
                    return job


def _forked(awaited: selectors.BaseSelector, listener: socket.socket) -> dict | None:
    """Fork for one asker; returns its job in the fork, and nothing in this process."""
    connection, streams, server = None, [], os.getpid()
    try:
        connection, _ = listener.accept()
        connection.settimeout(PATIENCE_S)
        asker = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
        if struct.unpack("3i", asker)[1] != os.getuid():
            raise PermissionError
        head, streams, *_ = socket.recv_fds(connection, LENGTH.size, 3)
        job = json.loads(_received(connection, LENGTH.unpack(head)[0]))
        connection.settimeout(None)
        fork = os.fork()
    except (OSError, EOFError, ValueError, struct.error):  # it was killed, or is somebody else
        fork = None
    if fork == 0:
        listener.close()
        _become(job, connection, streams, server)
        return job
    for stream in streams:
        os.close(stream)
    if fork:
        with contextlib.suppress(OSError):  # its asker was killed meanwhile, and it ends
            connection.sendall(STATUS.pack(fork))
        awaited.register(os.pidfd_open(fork), selectors.EVENT_READ, (fork, connection))
    elif connection:
        connection.close()
    return None


def _tell_end(awaited: selectors.BaseSelector, key: selectors.SelectorKey) -> None:
    fork, connection = key.data
    awaited.unregister(key.fileobj)
    os.close(key.fileobj)
    _, status = os.waitpid(fork, 0)
    with connection, contextlib.suppress(OSError):  # nobody waits for it any more
        connection.sendall(STATUS.pack(status))


def _become(job: dict, connection: socket.socket, streams: list[int], server: int) -> None:
    """Be the asker's process: its streams, environment and folder; end when it does."""
    die_with_parent(server)
    os.setsid()  # signals come from the asker alone
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    os.environ.clear()
    os.environ.update(job["environment"])
    if PARENT in os.environ:  # for a kernel, which looks whether it is still there
        os.environ[PARENT] = str(os.getppid())
    os.chdir(job["folder"])
    sys.argv[1:] = job["arguments"]
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for name in [name for name in sys.modules if name.partition(".")[0] == "helpers"]:
        del sys.modules[name]
    importlib.invalidate_caches()

    def end_with_asker() -> None:
        connection.recv(1)  # it sends nothing more: this is its end
        os._exit(1)

    threading.Thread(target=end_with_asker, daemon=True).start()


def main() -> int:
    """Serve; in a fork, do the job that was asked for."""
    die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the jobs, which end first
    job = forked_jobs(socket.socket(fileno=int(sys.argv[1])))
    from helpers.study import jobs

    try:
        return jobs.main(job["arguments"])
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # nothing is left that could be stopped


if __name__ == "__main__":
    sys.exit(main())
