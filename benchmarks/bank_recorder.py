"""pytest's plugin for the bank of silent failures: where each is put in, and what catches it.

A member is a test marked `bank(kind, failure, *gates)`. While it runs, every gate that fails and
every place of the project that is patched are noted. `failure` may name parameters of the test,
as in "{change} in every Linear": a function stands for its own name. The gates given have to
fail; without any, whatever failed has caught it. `at` tells where a failure is put in that no
patch shows.
"""

from collections.abc import Callable
from functools import wraps

import pytest

from benchmarks import gate_names as names


class Notes:
    """Notes about the running member of the bank."""

    def __init__(self):
        self.begin()

    def begin(self) -> None:
        self.caught: dict[str, None] = {}  # in the order they failed
        self.places: dict[str, None] = {}

    def failed(self, name: str, fails) -> None:
        if fails:
            self.caught[name] = None


NOTES = Notes()


def pytest_configure(config) -> None:
    """Watch gates and checks before a test imports them."""
    from helpers.core.errors import StudyError
    from helpers.core.records import Gate
    from helpers.evaluation import preflight
    from helpers.report.checks import (
        recomputation,
        recomputed_chapters,
        recomputed_graded_report,
        recomputed_recommendation,
    )
    from helpers.statistics import verdicts
    from helpers.statistics.checks import recomputed_verdicts

    init_gate, refused = Gate.__init__, StudyError.__init__

    def gate(self, name, passed, measured, limit):
        init_gate(self, name, passed, measured, limit)
        NOTES.failed(name, not passed)

    def error(self, text):
        refused(self, text)
        NOTES.failed(names.REFUSED, True)

    Gate.__init__, StudyError.__init__ = gate, error
    _watch(recomputed_verdicts, "disagreements", names.COMPARISONS)
    _watch(recomputation, "recompute", names.VERDICTS, lambda result: result[1])
    _watch(recomputation, "_misread_passages", names.VERDICTS)
    for module in (recomputed_graded_report, recomputation):
        _watch_lines(module, "wrong_cards", names.VERDICTS)
        _watch_lines(module, "wrong_kl_tables", names.VERDICTS)
    for module in (recomputed_recommendation, recomputation):
        _watch(module, "wrong_recommendation", names.VERDICTS)
    _watch(recomputation, "wrong_sentences", names.SENTENCES)
    _watch(recomputation, "wrong_chapters", names.CHAPTERS)
    _watch(recomputation, "wrong_costs", names.COSTS)
    for module in (recomputed_chapters, recomputation):
        _watch(module, "wrong_records", names.RECORDS)
    _watch(verdicts, "uninformative_reason", names.BASELINE)
    true = preflight.problems

    def problems(*args, **options):
        for line in true(*args, **options):
            NOTES.failed(names.BEFOREHAND, True)
            yield line

    preflight.problems = problems
    for name in ("setattr", "setitem"):
        setattr(pytest.MonkeyPatch, name, _noting_places(getattr(pytest.MonkeyPatch, name)))


def _watch(module, name: str, check: str, fails: Callable = bool) -> None:
    true = getattr(module, name)

    @wraps(true)
    def watched(*args, **options):
        found = true(*args, **options)
        NOTES.failed(check, fails(found))
        return found

    setattr(module, name, watched)


def _watch_lines(module, name: str, check: str) -> None:
    """Watch a generator of lines, each of which names a difference."""
    true = getattr(module, name)

    @wraps(true)
    def watched(*args, **options):
        for line in true(*args, **options):
            NOTES.failed(check, True)
            yield line

    setattr(module, name, watched)


def _noting_places(patch: Callable) -> Callable:
    @wraps(patch)
    def noted(self, target, name, *args, **options):
        place = target if isinstance(target, str) else _place(target, name)
        if place.startswith("helpers."):
            NOTES.places[place.removeprefix("helpers.")] = None
        return patch(self, target, name, *args, **options)

    return noted


def _place(target, name) -> str:
    """`helpers.inference.packed_attention.Segment._mask`, of a module or a class."""
    parts = [getattr(target, "__name__", ""), name]
    if isinstance(target, type):
        parts = [target.__module__, target.__qualname__, name]
    return ".".join(str(part) for part in parts if part)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    """Record the gates and places of a member, for its report."""
    NOTES.begin()
    try:
        return (yield)
    finally:
        for marker in item.iter_markers("bank"):
            item.user_properties.append(("bank", _row(item, marker)))


def _row(item, marker) -> dict:
    kind, failure, *gates = marker.args
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    return {
        "kind": kind,
        "failure": failure.format(**{k: _words(v) for k, v in parameters.items()}),
        "at": list(filter(None, [marker.kwargs.get("at")])) or list(NOTES.places),
        "gates": list(gates or NOTES.caught),
        "missed": [gate for gate in gates if gate not in NOTES.caught],
        "test": f"{item.path.name}::{item.originalname}",
    }


def _words(value) -> str:
    return getattr(value, "__name__", str(value)).replace("_", " ").strip()
