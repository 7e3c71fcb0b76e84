"""Coverage, size and power of every interval and test of graded scores, in simulated studies.

Each scenario draws studies whose truth is known and hands their scores to the functions that
make the report's figures. An interval at 95 % should hold the truth in 93 to 97 % of them, a
test at 5 % should reject in at most 5.5 % where there is nothing. Scenarios marked *stress* are
beyond what a sample can show (a collapse on one item in twenty, few items); they are reported
and no bound is claimed.
"""

import argparse
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from helpers.core.files import outputs_root, write_atomically
from helpers.core.records import write_json
from helpers.statistics.graded import (
    DrawsOfSet,
    Scored,
    ability,
    comparison_of,
    option_probabilities,
    pooled_difference,
    pooled_recipe,
    recipe_estimate,
    recovery,
)
from helpers.statistics.intervals import clustered_mean, mcnemar_exact

STUDIES = 2000
MORE = 5  # times as many for sizes: of 2,000 studies 5 % is known to a point
SEED = 20261127
LARGE = 200_000  # items that a truth without a formula is computed from
CONFIDENCE, ALPHA, POWER = 0.95, 0.05, 0.8
LOWEST, HIGHEST, SIZE = 0.93, 0.97, 0.055

Rng = np.random.Generator
Draw = Callable[[Rng, NDArray], NDArray]


@dataclass(frozen=True)
class Row:
    """One scenario's outcome; shares are 0-1, None where they do not apply.

    `kind` is coverage (of a true value), size (of a test where nothing is), or power.
    """

    part: str
    scenario: str
    n: int
    clusters: int
    kind: str
    share: float
    below: float | None = None
    above: float | None = None
    half_width: float | None = None
    stress: bool = False
    note: str = ""

    @property
    def holds(self) -> bool:
        """Whether the share lies where it should; power and stress have no bound."""
        if self.stress or self.kind == "power":
            return True
        if self.kind == "coverage":
            return LOWEST <= self.share <= HIGHEST
        return self.share <= SIZE


@cache
def cluster_of(n: int, kind: str) -> NDArray:
    """(n,) cluster of each item: its own, or passages of one to five items."""
    if kind == "items":
        return np.arange(n)
    sizes = np.random.default_rng(7).integers(1, 6, n)
    return np.repeat(np.arange(n), sizes)[:n]


def _noise(rng: Rng, clusters: NDArray, *, heavy: bool) -> NDArray:
    """(n,) variance shared half by half between items and their passages; t with 3 degrees."""

    def draw(count: int) -> NDArray:
        return rng.standard_t(3, count) if heavy else rng.normal(size=count)

    own = draw(clusters.size)
    shared = draw(int(clusters.max()) + 1)[clusters]
    alone = clusters.max() + 1 == clusters.size
    return own if alone else (own + shared) / np.sqrt(2)


def _sigmoid(x: NDArray) -> NDArray:
    return 1 / (1 + np.exp(-np.clip(x, -500, 500)))


def _moved(rng: Rng, clusters: NDArray, *, at, spread, shift, noise, heavy) -> NDArray:
    """Change of a probability whose log-odds, spread around `at`, move by `shift` and noise."""
    odds = at + spread * rng.normal(size=clusters.size)
    moved = odds + shift + noise * _noise(rng, clusters, heavy=heavy)
    return _sigmoid(moved) - _sigmoid(odds)


def _moving(**how) -> Draw:
    return lambda rng, clusters: _moved(rng, clusters, **how)


def _lost_nats(rng: Rng, clusters: NDArray) -> NDArray:
    """A loss in nats a token that grows with how unlikely the answer was."""
    unlikely = rng.gamma(1.5, 1.0, clusters.size)
    factor = np.exp(0.5 * _noise(rng, clusters, heavy=False))
    return -0.2 * unlikely * factor + 0.1 * rng.standard_t(3, clusters.size)


def _collapse(rng: Rng, clusters: NDArray) -> NDArray:
    """One item in twenty loses all it had; the rest moves by rounding."""
    lost = np.where(rng.random(clusters.size) < 0.05, -rng.random(clusters.size), 0.0)
    return lost + 0.02 * _noise(rng, clusters, heavy=False)


