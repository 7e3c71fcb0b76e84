"""Which variant of a finished study to use on this machine: one table, one figure, one sentence.

Variants are chosen by their KL on the items that the calibration keeps for judging, simulated when
they were quantized, and confirmed on the evaluation items, which took no part in the choice: a
variant chosen by the scores that it is then praised for is praised too much. How much, is shown on
the study's own answers: they are halved again and again, the best variant of one half is looked up
in the other.

A variant is on the Pareto front if no other has a lower KL, fewer bytes and reads faster, all at
least as good and one better. Only variants that pass every check are chosen.

usage: python -m tools.recommend STUDY [--most-bytes SHARE]
"""

import argparse
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.figure import Figure

from helpers.core.errors import StudyError
from helpers.core.files import write_atomically
from helpers.report.estimates import ConfigurationResult, Cost, Spread, VariantResults
from helpers.report.figures import in_house_style, new_figure, variant_looks
from helpers.report.graded_chapter import excluded_points
from helpers.report.markdown import (
    MISSING,
    Rows,
    code,
    listed,
    markdown_table,
    number,
    percent,
    percent_plain,
    points,
)
from helpers.report.results import Results, load_results
from helpers.statistics.graded import Scored, paired_differences
from helpers.statistics.graded_study import GradedVerdict, graded_scores, length_rule
from helpers.study.loading import open_job
from helpers.study.schema import FineTunedModel

JUDGED = "nothing"  # the row of a quantization's record in which no Linear is left float
HALVINGS = 1000
SPEEDS = {"prefill": "reading", "decode": "writing"}
BYTES = {"float32": 4, "bfloat16": 2}  # of a number


@dataclass(frozen=True)
class Candidate:
    """One variant of one model.

    Attributes:
        quantized: whether it computes in int8.
        judged_kl: nats a token on the judging items; None if it was not quantized.
        bytes_share: of the float model's.
        speeds: reading and writing, as multiples of float32's; empty if not measured.
        verdict: of its graded scores, pooled; None without any.
        failed: names of the checks that fail.
    """

    name: str
    quantized: bool
    judged_kl: float | None
    bytes_share: float
    speeds: Mapping[str, Spread]
    verdict: GradedVerdict | None
    failed: tuple[str, ...]

    @property
    def reading(self) -> float:
        """Reading speed as a multiple of float32's; float32's if it was not measured."""
        return self.speeds["prefill"].value if self.speeds else 1.0


def candidates(results: Results, model: str) -> list[Candidate]:
    """All variants of a model but the baseline, in the study's order."""
    cost = _cost_of(results, model)
    return [_candidate(results, e, cost) for e in results.compared_variants_of(model)]


def _candidate(results: Results, e: VariantResults, cost: Cost | None) -> Candidate:
    variant, pooled = results.study.variants[e.variant], results.graded.pooled.get(e.key)
    recorded = e.quantization["results"] if e.quantization else {}
    rows = (recorded.get("losses") or {}).get("left_float", [])
    judged = next((row["kl"] for row in rows if row["float"] == JUDGED), None)
    judged = None if variant.kv else judged  # no cache was simulated there
    study_type = results.runtime.dtype
    share = BYTES[variant.dtype or study_type] / BYTES[study_type]
    if recorded:
        share = sum(recorded["bytes_after"].values()) / sum(recorded["bytes_before"].values())
    timed = _timed_as(results, e.variant, cost) if cost else None
    speeds = {q: cost.ratio(timed, q, cost.reference) for q in SPEEDS} if timed else {}
    failed = tuple(gate["name"] for gate in e.failed_gates)
    verdict = pooled.verdict if pooled else None
    return Candidate(e.variant, variant.quantized, judged, share, speeds, verdict, failed)


def _cost_of(results: Results, model: str) -> Cost | None:
    """The measurements of a model; those of its start model if it was trained here."""
    source = results.study.models[model]
    timed = source.finetune.start if isinstance(source, FineTunedModel) else model
    return results.costs.get(model) or results.costs.get(timed)


