"""Numbers as text, and any text as a cell of a Markdown table that also exports to HTML.

Fractions become percent here and nowhere else. What a model wrote, or a data set holds,
is shown as written: every character that Markdown, HTML or MathJax would act on becomes
an entity, and the text stands in `<code>`, which MathJax leaves alone. Addresses are no
links: what GitHub would make one of (`www.`, `://`, `a@b.c`) is broken by an empty tag.
"""

import math
import re

from helpers.core.errors import one_line
from helpers.statistics.intervals import Interval

MISSING = "–"
_ACTIVE = {c: f"&#{ord(c)};" for c in "&<>|`$\\*[]{}~#!^"}
_IN_CODE = _ACTIVE | {c: f"&#{ord(c)};" for c in "_\"'^:@"}
_AT_AN_EDGE = re.compile(r"(?<![^\W_])_|_(?![^\W_])|=(?==)")  # emphasis, a mark
_IN_ADDRESS = re.compile(r"(?i)(?<=www)(?=\.)|(?<=:)(?=//)|(?=@)|(?=&#64;)")
_PLAIN_NAME = re.compile(r"[\w./:=+,() -]+", re.ASCII)
DATASETS = {"arc": "ARC", "squad_v2": "SQuAD v2", "openmath": "OpenMath", "boolq": "BoolQ"}


Rows = list[dict[str, str]]


class Markup(str):
    """Text that is already Markdown and safe inside a table cell."""


def percent(fraction: float | None) -> str:
    """0.45 as `45.0 %`."""
    return MISSING if fraction is None else f"{100 * fraction:.1f} %"


def percent_plain(fraction: float) -> str:
    """A chosen level or power, without needless decimals: `80 %`."""
    return f"{100 * fraction:.10g} %"


def points(fraction: float | None) -> str:
    """A difference of two fractions in percentage points, with its sign: `−2.0`."""
    return MISSING if fraction is None else signed(100 * fraction, 1)


def signed(value: float, decimals: int) -> str:
    """With + or a true minus; without a sign if it rounds to zero."""
    if round(value, decimals) == 0:
        return f"{0:.{decimals}f}"
    return f"{'+' if value > 0 else '−'}{abs(value):.{decimals}f}"


def signed4(value: float | None) -> str:
    """A difference with its sign and four decimals."""
    return MISSING if value is None else signed(value, 4)


def two_decimals(value: float | None) -> str:
    """A perplexity."""
    return MISSING if value is None else f"{value:.2f}"


def number(value: float | None, digits: int = 3) -> str:
    """Three significant digits, thousands apart by commas, tiny values in powers of ten."""
    if value is None:
        return MISSING
    if value == 0:
        return "0"
    if abs(value) >= 10 ** (digits - 1):
        return f"{value:,.0f}" if abs(value) < 1e9 else f"{value:.2e}"
    rounded = float(f"{value:.{digits - 1}e}")
    if abs(rounded) < 1e-4:
        return f"{value:.1e}"  # of the value itself: rounding twice can be off by a digit
    decimals = digits - 1 - math.floor(math.log10(abs(rounded)))
    return f"{value:.{decimals}f}"


def span(interval: Interval, show) -> str:
    """`[low, high]`, each limit by `show`."""
    return f"[{show(interval.low)},\u00a0{show(interval.high)}]"  # not broken over lines


def with_span(value: float, interval: Interval | None, show) -> Markup:
    """A value and its interval, if it has one."""
    return Markup(show(value) if interval is None else f"{show(value)} {span(interval, show)}")


def percent_span(value: float, interval: Interval | None) -> Markup:
    """`45.0 % [35.6, 54.8]`, the limits in percent too."""
    if interval is None:
        return Markup(percent(value))
    return Markup(f"{percent(value)} {span(interval, lambda x: f'{100 * x:.1f}')}")


def p_value(p: float | None) -> str:
    """Three decimals, or `< 0.001`."""
    if p is None:
        return MISSING
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def megabytes(size_bytes: float) -> str:
    return f"{number(size_bytes / 1e6)} MB"


def count(n: int, noun: str) -> str:
    """`1 item`, `20 items`."""
    return f"{n:,} {noun}" if n == 1 else f"{n:,} {noun}s"


def listed(parts: list[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    return " and ".join(filter(None, (", ".join(parts[:-1]), parts[-1]))) if parts else ""


def capitalized(text: str) -> str:
    return text[:1].upper() + text[1:]


def dataset_name(name: str) -> str:
    """The data set's name as its authors write it; other names are unchanged."""
    return DATASETS.get(name, name)


def code(name: str) -> Markup:
    """A name as code; text with other characters is quoted."""
    return Markup(f"`{name}`") if _PLAIN_NAME.fullmatch(name) else quoted(name, limit=200)


def escape(text: str) -> str:
    """Any text, escaped so that Markdown and HTML show it literally."""
    active = "".join(_ACTIVE.get(c, c) for c in one_line(text))
    return _without_links(_AT_AN_EDGE.sub(lambda c: f"&#{ord(c[0])};", active))


def quoted(text: str, *, limit: int) -> Markup:
    """A model's text, cut at `limit` characters, as inert code."""
    plain = one_line(text)
    cut = plain if len(plain) <= limit else plain[: limit - 1].rstrip() + "…"
    inert = _without_links("".join(_IN_CODE.get(c, c) for c in cut))
    return Markup(f"<code>{inert}</code>" if cut else "(empty)")


def _without_links(text: str) -> str:
    """The text with an empty tag inside every address, so that none becomes a link."""
    return _IN_ADDRESS.sub("<wbr/>", text)


def folded(title: str, *parts: str) -> str:
    """Paragraphs and tables behind a title, in Markdown and in HTML alike; empty without any.

    Args:
        title: text with names between backticks, which a title's HTML does not render.
    """
    inside = "\n\n".join(filter(None, parts))
    if not inside:
        return ""
    marked = re.sub(r"`([^`]*)`", r"<code>\1</code>", title)
    return f"<details><summary>{marked}</summary>\n\n{inside}\n\n</details>"


def markdown_table(rows: Rows) -> str:
    """A GitHub pipe table, its columns in the order they first occur.

    Text columns are left-aligned, columns of numbers right-aligned. A missing cell is marked.
    Column names are already Markdown.

    Raises:
        ValueError: there are no rows, or a cell is empty or not text: format it first.
    """
    columns = list(dict.fromkeys(name for row in rows for name in row))
    if not columns:
        raise ValueError("a table has no rows: say so in a sentence instead")
    cells = [[_cell(row.get(name, MISSING)) for name in columns] for row in rows]
    marks = [
        "---:" if all(map(_numeric, column)) else ":---" for column in zip(*cells, strict=True)
    ]
    lines = [[_cell(name) for name in columns], marks, *cells]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def _cell(value) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError(f"a table cell is {value!r}: format it, or give {MISSING!r}")
    return str(value) if isinstance(value, Markup) else escape(value)


def _numeric(cell: str) -> bool:
    return cell[:1] in "+−–0123456789&" and not cell[1:4].isalpha()