DIFFERENCES: dict[str, Draw] = {
    "normal": lambda rng, c: _noise(rng, c, heavy=False),
    "heavy tails": lambda rng, c: _noise(rng, c, heavy=True),
    "probabilities, rounding": _moving(at=0.5, spread=2, shift=0, noise=0.2, heavy=True),
    "probabilities, a loss": _moving(at=0.5, spread=2, shift=-0.5, noise=0.4, heavy=True),
    "probabilities near the ceiling": _moving(
        at=2.5, spread=1.5, shift=-0.5, noise=0.4, heavy=False
    ),
    "a broken model": _moving(at=1, spread=2, shift=-1, noise=2, heavy=False),
    "nats, a skewed loss": _lost_nats,
    "KL, lognormal": lambda rng, c: np.exp(0.5 * _noise(rng, c, heavy=False)),
}
STRESS: dict[str, Draw] = {
    "one item in twenty collapses": _collapse,
    "heavy tails at the ceiling": _moving(at=3.5, spread=1.5, shift=0, noise=0.6, heavy=True),
}  # fmt: skip


@cache
def true_mean(scenario: str, kind: str) -> float:
    """Mean of a scenario's differences, over many items in clusters as the studies have them."""
    if scenario in ("normal", "heavy tails"):
        return 0.0
    draw = (DIFFERENCES | STRESS)[scenario]
    found = [draw(np.random.default_rng(i), cluster_of(LARGE, kind)).mean() for i in range(10)]
    return float(np.mean(found))


def differences(studies: int, sizes: tuple[int, ...]) -> list[Row]:
    """Coverage of a paired difference's interval."""
    rows = []
    for scenario, draw in (DIFFERENCES | STRESS).items():
        for n in sizes:
            for kind in ("items", "passages"):
                clusters, rng = cluster_of(n, kind), np.random.default_rng(SEED)
                found = [clustered_mean(draw(rng, clusters), clusters) for _ in range(studies)]
                rows.append(
                    _coverage(
                        "paired difference",
                        f"{scenario}; {kind}",
                        [x.interval(CONFIDENCE) for x in found],
                        true_mean(scenario, kind),
                        found[0],
                        stress=scenario in STRESS,
                    )
                )
    return rows


def _coverage(part: str, scenario: str, intervals, truth: float, example, *, stress=False) -> Row:
    low, high = (np.array([getattr(x, side) for x in intervals]) for side in ("low", "high"))
    return Row(
        part,
        scenario,
        example.n,
        example.clusters,
        "coverage",
        float(np.mean((low <= truth) & (truth <= high))),
        below=float(np.mean(high < truth)),
        above=float(np.mean(low > truth)),
        half_width=float(np.median(high - low) / 2),
        stress=stress,
    )


def sizes_of_tests(studies: int, sizes: tuple[int, ...]) -> list[Row]:
    """How often p is at most 5 % for two variants that differ by rounding alone, both ways."""
    rows = []
    for name, heavy in (("rounding", False), ("rounding with heavy tails", True)):
        for n in sizes:
            for kind in ("items", "passages"):
                clusters, rng, rejected = cluster_of(n, kind), np.random.default_rng(SEED + 1), 0
                for _ in range(studies):
                    odds = 0.5 + 2 * rng.normal(size=n)
                    sides = [
                        _sigmoid(odds + 0.4 * _noise(rng, clusters, heavy=heavy)) for _ in "ab"
                    ]
                    rejected += clustered_mean(sides[1] - sides[0], clusters).p_value() <= ALPHA
                count = int(clusters.max()) + 1
                rows.append(
                    Row(
                        "paired difference", f"{name}; {kind}", n, count, "size", rejected / studies
                    )
                )
    return rows


def equivalence(studies: int, sizes: tuple[int, ...]) -> list[Row]:
    """How often a loss as large as the margin is called equivalent."""
    rows = []
    draw = DIFFERENCES["probabilities, a loss"]
    for n in sizes:
        for kind in ("items", "passages"):
            clusters, rng, called = cluster_of(n, kind), np.random.default_rng(SEED + 2), 0
            margin = -true_mean("probabilities, a loss", kind)
            for _ in range(studies):
                estimate = clustered_mean(draw(rng, clusters), clusters)
                called += comparison_of(
                    estimate, unit="probability", confidence=CONFIDENCE, alpha=ALPHA, power=POWER
                ).is_inside(margin)
            count = int(clusters.max()) + 1
            note = "true loss = margin"
            rows.append(
                Row("equivalence", f"a loss; {kind}", n, count, "size", called / studies, note=note)
            )
    return rows


