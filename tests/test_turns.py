"""Measurements are interleaved, each in a process of its own, and none is lost unnoticed."""

import os
from functools import partial

import pytest

from helpers.study.errors import StudyError
from helpers.study.turns import in_turns, measured_in_turns


def whose() -> dict:
    return {"process": os.getpid()}


@pytest.mark.parametrize("rounds", [1, 3, 5])
@pytest.mark.parametrize("names", ["a", "ab", "abcd"])
def test_every_round_measures_all_and_begins_one_further(names, rounds):
    order, size = in_turns(names, rounds), len(names)
    each = [order[i : i + size] for i in range(0, len(order), size)]
    assert len(each) == rounds
    assert all(sorted(one) == sorted(names) for one in each)
    assert [one[0] for one in each] == [names[r % size] for r in range(rounds)]


def test_each_measurement_has_a_process_of_its_own():
    found = measured_in_turns({"a": whose, "b": whose}, rounds=2)
    assert [len(rounds) for rounds in found.values()] == [2, 2]
    processes = {made["process"] for rounds in found.values() for made in rounds}
    assert len(processes | {os.getpid()}) == 5


def test_a_process_that_dies_is_named():
    with pytest.raises(StudyError, match="broken: the process that measured it died"):
        measured_in_turns({"broken": partial(os._exit, 3)}, rounds=1)
