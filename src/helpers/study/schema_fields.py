"""The kinds of value a study file is made of: names, numbers, fractions, strict mappings.

What is refused here is refused in words that follow the value it is about.
"""

import difflib
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from helpers.study.schema_names import PATTERN, name_problem


def _in_unit_interval(value: float) -> float:
    if not 0.0 <= value <= 1.0:
        raise PydanticCustomError("range", "is outside [0, 1]; give a fraction in that range")
    return value


def _no_truth_value(value: Any) -> Any:
    if isinstance(value, bool):
        raise PydanticCustomError("number", "is not a number; give one")
    return value


def sole_key(value: Any) -> str | None:
    """The tag of a mapping such as `{hub: …, revision: …}`: its first key."""
    keys = value if isinstance(value, dict) else getattr(type(value), "model_fields", {})
    return next(iter(keys), None)


def _portable(name: str) -> str:
    if problem := name_problem(name):
        raise PydanticCustomError("name", "{trouble}", {"trouble": problem})
    return name


Name = Annotated[str, Field(pattern=PATTERN), AfterValidator(_portable)]
Number = Annotated[float, BeforeValidator(_no_truth_value)]
Whole = Annotated[int, Field(strict=True)]
Fraction = Annotated[Number, AfterValidator(_in_unit_interval)]
Count = Annotated[Whole, Field(ge=1)]


class Strict(BaseModel):
    """Unknown keys are errors; a validated study cannot be edited."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _known_keys(cls, data: Any) -> Any:
        for key in data if isinstance(data, dict) else ():
            if key not in cls.model_fields:
                matches = difflib.get_close_matches(str(key), cls.model_fields, n=1)
                hint = f"did you mean {matches[0]!r}?" if matches else "remove it"
                raise PydanticCustomError(
                    "unknown_key",
                    "is not a known key; {hint} (known here: {known})",
                    {"key": str(key), "hint": hint, "known": ", ".join(cls.model_fields)},
                )
        return data
