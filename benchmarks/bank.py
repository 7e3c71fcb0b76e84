"""The bank of silent failures as a whole: each is put in, and what catches it is on record.

    python -m benchmarks.bank

runs every test that is marked as a member (see `bank_recorder`) and writes outputs/bank/bank.md
and bank.json: failure, place, what caught it, test. It fails if a member is not caught, if an
example has no member, or if a gate has none that makes it fail. With arguments, which go to
pytest, nothing is written.
"""

import subprocess
import sys
import time
from collections.abc import Iterable

import pytest

from benchmarks.gate_names import CHECKS, gate_names
from helpers.core.files import PROJECT, write_atomically
from helpers.core.records import write_json
from helpers.runtime.devices import processor_class as processor_kind
from helpers.runtime.devices import processor_name

FOLDER = PROJECT / "outputs" / "bank"
RUN = ("-m", "bank", "-q", "-n", "2", "--dist", "loadfile", "-p", "benchmarks.bank_recorder")
KINDS = {
    "int8": "INT8 on the path that the evaluation takes",
    "float": "Float parts while they run",
    "limits": "Limits measured against the thing under test",
    "reading": "Packing and decoding",
    "text": "KL, perplexity and the shared text",
    "statistics": "Statistics",
    "items": "Golds, near-duplicates and leaks",
    "tokens": "Tokens, tokenizers and prompts",
    "tied": "Tied weights",
    "rope": "Positions that depend on a text's length",
    "beginnings": "Beginnings of plain text",
    "checkpoint": "Checkpoints: smoothing, weights, scales, metadata",
    "ruler": "Rulers: other recipes, simulated",
    "calibration": "Calibration and the source model",
    "rotation": "Rotations: both sides, norms, head",
    "training": "Fine-tuning: its items, loss and steps",
    "model": "The model that is asked",
    "answers": "Answers: given, filed, scored",
    "report": "Files, and numbers of the report",
    "brought": "Models and data that people bring",
}
EXAMPLES = (
    "packed rows run every Linear in float",
    "one scale a text instead of a token in packed rows",
    "weight scales doubled at load in the evaluation alone",
    "activations truncated in the evaluation alone",
    "head in bfloat16 for quantized variants alone",
    "attention in bfloat16 for quantized variants alone",
    "the baseline's products in bfloat16",
    "a wrong baseline raises its own limit",
    "every answer of every variant capped",
    "positions off by one after a shared beginning",
    "options that see the next token",
    "a key too many in a slot",
    "KL the wrong way round",
    "loss on the wrong token",
    "reference shifted by one for quantized variants",
    "bootstrap of four times the items",
    "sorted rows paired",
    "Holm over the valid comparisons only",
    "golds shifted by a row in the adapter",
    "25 items in four wordings counted as 100",
    "training on reworded evaluation items",
    "two token ids swapped for one variant",
    "a wrong tokenizer saved with the checkpoint",
    "other tokens under the same words of a prompt",
    "a checkpoint with a head of its own read as tied",
    "positions that depend on the longest text beside",
    "plain text without the first token that the tokenizer puts there",
)
"""Failures that once passed every check; each has to be a member, in these words."""


class Collected:
    """Collects the reports of the bank's tests."""

    def __init__(self):
        self.rows: list[dict] = []
        self.wrong: list[str] = []

    def pytest_runtest_logreport(self, report) -> None:
        if report.failed:
            self.wrong.append(f"{report.nodeid} failed at {report.when}")
        if report.when != "call":
            return
        for row in (value for key, value in report.user_properties if key == "bank"):
            self.rows.append(row)
            if report.passed and (row["missed"] or not row["gates"]):
                self.wrong.append(f"{report.nodeid}: not caught by {row['missed'] or 'anything'}")


def members(rows: Iterable[dict]) -> list[dict]:
    """One member per failure with all its cases, in the order of kinds."""
    by_failure: dict[tuple, dict] = {}
    for row in rows:
        key = row["kind"], row["failure"]
        member = by_failure.setdefault(key, {"kind": key[0], "failure": key[1], "cases": 0} | {
            name: [] for name in ("at", "gates", "tests")})  # fmt: skip
        member["cases"] += 1
        values = {"at": row["at"], "gates": row["gates"], "tests": [row["test"]]}
        for name, new in values.items():
            member[name] += [v for v in new if v and v not in member[name]]
    order = {name: place for place, name in enumerate(KINDS)}
    return sorted(by_failure.values(), key=lambda m: (order[m["kind"]], m["failure"].lower()))


