"""What each way of running a model costs, as tables: ratios, amounts, and how near the limit."""

from collections.abc import Callable

from helpers.cost.results import ConfigurationResult, Cost, Spread
from helpers.report.markdown import MISSING, Markup, Rows, code, megabytes, number, percent


def way_name(cost: Cost, way: ConfigurationResult) -> Markup:
    """The variant; of the baseline, which runs in two, the dtype too."""
    dtype = f" {way.entry['dtype']}" if way.variant == cost.measurements["baseline"] else ""
    return Markup(f"{code(way.variant)}{dtype}")


def times(value: float) -> str:
    return f"{value:.2f}×"


def with_rounds(found: Spread, show: Callable[[float], str]) -> Markup:
    """The median, and the least and largest round."""
    low, high = show(found.low).removesuffix("×"), show(found.high).removesuffix("×")
    return Markup(f"{show(found.value)} ({low}–{high})")


def relative(cost: Cost) -> Rows:
    """Every way against the baseline in float32: bytes, load time, memory, speed."""
    reference = cost.reference

    def ratio(way: ConfigurationResult, quantity: str) -> Markup:
        if way.name == reference.name:
            return Markup(times(1))
        return with_rounds(cost.ratio(way, quantity, reference), times)

    return [
        {
            "against float32": way_name(cost, way),
            "Linears multiply in": way.multiplies_in,
            "reading": ratio(way, "prefill"),
            "writing": ratio(way, "decode"),
            "file": times(way.file_bytes / reference.file_bytes),
            "Linears in memory": times(way.linear_bytes / reference.linear_bytes),
            "peak memory": ratio(way, "memory"),
            "load time": ratio(way, "load"),
        }
        for way in cost.configurations
    ]


def absolute(cost: Cost) -> Rows:
    """The same in tokens a second, megabytes and seconds; the file part by part."""
    rows = []
    for way in cost.configurations:
        row = {"variant": way_name(cost, way)}
        row["reading [tokens/s]"] = with_rounds(cost.measured(way, "prefill"), whole)
        row["writing [tokens/s]"] = with_rounds(cost.measured(way, "decode"), whole)
        parts = way.entry["file_bytes"].items()
        row |= {f"{part}, file": megabytes(size) for part, size in parts}
        row["Linears in memory"] = megabytes(way.linear_bytes)
        row["peak memory [MB]"] = with_rounds(cost.measured(way, "memory"), millions)
        row["load time [s]"] = with_rounds(cost.measured(way, "load"), lambda s: f"{s:.2f}")
        rows.append(row)
    return rows


def whole(value: float) -> str:
    return f"{value:,.0f}"


def millions(size_bytes: float) -> str:
    return f"{size_bytes / 1e6:,.0f}"


def billions(operations: float) -> str:
    return number(operations / 1e9)


def near_the_limit(cost: Cost) -> Rows:
    """How much of the machine's matrix product the Linears use while reading."""
    rows = []
    for way in cost.configurations:
        peak, achieved = cost.peak(way), cost.achieved(way)
        fastest = cost.prefill_limit(way)
        row = {"variant": way_name(cost, way), "Linears multiply in": way.multiplies_in}
        row["bare product [GOP/s]"] = with_rounds(peak, billions) if peak else MISSING
        row["Linears [GOP/s]"] = with_rounds(achieved, billions) if achieved else MISSING
        row["Linears, of the limit"] = percent(cost.peak_fraction(way))
        row["time in Linears"] = percent(cost.linear_time_fraction(way))
        row["reading at the limit [tokens/s]"] = MISSING if fastest is None else number(fastest)
        rows.append(row)
    return rows
