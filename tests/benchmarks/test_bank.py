"""The bank's table names every gate and every known failure; `make bank` makes it."""

import json
from pathlib import Path

import pytest
from benchmarks.bank import EXAMPLES, FOLDER, all_gates, lacking, markdown, table
from benchmarks.gate_names import gate_names

from benchmarks import bank as bank_module
from helpers.core.files import PROJECT

BANK = json.loads((FOLDER / "bank.json").read_text("utf-8"))
PUBLISHED = sorted((PROJECT / "outputs").glob("*/answers/gates.json"))


@pytest.fixture(scope="module")
def own_names():
    """The names in this project's source, read once: it is not changed here."""
    return gate_names()


@pytest.fixture(autouse=True)
def read_once(own_names, monkeypatch):
    monkeypatch.setattr(bank_module, "gate_names", lambda: own_names)


def test_every_check_has_been_seen_to_fail():
    """Mark a test that breaks what the gate guards, then run make bank."""
    seen = {check["name"] for check in BANK["checks"] if check["failures"]}
    assert all_gates().keys() - seen == set()
    assert seen - all_gates().keys() == set()


def test_every_failure_that_once_passed_is_a_member():
    assert lacking(BANK) == []
    assert list(BANK["examples"]) == list(EXAMPLES)


def test_tests_that_show_a_failure_are_there():
    for member in BANK["members"]:
        for test in member["tests"]:
            file, name = test.split("::")
            assert f"def {name}(" in next((PROJECT / "tests").rglob(file)).read_text("utf-8"), test


def test_the_table_is_made_of_its_data():
    assert (FOLDER / "bank.md").read_text("utf-8") == markdown(BANK)


@pytest.mark.parametrize("path", PUBLISHED, ids=lambda p: p.parts[-3])
def test_gates_on_record_are_found_in_the_source(path, own_names):
    gates = [gate for result in json.loads(path.read_text("utf-8")).values() for gate in result]
    assert gates
    assert {gate["name"] for gate in gates} <= own_names.keys()


def row(failure: str, *gates: str) -> dict:
    fields = {"kind": "text", "failure": failure, "at": ["metrics"], "gates": list(gates)}
    return fields | {"missed": [], "test": "test_full_logits.py::test_sound_figures_agree"}


def test_what_is_missing_is_named():
    bank = table(
        [row("some failure", "shared-text means recomputed", "no gate")], date="", seconds=1
    )
    problems = lacking(bank)
    assert "no member is the example 'KL the wrong way round'" in problems
    assert "no member makes 'answers parse' fail" in problems
    assert "no member makes 'shared-text means recomputed' fail" not in problems
    assert "'no gate' catches one and is no gate" in problems


def test_cases_of_one_failure_are_one_member():
    rows = [
        row("a", "answers parse"),
        row("b", "answers within the token limit"),
        row("a", "answers within the token limit"),
    ]
    bank = table(rows, date="", seconds=1)
    assert [m["gates"] for m in bank["members"]] == [
        ["answers parse", "answers within the token limit"],
        ["answers within the token limit"],
    ]
    assert bank["members"][0]["cases"] == 2


MODULE = """
from helpers.core.records import Gate, none_of
from helpers.evaluation.names import KEPT
HERE = "a constant"

def one(scored) -> Gate:
    name = HERE if scored else KEPT
    return Gate(name, True, "", "")

def through(*, name: str = "") -> Gate:
    return Gate(name or "a default", True, "", "")

def two():
    return [through(name="a caller's"), none_of(name="a keyword's", odd=[], n=1, said="")]
"""


def source(folder: Path, **modules: str) -> Path:
    (folder / "core").mkdir()
    (folder / "core" / "records.py").write_text(
        "class Gate: pass\ndef none_of(name, odd, n, said) -> Gate: return Gate(name, 1, 2, 3)\n"
    )
    (folder / "evaluation").mkdir()
    for name, text in modules.items():
        (folder / "evaluation" / f"{name}.py").write_text(text)
    return folder


def test_names_are_read_wherever_they_are_given(tmp_path):
    names = gate_names(source(tmp_path, gates=MODULE, names="KEPT = 'another module\\'s'\n"))
    assert set(names) == {
        "a constant",
        "another module's",
        "a caller's",
        "a keyword's",
        "a default",
    }
    assert set(names.values()) == {"evaluation.gates"}


def test_a_name_that_cannot_be_read_is_an_error(tmp_path):
    text = (
        "from helpers.core.records import Gate\n\ndef one(x):\n    return Gate(x.name, 1, 2, 3)\n"
    )
    with pytest.raises(ValueError, match=r"evaluation\.gates, line 4: 'x\.name'"):
        gate_names(source(tmp_path, gates=text))
