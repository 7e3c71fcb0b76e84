"""Which of the project's modules a notebook rests on, read off its imports.

Left out on purpose: modules that only read and check the study file (what they read is in
`grid.depends_on`), those that only run notebooks, and, for every stage but analysis, the
report room, which shows results and makes none.
"""

import ast
import json
from functools import cache
from pathlib import Path

from helpers.study.errors import StudyError

HELPERS = Path(__file__).resolve().parents[1]
READ_AND_CHECK = ("complaints", "errors", "fields", "loading", "local_files", "model_folders")
READ_AND_CHECK += ("names", "opening", "paths", "pins", "references", "schema")
READ_AND_CHECK += ("source_settings", "variant_settings", "yaml_text")
RUN_NOTEBOOKS = ("accounts", "activity", "archive", "beforehand", "cleaning", "cluster")
RUN_NOTEBOOKS += ("code_files", "display", "estimate", "execution", "export", "grid", "jobs")
RUN_NOTEBOOKS += ("locking", "partial", "schedule", "terminal", "workflow")
MAKE_NO_NUMBERS = {f"helpers.study.{name}" for name in READ_AND_CHECK + RUN_NOTEBOOKS}


@cache
def imported_modules(notebook: Path, *, with_report: bool) -> frozenset[Path]:
    """Files of the helper modules a notebook imports, directly or through others.

    Raises:
        StudyError: the notebook is missing or holds a cell that is not Python.
    """
    if not notebook.is_file():
        raise StudyError(f"notebooks/{notebook.name} is missing; restore it")
    waiting, seen = _imports(_code(notebook), notebook.name), set()
    while waiting:
        name = waiting.pop()
        shows_only = name.startswith("helpers.report") and not with_report
        if name in seen or name in MAKE_NO_NUMBERS or shows_only:
            continue
        seen.add(name)
        file = _package_file(name)
        waiting |= _imports(file.read_text("utf-8"), file.name)
    return frozenset(_package_file(name) for name in seen)


def _code(notebook: Path) -> str:
    """The notebook's code; lines of IPython's own syntax are not Python and import nothing."""
    cells = json.loads(notebook.read_text("utf-8"))["cells"]
    code = ["".join(c["source"]) for c in cells if c["cell_type"] == "code"]
    lines = "\n".join(code).splitlines()
    return "\n".join(line for line in lines if not line.lstrip().startswith(("%", "!")))


def _imports(code: str, place: str) -> set[str]:
    """Names of the `helpers` modules that some code imports, anywhere in it."""
    try:
        tree = ast.parse(code)
    except SyntaxError as error:
        raise StudyError(f"{place}: is not Python ({error.msg}: {error.text}); mend it") from None
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return {n for n in names if n.partition(".")[0] == "helpers" and _package_file(n)}


@cache
def _package_file(name: str) -> Path | None:
    """The file of a helper module, None if the name is not one (a function, a class)."""
    path = HELPERS.joinpath(*name.split(".")[1:])
    for file in (path.with_name(f"{path.name}.py"), path / "__init__.py"):
        if file.is_file():
            return file
    return None
