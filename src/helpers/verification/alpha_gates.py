"""The gate on the choice of α: what was chosen is the least of what was recorded."""

import math

from helpers.core.records import read_json
from helpers.quantization.alpha import AUTO
from helpers.verification.checkpoint_files import Evidence
from helpers.verification.gate_decorator import gate, named


@gate("alpha chosen at the least loss")
def choice_gate(evidence: Evidence):
    """A grid's α has the least KL of the curve over that grid, `auto` the least error a group."""
    asked = evidence.claim.smooth.alpha
    folder = evidence.job.paths.quantization(evidence.job.model, evidence.job.variant)
    record = read_json(folder / "alpha.json", made_by="02_quantization")
    if asked == "auto":
        losses = {
            name: {row["alpha"]: row["error"] for row in record["errors"] if row["group"] == name}
            for name in record["alphas"]
        }
        grid = set(AUTO)
    else:
        curve = {row["alpha"]: row["kl"] for row in record["curve"]}
        losses, grid = dict.fromkeys(record["alphas"], curve), set(asked)
    odd = [n for n, found in losses.items() if not _least(record["alphas"][n], found, grid)]
    odd += [g.consumers[0] for g in evidence.groups if g.consumers[0] not in losses]
    return (
        not odd,
        f"{len(odd)} of {len(losses)} groups have an α that is not the least of its "
        f"curve{named(odd)}",
        "none, each curve over all the study names",
    )


def _least(alpha: float, losses: dict[float, float | None], grid: set[float]) -> bool:
    finite = {a: x for a, x in losses.items() if x is not None and math.isfinite(x)}
    return set(losses) == grid and alpha in finite and finite[alpha] == min(finite.values())
