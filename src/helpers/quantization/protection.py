"""Which Linears a variant with `protect` leaves float, chosen by what each loses.

Of all sets of Linears that fit the bytes, the one with the largest sum of KLs is left float, each
KL measured on the judging items of the calibration with that Linear alone in int8. Other
calibration items tell whether the choice beats as many random sets of these bytes as it takes for
that to be no chance.
"""

import math
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from torch import Tensor

from helpers.core.errors import StudyError
from helpers.core.processes import Bar
from helpers.quantization.calibration import first_judging_item, quantized_linears
from helpers.quantization.simulation import JUDGES, DivergenceProbe, simulated_linears
from helpers.quantization.smoothing import linear_scales
from helpers.runtime.discovery import architecture
from helpers.study.schema import Variant

OTHERS = 6  # calibration items, none of which judges, on which a choice is compared
RANDOM_SETS = 19  # 1 / (19 + 1) = 0.05: a lead over all of them is one chance in twenty


@dataclass(frozen=True)
class Protection:
    """A variant with the Linears that `protect` chose among its `ignore`, and why these."""

    recipe: Variant
    record: dict = field(default_factory=dict)

    @property
    def sentence(self) -> str:
        """What was chosen and what it is worth; empty if nothing was."""
        if not self.record:
            return ""
        sets = [_or_infinite(row["kl"]) for row in self.record["random"]]
        kl, kl_chosen = (_or_infinite(self.record[key]) for key in ("kl", "kl_chosen"))
        rank, of = self.record["rank"], len(sets) + 1
        return (
            f"{len(self.record['chosen'])} of {len(self.record['linears'])} Linears stay float for "
            f"{100 * self.record['chosen_bytes'] / self.record['bytes']:.2f} % of the bytes; on "
            f"{len(self.record['other_items'])} other calibration items the KL is {kl:.4g} nats a "
            f"token with all in int8, {kl_chosen:.4g} with these float, {min(sets):.4g} to "
            f"{max(sets):.4g} with {of - 1} random choices of as many bytes: rank {rank} of {of}, "
            f"p = {rank / of:.2g}"
        )


def choose_protected(
    model,
    variant: Variant,
    act_absmax: dict[str, Tensor],
    alphas: dict[str, float],
    texts: list[list[int]],
    *,
    seed: int,
) -> Protection:
    """The Linears that a variant leaves float for its share of the bytes.

    Args:
        model: the float model, not smoothed; it is not changed.
        act_absmax, alphas: as in `simulated_quantization`.
        texts: token ids of all calibration items; the judging items choose.
        seed: of the random sets.

    Raises:
        StudyError: no Linear fits the bytes or every one does, or a KL is not finite.
    """
    if variant.protect is None:
        return Protection(variant)
    first = first_judging_item(len(texts))
    judging, others = list(range(len(texts)))[first:][:JUDGES], list(range(first))[:OTHERS]
    simulated = _Protecting(model, variant, act_absmax, alphas)
    gains = simulated.sensitivities([texts[i] for i in judging])
    allowed = int(variant.protect.bytes * simulated.bytes)
    chosen = best_set(gains, simulated.costs, allowed)
    if len(chosen) in (0, len(gains)):
        raise StudyError(
            f"protect.bytes = {variant.protect.bytes:g} leaves {len(chosen)} of {len(gains)} "
            f"Linears float, {min(simulated.costs.values()) / simulated.bytes:.2g} of the bytes or "
            f"more each; give {'less' if chosen else 'more'}"
        )
    generator = random.Random(seed)
    sets = [random_set(simulated.costs, allowed, generator) for _ in range(RANDOM_SETS)]
    probe = DivergenceProbe(model, [texts[i] for i in others], variant)
    kl, kl_chosen = simulated.kl(probe, []), simulated.kl(probe, chosen)
    kls = [simulated.kl(probe, names) for names in Bar(sets, desc="random choices", unit="set")]
    record = {
        "share": variant.protect.bytes,
        "bytes": simulated.bytes,
        "allowed_bytes": allowed,
        "chosen_bytes": sum(simulated.costs[name] for name in chosen),
        "chosen": chosen,
        "linears": {n: {"bytes": simulated.costs[n], "kl": gains[n]} for n in gains},
        "judging_items": judging,
        "other_items": others,
        "kl": kl,
        "kl_chosen": kl_chosen,
        "random": [{"chosen": names, "kl": x} for names, x in zip(sets, kls, strict=True)],
        "rank": 1 + sum(_or_infinite(x) <= _or_infinite(kl_chosen) for x in kls),
    }
    return Protection(variant.leaving_float(chosen), record)


