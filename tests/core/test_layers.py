"""A package of the library imports only packages before it; light packages never import torch."""

import ast
import functools
import graphlib
import os
import re
import subprocess
import sys

import pytest

from helpers.core.files import PROJECT

HELPERS = PROJECT / "src" / "helpers"
PACKAGES = ("core", "study", "runtime", "sources", "inference", "quantization", "verification")
PACKAGES += ("cost", "evaluation", "statistics", "report", "workflow")
# Light packages, with the modules of each that need torch. The lists may only shrink.
NEED_TORCH = {
    "core": set(),
    "study": set(),
    "cost": {
        "measurement",
        "operations",
    },
    "evaluation": {
        "checks.evaluation_data",
        "checks.forward_passes",
        "checks.recorded_calls",
        "checks.second_opinion",
        "engine",
        "preflight",
        "prompts",
        "stage",
    },
    "statistics": set(),
    "report": set(),
    "workflow": set(),
}
LIGHT_MODULES_ELSEWHERE = ["helpers.sources.sampling"]
MODULE = re.compile(r"helpers(\.\w+){2,}")


@functools.cache
def modules() -> dict[str, ast.Module]:
    """Every module of the library, parsed, by its dotted name."""
    return {
        ".".join(path.relative_to(PROJECT / "src").with_suffix("").parts): ast.parse(
            path.read_text(encoding="utf-8")
        )
        for path in sorted(HELPERS.rglob("*.py"))
    }


def package_of(name: str) -> str:
    return name.split(".")[1]


def imported(tree: ast.Module) -> set[str]:
    """Dotted names that a tree imports, inside functions too, or names in a string.

    A string that is a module's name and nothing else is run by `-m` or imported by name.
    """
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            names |= {node.value} if MODULE.fullmatch(node.value) else set()
    return names


def upward(name: str, tree: ast.Module) -> list[str]:
    """Imports of a module that point at a package after its own."""
    allowed = PACKAGES[: PACKAGES.index(package_of(name)) + 1]
    others = (other for other in imported(tree) if other.startswith("helpers."))
    return sorted(other for other in others if package_of(other) not in allowed)


def light_modules() -> list[str]:
    """The modules that promise to do without torch."""
    names = [name.removesuffix(".__init__") for name in modules()]
    light = [
        name
        for name in names
        if (parts := name.split(".", 2))[1:]
        and parts[1] in NEED_TORCH
        and ".".join(parts[2:]) not in NEED_TORCH[parts[1]]
    ]
    return light + LIGHT_MODULES_ELSEWHERE


def test_the_packages_are_these():
    folders = {p.name for p in HELPERS.iterdir() if p.is_dir() and p.name != "__pycache__"}
    assert folders == set(PACKAGES)


@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_imports_only_packages_before_it(package):
    violations = {n: upward(n, tree) for n, tree in modules().items() if package_of(n) == package}
    assert {name: others for name, others in violations.items() if others} == {}


def test_an_upward_import_is_found():
    for code in (
        "from helpers.report import tables",
        "import helpers.report",
        "def f():\n    import helpers.workflow.cli",
        "command = ['-m', 'helpers.evaluation.preflight']",
    ):
        assert upward("helpers.cost.measurement", ast.parse(code)), code
    assert not upward("helpers.cost.measurement", ast.parse("from helpers.core import files"))


def test_the_library_knows_nothing_of_tests_or_notebooks():
    outside = {"tests", "notebooks", "conftest", "benchmarks", "tools"}
    for name, tree in modules().items():
        assert not {i.split(".")[0] for i in imported(tree)} & outside, name


def test_modules_that_need_torch_are_there():
    listed = {f"helpers.{package}.{m}" for package, names in NEED_TORCH.items() for m in names}
    assert listed <= set(modules())


def test_every_light_module_is_found():
    """So that the next test does not pass over an empty list."""
    light = light_modules()
    assert {"helpers.study.loading", "helpers.evaluation.scoring", "helpers.report"} <= set(light)
    assert len(light) == len(set(light)) >= 50


def test_light_modules_do_not_import_torch_even_through_others():
    script = "\n".join(
        [
            "import importlib, sys",
            "for name in sys.argv[1:]:",
            "    importlib.import_module(name)",
            "    heavy = {'torch', 'transformers'} & set(sys.modules)",
            "    assert not heavy, f'{name} imports {heavy}'",
        ]
    )
    environment = os.environ | {"PYTHONPATH": str(PROJECT / "src")}
    done = subprocess.run(
        [sys.executable, "-c", script, *light_modules()],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 0, done.stderr


def imports_at_the_top(name: str, tree: ast.Module) -> set[str]:
    """Modules of the library that a module imports when it is itself imported."""
    top = ast.Module([n for n in tree.body if isinstance(n, ast.Import | ast.ImportFrom)], [])
    return (imported(top) & modules().keys()) - {name}


def test_no_modules_import_each_other():
    """A circle works or fails by which of its modules is imported first."""
    graph = {name: imports_at_the_top(name, tree) for name, tree in modules().items()}
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError with the circle


def test_a_circle_of_imports_is_found():
    with pytest.raises(graphlib.CycleError):
        graphlib.TopologicalSorter({"a": {"b"}, "b": {"a"}}).prepare()