def _timed_as(results: Results, variant: str, cost: Cost) -> ConfigurationResult | None:
    """The measured configuration that multiplies as a variant does; None if there is none."""
    own = results.study.variants[variant]
    if own.kv or own.needs_checkpoint:
        return cost.multiplying_as(variant, results.study.variants)
    dtype = own.dtype or results.runtime.dtype
    return cost.bfloat16 if dtype == "bfloat16" else cost.reference


def pareto_front(of_model: Iterable[Candidate]) -> list[str]:
    """Names of the variants with a judged KL that no other beats."""
    judged = [c for c in of_model if c.judged_kl is not None]

    def beats(a: Candidate, b: Candidate) -> bool:
        gains = (b.judged_kl - a.judged_kl, b.bytes_share - a.bytes_share, a.reading - b.reading)
        return min(gains) >= 0 and max(gains) > 0

    return [c.name for c in judged if not any(beats(other, c) for other in judged)]


def choose(of_model: Sequence[Candidate], *, most_bytes: float = 1.0) -> Candidate | None:
    """The quantized variant with the least KL on the judging items; None if none can be chosen.

    Args:
        most_bytes: the largest share of the float model's bytes.
    """
    usable = [
        c
        for c in of_model
        if c.quantized and c.judged_kl is not None and not c.failed
        if c.bytes_share <= most_bytes
    ]
    return min(usable, key=lambda c: c.judged_kl, default=None)


def table(of_model: Sequence[Candidate]) -> Rows:
    """Each variant: KL on the judging items, the graded loss, bytes and speed."""
    front = pareto_front(of_model)
    return [
        {
            "variant": code(c.name),
            "KL on judging items [nats]": MISSING if c.judged_kl is None else number(c.judged_kl),
            "graded difference [points]": _difference(c.verdict),
            "verdict": c.verdict.kind if c.verdict else MISSING,
            "bytes": percent(c.bytes_share),
            **{verb: _speed(c, quantity) for quantity, verb in SPEEDS.items()},
            "Pareto front": "yes" if c.name in front else MISSING,
            "checks": f"{len(c.failed)} fail" if c.failed else "pass",
        }
        for c in of_model
    ]


def _speed(c: Candidate, quantity: str) -> str:
    return f"{c.speeds[quantity].value:.2f}×" if c.speeds else MISSING


def _difference(verdict: GradedVerdict | None) -> str:
    if verdict is None or verdict.comparison is None:
        return MISSING
    comparison = verdict.comparison
    low, high = points(comparison.interval.low), points(comparison.interval.high)
    return f"{points(comparison.delta)} [{low}, {high}]"


def recommendation(
    results: Results, model: str, of_model: Sequence[Candidate], *, most_bytes: float = 1.0
) -> str:
    """The sentence: which variant to use, what it may cost, and why not the others."""
    chosen = choose(of_model, most_bytes=most_bytes)
    if chosen is None:
        return f"For {code(model)} no quantized variant passes every check: keep the float model."
    confirmed = chosen.verdict is not None and chosen.verdict.kind in ("equivalent", "better")
    head = f"For {code(model)} on this machine take {code(chosen.name)}: {_claim(chosen)}."
    if not confirmed:
        reason = "no evaluation set is informative"
        if chosen.verdict:
            reason = f"on the evaluation items it is {chosen.verdict.kind}"
        head = (
            f"For {code(model)} nothing can be recommended: {code(chosen.name)} has the least KL "
            f"on the judging items, but {reason} ({_claim(chosen)})."
        )
    declared = {(c.model, c.variant) for c in results.study.statistics.primary}
    if confirmed and (model, chosen.name) not in declared:
        head += " Its comparisons are exploratory; declare them and run the study again."
    others = [_objection(c, chosen) for c in of_model if c.quantized and c.name != chosen.name]
    alternatives = [_alternative(c) for c in of_model if not c.quantized and c.speeds]
    return " ".join([head, *filter(None, others), *alternatives])


def _claim(c: Candidate) -> str:
    parts = []
    if c.verdict and c.verdict.comparison:
        limit = excluded_points(c.verdict.comparison)
        parts.append(f"losses above {limit} points of probability are excluded (pooled)")
    if c.speeds:
        parts.append(f"it reads {_speed(c, 'prefill')} and writes {_speed(c, 'decode')} as fast")
    return ", ".join([*parts, f"{percent(c.bytes_share)} of the bytes"])


