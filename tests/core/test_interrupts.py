"""Ctrl-C that meets a process while its interpreter starts ends it without a traceback."""

import os
import signal
import subprocess
import sys

import pytest

from helpers.core.files import PROJECT
from helpers.core.processes import begin_child

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
COMMANDS = [
    ["helpers.workflow.cli", "check", "demo"],
    ["helpers.evaluation.preflight", "demo"],
    ["helpers.sources.fetching", "demo"],
]


def begin_with_ctrl_c() -> None:
    """As `begin_child`; then Ctrl-C comes before the program does."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # what a shell in the foreground leaves
    begin_child()
    os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize("command", COMMANDS, ids=lambda c: c[0].rpartition(".")[2])
def test_ctrl_c_before_the_first_line_is_kept_and_ends_the_process_silently(command):
    done = subprocess.run(
        [sys.executable, "-m", *command],
        cwd=PROJECT,
        capture_output=True,
        text=True,
        preexec_fn=begin_with_ctrl_c,
        timeout=60,
    )
    assert done.returncode in (-signal.SIGINT, 130)
    assert done.stdout + done.stderr == ""


ENGINE = """
import subprocess, sys, threading
from helpers.core.processes import block_interrupts_in_threads

def blocked(command):
    lines = subprocess.run(command, capture_output=True, text=True).stdout.splitlines()
    mask = next(line.split()[1] for line in lines if line.startswith("SigBlk"))
    return bool(int(mask, 16) >> 1 & 1)  # SIGINT is number 2

job = ["bash", "-c", "set -euo pipefail; cat /proc/self/status"]
block_interrupts_in_threads()
found = [blocked(job)]
thread = threading.Thread(target=lambda: found.append(blocked(job)))
thread.start()
thread.join()
found.append(blocked(job))
print(found)
"""


def test_jobs_start_with_ctrl_c_blocked_and_the_main_thread_keeps_it():
    """The engine starts jobs through a shell and from threads, of which it has a pool."""
    done = subprocess.run(
        [sys.executable, "-c", ENGINE], capture_output=True, text=True, check=True
    )
    assert done.stdout == "[False, True, False]\n"
