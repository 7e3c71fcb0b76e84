"""Notebooks as they are stored: documents with a parameters cell, no logic, no outputs."""

import ast
import json
from pathlib import Path

import pytest

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))
NAMES = ["00_finetuning", "01_calibration", "02_quantization", "03_cost", "03_evaluation"]
NAMES += ["04_analysis"]


def cells(path, kind=None):
    found = json.loads(path.read_text("utf-8"))["cells"]
    return [c for c in found if kind is None or c["cell_type"] == kind]


def source(cell):
    return "".join(cell["source"])


def test_all_of_them_are_there():
    assert [path.stem for path in NOTEBOOKS] == NAMES


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_begins_with_a_title_and_a_question(path):
    first = cells(path)[0]
    assert first["cell_type"] == "markdown"
    assert source(first).startswith("# ")
    assert "**Question.**" in source(first)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_has_one_parameters_cell_that_papermill_can_explain(path):
    tagged = [c for c in cells(path, "code") if "parameters" in c["metadata"].get("tags", [])]
    assert len(tagged) == 1
    for line in source(tagged[0]).splitlines():
        assignment, _, comment = line.partition("  # ")
        assert len(ast.parse(assignment).body) == 1
        assert comment, f"{line!r} has no trailing help"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_defaults_name_what_the_demo_study_has(path):
    from helpers.study.opening import open_job

    tagged = [c for c in cells(path, "code") if "parameters" in c["metadata"].get("tags", [])]
    defaults = {}
    exec(source(tagged[0]), defaults)
    given = {k: defaults[k] for k in ("model", "variant") if k in defaults}
    assert open_job(defaults["study"], **given).name == "demo"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_holds_no_logic_and_no_outputs(path):
    for cell in cells(path, "code"):
        assert cell["outputs"] == []
        assert cell["execution_count"] is None
        code = ast.parse(source(cell))
        banned = (ast.FunctionDef, ast.ClassDef, ast.For, ast.While, ast.If, ast.Try, ast.With)
        assert not [n for n in ast.walk(code) if isinstance(n, banned)], source(cell)
        imports = all(isinstance(n, ast.Import | ast.ImportFrom) for n in code.body)
        assert imports or source(cell).count("\n") < 12, source(cell)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_records_hold_nothing_that_was_not_computed(path):
    """A number that stands in the notebook is a claim that no run can contradict."""
    for cell in cells(path, "code"):
        calls = [n for n in ast.walk(ast.parse(source(cell))) if isinstance(n, ast.Call)]
        for call in (c for c in calls if ast.unparse(c.func).endswith(("write", "write_json"))):
            held = [v for d in ast.walk(call) if isinstance(d, ast.Dict) for v in d.values]
            assert not [v for v in held if isinstance(v, ast.Constant)], source(cell)
