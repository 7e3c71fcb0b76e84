"""Locks end with their holder, name it, and never stand in their own process's way."""

import os
import signal
import subprocess
import sys

import pytest

from helpers.core import files
from helpers.core.errors import StudyError
from helpers.core.files import PROJECT, acquire_lock, release_lock
from helpers.core.records import Record

HOLDER = """
import sys, time
from pathlib import Path
from helpers.core.records import Record
Record(Path(sys.argv[1]), stage="evaluation", parameters={})
print("held", flush=True)
time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that writes to the folder `evaluation`."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path / "evaluation")],
        env=os.environ | {"PYTHONPATH": str(PROJECT / "src")},
        stdout=subprocess.PIPE,
    )
    process.stdout.readline()
    yield process
    process.kill()
    process.wait()


def test_a_folder_that_is_being_written_is_refused_until_the_writer_is_gone(tmp_path, holder):
    folder = tmp_path / "evaluation"
    with pytest.raises(StudyError) as caught:
        Record(folder, stage="evaluation", parameters={})
    assert str(caught.value).endswith(
        f"evaluation is being written by process {holder.pid}; wait for it or stop it"
    )
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    Record(folder, stage="evaluation", parameters={}).write({})


def test_a_holder_on_another_machine_is_named_with_it(tmp_path):
    path = tmp_path / ".x.lock"
    script = "import fcntl, sys, time; f = open(sys.argv[1], 'w'); f.write('12 node7'); f.flush(); "
    script += "fcntl.flock(f, fcntl.LOCK_EX); print('held', flush=True); time.sleep(60)"
    holder = subprocess.Popen([sys.executable, "-c", script, str(path)], stdout=subprocess.PIPE)
    holder.stdout.readline()
    with pytest.raises(StudyError, match="x is being run by process 12 on node7; wait for it"):
        acquire_lock(path, "x is being run")
    holder.kill()
    holder.wait()


def test_a_cell_that_is_run_again_is_not_refused(tmp_path):
    for _ in range(2):
        record = Record(tmp_path / "x", stage="evaluation", parameters={})
    record.write({})
    record.write({})


def test_a_released_lock_is_free(tmp_path):
    path = tmp_path / ".x.lock"
    assert acquire_lock(path, "x") == acquire_lock(path, "x")
    release_lock(path)
    release_lock(path)
    acquire_lock(path, "x")
    release_lock(path)


def test_a_file_system_without_locks_is_written_to_all_the_same(tmp_path, monkeypatch):
    def none(_number, _how):
        raise OSError(files.NO_LOCKS[0], "No locks available")

    monkeypatch.setattr(files.fcntl, "flock", none)
    acquire_lock(tmp_path / ".x.lock", "x")
    release_lock(tmp_path / ".x.lock")
