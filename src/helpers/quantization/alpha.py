"""Which α: a number, the best of a grid, or one for each group of Linears.

All of them work from the one calibration pass. What is chosen is chosen by the last
tenth of the calibration items, with maxima over the others; evaluation items have no say.
A grid is judged by how far the quantized model's next-token distributions move, `auto` by
the squared error of each group's own outputs. The scales of the checkpoint then come
from the maxima over all items.
"""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from helpers.core.activity import Bar
from helpers.core.errors import StudyError
from helpers.quantization.fake_quant import Scales, look, simulated
from helpers.quantization.layer_groups import smoothing_groups
from helpers.quantization.sensitivity import Probe
from helpers.quantization.smoothing import everywhere, group_scales
from helpers.runtime.moe_experts import every_expert_reads
from helpers.study.schema_variants import Variant

AUTO = tuple(step / 10 for step in range(11))  # what `auto` tries for each group


@dataclass(frozen=True)
class Choice:
    """α of every group, by its first consumer, and what the choice was made from.

    Attributes:
        curve: for a grid, α with its KL and top-1 agreement on the judging items.
        errors: for `auto`, group and α with the squared error of the group's outputs.
    """

    alphas: dict[str, float]
    curve: list[dict]
    errors: list[dict] = field(default_factory=list)

    @property
    def record(self) -> dict:
        kept = {"alphas": self.alphas, "curve": self.curve}
        return kept | ({"errors": self.errors} if self.errors else {})


def choose(
    model, variant: Variant, fit_absmax: dict[str, Tensor], judges: list[list[int]]
) -> Choice:
    """The α of every group of a variant; none if it does not smooth.

    Args:
        model: the float model; it is not changed.
        variant: a number, a list or `auto` as its α.
        fit_absmax: Linear name to (in_features,) maxima over the items that do not judge.
        judges: token ids of the items that do.

    Raises:
        StudyError: no α of the grid gives a finite KL, or of `auto` a finite error.
    """
    smooth = variant.smooth
    if smooth is None:
        return Choice({}, [])
    if isinstance(smooth.alpha, float):
        return Choice(everywhere(model.config, smooth.targets, smooth.alpha), [])
    if smooth.alpha == "auto":
        return _each_group(model, variant, fit_absmax, judges)
    curve = _curve(model, variant, fit_absmax, Probe(model, judges, variant))
    best = _least({row["alpha"]: row["kl"] for row in curve}, of="the quantized model's KL")
    return Choice(everywhere(model.config, smooth.targets, best), curve)


def _least(losses: dict[float, float | None], *, of: str) -> float:
    """The α of the least finite loss."""
    finite = {a: loss for a, loss in losses.items() if loss is not None and math.isfinite(loss)}
    if not finite:
        raise StudyError(
            f"smooth.alpha: {of} is finite at no α of {', '.join(map(str, losses))}; "
            "use dtype float32 or mend the model"
        )
    return min(finite, key=finite.__getitem__)


def _curve(model, variant: Variant, absmax: dict[str, Tensor], probe: Probe) -> list[dict]:
    """KL and top-1 agreement of the quantized model at every α of the grid."""
    rows = []
    for alpha in Bar(variant.smooth.alpha, desc="choosing α", unit="value"):
        alphas = everywhere(model.config, variant.smooth.targets, alpha)
        with simulated(model, variant, absmax, alphas):
            rows.append({"alpha": alpha, **probe.divergence(model)})
    return rows


@torch.inference_mode()
def _each_group(
    model, variant: Variant, absmax: dict[str, Tensor], judges: list[list[int]]
) -> Choice:
    """For every group the α at which its own int8 outputs are nearest to the float ones."""
    groups = {g.consumers[0]: g for g in smoothing_groups(model.config, variant.smooth.targets)}
    errors: dict[str, dict[float, float]] = {name: dict.fromkeys(AUTO, 0.0) for name in groups}

    def hook(name: str):
        def observe(_module, args: tuple) -> None:
            for alpha in AUTO:
                scales = group_scales(model, groups[name], absmax, alpha=alpha).float()
                for consumer in groups[name].consumers:
                    linear, limit = model.get_submodule(consumer), absmax[consumer]
                    looked = look(linear, args[0], limit, Scales(inputs=scales))
                    error = looked.exact() - looked.rounded(variant)
                    errors[name][alpha] += error.square().sum().item()

        return observe

    handles = [model.get_submodule(n).register_forward_pre_hook(hook(n)) for n in groups]
    try:
        with every_expert_reads(model):
            for tokens in Bar(judges, desc="choosing α", unit="item"):
                ids = torch.tensor([tokens], device=model.device)
                model.base_model(input_ids=ids, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    chosen = {
        name: _least(found, of=f"the quantization error of {name}")
        for name, found in errors.items()
    }
    rows = [
        {"group": name, "alpha": alpha, "error": error if math.isfinite(error) else None}
        for name, found in errors.items()
        for alpha, error in found.items()
    ]
    return Choice(chosen, [], rows)
