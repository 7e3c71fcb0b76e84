"""What a Linear computed from a tensor, kept on the tensor for the next Linear that reads it."""

from dataclasses import dataclass

from torch import Tensor

# Names of the tensor attributes that hold the cached results.
QUANTIZED, MULTIPLIED = "_int8_quantized", "_int8_multiplied"


@dataclass(frozen=True)
class CachedResult:
    """A result computed from a tensor, cached for the next Linear that reads the same tensor.

    Attributes:
        value: the result.
        conditions: the other inputs of the computation; equal conditions give an equal result.
    """

    value: object
    conditions: tuple

    @classmethod
    def get_or_compute(cls, x: Tensor, name: str, conditions: tuple, compute):
        """The result cached on x under a name; computed and cached if there is none."""
        version = None if x.is_inference() else x._version  # torch counts changes in place
        conditions = (*conditions, version)
        cached = getattr(x, name, None)
        if cached is None or not all(map(_equal, cached.conditions, conditions)):
            cached = cls(compute(), conditions)
            setattr(x, name, cached)
        return cached.value


def _equal(first, second) -> bool:
    return first is second or (not isinstance(first, Tensor) and first == second)
