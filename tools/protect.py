"""Which Linears of a variant to leave float for a given share of the model's bytes.

For every Linear the KL is measured on a few of the calibration's judging items with that Linear
alone in int8. An integer programme then chooses the set with the largest sum that fits the bytes.
Whether the choice is worth them is asked on other calibration items: the whole variant is simulated
with the chosen Linears left float, and with as many random sets of the same bytes as it takes for a
lead over all of them to be no chance (p = 1 / (sets + 1)).

Prints an `ignore` for the study file: what a study computes stands there and nowhere else. The
study has to be calibrated (01_calibration).

usage: python -m tools.protect STUDY MODEL VARIANT [--bytes 0.03] [--random 19]
"""

import argparse
import random
import sys
from collections.abc import Mapping, Sequence

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp

from helpers.core.errors import StudyError
from helpers.core.processes import Bar
from helpers.quantization import calibration
from helpers.quantization.calibration import quantized_linears
from helpers.quantization.simulation import (
    JUDGES,
    DivergenceProbe,
    choose_alphas,
    simulated_quantization,
)
from helpers.runtime.devices import prepare
from helpers.sources.chat import calibration_tokens
from helpers.sources.model_files import TensorFiles
from helpers.sources.models import load_model, load_tokenizer, model_folder
from helpers.sources.sampling import calibration_items
from helpers.study.loading import Job, open_job
from helpers.study.schema import Variant

CONFIRMING = 10  # calibration items, none of which judges
SHARE = 0.03


def best_set(gains: Mapping[str, float], costs: Mapping[str, int], budget: float) -> list[str]:
    """The names with the largest sum of gains whose costs fit a budget.

    Args:
        gains, costs: by name; no gain is negative.
    """
    names = list(gains)
    solution = milp(
        [-gains[name] for name in names],
        constraints=LinearConstraint([[costs[name] for name in names]], ub=budget),
        integrality=np.ones(len(names)),
        bounds=Bounds(0, 1),
    )
    return [name for name, taken in zip(names, np.round(solution.x), strict=True) if taken]


def random_set(costs: Mapping[str, int], budget: float, rng: random.Random) -> list[str]:
    """Names in random order, each taken if it still fits the budget."""
    names, chosen = rng.sample(list(costs), len(costs)), []
    for name in names:
        if costs[name] <= budget:
            chosen.append(name)
            budget -= costs[name]
    return chosen


class Search:
    """The simulated variant of a job, with any of its Linears left float.

    Raises:
        StudyError: the study is not calibrated, or the variant quantizes nothing.
    """

    def __init__(self, job: Job):
        if not job.recipe.quantized:
            raise StudyError(f"variants.{job.variant} quantizes nothing; name one that does")
        if job.recipe.made_elsewhere:
            raise StudyError(f"variants.{job.variant} was made elsewhere; name one made here")
        self.recipe = job.recipe
        source = model_folder(job.study, job.model, job.paths)
        path = job.paths.calibration(job.model) / "activations.safetensors"
        self.absmax = calibration.load_absmax(path)
        self.model = load_model(source, job.study.runtime)
        tokenizer = load_tokenizer(source, enable_thinking=job.study.enable_thinking)
        adapter = job.calibration_settings.adapter
        items = calibration_items(job.study, job.calibration)
        tokens = [calibration_tokens(tokenizer, item, adapter) for item in items]
        first = calibration.first_judging_item(len(tokens))
        judges, others = tokens[first:], tokens[:first][:CONFIRMING]
        fit = calibration.load_absmax(path, fit=True)
        self.alphas = choose_alphas(self.model, job.recipe, fit, judges).alphas
        few = judges[:JUDGES]  # read once for each Linear
        self.judging = DivergenceProbe(self.model, few, job.recipe)
        self.confirming = DivergenceProbe(self.model, others, job.recipe)
        self.targets = list(quantized_linears(self.model, job.recipe.ignore))
        files = TensorFiles(source, dtype=None)
        sizes = {name: files.size_bytes(f"{name}.weight") for name in self.targets}
        rows = {name: files.shape(f"{name}.weight") for name in self.targets}
        # Of a Linear left float: its float bytes less those of int8 with a float32 step a row.
        self.costs = {n: sizes[n] - rows[n][0] * rows[n][1] - 4 * rows[n][0] for n in self.targets}
        self.bytes = sum(files.size_bytes(name) for name in files)

    def kl(self, probe: DivergenceProbe, left_float: Sequence[str]) -> float:
        """KL in nats a token of the simulated variant with some Linears left float."""
        ignore = (*self.recipe.ignore, *left_float)
        variant: Variant = self.recipe.model_copy(update={"ignore": ignore})
        with simulated_quantization(self.model, variant, self.absmax, self.alphas):
            kl = probe.divergence(self.model)["kl"]
        return float("inf") if kl is None else kl

    def sensitivities(self) -> dict[str, float]:
        """KL on the judging items by Linear, if it alone is in int8."""
        alone = {}
        for name in Bar(self.targets, desc="each Linear alone", unit="Linear"):
            others = [other for other in self.targets if other != name]
            alone[name] = max(0.0, self.kl(self.judging, others))
        return alone


def report(search: Search, share: float, sets: int, seed: int) -> list[str]:
    """The lines to print: the choice, what it gains, and what random sets gain."""
    budget = share * search.bytes
    chosen = best_set(search.sensitivities(), search.costs, budget)
    if not chosen:
        return [f"no Linear fits {100 * share:g} % of the bytes; give more"]
    rng = random.Random(seed)
    draws = [random_set(search.costs, budget, rng) for _ in range(sets)]
    plain = search.kl(search.confirming, [])
    kept = search.kl(search.confirming, chosen)
    others = sorted(
        search.kl(search.confirming, names) for names in Bar(draws, desc="random sets", unit="set")
    )
    spent = sum(search.costs[name] for name in chosen) / search.bytes
    lines = [
        f"{len(chosen)} of {len(search.targets)} Linears for {100 * spent:.2f} % of the bytes",
        f"KL on {len(search.confirming.texts)} other calibration items: {plain:.4f} nats a token "
        f"as it is, {kept:.4f} with these left float",
    ]
    if others:
        as_good = sum(kl <= kept for kl in others)
        lines.append(
            f"{sets} random sets of these bytes: {others[0]:.4f} to {others[-1]:.4f}; {as_good} at "
            f"least as good, p = {(as_good + 1) / (sets + 1):.2g}"
        )
    entries = [*search.recipe.ignore, *chosen]
    return [*lines, f"ignore: [{', '.join(entries)}]"]


def main(argv: list[str] | None = None) -> int:
    """Print the choice for one variant."""
    parser = argparse.ArgumentParser(prog="make protect", description=__doc__.splitlines()[0])
    parser.add_argument("study")
    parser.add_argument("model")
    parser.add_argument("variant")
    parser.add_argument("--bytes", type=float, default=SHARE, help=f"share of all bytes ({SHARE})")
    parser.add_argument("--random", type=int, default=19, help="random sets to compare with (19)")
    arguments = parser.parse_args(argv)
    try:
        job = prepare(open_job(arguments.study, model=arguments.model, variant=arguments.variant))
        if not 0 < arguments.bytes < 1:
            raise StudyError(f"--bytes = {arguments.bytes:g} is no share; give one between 0 and 1")
        lines = report(Search(job), arguments.bytes, arguments.random, job.study.seed)
    except StudyError as error:
        print(error, file=sys.stderr)
        return 2
    print("\n".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
