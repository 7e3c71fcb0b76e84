"""Measurements are interleaved, each in a process of its own, and none is lost unnoticed."""

import os
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest

from helpers.core.errors import StudyError
from helpers.core.processes import interleaved_order, interleaved_rounds
from process_tree import kill, new_mark, processes, wait_for, wait_until_gone


def whose() -> dict:
    return {"process": os.getpid()}


@pytest.mark.parametrize("rounds", [1, 3, 5])
@pytest.mark.parametrize("names", ["a", "ab", "abcd"])
def test_every_round_measures_all_and_begins_one_further(names, rounds):
    order, size = interleaved_order(names, rounds), len(names)
    each = [order[i : i + size] for i in range(0, len(order), size)]
    assert len(each) == rounds
    assert all(sorted(one) == sorted(names) for one in each)
    assert [one[0] for one in each] == [names[r % size] for r in range(rounds)]


def test_each_measurement_has_a_process_of_its_own():
    results = interleaved_rounds({"a": whose, "b": whose}, rounds=2)
    assert [len(rounds) for rounds in results.values()] == [2, 2]
    processes = {result["process"] for rounds in results.values() for result in rounds}
    assert len(processes | {os.getpid()}) == 5


def test_a_process_that_dies_is_named():
    with pytest.raises(StudyError, match="broken: the process that measured it died"):
        interleaved_rounds({"broken": partial(os._exit, 3)}, rounds=1)


NEVER_ENDING = """
import time
from functools import partial
from helpers.core.processes import interleaved_rounds

if __name__ == "__main__":
    interleaved_rounds({"endless": partial(time.sleep, 600)}, rounds=1, preload=["json"])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="processes are found by /proc")
@pytest.mark.parametrize("victim", ["who asked", "the server"])
def test_nothing_that_measures_outlives_who_asked_for_it(tmp_path, victim):
    """Not the server, its tracker of resources, nor the process that measures."""
    script, mark = tmp_path / "measure.py", new_mark()
    script.write_text(NEVER_ENDING, encoding="utf-8")
    asking = subprocess.Popen([sys.executable, str(script)], env=os.environ | mark)
    try:
        tree = wait_for(lambda: _measuring(mark), seconds=120)
        time.sleep(0.5)  # the measuring process has begun
        kill(asking.pid if victim == "who asked" else max(tree, key=_is_server))
        asking.wait(timeout=120)
        wait_until_gone(mark, seconds=60)
    finally:
        for process in [asking.pid, *processes(mark)]:
            kill(process)
        asking.wait()


def _measuring(mark) -> list[int] | None:
    """All processes, once there are four: who asked, tracker, server, and who measures."""
    pids = list(processes(mark))
    return pids if len(pids) >= 4 else None


def _is_server(process: int) -> tuple[bool, int]:
    """The first of those that run Python's server: the other is forked off it."""
    words = Path(f"/proc/{process}/cmdline").read_bytes()
    return b"forkserver" in words, -process
