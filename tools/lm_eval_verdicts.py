"""Verdicts on two runs of lm-evaluation-harness, whoever made them, from their sample files.

    make verdicts FROM=baseline/samples_task_date.jsonl,variant/samples_task_date.jsonl

reads what `--log_samples` writes (0.4.5 or newer; `make export` writes it too). Documents are
paired by their number and hashes; two runs that were not asked the same are refused. Every metric
of 0 or 1 gets the difference of the two accuracies, the items lost and gained, and a verdict; where
the files hold log-likelihoods of options, so does the probability of the right option. Statistics
and rules are those of the report; confidence, power and margins are those of a study file.

A sample file says what was asked and answered, not by which weights. What could be checked here is
checked (hashes, and metrics against log-likelihoods); the page ends with what could not.
"""

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from helpers.core.errors import StudyError, one_line
from helpers.evaluation.scoring import mean
from helpers.report.markdown import (
    MISSING,
    count,
    p_value,
    percent,
    percent_plain,
    points,
    signed4,
    span,
)
from helpers.statistics import graded
from helpers.statistics.intervals import clustered_mean, holm
from helpers.statistics.verdicts import (
    DecisionRules,
    PairedComparison,
    VariantPredictions,
    decide_verdict,
    invalid_reason,
    paired_comparison,
    uninformative_reason,
)
from helpers.study.loading import load_study, study_file_label
from helpers.study.schema import Statistics
from tools.lm_eval_samples import (
    Options,
    Pairs,
    SampleFile,
    clusters_of,
    document_id,
    option_texts,
    options_of,
    paired_samples,
    prediction,
    read_samples,
    requests_of,
    shared_field,
)

QUESTION_FIELDS = ("question", "problem", "query", "input", "sentence", "text", "goal", "ctx")
MOST_ITEMS = 20  # listed of each kind
ADAPTER = "lm-eval"  # none of this project's: golds are compared as texts
CHOICES = ("acc", "acc_norm")  # accuracies that follow from log-likelihoods of options


@dataclass(frozen=True)
class Test:
    """One comparison of two runs by one score.

    Attributes:
        name: the metric, with its filter if the task has several.
        kind: `accuracy` for scores of 0 or 1, `graded` for the right option's probability, `mean`
            for other numbers, which get no verdict.
        baseline, variant: the same documents in one order.
        normalize: of a graded test, whether log-likelihoods are divided by lengths (`bytes`).
    """

    name: str
    kind: Literal["accuracy", "graded", "mean"]
    baseline: list[dict]
    variant: list[dict]
    normalize: str = "none"

    @property
    def sides(self) -> tuple[VariantPredictions, VariantPredictions]:
        return (
            VariantPredictions("the baseline", self.baseline),
            VariantPredictions("the variant", self.variant),
        )


def tests_of(
    pairs: dict[str, Pairs], metrics: Sequence[str], cluster_field: str | None
) -> tuple[list[Test], list[str]]:
    """The tests that the files allow, and a sentence on each that they do not."""
    tests: list[Test] = []
    notes: dict[str, None] = {}  # ordered, each once
    for filter_name, filter_pairs in pairs.items():
        clusters, options = clusters_of(filter_pairs, cluster_field), options_of(filter_pairs)
        if isinstance(options, str):
            notes[f"No graded scores: {options}."] = None
        for metric in metrics:
            name = metric if filter_name == "none" else f"{metric} ({filter_name})"
            values = [sample[metric] for pair in filter_pairs for sample in pair]
            if not all(isinstance(v, int | float) and math.isfinite(v) for v in values):
                notes[f"{name} is not compared: it has no number for each document."] = None
                continue
            readable = options if isinstance(options, Options) and metric in CHOICES else None
            sides = [
                [
                    prediction(pair[side], metric, readable, cluster)
                    for pair, cluster in zip(filter_pairs, clusters, strict=True)
                ]
                for side in (0, 1)
            ]
            tests.append(Test(name, "accuracy" if set(values) <= {0, 1} else "mean", *sides))
            if readable and (metric == "acc" or readable.lengths):
                by_length = metric == "acc_norm"
                title = f"probability of the right option{', by length' * by_length}"
                tests.append(Test(title, "graded", *sides, "bytes" if by_length else "none"))
    return tests, list(notes)


@dataclass(frozen=True)
class Row:
    """What is said of one test; `result` is None if an invalid run has no graded scores."""

    test: Test
    before: float
    after: float
    result: PairedComparison | graded.GradedComparison | None
    kind: str
    reason: str
    p: float | None


def judged(tests: Sequence[Test], settings: Statistics, *, seed: int) -> list[Row]:
    """A row for each test; p is Holm's over all that get a verdict.

    An invalid comparison stays in the family with p = 1, so that a broken run never eases the test
    of another score.
    """
    family = [test for test in tests if test.kind != "mean"]
    s = settings
    rules = DecisionRules(s.confidence, s.power, s.margin, s.resamples, seed, len(family))
    alpha = rules.alpha / max(1, len(family))
    invalid = {test.name: invalid_reason(ADAPTER, *test.sides, rules) for test in family}
    results = {
        test.name: None
        if test.kind == "graded" and invalid[test.name]
        else _result(test, rules, alpha)
        for test in tests
    }
    p_values = holm(
        {t.name: 1.0 if invalid[t.name] else results[t.name].p for t in family}  # type: ignore
    )
    return [
        _row(test, results[test.name], invalid.get(test.name), p_values.get(test.name), rules, s)
        for test in tests
    ]