def interactions(studies: int, sizes: tuple[int, ...]) -> list[Row]:
    """A difference of differences: coverage where fine-tuning raises the cost, size where not."""

    def change(rng: Rng, clusters: NDArray, shift: float) -> NDArray:
        odds = 0.5 + 2 * rng.normal(size=clusters.size)
        common = 0.2 * _noise(rng, clusters, heavy=True)
        found = []
        for extra in (0.0, shift):
            own = odds + 0.3 * rng.normal(size=clusters.size)
            noise = common + 0.3 * _noise(rng, clusters, heavy=False)
            found.append(_sigmoid(own - 0.2 - extra + noise) - _sigmoid(own))
        return found[1] - found[0]

    rows = []
    for shift in (0.0, 0.5):
        truth = 0.0
        if shift:
            truth = change(np.random.default_rng(1), cluster_of(20 * LARGE, "items"), shift).mean()
        for n in sizes:
            for kind in ("items", "passages"):
                clusters, rng = cluster_of(n, kind), np.random.default_rng(SEED + 3)
                found = [
                    clustered_mean(change(rng, clusters, shift), clusters) for _ in range(studies)
                ]
                part = "difference of differences"
                name = f"{'a higher cost' if shift else 'the same cost'}; {kind}"
                intervals = [x.interval(CONFIDENCE) for x in found]
                rows.append(_coverage(part, name, intervals, float(truth), found[0]))
                share = float(np.mean([x.p_value() <= ALPHA for x in found]))
                what = "power" if shift else "size"
                rows.append(Row(part, name, n, found[0].clusters, what, share))
    return rows


SETS = {"options": ("items", 4), "yes or no": ("passages", 2), "written": ("passages", 0)}


def _pair(rng: Rng, name: str, n: int, shift: float) -> tuple[Scored, Scored]:
    """Baseline and variant of one set; of `written` the foil's probability is taken off."""
    kind, options = SETS[name]
    clusters = cluster_of(n, kind)
    ids = tuple(f"{i:05}" for i in range(n))
    groups = tuple(f"{c:05}" for c in clusters)
    if not options:
        gold = -rng.gamma(1.5, 0.8, n)  # nats a token
        moved = gold * np.exp(0.2 * _noise(rng, clusters, heavy=False)) + 0.3 * shift
        foil = np.exp(gold - 0.8 + 0.6 * rng.normal(size=n))
        scores = [np.exp(x) - foil for x in (gold, moved)]
    else:
        odds = 1 + 1.5 * rng.normal(size=n)
        moved = odds + shift + 0.4 * _noise(rng, clusters, heavy=True)
        scores = [_sigmoid(odds), _sigmoid(moved)]
    chance = np.full(n, 1 / options if options else 0.0)
    before, after = (Scored(ids, groups, x, chance, x - chance) for x in scores)
    return before, after


@cache
def _pooled_truth(shift: float) -> tuple[float, float]:
    """(pooled difference, recovery) of a population."""
    rng, gaps, above = np.random.default_rng(5), [], []
    for name in SETS:
        pairs = [_pair(rng, name, LARGE, shift) for _ in range(3)]
        gaps.append(np.mean([(after.scores - before.scores).mean() for before, after in pairs]))
        above.append(np.mean([(before.scores - before.chance).mean() for before, _ in pairs]))
    return float(np.mean(gaps)), float(1 + np.mean(gaps) / np.mean(above))


def pooled(studies: int, sizes: tuple[int, ...]) -> list[Row]:
    """Coverage of the pooled difference over three sets, and of recovery."""
    rows = []
    for shift in (0.0, -0.5):
        difference, share = _pooled_truth(shift)
        for n in sizes:
            rng, found, shares = np.random.default_rng(SEED + 4), [], []
            for _ in range(studies):
                pairs = {name: _pair(rng, name, n, shift) for name in SETS}
                found.append(pooled_difference(pairs))
                shares.append(recovery(pairs, confidence=CONFIDENCE))
            name = f"three sets, {'a loss' if shift else 'rounding'}"
            intervals = [x.interval(CONFIDENCE) for x in found]
            rows.append(_coverage("pooled difference", name, intervals, difference, found[0]))
            shown = [x.interval for x in shares if x]
            row = _coverage("recovery", name, shown, share, found[0])
            rows.append(Row(**asdict(row) | {"note": f"shown in {len(shown) / studies:.1%}"}))
    return rows


