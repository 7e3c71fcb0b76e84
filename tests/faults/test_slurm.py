"""The smoke study on a real Slurm: killed, a job lost, run to its end; the same results."""

import re
import subprocess

import pytest

import slurm_cluster
from helpers.core.files import StudyPaths
from helpers.study import stages
from helpers.study.loading import load_study
from process_tree import kill, new_mark, of_role, wait_for
from smoke_study import NAME, PART, Smoke

pytestmark = pytest.mark.long

# One node of two cores that keeps no accounts, and no network between it and the one who asks.
HERE = "--jobs 4 --latency-wait 10 --slurm-init-seconds-before-status-checks 5 --set-threads cost=2"
PATHS = StudyPaths(NAME)
NAMES = {  # where a run leaves its record, and how the terminal calls it
    str(run.record(PATHS).parent.relative_to(PATHS.root)): " ".join(
        filter(None, (run.stage, run.model, run.variant))
    )
    for run in [*stages.runs(load_study(NAME)), stages.Run("analysis")]
}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    try:
        with slurm_cluster.cluster(tmp_path_factory.mktemp("slurm") / "run"):
            yield
    except slurm_cluster.NoCluster as reason:
        pytest.skip(f"no Slurm here: {reason}")


def queued() -> list[tuple[str, str]]:
    """(id, state) of what is on the cluster."""
    command = ["squeue", "--noheader", "--states", "PD,R", "--format", "%i %T"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return [tuple(line.split()) for line in done.stdout.splitlines()]


def records(study: Smoke) -> set[str]:
    return {
        str(path.parent.relative_to(study.outputs)) for path in study.outputs.rglob("record.json")
    }


def start(study: Smoke, **more) -> subprocess.Popen:
    return study.make("study", "EXECUTOR=slurm", f"ARGS={HERE}", **more)


def test_a_cluster_gives_what_one_machine_gives(cluster, undisturbed_part, tmp_path):
    study, mark = Smoke(tmp_path / "study").keep_variants(*PART), new_mark()

    # The engine is killed; its jobs are the cluster's and stay there.
    front = start(study, **mark)
    wait_for(lambda: len(records(study)) >= 3 and queued(), seconds=600)
    kill(of_role(mark, "front")[0])
    front.communicate(timeout=30)
    left = {number for number, _ in queued()}
    assert left, "nothing was left on the cluster, so that nothing is shown below"

    # Run again: what was left is stopped first. Then a job is lost; the others go on.
    finished = records(study)
    front = start(study)
    lost = wait_for(
        lambda: [n for n, state in queued() if state == "RUNNING" and n not in left],
        seconds=600,
    )
    assert not left & {number for number, _ in queued()}
    subprocess.run(["scancel", lost[0]], check=True)
    _, output = front.communicate(timeout=1200)
    assert front.returncode == 2  # make's, for a command that failed
    assert "Traceback" not in output
    assert "finished jobs are kept" in output
    # Nothing is gone but what the lost job had begun to make again, and it is named.
    [killed_jobs] = re.findall("exited without reporting a result: (.*?); such a job", output)
    assert {NAMES[record] for record in finished - records(study)} <= {killed_jobs}
    assert "1 failed" in output
    assert records(study) - finished, "the others did not go on"

    output = study.done("study", "EXECUTOR=slurm", f"ARGS={HERE}")
    assert "current: " in output
    assert study.content() == undisturbed_part.content()
    assert queued() == []