def _objection(c: Candidate, chosen: Candidate) -> str:
    """Why a variant is not taken."""
    if c.failed:
        return f"Not {code(c.name)}: {len(c.failed)} of its checks fail ({c.failed[0]})."
    if c.verdict and c.verdict.kind == "worse":
        return f"Not {code(c.name)}: it is worse by {_difference(c.verdict).lstrip('−')} points."
    if c.judged_kl is None or chosen.judged_kl is None:
        return ""
    ratio = c.judged_kl / chosen.judged_kl if chosen.judged_kl else float("inf")
    saved = chosen.bytes_share - c.bytes_share
    if ratio < 1:
        return f"Not {code(c.name)}: {percent(c.bytes_share)} of the bytes are too many."
    gain = f", with {percent(c.bytes_share)} of the bytes" if saved > 0.005 else ""
    return f"Not {code(c.name)}: {ratio:.1f} times the KL{gain}."


def _alternative(c: Candidate) -> str:
    speeds = f"reads {_speed(c, 'prefill')} and writes {_speed(c, 'decode')} as fast"
    return f"Unquantized, {code(c.name)} {speeds} with {percent(c.bytes_share)} of the bytes."


def flattery(results: Results, model: str, names: Sequence[str]) -> float | None:
    """By how much the best of some variants is praised too much, if its scores chose it.

    Mean over random halvings of the items: the pooled difference of the half that chose, less
    that of the other half, in probability. None with fewer than two variants or without scores.
    """
    sets = results.graded.pooled.get((model, next(iter(names), "")))
    if sets is None or len(names) < 2:
        return None
    pairs = [[_scored(results, model, v, s) for s in sets.sets] for v in names]
    if any(one is None for of_variant in pairs for one in of_variant):
        return None
    base = [_scored(results, model, results.study.baseline, name) for name in sets.sets]
    differences = [
        [paired_differences(b, v) for b, v in zip(base, of_variant, strict=True)]
        for of_variant in pairs
    ]
    return mean_flattery(differences, [b.clusters for b in base], seed=results.study.seed)


def _scored(results: Results, model: str, variant: str, name: str) -> Scored | None:
    evaluation_set = results.study.evaluation.datasets[name]
    rows = results.evaluations[model, variant].predictions[name]
    return graded_scores(rows, length_rule(evaluation_set))


def mean_flattery(
    differences: Sequence[Sequence[np.ndarray]], clusters: Sequence[Sequence[str]], *, seed: int
) -> float:
    """As `flattery`, of (items,) differences by variant and set, and each set's clusters."""
    rng, gaps = np.random.default_rng(seed), []
    indices = [np.unique(np.asarray(of_set), return_inverse=True)[1] for of_set in clusters]
    by_set = [np.array(of_variants) for of_variants in zip(*differences, strict=True)]
    for _ in range(HALVINGS):
        means = np.zeros((len(differences), 2))  # by variant and half
        for of_variants, index in zip(by_set, indices, strict=True):
            half = rng.permutation(index.max() + 1)[index] <= index.max() // 2
            means += np.stack([of_variants[:, side].mean(1) for side in (half, ~half)], axis=1)
        means /= len(by_set)
        best = int(means[:, 0].argmax())
        gaps.append(means[best, 0] - means[best, 1])
    return float(np.mean(gaps))


def flattery_sentence(results: Results, model: str, of_model: Sequence[Candidate]) -> str:
    """What a choice by the evaluation items would have praised too much; empty if unknown."""
    names = [c.name for c in of_model if c.quantized and not c.failed]
    if (excess := flattery(results, model, names)) is None:
        return ""
    compared = listed(list(map(code, names)))
    return (
        f"Chosen by half of the evaluation items instead, the best of {compared} would look "
        f"{points(excess).lstrip('+')} points better there than on the other half (mean of "
        f"{HALVINGS} random halvings)."
    )


