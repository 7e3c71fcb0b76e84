"""Twenty random kills across smoke studies, and every study ends in the very same results."""

import json
import random
import time

import pytest
from safetensors import safe_open

from helpers.core.records import check_checksums
from process_tree import kill, new_mark, of_role, processes, wait_until_gone
from smoke_study import PART, Smoke

pytestmark = pytest.mark.long

KILLS, SEED = 20, 20261125
VICTIMS = ("make", "front", "engine", "runner", "kernel")
TAKES_ALL = ("make", "front", "engine")  # with these everything else has to end
GONE_S = 30  # on a machine that does other work too


def test_twenty_random_kills_end_in_identical_results(undisturbed_part, tmp_path):
    chance, killed, studies = random.Random(SEED), [], 0
    while len(killed) < KILLS:
        study = Smoke(tmp_path / f"study{studies}").keep_variants(*PART)
        studies += 1
        while not disturbed_to_the_end(study, chance, killed):
            nothing_looks_finished_that_is_not(study)
        assert study.content() == undisturbed_part.content(), f"study {studies} after {killed}"
    print(f"{len(killed)} kills in {studies} studies: {', '.join(killed)}")
    assert set(killed) == set(VICTIMS)


def disturbed_to_the_end(study: Smoke, chance: random.Random, killed: list[str]) -> bool:
    """Run make study and kill something now and then; returns whether it ended well."""
    mark = new_mark()
    # Without the estimate: kills are to fall on jobs, not on the seconds before them.
    front = study.make("study", **mark, STUDY_ESTIMATE="no")
    while front.poll() is None:
        wait_s = chance.uniform(0.5, 12)
        deadline = time.monotonic() + wait_s
        while time.monotonic() < deadline and front.poll() is None:
            time.sleep(0.05)
        if front.poll() is None and len(killed) < KILLS:
            strike(mark, chance, killed)
    out, output = front.communicate(timeout=GONE_S)
    wait_until_gone(mark, seconds=GONE_S)
    assert "Traceback" not in out + output, output
    return front.returncode == 0


def strike(mark, chance: random.Random, killed: list[str]) -> None:
    """kill -9 of one process, of a role that is drawn first: there are many kernels.

    Roles that were not yet struck come first, since few jobs are left after the first kills.
    """
    there = {role for role in processes(mark).values() if role in VICTIMS}
    if "engine" not in there:  # the front, just begun, may not yet have said with whom it ends
        there.discard("make")
    if not there:
        return
    role = chance.choice(sorted(there - set(killed) or there))
    if victims := of_role(mark, role):
        kill(chance.choice(victims))
        killed.append(role)
        if role in TAKES_ALL:
            wait_until_gone(mark, seconds=GONE_S)


def nothing_looks_finished_that_is_not(study: Smoke) -> None:
    """Whatever has its final name is whole, and what a record vouches for is there."""
    for path in study.outputs.rglob("*.json"):
        json.loads(path.read_bytes())
    for path in study.outputs.rglob("*.jsonl"):
        if ".partial" not in path.parts:
            [json.loads(line) for line in path.read_bytes().splitlines()]
    for path in study.outputs.rglob("*.safetensors"):
        if not any(part.startswith(".") for part in path.relative_to(study.outputs).parts):
            with safe_open(path, framework="np") as tensors:
                assert tensors.keys()
    for path in study.outputs.rglob("record.json"):
        check_checksums(path.parent, made_by="its stage")
