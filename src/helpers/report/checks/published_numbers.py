"""What a published table says: the tables of report.md, and the numbers in a cell.

Reads text and knows nothing of how the report writes it.
"""

import html
import math
import re
from dataclasses import dataclass

MISSING = "–"
_CODE = re.compile(r"<code>.*?</code>|`[^`]*`", re.DOTALL)
_NUMBER = re.compile(r"(?<![\w.])[+\-]?\d[\d,]*(?:\.\d+)?(?:e[+\-]?\d+)?")


@dataclass(frozen=True)
class Table:
    """One pipe table: the heading above it, its columns, its rows of cells."""

    heading: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def row(self, **cells: str) -> dict[str, str] | None:
        """The first row whose named columns hold these plain texts, by column; None if none."""
        for row in map(self.by_column, self.rows):
            if all(plain_text(row.get(name, "")) == text for name, text in cells.items()):
                return row
        return None

    def by_column(self, row: tuple[str, ...]) -> dict[str, str]:
        return dict(zip(self.columns, row, strict=False))


def read_tables(markdown: str) -> list[Table]:
    """Every pipe table of a Markdown text, in order."""
    parsed, heading, lines = [], "", []
    for line in [*markdown.splitlines(), ""]:
        if line.startswith("|"):
            lines.append(_split_cells(line))
            continue
        if len(lines) > 2:
            parsed.append(Table(heading, tuple(map(plain_text, lines[0])), tuple(lines[2:])))
        lines = []
        if line.startswith("#"):
            heading = plain_text(line.lstrip("# "))
        elif line.startswith("**"):
            heading = plain_text(line)
    return parsed


def _split_cells(line: str) -> tuple[str, ...]:
    return tuple(cell.strip() for cell in line.strip().strip("|").split("|"))


def plain_text(cell: str) -> str:
    """A cell's text: entities resolved, marks of code and emphasis removed."""
    text = html.unescape(re.sub(r"<[^>]*>", "", cell)).replace("\u00a0", " ")
    return text.replace("`", "").replace("**", "").strip()


def written_numbers(cell: str) -> list[str]:
    """The numbers written in a cell, without those in names and quotations."""
    text = html.unescape(_CODE.sub(" ", cell)).replace("−", "-").replace("\u00a0", " ")
    return [match.replace(",", "") for match in _NUMBER.findall(text)]


def rounds_to(written: str, value: float) -> bool:
    """Whether the value, rounded to the decimals of the written number, equals it."""
    mantissa, _, exponent = written.partition("e")
    decimals = len(mantissa.partition(".")[2])
    step = 10.0 ** (int(exponent or 0) - decimals)
    return abs(float(written) - value) <= 0.5 * step * (1 + 1e-6) + 1e-9 * abs(value)


def cell_differs(cell: str, values: list[float | None]) -> bool:
    """Whether the numbers of a cell differ from these, in their order; None counts as missing."""
    expected = [v for v in values if v is not None and not math.isnan(v)]
    written = written_numbers(cell)
    if len(written) != len(expected):
        return True
    return not all(rounds_to(w, v) for w, v in zip(written, expected, strict=True))