@in_house_style
def figure(results: Results, model: str, of_model: Sequence[Candidate], chosen: str) -> Figure:
    """A row a variant, by its KL on judging items: with graded difference, bytes and speed."""
    rows = sorted(of_model, key=lambda c: (c.judged_kl is None, c.judged_kl or 0.0))
    height = 1.3 + 0.26 * len(rows)
    drawn, panels = new_figure(8.4, height, ncols=4, sharey=True)
    looks, front = variant_looks(results.compared), pareto_front(of_model)
    kl, graded, share, speed = panels
    for y, c in enumerate(rows):
        color, marker = looks[c.name]
        mark = {"color": color, "marker": marker, "linestyle": "", "markersize": 7}
        mark |= {} if c.name in front else {"fillstyle": "none"}
        if c.judged_kl is not None:
            kl.plot(c.judged_kl, y, **mark)
        if c.verdict and (comparison := c.verdict.comparison):
            graded.hlines(
                y, 100 * comparison.interval.low, 100 * comparison.interval.high, color=color
            )
            graded.plot(100 * comparison.delta, y, **mark)
        share.plot(100 * c.bytes_share, y, **mark)
        if c.speeds:
            speed.plot(c.reading, y, **mark)
    margin = 100 * results.study.statistics.graded_margins.probability
    graded.axvspan(-margin, margin, color="#eeeeee", zorder=0)
    graded.axvline(0, color="#999999", linewidth=0.8, zorder=0)
    kl.set_xscale("log")
    kl.set_yticks(range(len(rows)), [c.name for c in rows])
    kl.invert_yaxis()
    for label in kl.get_yticklabels():
        label.set_fontweight("bold" if label.get_text() == chosen else "normal")
    labels = ("KL on judging items\n[nats]", "graded difference\n[points]")
    labels += ("bytes\n[% of the float model's]", "reading speed\n[multiple of float32's]")
    for axes, label in zip(panels, labels, strict=True):
        axes.set_xlabel(label)
    share.set_xlim(0, 108 * max(c.bytes_share for c in rows))
    speed.set_xlim(0, 1.08 * max((c.reading for c in rows if c.speeds), default=1.0))
    title = f"{model}: {chosen} is recommended" if chosen else f"{model}: nothing is recommended"
    drawn.suptitle(f"{title}; filled: on the Pareto front", x=0.01, ha="left", fontsize=11)
    return drawn


def main(argv: list[str] | None = None) -> int:
    """Write recommendation.md and a figure a model beside the report, and print the sentences."""
    parser = argparse.ArgumentParser(prog="make recommend", description=__doc__.splitlines()[0])
    parser.add_argument("study")
    parser.add_argument("--most-bytes", type=float, default=1.0, help="share of the float model's")
    arguments = parser.parse_args(argv)
    try:
        job = open_job(arguments.study)
        results = load_results(job)
    except StudyError as error:
        print(error, file=sys.stderr)
        return 2
    folder, parts = job.paths.root, [f"# Which variant to use: {results.study.title}"]
    for model in results.models:
        of_model = candidates(results, model)
        words = recommendation(results, model, of_model, most_bytes=arguments.most_bytes)
        chosen = choose(of_model, most_bytes=arguments.most_bytes)
        taken = chosen.name if chosen and f"take {code(chosen.name)}" in words else ""
        name = f"recommendation_{model}.png"
        drawn = figure(results, model, of_model, taken)
        write_atomically(folder / name, lambda path, f=drawn: f.savefig(path, format="png"))
        paragraphs = [words, flattery_sentence(results, model, of_model)]
        picture = f"![KL, graded difference, bytes and speed of every variant of {model}]({name})"
        parts += [f"## {code(model)}", *filter(None, paragraphs), markdown_table(table(of_model)),
                  picture]  # fmt: skip
        print(words)
    parts.append(
        "A variant is chosen by its KL on the calibration's judging items; its graded difference "
        "is measured on the evaluation items, pooled over the informative sets, with "
        f"{percent_plain(results.rules.confidence)} intervals."
    )
    text = "\n\n".join(parts) + "\n"
    write_atomically(folder / "recommendation.md", lambda path: path.write_text(text, "utf-8"))
    print(f"written: {folder / 'recommendation.md'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