def recipes(studies: int, counts: tuple[int, ...]) -> list[Row]:
    """Coverage of a recipe's mean where checkpoints differ and where only items do.

    The truth is 0 and the test rejects where the interval leaves 0 out: its size is what the
    coverage lacks of 1.
    """

    def table_of(rng: Rng, clusters: NDArray, level: NDArray) -> NDArray:
        item = 0.3 * _noise(rng, clusters, heavy=False)
        return np.array([item + _noise(rng, clusters, heavy=True) * 0.5 + x for x in level])

    rows = []
    tokens = np.random.default_rng(3).integers(20, 250, 100).astype(float)
    for draws in counts:
        for spread in (0.0, 1.0, 3.0):  # of draws, in standard errors of one draw's mean
            for kind in ("items", "passages", "weighted by tokens", "three sets pooled"):
                clusters = cluster_of(100, "passages" if kind == "passages" else "items")
                rng, found = np.random.default_rng(SEED + 5), []
                for _ in range(studies):
                    level = spread * 0.1 * rng.normal(size=draws)
                    if kind == "three sets pooled":  # which one checkpoint is good or bad on
                        tables = [table_of(rng, clusters, level) for _ in range(3)]
                        found.append(pooled_recipe([DrawsOfSet(t, clusters) for t in tables]))
                        continue
                    weights = tokens if kind == "weighted by tokens" else None
                    table = table_of(rng, clusters, level)
                    found.append(recipe_estimate(table, clusters, weights))
                name = f"{draws} draws, spread {spread:g}; {kind}"
                intervals = [x.interval(CONFIDENCE) for x in found]
                row = _coverage("recipe", name, intervals, 0.0, found[0], stress=draws < 4)
                note = "conservative with two or three draws" if draws < 4 else ""
                rows.append(Row(**asdict(row) | {"note": note}))
    return rows


def abilities(studies: int, sizes: tuple[int, ...]) -> list[Row]:
    """How often a model that ignores the question is called able."""
    rows = []
    for bias, yes in ((0.0, 0.5), (0.4, 0.5), (0.4, 0.65)):
        for n in sizes:
            clusters, rng, called = cluster_of(n, "passages"), np.random.default_rng(SEED + 6), 0
            for _ in range(studies):
                odds = bias + 0.5 * _noise(rng, clusters, heavy=False)
                gold = rng.random(n) < yes
                shares = np.array([option_probabilities([x, 0.0]) for x in odds])
                right = np.stack([gold, ~gold], axis=1)
                lead = ((shares - shares.mean(0)) * (right - right.mean(0))).sum(1)
                groups = tuple(f"{c:05}" for c in clusters)
                scores, chance = (shares * right).sum(1), np.full(n, 0.5)
                found = Scored(groups, groups, scores, chance, lead)
                called += ability(found, confidence=CONFIDENCE).able
            name = f"bias {bias:g}, {yes:.0%} yes"
            count = int(clusters.max()) + 1
            rows.append(Row("ability", name, n, count, "size", called / studies))
    return rows


def powers(studies: int, sizes: tuple[int, ...]) -> list[Row]:
    """Power of graded scores beside exact McNemar's on the same items."""
    rows = []
    for loss in (0.1, 0.3):
        for n in sizes:
            clusters, rng = cluster_of(n, "items"), np.random.default_rng(SEED + 7)
            graded = counted = 0
            for _ in range(studies):
                odds = 0.5 + 2 * rng.normal(size=n)
                moved = odds - loss + 0.3 * _noise(rng, clusters, heavy=False)
                changes = _sigmoid(moved) - _sigmoid(odds)
                found = clustered_mean(changes, clusters)
                graded += found.p_value() <= ALPHA
                lost, won = ((odds > 0) & (moved < 0)).sum(), ((odds < 0) & (moved > 0)).sum()
                counted += mcnemar_exact(int(lost), int(won)) <= ALPHA
            name = f"log-odds lose {loss:g}"
            rows += [
                Row("power", f"{name}: probability", n, n, "power", graded / studies),
                Row("power", f"{name}: accuracy, McNemar", n, n, "power", counted / studies),
            ]
    return rows


