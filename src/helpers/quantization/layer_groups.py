"""Which Linears a variant quantizes, and where a model's smoothing scales can be folded.

What a family looks like is in `helpers.core.architectures`; here it becomes the groups
of one model and the Linears of one variant.
"""

from dataclasses import dataclass

from torch import nn

from helpers.core.architectures import architecture, places
from helpers.core.errors import StudyError


@dataclass(frozen=True)
class SmoothingGroup:
    """Modules into which one vector of smoothing scales s is folded, by name.

    Attributes:
        target: the study file's word for this kind of group.
        producer: the norm or Linear whose (last) output channels are divided by s.
        consumers: the Linears that read it; their input channels are multiplied by s.
        readers: float matrices that read it too (a router), multiplied by s as well.
        norm_offset: the constant that a norm adds to its weight before it multiplies.
    """

    target: str
    producer: str
    consumers: tuple[str, ...]
    readers: tuple[str, ...]
    norm_offset: float


def smoothing_groups(config, targets: tuple[str, ...]) -> list[SmoothingGroup]:
    """The groups of the named targets in a model of this configuration, in layer order.

    Raises:
        StudyError: the architecture is unknown, or smoothing a target would change its function.
    """
    family = architecture(config)
    for place in family.places:
        if place.target in targets and place.need and not place.need.holds(config):
            condition = place.need.words.format(config=config)
            raise StudyError(f"smooth.targets: {place.target!r} needs {condition}; leave it out")
    return [
        SmoothingGroup(p.target, p.producer, p.consumers, p.readers, family.norm_offset)
        for p in places(config)
        if p.target in targets
    ]


def linear_layers(model) -> dict[str, nn.Linear]:
    """Every Linear of the model by name, the head included."""
    return {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}


def quantized_linears(model, ignore: tuple[str, ...]) -> dict[str, nn.Linear]:
    """The Linears a variant quantizes: all but those it ignores.

    Args:
        ignore: module names, whole or their last part (`lm_head`, `down_proj`).

    Raises:
        StudyError: an ignored name matches nothing.
    """
    linears = linear_layers(model)
    ignored = {name for name in linears for i in ignore if name == i or name.endswith("." + i)}
    for i in ignore:
        if not any(name == i or name.endswith("." + i) for name in linears):
            raise StudyError(f"ignore: {i!r} matches no Linear of this model; correct the name")
    return {name: m for name, m in linears.items() if name not in ignored}
