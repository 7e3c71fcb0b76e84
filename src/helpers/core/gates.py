"""A gate: one check that must hold before a result counts, as plain data.

A failed gate does not stop a study; it makes what it guards invalid.
"""

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass

WHOLE_VARIANT = "whole variant"  # a data set's name has no space


@dataclass(frozen=True)
class Gate:
    """The result of one check: `measured` against `limit`, in words that can be read alone."""

    name: str
    passed: bool
    measured: str
    limit: str


def largest(values: Iterable[float]) -> float:
    """The largest number, 0 if there is none; NaN if any number is NaN.

    Python's `max` ignores a NaN that is not the first, and a gate on it would hold.
    """
    numbers = list(values)
    return math.nan if any(map(math.isnan, numbers)) else max(numbers, default=0.0)


def none_of(name: str, exceptions: list[str], n: int, description: str) -> Gate:
    """A gate that holds if there are no exceptions; else it counts them and names the first."""
    example = f" ({exceptions[0]})" if exceptions else ""
    return Gate(name, not exceptions, f"{len(exceptions)} of {n} {description}{example}", "none")


def failed_check(gates: list[dict], guarded: list[str]) -> str | None:
    """The first failed gate that guards one of these, in words; None if there is none."""
    for gate in gates:
        if not gate["passed"] and gate.get("invalidates", WHOLE_VARIANT) in guarded:
            return f"{gate['name']} ({gate['measured']}; limit: {gate['limit']})"
    return None


def as_record(gates: list[tuple[str, Gate]]) -> dict:
    """The gates as plain data, and whether all of them hold.

    Args:
        gates: each with the data set that it invalidates if it fails, or `WHOLE_VARIANT`.
    """
    rows = [asdict(gate) | {"invalidates": what} for what, gate in gates]
    return {"passed": all(gate.passed for _, gate in gates), "gates": rows}
