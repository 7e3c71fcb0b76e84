"""What report.md says of time and cost held to itself.

No answer tells a speed. What the ratios, the amounts and the sentences say of one has to agree.
None of the code that writes the report is used.
"""

import re
from collections.abc import Iterator

from helpers.report.checks.published_numbers import Table, plain_text, read_tables, written_numbers

RATIO_COLUMNS = {
    "reading": "reading [tokens/s]",
    "writing": "writing [tokens/s]",
    "Linears in memory": "Linears in memory",
    "peak memory": "peak memory [MB]",
    "load time": "load time [s]",
}
SPEED = re.compile(r"(reads|writes) ([\d,]+) tokens per second, (.*?) float32\W* \(([\d.]+)×\)")


def wrong_costs(markdown: str) -> list[str]:
    """Every time, ratio and speed that contradicts another one, with its place."""
    report_tables = read_tables(markdown)
    lines = [
        *_wrong_jobs(report_tables),
        *_wrong_ratios(report_tables),
        *_wrong_cost_sentences(markdown, report_tables),
    ]
    return [f"report.md, {line}" for line in lines]


def _wrong_jobs(report_tables: list[Table]) -> Iterator[str]:
    """Stages whose total time contradicts the number and the longest of their jobs."""
    for table in report_tables:
        if not {"stage", "total time", "longest job"} <= set(table.columns):
            continue
        for row in map(table.by_column, table.rows):
            total, longest, jobs = (
                float(written_numbers(row[c])[0]) for c in ("total time", "longest job", "jobs")
            )
            alone = jobs > 1 and longest >= 10 and total <= longest  # no other took a second
            if alone or total < longest - 1 or total > jobs * longest + jobs:
                stage = plain_text(row["stage"])
                yield f"jobs, {stage}: {total:g} s in all, the longest {longest:g} s"


def _cost_tables(report_tables: list[Table]) -> Iterator[tuple[dict, dict]]:
    """(ratios, amounts) of one model, rows by name."""
    ratios = [t for t in report_tables if "against float32" in t.columns]
    amounts = [t for t in report_tables if RATIO_COLUMNS["reading"] in t.columns]
    for one, other in zip(ratios, amounts, strict=False):
        rows = [{plain_text(row[0]): t.by_column(row) for row in t.rows} for t in (one, other)]
        yield rows[0], rows[1]


def _wrong_ratios(report_tables: list[Table]) -> Iterator[str]:
    """Ratios outside the range given by the smallest and largest rounds of the amounts."""
    for ratios, amounts in _cost_tables(report_tables):
        reference = next(iter(amounts.values()))
        for name, row in list(ratios.items())[1:]:
            for column, amount in RATIO_COLUMNS.items():
                published = float(written_numbers(row[column])[0])
                variant_range, reference_range = (
                    _value_range(r[amount]) for r in (amounts[name], reference)
                )
                low, high = (
                    variant_range[0] / reference_range[1],
                    variant_range[1] / reference_range[0],
                )
                if not 0.98 * low - 0.01 <= published <= 1.02 * high + 0.01:
                    expected = f"{low:.2f} to {high:.2f}"
                    yield f"costs, {name}, {column}: {published:g}×, by the amounts {expected}"
            parts = [
                sum(float(written_numbers(v)[0]) for k, v in r.items() if k.endswith(", file"))
                for r in (amounts[name], reference)
            ]
            if abs(float(written_numbers(row["file"])[0]) - parts[0] / parts[1]) > 0.01:
                yield f"costs, {name}: file {row['file']}, by its parts {parts[0] / parts[1]:.3f}"


def _value_range(cell: str) -> tuple[float, float]:
    """The smallest and the largest value that round to the numbers of a cell."""
    halves = [(float(n), 0.5 * 10.0 ** -len(n.partition(".")[2])) for n in written_numbers(cell)]
    low, high = min(v - half for v, half in halves), max(v + half for v, half in halves)
    return max(low, 1e-9), high


def _wrong_cost_sentences(markdown: str, report_tables: list[Table]) -> Iterator[str]:
    """Sentences whose speeds and shares differ from those of the tables."""
    lines = re.findall(r"^- `(\S+)` \(.*\) takes ([\d.]+) % of (.*)$", markdown, re.M)
    for ratios, amounts in _cost_tables(report_tables):
        for variant, share, text in lines:
            if variant not in ratios:
                continue
            row, amount = ratios[variant], amounts[variant]
            if abs(float(share) / 100 - float(written_numbers(row["file"])[0])) > 0.006:
                in_table = plain_text(row["file"])
                yield f"costs, {variant}: {share} % of the bytes, in the table {in_table}"
            for verb, tokens, word, times in SPEED.findall(text):
                column = {"reads": "reading", "writes": "writing"}[verb]
                values = [float(n) for n in written_numbers(row[column])]
                faster = "faster" if values[1] > 1 else "slower" if values[2] < 1 else "within"
                same_numbers = (
                    times == f"{values[0]:.2f}"
                    and tokens.replace(",", "") == written_numbers(amount[RATIO_COLUMNS[column]])[0]
                )
                if not same_numbers or (faster not in word and 1 not in values):
                    yield f"costs, {variant}: {verb} {tokens} ({times}×), in the tables otherwise"
