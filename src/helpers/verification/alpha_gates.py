"""The gate on the choice of α: what was chosen is the least of what was recorded."""

import math

from helpers.core.records import read_json
from helpers.quantization.alpha import AUTO_ALPHAS
from helpers.verification.checkpoint_files import CheckpointFiles
from helpers.verification.gate_decorator import examples, gate


@gate("alpha minimizes the loss")
def alpha_choice_gate(evidence: CheckpointFiles):
    """The chosen α has the least KL of its grid, or with `auto` the least error of its group."""
    declared = evidence.claim.smooth.alpha
    folder = evidence.job.paths.quantization(evidence.job.model, evidence.job.variant)
    record = read_json(folder / "alpha.json", made_by="02_quantization")
    if declared == "auto":
        losses = {
            name: {row["alpha"]: row["error"] for row in record["errors"] if row["group"] == name}
            for name in record["alphas"]
        }
        grid = set(AUTO_ALPHAS)
    else:
        curve = {row["alpha"]: row["kl"] for row in record["curve"]}
        losses, grid = dict.fromkeys(record["alphas"], curve), set(declared)
    wrong_groups = [
        n
        for n, curve_of_group in losses.items()
        if not _is_least_loss(record["alphas"][n], curve_of_group, grid)
    ]
    wrong_groups += [g.consumers[0] for g in evidence.groups if g.consumers[0] not in losses]
    return (
        not wrong_groups,
        f"{len(wrong_groups)} of {len(losses)} groups have an α that is not the least of its "
        f"curve{examples(wrong_groups)}",
        "none, each curve over all the study names",
    )


def _is_least_loss(alpha: float, losses: dict[float, float | None], grid: set[float]) -> bool:
    finite = {a: x for a, x in losses.items() if x is not None and math.isfinite(x)}
    return set(losses) == grid and alpha in finite and finite[alpha] == min(finite.values())
