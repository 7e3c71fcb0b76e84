"""What each way of running a model costs, as tables: ratios, amounts, and how near the limit."""

from collections.abc import Callable

from helpers.cost.results import ConfigurationResult, Cost, Spread
from helpers.report.markdown import MISSING, Markup, Rows, code, megabytes, number, percent


def way_name(cost: Cost, way: ConfigurationResult) -> Markup:
    """The variant's name; for the baseline, which runs in two dtypes, also the dtype."""
    dtype = f" {way.entry['dtype']}" if way.variant == cost.measurements["baseline"] else ""
    return Markup(f"{code(way.variant)}{dtype}")


def ratio_text(value: float) -> str:
    return f"{value:.2f}×"


def median_with_rounds(spread: Spread, show: Callable[[float], str]) -> Markup:
    """The median with the smallest and the largest round."""
    low, high = show(spread.low).removesuffix("×"), show(spread.high).removesuffix("×")
    return Markup(f"{show(spread.value)} ({low}–{high})")


def ratio_table(cost: Cost) -> Rows:
    """Every configuration relative to the baseline in float32: bytes, load time, memory, speed."""
    reference = cost.reference

    def ratio(way: ConfigurationResult, quantity: str) -> Markup:
        if way.name == reference.name:
            return Markup(ratio_text(1))
        return median_with_rounds(cost.ratio(way, quantity, reference), ratio_text)

    return [
        {
            "against float32": way_name(cost, way),
            "Linears multiply in": way.multiplies_in,
            "reading": ratio(way, "prefill"),
            "writing": ratio(way, "decode"),
            "file": ratio_text(way.file_bytes / reference.file_bytes),
            "Linears in memory": ratio_text(way.linear_bytes / reference.linear_bytes),
            "peak memory": ratio(way, "memory"),
            "load time": ratio(way, "load"),
        }
        for way in cost.configurations
    ]


def amount_table(cost: Cost) -> Rows:
    """The same in tokens per second, megabytes and seconds; the file part by part."""
    rows = []
    for way in cost.configurations:
        row = {"variant": way_name(cost, way)}
        row["reading [tokens/s]"] = median_with_rounds(cost.measured(way, "prefill"), whole_number)
        row["writing [tokens/s]"] = median_with_rounds(cost.measured(way, "decode"), whole_number)
        parts = way.entry["file_bytes"].items()
        row |= {f"{part}, file": megabytes(size) for part, size in parts}
        row["Linears in memory"] = megabytes(way.linear_bytes)
        row["peak memory [MB]"] = median_with_rounds(cost.measured(way, "memory"), millions)
        row["load time [s]"] = median_with_rounds(cost.measured(way, "load"), lambda s: f"{s:.2f}")
        rows.append(row)
    return rows


def whole_number(value: float) -> str:
    return f"{value:,.0f}"


def millions(size_bytes: float) -> str:
    return f"{size_bytes / 1e6:,.0f}"


def billions(operations: float) -> str:
    return number(operations / 1e9)


def limit_table(cost: Cost) -> Rows:
    """The Linears' speed while reading, as a share of the machine's matrix product."""
    rows = []
    for way in cost.configurations:
        peak, achieved = cost.peak(way), cost.achieved(way)
        fastest = cost.prefill_limit(way)
        row = {"variant": way_name(cost, way), "Linears multiply in": way.multiplies_in}
        row["bare product [GOP/s]"] = median_with_rounds(peak, billions) if peak else MISSING
        row["Linears [GOP/s]"] = median_with_rounds(achieved, billions) if achieved else MISSING
        row["Linears / bare product"] = percent(cost.peak_fraction(way))
        row["time in Linears"] = percent(cost.linear_time_fraction(way))
        row["reading at the limit [tokens/s]"] = MISSING if fastest is None else number(fastest)
        rows.append(row)
    return rows
