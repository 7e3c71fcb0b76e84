"""Which of the project's modules a notebook rests on, read off its code by one rule.

A module counts if the notebook, or a module that counts, imports it anywhere in its code, or
names it in a text of its own: a dotted name is given to `import_module` or to another
interpreter, the name of a file beside the module is run by its path. So do the packages that
it lies in. No module is left out by its name.

One package is left out, and only for notebooks that compute: `helpers.report`, from which they
show things. Nothing that it makes gets into a record (tests/test_notebooks.py), and no other
package imports it (tests/test_layers.py), so that work on the report repeats no computation.
"""

import ast
import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from helpers.core.errors import StudyError

HELPERS = Path(__file__).resolve().parents[1]
REPORT = HELPERS / "report"
# Files that a module runs by their path, or shows: the parts of a page.
BESIDE = (".py", ".html", ".css", ".js")


@cache
def imported_modules(notebook: Path, *, with_report: bool) -> frozenset[Path]:
    """Files of the helper modules that a notebook imports, directly or through others.

    Raises:
        StudyError: the notebook is missing or holds a cell that is not Python.
    """
    if not notebook.is_file():
        raise StudyError(f"notebooks/{notebook.name} is missing; restore it")
    pending, visited = set(_named_files(_parsed(_code(notebook), notebook.name), notebook)), set()
    while pending:
        file = pending.pop()
        if file in visited or (file.is_relative_to(REPORT) and not with_report):
            continue
        visited.add(file)
        pending |= _files_named_in(file)
    return frozenset(visited)


def _code(notebook: Path) -> str:
    """The notebook's Python code, without lines of IPython's own syntax, which import nothing."""
    cells = json.loads(notebook.read_text("utf-8"))["cells"]
    code = ["".join(c["source"]) for c in cells if c["cell_type"] == "code"]
    lines = "\n".join(code).splitlines()
    return "\n".join(line for line in lines if not line.lstrip().startswith(("%", "!")))


def _parsed(code: str, place: str) -> ast.Module:
    try:
        return ast.parse(code)
    except SyntaxError as error:
        raise StudyError(f"{place}: is not Python ({error.msg}: {error.text}); mend it") from None


@cache
def _files_named_in(file: Path) -> frozenset[Path]:
    """The files that one module imports or names, and of its packages; a page names none."""
    if file.suffix != ".py":
        return frozenset()
    return frozenset(_named_files(_parsed(file.read_text("utf-8"), file.name), file))


def _named_files(tree: ast.Module, importer: Path) -> Iterator[Path]:
    for node in ast.walk(tree):
        names: list[str] = []
        text = None
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            if node.module is None or node.level:
                raise StudyError(f"{importer.name}: has a relative import; name the module in full")
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            names, text = [node.value], node.value
        for name in names:
            yield from _module_files(name)
        if text and text.endswith(BESIDE) and importer.is_relative_to(HELPERS):
            yield from filter(Path.is_file, [importer.parent / text])


@cache
def _module_files(name: str) -> tuple[Path, ...]:
    """The files of a helper module and of each package around it; empty for other names."""
    parts = name.split(".")
    if parts[0] != HELPERS.name or not all(map(str.isidentifier, parts)):
        return ()
    if (file := _package_file(name)) is None:
        return ()
    around = (_package_file(".".join(parts[:n])) for n in range(1, len(parts)))
    return (file, *filter(None, around))


@cache
def _package_file(name: str) -> Path | None:
    """The file of a helper module, None if the name is not one (a function, a class)."""
    module_path = HELPERS.joinpath(*name.split(".")[1:])
    for file in (module_path.with_name(f"{module_path.name}.py"), module_path / "__init__.py"):
        if file.is_file():
            return file
    return None