def _result(test: Test, rules: DecisionRules, alpha: float):
    if test.kind == "accuracy":
        return paired_comparison(*test.sides, rules, alpha=alpha)
    levels = {"confidence": rules.confidence, "alpha": alpha, "power": rules.power}
    if test.kind == "graded":
        return graded.compare_graded(*_scored(test), **levels)
    changes = [a["score"] - b["score"] for b, a in zip(test.baseline, test.variant, strict=True)]
    clusters = [row["cluster"] or row["id"] for row in test.baseline]
    return graded.comparison_of(clustered_mean(changes, clusters), unit="probability", **levels)


def _scored(test: Test) -> list[graded.Scored]:
    sides = (test.baseline, test.variant)
    return [graded.scored(rows, normalize=test.normalize) for rows in sides]


def _row(
    test: Test, result, invalid: str | None, p: float | None, rules: DecisionRules, s: Statistics
) -> Row:
    before, after = (mean([row["score"] for row in rows]) for rows in (test.baseline, test.variant))
    if test.kind == "mean":
        reason = "no margin is declared for scores other than 0 and 1"
        return Row(test, before, after, result, "exploratory", reason, result.p)
    if test.kind == "accuracy":
        blind = uninformative_reason(ADAPTER, test.sides[0], rules)
        verdict = decide_verdict(result, invalid, blind, p, rules)
        return Row(test, before, after, result, verdict.kind, verdict.reason, verdict.holm_p)
    if invalid:
        return Row(test, math.nan, math.nan, None, "invalid", invalid, None)
    scored = _scored(test)
    ability = graded.ability(scored[0], confidence=rules.confidence)
    margin = s.graded_margins.probability
    kind = graded.judge_graded(result, able=ability.able, adjusted_p=p, margin=margin)
    reason = "" if ability.able else "the baseline's probabilities hardly depend on the question"
    return Row(test, *(float(x.scores.mean()) for x in scored), result, kind, reason, p)


def page(
    files: tuple[SampleFile, SampleFile],
    pairs: dict[str, Pairs],
    rows: Sequence[Row],
    notes: Sequence[str],
    *,
    settings: Statistics,
    settings_name: str,
    most_items: int,
    cluster_field: str | None,
) -> str:
    """The whole answer as text."""
    baseline, variant = files
    documents = next(iter(pairs.values()))
    s = settings
    head = [
        f"baseline: {one_line(baseline.place)}",
        f"variant:  {one_line(variant.place)}",
        f"{count(len(documents), 'document')} with the same prompts, targets and options. "
        f"Confidence {percent_plain(s.confidence)}, margins {100 * s.margin:g} points of accuracy "
        f"and {s.graded_margins.probability:g} of probability ({study_file_label(settings_name)}).",
    ]
    sections = [head, _table(rows), [line for row in rows for line in _sentences(row, settings)]]
    sections += [_flips(row, pairs, most_items) for row in rows if row.test.kind == "accuracy"]
    return "\n\n".join(
        "\n".join(lines)
        for lines in [*sections, notes, _closing(documents, cluster_field)]
        if lines
    )


def _table(rows: Sequence[Row]) -> list[str]:
    cells = [("score", "baseline", "variant", "difference", "lost", "gained", "p", "verdict")]
    for row in rows:
        is_accuracy = row.test.kind == "accuracy"
        show, show_change = (percent, points) if is_accuracy else (_four, signed4)
        result, flips = row.result, ("", "")
        if isinstance(result, PairedComparison):
            flips = str(result.losses), str(result.gains)
        change = MISSING
        if result:
            change = f"{show_change(result.delta)} {span(result.interval, show_change)}"
            change += " points" * is_accuracy
        levels = (
            (MISSING, MISSING) if math.isnan(row.before) else (show(row.before), show(row.after))
        )
        cells.append((row.test.name, *levels, change, *flips, p_value(row.p), row.kind))
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in cells
    ]


def _four(value: float) -> str:
    return f"{value:.4f}"


def _sentences(row: Row, settings: Statistics) -> list[str]:
    """The reason of a verdict, and what a null result could have missed."""
    parts = [row.reason] if row.reason else []
    if row.kind == "inconclusive" and row.result:
        size = row.result.detectable
        shown = (
            None if size is None else points(size) if row.test.kind == "accuracy" else _four(size)
        )
        power = percent_plain(settings.power)
        parts.append(
            f"only a loss of {shown.lstrip('+')} or more would be detected with {power} power"
            if shown
            else "no loss would be detected with these documents"
        )
    return [f"{row.test.name}: {row.kind}: {'; '.join(parts)}."] if parts else []