def at_detectable_losses(studies: int, sizes: tuple[int, ...]) -> list[Row]:
    """How often a loss is found that is as large as one sample says it could detect."""
    rows = []
    for n in sizes:
        clusters, rng, reached = cluster_of(n, "items"), np.random.default_rng(SEED + 8), 0
        for _ in range(studies):
            first, second = (
                _moved(rng, clusters, at=0.5, spread=2, shift=0, noise=0.3, heavy=False)
                for _ in "ab"
            )
            size = clustered_mean(first, clusters).detectable(alpha=ALPHA, power=POWER)
            reached += clustered_mean(second - size, clusters).p_value() <= ALPHA
        rows.append(Row("power", "a loss of the detectable size", n, n, "power", reached / studies))
    return rows


def all_rows(studies: int) -> list[Row]:
    """Every scenario with so many simulated studies each; sizes of tests with five times more."""
    sizes = (20, 50, 100, 200)
    return [
        *differences(studies, sizes),
        *sizes_of_tests(MORE * studies, sizes),
        *equivalence(MORE * studies, sizes),
        *interactions(studies, sizes),
        *pooled(studies, (100,)),
        *recipes(studies, (2, 3, 4, 5, 8)),
        *abilities(studies, sizes),
        *powers(studies, (50, 100, 200)),
        *at_detectable_losses(studies, (50, 100, 200)),
    ]


def text_of(rows: list[Row], studies: int) -> str:
    """The account as Markdown."""
    bounded = [row for row in rows if not row.stress and row.kind != "power"]
    kept = sum(row.holds for row in bounded)
    lines = [
        "# Coverage, size and power of graded scores, simulated",
        "",
        f"{studies:,} studies a scenario, {MORE * studies:,} for the size of a paired test and of "
        "equivalence. Nominal: intervals 95 %, tests 5 %. "
        f"{kept} of {len(bounded)} scenarios with a bound keep it: coverage 93 to 97 %, size at "
        "most 5.5 %. Rows marked *stress* have no bound.",
        "",
        "| part | scenario | n | clusters | what | share | truth above | truth below | half-width "
        "| |",
        "| :--- | :--- | ---: | ---: | :--- | ---: | ---: | ---: | ---: | :--- |",
    ]
    for row in rows:
        shares = ["" if x is None else f"{100 * x:.1f} %" for x in (row.below, row.above)]
        width = "" if row.half_width is None else f"{row.half_width:.4f}"
        mark = "stress" if row.stress else "" if row.holds else "**outside**"
        told = "; ".join(filter(None, (mark, row.note)))
        cells = [row.part, row.scenario, row.n, row.clusters, row.kind, f"{100 * row.share:.1f} %"]
        lines.append("| " + " | ".join(map(str, [*cells, *shares, width, told])) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Simulate everything and write outputs/bench/coverage-graded.md and .json."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.coverage", description=__doc__)
    parser.add_argument("--studies", type=int, default=STUDIES)
    parser.add_argument("--into", type=Path, default=None)
    given = parser.parse_args()
    started = time.monotonic()
    rows = all_rows(given.studies)
    folder = given.into or outputs_root() / "bench"
    folder.mkdir(parents=True, exist_ok=True)
    text = text_of(rows, given.studies)
    write_atomically(folder / "coverage-graded.md", lambda path: path.write_text(text, "utf-8"))
    content = {"studies": given.studies, "seed": SEED, "rows": [asdict(row) for row in rows]}
    write_json(folder / "coverage-graded.json", content)
    odd = [row for row in rows if not row.holds]
    print(f"{len(rows)} scenarios in {time.monotonic() - started:.0f} s, {len(odd)} outside")
    for row in odd:
        print(f"  {row.part}: {row.scenario}, n = {row.n}: {row.kind} {row.share:.3f}")


if __name__ == "__main__":
    main()