def all_gates() -> dict[str, str]:
    """Module by name, of every gate and every other check."""
    return gate_names() | CHECKS


def table(rows: list[dict], *, date: str, seconds: float) -> dict:
    """The whole bank as data."""
    bank = members(rows)
    return {
        "processor": f"{processor_name()} ({processor_kind()})",
        "commit_date": date,
        "minutes": round(seconds / 60, 1),
        "members": bank,
        "examples": {name: _tests_of(name, bank) for name in EXAMPLES},
        "checks": [
            {"name": name, "module": module, "failures": _failures_of(name, bank)}
            for name, module in sorted(all_gates().items())
        ],
    }


def _tests_of(failure: str, bank: list[dict]) -> list[str]:
    return [test for member in bank if member["failure"] == failure for test in member["tests"]]


def _failures_of(check: str, bank: list[dict]) -> list[str]:
    return [member["failure"] for member in bank if check in member["gates"]]


def lacking(bank: dict) -> list[str]:
    """Problems: examples and gates without a member, and names that are not gates."""
    problems = [
        f"no member is the example {e!r}" for e, tests in bank["examples"].items() if not tests
    ]
    problems += [f"no member makes {c['name']!r} fail" for c in bank["checks"] if not c["failures"]]
    catching = {gate for member in bank["members"] for gate in member["gates"]}
    return problems + [
        f"{g!r} catches one and is no gate" for g in sorted(catching - set(all_gates()))
    ]


def markdown(bank: dict) -> str:
    """The bank as tables: failures by kind, then examples, then gates."""
    count = sum(member["cases"] for member in bank["members"])
    lines = [
        "# Silent failures, and what catches them",
        "",
        f"{len(bank['members'])} failures, put into the running code or into files one at a time "
        f"({count} cases, {bank['minutes']:g} minutes, {bank['processor']}, code of "
        f"{bank['commit_date']}). Without its check, each ends as a number in a report. "
        "`make bank` makes this table from what happened.",
    ]
    for kind, heading in KINDS.items():
        chosen = [member for member in bank["members"] if member["kind"] == kind]
        cells = [[m["failure"], _code(m["at"]), ", ".join(m["gates"]), _code(m["tests"])]
                 for m in chosen]  # fmt: skip
        if cells:
            lines += ["", f"## {heading}", ""]
            lines += _table(["failure", "put in at", "caught by", "shown by"], cells)
    lines += ["", "## Failures that once passed every check", ""]
    lines += _table(["failure", "shown by"], [[e, _code(t)] for e, t in bank["examples"].items()])
    lines += ["", "## Every check, and failures that it catches", ""]
    cells = [[c["name"], _code([c["module"]]), "; ".join(c["failures"])] for c in bank["checks"]]
    return "\n".join([*lines, *_table(["check", "module", "failures"], cells), ""])


def _code(names: list[str]) -> str:
    return ", ".join(f"`{name}`" if " " not in name else name for name in names)


def _table(heads: list[str], rows: list[list[str]]) -> list[str]:
    lines = [heads, ["---"] * len(heads), *rows]
    return [f"| {' | '.join(cell.replace('|', '&#124;') for cell in line)} |" for line in lines]


def main(argv: list[str]) -> int:
    """Run the bank; return 1 if a failure is not caught or a check catches none."""
    collected, start = Collected(), time.monotonic()
    pytest.main([*RUN, *argv], plugins=[collected])
    command = ["git", "log", "-1", "--format=%cs"]
    date = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True).stdout.strip()
    unknown = {row["kind"] for row in collected.rows} - set(KINDS)
    problems = [*collected.wrong, *(f"no kind is called {kind!r}" for kind in sorted(unknown))]
    rows = [row for row in collected.rows if row["kind"] in KINDS]
    bank = table(rows, date=date, seconds=time.monotonic() - start)
    if argv:
        print(markdown(bank))
    else:
        problems += lacking(bank)
        write_json(FOLDER / "bank.json", bank)
        write_atomically(FOLDER / "bank.md", lambda p: p.write_text(markdown(bank), "utf-8"))
    print("\n".join(problems) or f"{len(bank['members'])} failures, each caught", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
