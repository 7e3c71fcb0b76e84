"""Makes every number of a study again from its answers, and holds it to what was published.

    python -m helpers.report.checks.recomputation demo

reads params/demo.yaml and of outputs/demo the answers, summary.json, summary.csv and
report.md: no model, no tokenizer, no torch. Every answer is read and scored again from its
raw text (where its items are at hand), every figure, comparison and correction computed by
statistics of its own (`evaluation.recomputed_*`), every control looked at again, and the
numbers in the report's tables compared. Whatever differs is named with its place, what was
published and what came out, and the exit code is 1. None of the code that makes the report
is used.
"""

import argparse
import sys
from pathlib import Path

from helpers.core.errors import StudyError
from helpers.core.hashing import sha256_file
from helpers.core.paths import StudyPaths
from helpers.core.records import read_json
from helpers.evaluation.checks.recomputed_answers import rescored
from helpers.evaluation.checks.second_scoring import misread_part
from helpers.report.checks.recomputed_chapters import wrong_chapters
from helpers.report.checks.recomputed_costs import wrong_costs
from helpers.report.checks.recomputed_records import wrong_records
from helpers.report.checks.recomputed_sentences import wrong_sentences
from helpers.report.checks.recomputed_summary import (
    edited_tables,
    wrong_comparisons,
    wrong_csv_lines,
    wrong_headlines,
)
from helpers.report.checks.recomputed_tables import (
    DATASET_NAMES,
    RecomputedFigures,
    wrong_cells,
    wrong_verdict_words,
)
from helpers.sources.near_duplicates import cluster_near_duplicates
from helpers.sources.sampling import load_items
from helpers.statistics.checks.recomputed_verdicts import comparison_rows
from helpers.statistics.controls import ControlOutcome
from helpers.statistics.published_answers import PublishedAnswers, read_answers
from helpers.study.loading import load_study, study_file
from helpers.study.schema import Comparison, Study
from helpers.study.schema_sources import HubDataset

ANSWERS = "answers"  # the folder, and the key of summary.json


def recompute(study: str) -> tuple[str, list[str]]:
    """(the verdicts as a text table, every difference from the published values).

    Raises:
        StudyError: the study, its answers or its summary cannot be read.
    """
    loaded, paths = load_study(study), StudyPaths(study_file(study).stem)
    folder = paths.root
    published = read_json(folder / "summary.json", made_by="04_analysis")
    differing = _changed_files(folder / ANSWERS, published.get(ANSWERS, {}))
    answers = read_answers(folder / ANSWERS, loaded)
    joined = "clusters" in published  # before, near-duplicates counted as independent items
    for name in loaded.evaluation.datasets:
        differing += _misread_answers(answers, name, joined)
    rows = comparison_rows(loaded, answers.answers, _published_p_values(published["comparisons"]))
    figures = RecomputedFigures(answers, rows, published)
    differing += wrong_comparisons(rows, published["comparisons"])
    differing += _wrong_controls(answers, published["controls"])
    differing += wrong_headlines(published, figures)
    differing += wrong_csv_lines(folder / "summary.csv", figures)
    differing += _wrong_report(paths, figures)
    return _verdict_table(loaded, list(rows.values())), differing


def _published_p_values(comparisons: list[dict]) -> dict[Comparison, float | None]:
    keys = Comparison.model_fields
    return {Comparison(**{k: row[k] for k in keys}): row["p"] for row in comparisons}


def _wrong_report(paths: StudyPaths, figures: RecomputedFigures) -> list[str]:
    """Cells and sentences of report.md that differ; none if there is no report.md."""
    path = paths.root / "report.md"
    if not path.is_file():
        return []
    text = path.read_text("utf-8")
    lines = wrong_cells(text, figures) + wrong_verdict_words(text, figures)
    lines += wrong_sentences(text, figures) + wrong_chapters(text, figures) + wrong_costs(text)
    lines += wrong_records(text, figures, paths.notebooks)
    return lines + edited_tables(text, paths.notebooks / "04_analysis.ipynb")


def _control_fields(outcome: ControlOutcome) -> dict:
    """A control's outcome under the names of summary.json."""
    fields = {"role": outcome.role, "must": outcome.expected}
    return fields | {"found": outcome.observed, "done": outcome.ok}


