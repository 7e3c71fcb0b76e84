"""A table of test coverage by package of `src/helpers`, from the JSON report of coverage.py."""

import json
import sys
from collections import Counter
from pathlib import Path

COUNTS = ("num_statements", "covered_lines", "num_branches", "covered_branches")
HEADER = "| package | statements | covered | branches | covered |\n"
HEADER += "| :-- | --: | --: | --: | --: |\n"


def counts_by_package(report: dict) -> dict[str, Counter]:
    """Statements and branches by package, the sum last.

    Args:
        report: what `coverage json` writes.
    """
    packages: dict[str, Counter] = {}
    for file, measured in report["files"].items():
        package = Path(file).parent.as_posix().rpartition("src/")[2]
        counts = Counter({name: measured["summary"][name] for name in COUNTS})
        packages[package] = packages.get(package, Counter()) + counts
    table = dict(sorted(packages.items()))
    table["all"] = sum(packages.values(), Counter())
    return table


def markdown_table(packages: dict[str, Counter]) -> str:
    """The counts as a Markdown table with percentages."""
    rows = [
        f"| {package} | {c['num_statements']} | {_percent(c['covered_lines'], c['num_statements'])}"
        f" | {c['num_branches']} | {_percent(c['covered_branches'], c['num_branches'])} |\n"
        for package, c in packages.items()
    ]
    return HEADER + "".join(rows)


def _percent(part: int, whole: int) -> str:
    return f"{part / whole:.1%}" if whole else "–"


if __name__ == "__main__":
    source, target = map(Path, sys.argv[1:])
    text = markdown_table(counts_by_package(json.loads(source.read_text("utf-8"))))
    target.write_text(text, encoding="utf-8")
    print(text, end="")
