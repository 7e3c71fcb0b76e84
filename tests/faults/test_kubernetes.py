"""The Kubernetes profile against a stand-in for kubectl, which runs each pod's command here.

What is shown: the scripts make sound manifests, and jobs run, fail and are told by them.
What is not: anything that a cluster does.
"""

import json
import os
import subprocess
import sys
import tomllib

import pytest

import toy_project
from helpers.core.files import PROJECT

KUBECTL = '''#!{python}
"""create: run the pod's command in the background; get: print how it ended; delete: forget."""
import json, os, subprocess, sys
from pathlib import Path
here = Path({folder!r})
if sys.argv[1] == "create":
    job = json.load(sys.stdin)
    name = job["metadata"]["name"]
    (here / f"{{name}}.json").write_text(json.dumps(job))
    command = job["spec"]["template"]["spec"]["containers"][0]["command"]
    script = '"$@" > "$0.log" 2>&1; echo $? > "$0.part"; mv "$0.part" "$0.code"'
    subprocess.Popen(["sh", "-c", script, str(here / name), *command], start_new_session=True,
                     stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
elif sys.argv[1] == "get":
    code = here / f"{{sys.argv[3]}}.code"
    ended = code.read_text().strip() if code.exists() else None
    print({{None: " ", "0": "1 "}}.get(ended, " 1"), end="")
'''


@pytest.fixture
def kubectl(tmp_path):
    """The environment in which kubectl is the stand-in; it keeps the manifests it was given."""
    folder = tmp_path / "pods"
    folder.mkdir()
    program = folder / "kubectl"
    program.write_text(KUBECTL.format(python=sys.executable, folder=str(folder)))
    program.chmod(0o755)
    return folder, {
        "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}",
        "STUDY_IMAGE": "python:3.11-slim",
        "STUDY_CLAIM": "study",
        "STUDY_MOUNT": str(tmp_path),
    }


def submit(environment, *arguments) -> subprocess.CompletedProcess:
    command = [PROJECT / "profiles" / "kubernetes" / "submit", *arguments]
    return subprocess.run(command, env=os.environ | environment, capture_output=True, text=True)


def test_a_job_asks_for_its_memory_its_time_and_the_shared_volume(kubectl, tmp_path):
    folder, environment = kubectl
    script = tmp_path / "job.sh"
    script.write_text("true\n")
    done = submit(environment, "evaluation", "4", "48000", "1", "480", str(script))
    assert done.returncode == 0, done.stderr
    job = json.loads((folder / f"{done.stdout.strip()}.json").read_text())
    pod = job["spec"]["template"]["spec"]
    [container], [volume] = pod["containers"], pod["volumes"]
    assert container["command"] == ["/bin/sh", str(script)]
    gpu = {"memory": "48000M", "nvidia.com/gpu": "1"}
    assert container["resources"] == {"requests": {"cpu": "4", **gpu}, "limits": gpu}
    assert container["volumeMounts"][0]["mountPath"] == str(tmp_path)
    assert volume["persistentVolumeClaim"] == {"claimName": "study"}
    assert job["spec"]["activeDeadlineSeconds"] == 480 * 60
    assert job["spec"]["backoffLimit"] == 0
    without = submit(environment, "analysis", "1", "8000", "0", "60", str(script)).stdout.strip()
    assert "nvidia" not in (folder / f"{without}.json").read_text()


def test_what_is_not_said_is_asked_for(kubectl):
    environment = kubectl[1] | {"STUDY_CLAIM": ""}
    done = submit(environment, "analysis", "1", "8000", "0", "60", "job.sh")
    assert done.returncode != 0
    assert "STUDY_CLAIM: name the volume claim" in done.stderr


@pytest.mark.long
def test_a_study_runs_through_the_profile_and_a_failing_job_is_told(kubectl, tmp_path):
    _, environment = kubectl
    declared = tomllib.loads((PROJECT / "pyproject.toml").read_text("utf-8"))
    plugins = declared["project"]["optional-dependencies"]["kubernetes"]
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target"]
    if subprocess.run([*install, tmp_path / "plugins", *plugins]).returncode:
        pytest.skip("the executor's plugin cannot be installed here")
    project = tmp_path / "project"
    project.mkdir()
    toy_project.make(project, kernels=False)
    toy_project.write_study(project, toy_project.small())
    python_path = toy_project.environment(project)["PYTHONPATH"]
    environment |= {"PYTHONPATH": f"{python_path}{os.pathsep}{tmp_path / 'plugins'}"}
    arguments = ["study", "toy", "--cores", "1", "--executor", "kubernetes"]
    arguments += ["--", "--latency-wait", "5", "--jobs", "4"]

    (project / "fail").write_text("02_quantization")
    failed = toy_project.jobs(project, *arguments, **environment)
    assert failed.returncode == 1
    assert "told to fail" in failed.stderr
    assert "Traceback" not in failed.stderr
    (project / "fail").unlink()
    done = toy_project.jobs(project, *arguments, **environment)
    assert done.returncode == 0, done.stderr
    assert (project / "outputs/toy/report.html").is_file()
    assert toy_project.planned(project) == []
