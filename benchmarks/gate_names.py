"""Names of every gate that the project can write, read from its source.

A gate's name is the argument `name` of `Gate`, or of a function that gives one; it has to be a
constant, or a name that constants are given to. Names that only pass through are those of the
callers.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

from helpers.core.files import PROJECT

SOURCE = PROJECT / "src" / "helpers"
COMPARISONS = "figures that follow from the answers"
VERDICTS = "make verdicts"
SENTENCES = "sentences of the report made again"
CHAPTERS = "chapters of the report made again"
COSTS = "costs of the report made again"
RECORDS = "what a report prints of its notebooks"
BASELINE = "a baseline that can tell"
BEFOREHAND = "sources looked at before the first job"
REFUSED = "refused in one line"
CHECKS = {  # what catches a failure and is no gate
    COMPARISONS: "statistics.checks.recomputed_verdicts",
    VERDICTS: "report.checks.recomputation",
    SENTENCES: "report.checks.recomputation",
    CHAPTERS: "report.checks.recomputed_chapters",
    COSTS: "report.checks.recomputed_chapters",
    RECORDS: "report.checks.recomputed_chapters",
    BASELINE: "statistics.verdicts",
    BEFOREHAND: "evaluation.preflight",
    REFUSED: "core.errors",
}
PASSED_ON = [ast.Constant("")]  # a parameter: its names are those of the callers
Functions = dict[str, list[str]]  # positional parameters of functions that are given a gate's name


def gate_names(folder: Path = SOURCE) -> dict[str, str]:
    """Module (`evaluation.conduct`) by the name of each gate.

    Raises:
        ValueError: a name that cannot be read from the source.
    """
    trees = {
        ".".join(path.relative_to(folder).with_suffix("").parts): ast.parse(path.read_text("utf-8"))
        for path in sorted(folder.rglob("*.py"))
    }
    functions = {module: dict(_functions(tree)) for module, tree in trees.items()}
    functions["core.records"]["Gate"] = ["name"]
    constants = {module: _assigned(_constants(tree)) for module, tree in trees.items()}
    module_by_name: dict[str, str] = {}
    for module, tree in trees.items():
        functions_here, constants_here = dict(functions[module]), dict(constants[module])
        for node in (n for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)):
            source = (node.module or "").removeprefix("helpers.")
            for name in (alias.name for alias in node.names):
                if name in functions.get(source, ()):
                    functions_here[name] = functions[source][name]
                constants_here.setdefault(name, constants.get(source, {}).get(name, []))
        functions_here.setdefault("gate", ["name"])  # a method, too
        for name in _names(tree, functions_here, constants_here, module):
            module_by_name.setdefault(name, module)
    return module_by_name


def _constants(tree: ast.Module) -> list[ast.stmt]:
    return [statement for statement in tree.body if isinstance(statement, ast.Assign)]


def _functions(tree: ast.AST) -> Iterator[tuple[str, list[str]]]:
    """Functions that take a gate's name, with their parameters."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef):
            continue
        parameters = [a.arg for a in node.args.args if a.arg != "self"]
        gives = ast.unparse(node.returns) if node.returns else ""
        decorates = node.name == "gate" and gives == "Callable"
        named = {*parameters, *(a.arg for a in node.args.kwonlyargs)}
        if "name" in named and (gives == "Gate" or decorates):
            yield node.name, parameters


def _assigned(body: list[ast.stmt]) -> dict[str, list[ast.expr]]:
    """All values assigned to each name in some statements."""
    values: dict[str, list[ast.expr]] = {}
    for node in (n for statement in body for n in ast.walk(statement)):
        for target in node.targets if isinstance(node, ast.Assign) else ():
            pairs = [(target, node.value)]
            if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
                pairs = list(zip(target.elts, node.value.elts, strict=False))
            for name, value in pairs:
                if isinstance(name, ast.Name):
                    values.setdefault(name.id, []).append(value)
    return values


def _names(tree: ast.AST, known: Functions, constants: dict, module: str) -> Iterator[str]:
    """Names of the gates that a module makes."""

    def visit(node: ast.AST, parameters: frozenset[str], local: dict) -> Iterator[str]:
        if isinstance(node, ast.FunctionDef):
            parameters = parameters | {a.arg for a in [*node.args.args, *node.args.kwonlyargs]}
            local = local | _assigned(node.body)
        argument = _argument(node, known) if isinstance(node, ast.Call) else None
        if argument is not None:
            yield from resolved(argument, local | dict.fromkeys(parameters, PASSED_ON))
        for child in ast.iter_child_nodes(node):
            yield from visit(child, parameters, local)

    def resolved(value: ast.expr, local: dict) -> Iterator[str]:
        given = [value.body, value.orelse] if isinstance(value, ast.IfExp) else []
        if isinstance(value, ast.BoolOp):
            given = value.values
        if isinstance(value, ast.Name):
            given = local.get(value.id, constants.get(value.id, []))
        if isinstance(value, ast.Constant) and isinstance(value.value, str):
            yield from filter(None, [value.value])
        elif not given:
            told = f"{module}, line {value.lineno}: {ast.unparse(value)!r}"
            raise ValueError(f"no name of a gate can be read from {told}")
        for one in given:
            yield from resolved(one, local if isinstance(value, ast.BoolOp) else {})

    yield from visit(tree, frozenset(), {})


def _argument(call: ast.Call, known: Functions) -> ast.expr | None:
    """The gate name passed in a call; None if the call passes none."""
    function = getattr(call.func, "attr", getattr(call.func, "id", ""))
    if function not in known:
        return None
    arguments = dict(zip(known[function], call.args, strict=False))
    return (arguments | {k.arg: k.value for k in call.keywords}).get("name")
