"""A gate: one check that must hold before a result counts, as plain data.

A failed gate does not stop a study; it makes what it guards invalid.
"""

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass

WHOLE_VARIANT = "whole variant"  # a data set's name has no space


@dataclass(frozen=True)
class Gate:
    """One check: `measured` against `limit`, in words that can be read alone."""

    name: str
    passed: bool
    measured: str
    limit: str


def largest(values: Iterable[float]) -> float:
    """The largest of some numbers, 0 of none; NaN if one of them is, wherever it stands.

    Python's own `max` forgets a NaN that is not the first, and a gate on it would hold.
    """
    found = list(values)
    return math.nan if any(map(math.isnan, found)) else max(found, default=0.0)


def none_of(name: str, odd: list[str], n: int, said: str) -> Gate:
    """A gate that holds where nothing is odd; names how many of n are, and the first."""
    example = f" ({odd[0]})" if odd else ""
    return Gate(name, not odd, f"{len(odd)} of {n} {said}{example}", "none")


def failed_check(gates: list[dict], guarded: list[str]) -> str | None:
    """The first recorded gate that fails and guards one of these, in words; None if none does."""
    for gate in gates:
        if not gate["passed"] and gate.get("invalidates", WHOLE_VARIANT) in guarded:
            return f"{gate['name']} ({gate['measured']}; limit: {gate['limit']})"
    return None


def as_record(gates: list[tuple[str, Gate]]) -> dict:
    """The gates as plain data, with the one answer: do all hold.

    Args:
        gates: each with what it invalidates if it fails, a data set or `WHOLE_VARIANT`.
    """
    rows = [asdict(gate) | {"invalidates": what} for what, gate in gates]
    return {"passed": all(gate.passed for _, gate in gates), "gates": rows}
