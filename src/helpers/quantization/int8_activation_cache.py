"""What a Linear computed from a tensor, kept on the tensor for the next Linear that reads it."""

from dataclasses import dataclass

from torch import Tensor

# Attributes of such a tensor.
QUANTIZED, MULTIPLIED = "_int8_quantized", "_int8_multiplied"


@dataclass(frozen=True)
class Kept:
    """What was computed from a tensor, for the next Linear that reads the same tensor.

    Attributes:
        what: the result.
        why: what it depends on beside the tensor; it holds for whoever has the same.
    """

    what: object
    why: tuple

    @classmethod
    def of(cls, x: Tensor, name: str, why: tuple, make):
        """The result kept on x under a name, or else made now and kept there."""
        why = (*why, None if x.is_inference() else x._version)  # torch counts changes in place
        kept = getattr(x, name, None)
        if kept is None or not all(map(_same, kept.why, why)):
            kept = cls(make(), why)
            setattr(x, name, kept)
        return kept.what


def _same(one, other) -> bool:
    return one is other or (not isinstance(one, Tensor) and one == other)