def _or_infinite(kl: float | None) -> float:
    return math.inf if kl is None else kl


class _Protecting:
    """The simulated variant of a float model, with any of its Linears left float."""

    def __init__(self, model, variant: Variant, act_absmax: dict[str, Tensor], alphas: dict):
        self.model, self.variant, self.absmax = model, variant, act_absmax
        self.linears = quantized_linears(model, variant.ignore)
        self.scales = linear_scales(model, variant, act_absmax, alphas)
        weights = {name: linear.weight for name, linear in self.linears.items()}
        self.costs = {
            n: bytes_saved(w.shape, w.element_size(), variant) for n, w in weights.items()
        }
        self.bytes = sum(p.numel() * p.element_size() for p in model.parameters())

    def sensitivities(self, texts: list[list[int]]) -> dict[str, float]:
        """KL in nats a token by Linear, if it alone is in int8.

        Raises:
            StudyError: a KL is not finite.
        """
        probe = DivergenceProbe(self.model, texts, self.variant)
        probe.keep_states(self.model)
        inside, measured = f"{architecture(self.model.config).blocks}.", {}
        for name, linear in Bar(self.linears.items(), desc="each Linear alone", unit="Linear"):
            block = name.removeprefix(inside).partition(".")[0]
            first = int(block) if name.startswith(inside) else 0
            with simulated_linears({name: linear}, self.variant, self.absmax, self.scales):
                kl = probe.divergence(self.model, first_block=first)["kl"]
            if kl is None:
                raise StudyError(
                    f"protect: the KL with {name} alone in int8 is not finite; use dtype float32 "
                    "or mend the model"
                )
            measured[name] = max(0.0, kl)
        return measured

    def kl(self, probe: DivergenceProbe, left_float: Iterable[str]) -> float | None:
        """KL in nats a token with some Linears left float; None if it is not finite."""
        names = set(left_float)
        linears = {n: m for n, m in self.linears.items() if n not in names}
        with simulated_linears(linears, self.variant, self.absmax, self.scales):
            return probe.divergence(self.model)["kl"]


def bytes_saved(shape: Sequence[int], size: int, variant: Variant) -> int:
    """Bytes of a float weight less those in int8 with its scales, which are in the float type.

    Args:
        shape: (out_features, in_features); size: bytes of a float.
    """
    weights, activations = variant.scheme
    scales = shape[0] if weights == "channel" else 1
    scales += activations == "tensor_static"
    return math.prod(shape) * (size - 1) - scales * size


def best_set(gains: Mapping[str, float], costs: Mapping[str, int], budget: int) -> list[str]:
    """The names with the largest sum of gains whose costs fit a budget.

    Args:
        gains, costs: by name; a name without a gain is not taken.
    """
    if not (names := [n for n, gain in gains.items() if gain > 0 and costs[n] <= budget]):
        return []
    unit, top = math.gcd(*(costs[n] for n in names)), max(gains[n] for n in names)
    limit, chosen = budget // unit, names
    while sum(costs[name] for name in chosen) > budget:
        solution = milp(
            [-gains[name] / top for name in names],  # the solver's tolerances are absolute
            constraints=LinearConstraint([[costs[name] // unit for name in names]], ub=limit),
            integrality=np.ones(len(names)),
            bounds=Bounds(0, 1),
            options={"mip_rel_gap": 0.0},
        )
        taken = np.round(solution.x)
        chosen = [name for name, one in zip(names, taken, strict=True) if one]
        limit -= 1  # the solver may exceed its limit by a rounding
    return chosen


def random_set(costs: Mapping[str, int], budget: int, generator: random.Random) -> list[str]:
    """Names in random order, each taken if it still fits the budget."""
    chosen = []
    for name in generator.sample(list(costs), len(costs)):
        if costs[name] <= budget:
            chosen.append(name)
            budget -= costs[name]
    return chosen