def _wrong_controls(answers: PublishedAnswers, published: list[dict]) -> list[str]:
    """Controls of summary.json whose recomputed outcome differs."""
    after = {
        f"{m}: control {v}": _control_fields(outcome)
        for (m, v), outcome in answers.control_outcomes.items()
    }
    before = {f"{row['model']}: control {row['variant']}": row for row in published}
    lines = [f"{name} was published and is none of the study's" for name in before - after.keys()]
    lines += [f"{name} was not published" for name in after - before.keys()]
    for name in (n for n in after if n in before):
        lines += [
            f"summary.json, {name}: {key} is {value!r}, published {before[name].get(key)!r}"
            for key, value in after[name].items()
            if before[name].get(key) != value
        ]
    return lines


def _changed_files(folder: Path, hashes: dict[str, str]) -> list[str]:
    """Files of answers whose hash differs from that in summary.json."""
    if not hashes:
        return ["summary.json names no files of answers; run make report again"]
    return [
        f"{folder.name}/{name} is not the file the summary was made with"
        for name, digest in hashes.items()
        if not (folder / name).is_file() or sha256_file(folder / name) != digest
    ]


def _misread_answers(published: PublishedAnswers, dataset: str, joined: bool) -> list[str]:
    """Answers whose text does not give the stored score; none if the items are on a Hub.

    Args:
        joined: whether near-duplicates have one cluster.
    """
    evaluation_set = published.study.evaluation.datasets[dataset]
    if isinstance(evaluation_set.source, HubDataset):
        return []
    items = {
        item.id: item for item in load_items(evaluation_set.source, adapter=evaluation_set.adapter)
    }
    lines = []
    first = next(iter(published.variants.values())).predictions[dataset]
    answered = [items[row["id"]] for row in first if row["id"] in items]
    items |= {item.id: item for item in cluster_near_duplicates(answered)} if joined else {}
    for (model, variant), variant_answers in published.variants.items():
        at = f"{model}/{variant}: {DATASET_NAMES.get(dataset, dataset)} item"
        for row in variant_answers.predictions[dataset]:
            if (item := items.get(row["id"])) is None:
                lines.append(f"{at} {row['id']} is none of the set's")
                continue
            rescored_row = rescored(evaluation_set, item, row)
            wrong_keys = [key for key, value in rescored_row.items() if row.get(key) != value]
            if not wrong_keys and (reason := misread_part(evaluation_set, row)):
                wrong_keys = [reason]
            lines += [
                f"{at} {row['id']}: {key} does not follow from the answer" for key in wrong_keys
            ]
    return lines


def _verdict_table(study: Study, rows: list[dict]) -> str:
    """One line per comparison, the declared ones first, in the order of the summary."""
    cells = [("model", "dataset", "variant", "lost", "gained", "points", "Holm p", "verdict")]
    for row in rows:
        against = "" if row["baseline"] == study.baseline else f" vs {row['baseline']}"
        place = (
            row["model"],
            DATASET_NAMES.get(row["dataset"], row["dataset"]),
            f"{row['variant']}{against}",
        )
        counts = str(row["losses"]), str(row["gains"]), f"{100 * row['delta']:+.1f}"
        p = "–" if row["holm_p"] is None else f"{row['holm_p']:.3f}"
        cells.append((*place, *counts, p, row["verdict"]))
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) for line in cells)
    return "\n".join(line.rstrip() for line in lines)


def main(argv: list[str] | None = None) -> int:
    """The command line; see `--help`."""
    parser = argparse.ArgumentParser(
        prog="python -m helpers.report.checks.recomputation", description=__doc__
    )
    parser.add_argument("study", help="a study's name in params/, or the path of its YAML file")
    arguments = parser.parse_args(argv)
    try:
        table, differing = recompute(arguments.study)
    except StudyError as error:
        print(error, file=sys.stderr)
        return 2
    print(table)
    if differing:
        print(f"\nNOT AS PUBLISHED, in {len(differing)} places:", file=sys.stderr)
        print("\n".join(f"  {line}" for line in differing), file=sys.stderr)
        return 1
    recomputed = f"{table.count(chr(10))} verdicts and every table recomputed from the answers"
    print(f"\n{recomputed}: all as published")
    return 0


if __name__ == "__main__":
    sys.exit(main())
