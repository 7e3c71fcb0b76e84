"""A gate: one check that must hold before a result counts, as plain data.

A failed gate does not stop a study; it makes what it guards invalid.
"""

from dataclasses import asdict, dataclass

WHOLE_VARIANT = "whole variant"  # a data set's name has no space


@dataclass(frozen=True)
class Gate:
    """One check: `measured` against `limit`, in words that can be read alone."""

    name: str
    passed: bool
    measured: str
    limit: str


def as_record(gates: list[tuple[str, Gate]]) -> dict:
    """The gates as plain data, with the one answer: do all hold.

    Args:
        gates: each with what it invalidates if it fails, a data set or `WHOLE_VARIANT`.
    """
    rows = [asdict(gate) | {"invalidates": what} for what, gate in gates]
    return {"passed": all(gate.passed for _, gate in gates), "gates": rows}
