"""What a study may do to a model: smoothing, a granularity of int8, another float type."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Discriminator, Field, Tag, model_validator
from pydantic_core import PydanticCustomError

from helpers.study.schema_fields import Fraction, Strict

SmoothingTarget = Literal["attention_input", "mlp_input", "mlp_down", "attention_output"]
Weights = Literal["channel", "tensor"]
FloatType = Literal["float32", "bfloat16"]
Activations = Literal["token_dynamic", "tensor_dynamic", "tensor_static"]

# The paper's levels (arXiv:2211.10438, table 2) and the scheme the ecosystem ships.
PRESETS: dict[str, tuple[Weights, Activations]] = {
    "w8a8": ("channel", "token_dynamic"),
    "o1": ("tensor", "token_dynamic"),
    "o2": ("tensor", "tensor_dynamic"),
    "o3": ("tensor", "tensor_static"),
}


def _alpha_grid(values: tuple[float, ...]) -> tuple[float, ...]:
    if len(values) < 2 or len(set(values)) < len(values):
        raise PydanticCustomError(
            "grid", "is no choice; list two values or more, each once, or give one number"
        )
    return values


def _kind_of_alpha(value: Any) -> str:
    if isinstance(value, list | tuple):
        return "list"
    return "auto" if isinstance(value, str) else "number"


class Smooth(Strict):
    """SmoothQuant's migration strength and the places it is folded into.

    α is a number, a list from which the best is chosen, or `auto` for one α per group. The
    choice is made on held-out calibration items (helpers.quantization.alpha).
    """

    alpha: Annotated[
        Annotated[Fraction, Tag("number")]
        | Annotated[tuple[Fraction, ...], AfterValidator(_alpha_grid), Tag("list")]
        | Annotated[Literal["auto"], Tag("auto")],
        Discriminator(_kind_of_alpha),
    ]
    targets: Annotated[tuple[SmoothingTarget, ...], Field(min_length=1)]


class Variant(Strict):
    """How a model is quantized; without weights and activations it stays float.

    `recipe: seed` is the known broken recipe (helpers.quantization.seed_recipe), a control
    that must be flagged; it brings its own quantization scheme. `dtype` is a control too: the
    same weights, computed in another float type, differ by rounding alone and show the size
    of differences that mean nothing.
    """

    recipe: Literal["seed"] | None = None
    dtype: FloatType | None = None
    preset: Literal["w8a8", "o1", "o2", "o3"] | None = None
    weights: Weights | None = None
    activations: Activations | None = None
    smooth: Smooth | None = None
    ignore: tuple[str, ...] = ("lm_head",)

    @model_validator(mode="after")
    def _whole_scheme(self):
        if self.preset and (self.weights or self.activations):
            raise ValueError(
                f"preset = {self.preset!r} already names weights and activations; keep one of them"
            )
        if bool(self.weights) != bool(self.activations):
            raise ValueError("weights and activations go together; name both, or a preset")
        if self.recipe and (self.preset or self.weights or not self.smooth):
            raise ValueError(
                f"recipe = {self.recipe!r} takes smooth, and neither preset nor weights; it has "
                "its own"
            )
        searches_alpha = self.smooth and not isinstance(self.smooth.alpha, float)
        if searches_alpha and (self.recipe or not (self.preset or self.weights)):
            raise ValueError(
                "smooth.alpha is chosen by the error of quantization, and this variant has none "
                "of its own; give a number"
            )
        if self.dtype and (self.preset or self.weights or self.recipe or self.smooth):
            raise ValueError(
                f"dtype = {self.dtype!r} belongs to a variant that changes no weights; give it "
                "alone, or leave it out"
            )
        return self

    @property
    def scheme(self) -> tuple[Weights, Activations] | None:
        """(weights, activations) granularity, or None for a float variant."""
        if self.preset:
            return PRESETS[self.preset]
        if self.weights is None or self.activations is None:
            return None
        return self.weights, self.activations

    @property
    def quantized(self) -> bool:
        """Whether weights and activations become int8."""
        return self.scheme is not None

    @property
    def needs_checkpoint(self) -> bool:
        """Whether the variant has a checkpoint: it is quantized or smoothed."""
        return self.quantized or self.smooth is not None

    @property
    def is_unmodified(self) -> bool:
        """Whether the variant is the source model in the study's float type."""
        return not self.needs_checkpoint and self.dtype is None

    @property
    def claim(self) -> "Variant":
        """The variant as its report declares it; the gates check this declaration.

        The seed recipe's report calls it SmoothQuant W8A8, weights per tensor, head kept.
        """
        if self.recipe != "seed":
            return self
        declared = {"weights": "tensor", "activations": "token_dynamic", "recipe": None}
        return self.model_copy(update=declared)


def speed_key(variant: Variant) -> tuple:
    """The settings that determine a quantized variant's speed and size."""
    return variant.scheme, variant.ignore, variant.dtype


def variant_per_scheme(variants: Mapping[str, Variant]) -> dict[tuple, str]:
    """The variant to measure for each `speed_key`: the last quantized variant that has it."""
    return {speed_key(recipe): name for name, recipe in variants.items() if recipe.quantized}
