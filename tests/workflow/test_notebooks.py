"""Notebooks as they are stored: documents with a parameters cell, no logic, no outputs."""

import ast
import json
from pathlib import Path

import pytest

from helpers.study import stages
from helpers.workflow.cli import HIDDEN

NOTEBOOKS = sorted((Path(__file__).parents[2] / "notebooks").glob("*.ipynb"))
NAMES = ["00_finetuning", "00_rotation", "01_calibration", "02_quantization", "03_cost"]
NAMES += ["03_evaluation", "04_analysis", "explore"]
*COMPUTING, ANALYSIS = [path for path in NOTEBOOKS if path.stem in stages.NOTEBOOKS.values()]


def cells(path, kind=None):
    all_cells = json.loads(path.read_text("utf-8"))["cells"]
    return [c for c in all_cells if kind is None or c["cell_type"] == kind]


def source(cell):
    return "".join(cell["source"])


def test_all_of_them_are_there():
    assert [path.stem for path in NOTEBOOKS] == NAMES
    assert [path.stem for path in (*COMPUTING, ANALYSIS)] == NAMES[:-1]


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
    from helpers.study.loading import open_job

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
        lines = len(source(cell).splitlines())
        assert lines <= (12 if imports else 10), source(cell)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_holds_no_number_but_the_place_of_an_item(path):
    """A setting has a name, and its reason beside it, in the library or in the study file."""
    for cell in cells(path, "code"):
        code = ast.parse(source(cell))
        places = {id(n.slice) for n in ast.walk(code) if isinstance(n, ast.Subscript)}
        numbers = [n for n in ast.walk(code) if isinstance(n, ast.Constant)]
        numbers = [n for n in numbers if isinstance(n.value, int | float) and id(n) not in places]
        assert not numbers, source(cell)


@pytest.mark.parametrize("path", COMPUTING, ids=lambda p: p.stem)
def test_opens_its_stage_first_and_finishes_it_last(path):
    """Whatever fails in between leaves no record, since nothing else writes one."""
    code = [source(cell) for cell in cells(path, "code")]
    opens = [i for i, text in enumerate(code) if text.startswith("run = open_")]
    finishes = [i for i, text in enumerate(code) if "run.finish(" in text]
    assert opens == [2]  # after the parameters and the imports
    assert finishes == [len(code) - 1]
    last = ast.parse(code[-1]).body[-1]
    assert ast.unparse(last).startswith("run.finish(")


def test_the_report_leaves_the_frame_of_all_answers_out():
    with_answers = [c for c in cells(ANALYSIS, "code") if "answers" in source(c)]
    with_answers = [c for c in with_answers if not source(c).startswith("from ")]
    assert with_answers
    assert all(HIDDEN in c["metadata"]["tags"] for c in with_answers)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_records_hold_nothing_that_was_not_computed(path):
    """A number that stands in the notebook is a claim that no run can contradict."""
    for cell in cells(path, "code"):
        calls = [n for n in ast.walk(ast.parse(source(cell))) if isinstance(n, ast.Call)]
        writes = ("finish", "write", "write_json")
        for call in (c for c in calls if ast.unparse(c.func).endswith(writes)):
            values = [v for d in ast.walk(call) if isinstance(d, ast.Dict) for v in d.values]
            values += [keyword.value for keyword in call.keywords]
            assert not [v for v in values if isinstance(v, ast.Constant)], source(cell)


SHOWING = {"display", "print"}  # besides helpers.report itself


def names_of_the_report(tree: ast.Module) -> set[str]:
    """Names that a notebook imports from helpers.report."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module.startswith("helpers.report"):
            names |= {alias.asname or alias.name for alias in node.names}
        if isinstance(node, ast.Import):
            assert not [a for a in node.names if a.name.startswith("helpers.report")]
    return names


def passed_on(code: str) -> list[str]:
    """Calls that get something which helpers.report made, but for those that show it."""
    tree = ast.parse(code)
    library = names_of_the_report(tree)
    made = set(library)

    def used(node: ast.AST) -> bool:
        return any(isinstance(n, ast.Name) and n.id in made for n in ast.walk(node))

    before = None
    while before != made:  # until no name is added
        before = set(made)
        for node in ast.walk(tree):
            if isinstance(node, ast.Assign | ast.AugAssign | ast.AnnAssign | ast.NamedExpr):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                if node.value and used(node.value):
                    for target in targets:
                        made |= {n.id for n in ast.walk(target) if isinstance(n, ast.Name)}
            if isinstance(node, ast.comprehension) and used(node.iter):
                made |= {n.id for n in ast.walk(node.target) if isinstance(n, ast.Name)}
    odd = []
    for call in (n for n in ast.walk(tree) if isinstance(n, ast.Call)):
        root = call.func
        while isinstance(root, ast.Attribute | ast.Subscript | ast.Call):
            root = root.func if isinstance(root, ast.Call) else root.value
        shows = isinstance(root, ast.Name) and root.id in SHOWING | made
        if not shows and any(map(used, [*call.args, *(k.value for k in call.keywords)])):
            odd.append(ast.unparse(call))
    return odd


@pytest.mark.parametrize("path", COMPUTING, ids=lambda p: p.stem)
def test_a_notebook_that_computes_only_shows_what_the_report_makes(path):
    """helpers.report is in no fingerprint of such a notebook (helpers.study.stages)."""
    assert passed_on("\n".join(source(c) for c in cells(path, "code"))) == []


RECORDED = [
    'record.write({"maxima": tables.as_rows(maxima)})',
    'rows = tables.maxima(absmax)\nworst = rows["ratio"].idxmax()\nsave(folder, worst)',
    "found = [row for row in tables.rows(x)]\nrecord.write({'rows': found})",
    "record.write({'at': (first := tables.first(x))})",
]


@pytest.mark.parametrize("code", RECORDED)
def test_what_the_report_makes_is_seen_on_its_way_into_a_record(code):
    assert passed_on(f"from helpers.report import tables as tables\n{code}")
    shown = "rows = tables.rows(x)\nprint(rows.head(3))\nfigures.plot(rows, title=tables.title(x))"
    assert not passed_on(f"from helpers.report import figures, tables as tables\n{shown}")
