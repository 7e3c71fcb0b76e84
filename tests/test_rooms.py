"""The rooms of the library depend downwards only, and a report can be made without torch."""

import ast
import functools
import os
import subprocess
import sys

import pytest

from helpers.study.paths import PROJECT

HELPERS = PROJECT / "src" / "helpers"
LEVEL = {"study": 0, "sources": 1, "evaluation": 2, "quantization": 2, "report": 3}
LIGHT_EVALUATION = {
    "metrics",
    "statistics",
    "bootstrap",
    "power",
    "verdicts",
    "scoring",
    "parsing",
    "predictions",
    "prediction_rows",
    "prompt_records",
    "gates",
    "conduct",
    "degenerate",
    "invariance",
    "reference_gates",
    "range_gates",
    "passage_gates",
    "item_gates",
    "absolute_gates",
    "recomputed_statistics",
    "recomputed_comparisons",
    "recomputed_scores",
    "recomputed_verdicts",
    "controls",
    "answers",
    "old_rules",
    "progress",
}


@functools.cache
def modules() -> dict[str, ast.Module]:
    """Every module of the library, parsed, by its dotted name."""
    return {
        ".".join(path.relative_to(PROJECT / "src").with_suffix("").parts): ast.parse(
            path.read_text(encoding="utf-8")
        )
        for path in sorted(HELPERS.rglob("*.py"))
    }


def imported(tree: ast.Module) -> set[str]:
    """Dotted names of all modules a tree imports, inside functions too."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def light_modules() -> list[str]:
    """The modules that promise to do without torch."""
    return [
        name
        for name in modules()
        if name.split(".")[1] in ("study", "report")
        or (name.split(".")[1] == "evaluation" and name.split(".")[-1] in LIGHT_EVALUATION)
    ] + ["helpers.sources.datasets"]


def test_there_are_no_rooms_but_these():
    assert {p.name for p in HELPERS.iterdir() if p.is_dir() and p.name != "__pycache__"} == set(
        LEVEL
    )


@pytest.mark.parametrize("name", modules())
def test_a_room_depends_on_lower_rooms_only(name):
    room = name.split(".")[1]
    if room == "__init__":
        return
    for other in imported(modules()[name]):
        if other.startswith("helpers.") and (target := other.split(".")[1]) != room:
            assert LEVEL[target] < LEVEL[room], f"{name} imports {other}"


def test_the_library_knows_nothing_of_tests_or_notebooks():
    for name, tree in modules().items():
        assert not {i.split(".")[0] for i in imported(tree)} & {"tests", "notebooks", "conftest"}, (
            name
        )


def test_every_light_module_is_found():
    """So that the next test does not pass over an empty list."""
    light = light_modules()
    assert {"helpers.study.loading", "helpers.evaluation.metrics"} <= set(light)
    assert len(light) == len(set(light)) >= 10


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
    names = [name.removesuffix(".__init__") for name in light_modules()]
    done = subprocess.run(
        [sys.executable, "-c", script, *names], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
