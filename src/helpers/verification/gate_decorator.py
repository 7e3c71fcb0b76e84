"""A gate: one thing that must hold before a result about a variant counts.

A gate has a name, what was measured, the limit it was held to, and whether it held. A
failed gate does not stop a study; it makes the variant invalid. What cannot be checked
does not hold: an error inside a check is that gate's failure, with its reason.
"""

from collections.abc import Callable
from dataclasses import asdict
from functools import wraps

from helpers.core.gates import Gate


def gate(name: str) -> Callable:
    """Decorate a check, evidence → (passed, measured, limit), so that it returns its Gate."""

    def decorate(check: Callable) -> Callable:
        @wraps(check)
        def held(evidence) -> Gate:
            try:
                passed, measured, limit = check(evidence)
            except Exception as error:  # a broken checkpoint may raise any exception
                reason = " ".join(str(error).split())[:200]
                measured = f"could not be checked: {type(error).__name__}: {reason}"
                return Gate(name, False, measured, "can be checked")
            return Gate(name, bool(passed), measured, limit)

        held.gate_name = name
        return held

    return decorate


def examples(names: list[str]) -> str:
    """The first names in parentheses, for a gate's text: ` (a, b, …)`; empty without names."""
    if not names:
        return ""
    return f" ({', '.join(names[:2])}{', …' if len(names) > 2 else ''})"


def as_record(gates: list[Gate]) -> dict:
    """The gates as plain data, and whether all of them passed."""
    return {
        "passed": bool(gates) and all(g.passed for g in gates),
        "gates": [asdict(g) for g in gates],
    }
