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
from helpers.quantization.fake_quant import LinearScales, apply_smoothing, simulated_quantization
from helpers.quantization.layer_groups import smoothing_groups
from helpers.quantization.sensitivity import DivergenceProbe
from helpers.quantization.smoothing import group_scales, same_alpha
from helpers.runtime.moe_experts import every_expert_reads
from helpers.study.schema_variants import Variant

AUTO_ALPHAS = tuple(step / 10 for step in range(11))  # candidates of `auto` for each group


@dataclass(frozen=True)
class AlphaChoice:
    """α of every group, by its first consumer, and the measurements behind the choice.

    Attributes:
        curve: for a grid, each α with its KL and top-1 agreement on the judging items.
        errors: for `auto`, each group and α with the squared error of the group's outputs.
    """

    alphas: dict[str, float]
    curve: list[dict]
    errors: list[dict] = field(default_factory=list)

    @property
    def record(self) -> dict:
        choice = {"alphas": self.alphas, "curve": self.curve}
        return choice | ({"errors": self.errors} if self.errors else {})


def choose_alphas(
    model, variant: Variant, fit_absmax: dict[str, Tensor], judges: list[list[int]]
) -> AlphaChoice:
    """The α of every group of a variant; empty if it does not smooth.

    Args:
        model: the float model; it is not changed.
        variant: its α is a number, a list or `auto`.
        fit_absmax: Linear name to (in_features,) maxima over the items that do not judge.
        judges: token ids of the judging items.

    Raises:
        StudyError: no α gives a finite KL (grid) or a finite error (`auto`).
    """
    smooth = variant.smooth
    if smooth is None:
        return AlphaChoice({}, [])
    if isinstance(smooth.alpha, float):
        return AlphaChoice(same_alpha(model.config, smooth.targets, smooth.alpha), [])
    if smooth.alpha == "auto":
        return _choose_per_group(model, variant, fit_absmax, judges)
    curve = _grid_curve(model, variant, fit_absmax, DivergenceProbe(model, judges, variant))
    best = _alpha_of_least_loss(
        {row["alpha"]: row["kl"] for row in curve}, of="the quantized model's KL"
    )
    return AlphaChoice(same_alpha(model.config, smooth.targets, best), curve)


def _alpha_of_least_loss(losses: dict[float, float | None], *, of: str) -> float:
    """The α with the least finite loss."""
    finite = {a: loss for a, loss in losses.items() if loss is not None and math.isfinite(loss)}
    if not finite:
        raise StudyError(
            f"smooth.alpha: {of} is finite at no α of {', '.join(map(str, losses))}; "
            "use dtype float32 or mend the model"
        )
    return min(finite, key=finite.__getitem__)


def _grid_curve(
    model, variant: Variant, absmax: dict[str, Tensor], probe: DivergenceProbe
) -> list[dict]:
    """KL and top-1 agreement of the quantized model at every α of the grid."""
    rows = []
    for alpha in Bar(variant.smooth.alpha, desc="choosing α", unit="value"):
        alphas = same_alpha(model.config, variant.smooth.targets, alpha)
        with simulated_quantization(model, variant, absmax, alphas):
            rows.append({"alpha": alpha, **probe.divergence(model)})
    return rows


@torch.inference_mode()
def _choose_per_group(
    model, variant: Variant, absmax: dict[str, Tensor], judges: list[list[int]]
) -> AlphaChoice:
    """For every group the α with the least squared error of its own int8 outputs."""
    groups = {g.consumers[0]: g for g in smoothing_groups(model.config, variant.smooth.targets)}
    errors: dict[str, dict[float, float]] = {
        name: dict.fromkeys(AUTO_ALPHAS, 0.0) for name in groups
    }

    def hook(name: str):
        def observe(_module, args: tuple) -> None:
            for alpha in AUTO_ALPHAS:
                scales = group_scales(model, groups[name], absmax, alpha=alpha).float()
                for consumer in groups[name].consumers:
                    linear, limit = model.get_submodule(consumer), absmax[consumer]
                    smoothed = apply_smoothing(linear, args[0], limit, LinearScales(inputs=scales))
                    error = smoothed.exact() - smoothed.rounded(variant)
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
        name: _alpha_of_least_loss(curve_of_group, of=f"the quantization error of {name}")
        for name, curve_of_group in errors.items()
    }
    record_rows = [
        {"group": name, "alpha": alpha, "error": error if math.isfinite(error) else None}
        for name, curve_of_group in errors.items()
        for alpha, error in curve_of_group.items()
    ]
    return AlphaChoice(chosen, [], record_rows)