def _flips(row: Row, pairs: dict[str, Pairs], most: int) -> list[str]:
    """The documents that an accuracy lost and gained, each with its gold and both answers."""
    samples = {document_id(pair[0]): pair[0] for of_filter in pairs.values() for pair in of_filter}
    both = list(zip(row.test.baseline, row.test.variant, strict=True))
    lines = []
    for word, change in (("lost", -1), ("gained", 1)):
        flipped = [(b, a) for b, a in both if a["score"] - b["score"] == change]
        lines.append(f"{row.test.name}: {count(len(flipped), 'document')} {word}")
        lines += [_flip_line(b, a, samples[b["id"]]) for b, a in flipped[:most]]
        if len(flipped) > most:
            lines.append(f"  … and {len(flipped) - most} more; ARGS=--all lists them")
    return lines


def _flip_line(before: dict, after: dict, sample: dict) -> str:
    golds = [_answer(before | {"parsed": gold}, sample) for gold in before["golds"]]
    answers = f"{_answer(before, sample)} → {_answer(after, sample)}"
    return f"  {sample['doc_id']}  gold {' or '.join(golds)}: {answers}  {_question(sample)}"


def _answer(row: dict, sample: dict) -> str:
    text = row["parsed"]
    if "logprobs" in row:
        text = option_texts(sample)[int(text)] if text != "-1" else "not finite"
    return f"“{_cut(text, 40)}”"


def _question(sample: dict) -> str:
    doc = sample["doc"] if isinstance(sample["doc"], dict) else {}
    text = next((doc[name] for name in QUESTION_FIELDS if isinstance(doc.get(name), str)), "")
    return _cut(text or str(requests_of(sample)[0].get("arg_0", ""))[-70:], 70)


def _cut(text: str, most: int) -> str:
    line = one_line(text)
    return line if len(line) <= most else f"{line[: most - 1]}…"


def _closing(documents: Pairs, cluster_field: str | None) -> list[str]:
    """What the files cannot show, and what stands against independent documents."""
    lines = [
        "These files do not show by which weights the answers were given, whether both runs read "
        "the same tokens (hashes are of texts), whether answers depend on their batch or were cut "
        "off, whether documents were used for calibration or training, nor whether this "
        "comparison was declared before the numbers were known."
    ]
    if cluster_field:
        lines.append(f"Documents with the same {cluster_field} count as one unit.")
    elif shared := shared_field(documents):
        name, number = shared
        lines.append(
            f"{number} documents share their {name} with others but count as independent here: "
            f"add ARGS='--cluster {name}'."
        )
    else:
        lines.append("Documents count as independent.")
    return lines


def verdicts_of(
    baseline_path: Path,
    variant_path: Path,
    *,
    settings_name: str,
    metric: str | None,
    cluster_field: str | None,
    most_items: int,
) -> str:
    """The page on two sample files.

    Raises:
        StudyError: a file is none, the two do not fit, or an option names what is not there.
    """
    study = load_study(settings_name, with_sources=False)
    files = read_samples(baseline_path), read_samples(variant_path)
    pairs = paired_samples(*files)
    metrics = files[0].metrics
    if metric is not None and metric not in metrics:
        raise StudyError(
            f"--metric {metric}: the files have {', '.join(metrics)}; name one of them"
        )
    if any(len(filter_pairs) < 2 for filter_pairs in pairs.values()):
        raise StudyError(f"{baseline_path}: holds one document; give at least two")
    tests, notes = tests_of(pairs, metrics if metric is None else [metric], cluster_field)
    if not tests:
        raise StudyError(
            f"{baseline_path}: no metric has a number for each document "
            f"({', '.join(metrics)}); there is nothing to compare"
        )
    rows = judged(tests, study.statistics, seed=study.seed)
    return page(
        files,
        pairs,
        rows,
        notes,
        settings=study.statistics,
        settings_name=settings_name,
        most_items=most_items,
        cluster_field=cluster_field,
    )


def main(argv: list[str] | None = None) -> int:
    """The command line: 0 if there are verdicts, 2 after a line on what is wrong."""
    parser = argparse.ArgumentParser(
        prog="make verdicts FROM=baseline.jsonl,variant.jsonl", description=__doc__.split("\n")[0]
    )
    parser.add_argument("files", help="two sample files, divided by a comma; the baseline first")
    parser.add_argument("--settings", default="demo", help="the study whose statistics are used")
    parser.add_argument("--metric", help="one metric only, such as acc_norm")
    parser.add_argument("--cluster", metavar="FIELD", help="documents that share it count as one")
    parser.add_argument("--all", action="store_true", help="list all documents lost and gained")
    arguments = parser.parse_args(argv)
    paths = [part.strip() for part in arguments.files.split(",")]
    try:
        if len(paths) != 2 or not all(paths):
            number = count(sum(map(bool, paths)), "file")
            raise StudyError(
                f"FROM = {arguments.files!r} names {number}; give two, the baseline first: "
                "FROM=a.jsonl,b.jsonl"
            )
        print(
            verdicts_of(
                *map(Path, paths),
                settings_name=arguments.settings,
                metric=arguments.metric,
                cluster_field=arguments.cluster,
                most_items=sys.maxsize if arguments.all else MOST_ITEMS,
            )
        )
    except StudyError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
