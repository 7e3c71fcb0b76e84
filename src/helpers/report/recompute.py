"""Makes every verdict of a study again from its answers, and holds it to what was published.

    python -m helpers.report.recompute demo

reads params/demo.yaml, outputs/demo/answers/ and outputs/demo/summary.json: no model, no
tokenizer, no torch. Every answer is read and scored again from its raw text (where its
items are at hand), every comparison paired, tested and judged again, every control looked
at again. Whatever differs is named, and the exit code is 1.
"""

import argparse
import math
import sys
from pathlib import Path

from helpers.evaluation.answers import Published, read_answers
from helpers.evaluation.gates import rescored
from helpers.evaluation.verdicts import study_verdicts
from helpers.report.formats import dataset_name, p_value, points
from helpers.report.summary import ANSWERS, comparison_row, control_row
from helpers.sources.datasets import load_items
from helpers.study.errors import StudyError
from helpers.study.hashing import sha256_file
from helpers.study.loading import load_study, study_file
from helpers.study.paths import StudyPaths
from helpers.study.records import read_json
from helpers.study.schema import Study
from helpers.study.source_settings import HubDataset

TOLERANCE = 1e-9  # of figures made by another version of a library


def recompute(study: str) -> tuple[str, list[str]]:
    """(the verdicts as a text table, everything that differs from what was published).

    Raises:
        StudyError: the study, its answers or its summary cannot be read.
    """
    loaded, folder = load_study(study), StudyPaths(study_file(study).stem).root
    published = read_json(folder / "summary.json", made_by="04_analysis")
    differing = _changed_files(folder / ANSWERS, published.get(ANSWERS, {}))
    found = read_answers(folder / ANSWERS, loaded)
    differing += [f for name in loaded.evaluation.datasets for f in _misread(found, name)]
    verdicts = study_verdicts(loaded, found.answers)
    rows = [comparison_row(loaded, c, verdict) for c, verdict in verdicts.items()]
    controls = [control_row(at, duty) for at, duty in found.duties.items()]
    differing += _differences(rows, published["comparisons"], _at_comparison)
    differing += _differences(controls, published["controls"], _at_control)
    return _table(loaded, rows), differing


def _changed_files(folder: Path, hashes: dict[str, str]) -> list[str]:
    """Files that are not those the summary was written beside."""
    if not hashes:
        return ["summary.json names no files of answers; run make report again"]
    return [
        f"{folder.name}/{name} is not the file the summary was made with"
        for name, digest in hashes.items()
        if not (folder / name).is_file() or sha256_file(folder / name) != digest
    ]


def _misread(found: Published, dataset: str) -> list[str]:
    """Answers whose text does not give what is stored of it; none if the items are on a Hub."""
    wanted = found.study.evaluation.datasets[dataset]
    if isinstance(wanted.source, HubDataset):
        return []
    items = {item.id: item for item in load_items(wanted.source, adapter=wanted.adapter)}
    told = []
    for (model, variant), asked in found.asked.items():
        at = f"{model}/{variant}: {dataset_name(dataset)} item"
        for row in asked.predictions[dataset]:
            if (item := items.get(row["id"])) is None:
                told.append(f"{at} {row['id']} is none of the set's")
                continue
            again = rescored(wanted, item, row)
            odd = [key for key, value in again.items() if row.get(key) != value]
            told += [f"{at} {row['id']}: {key} does not follow from the answer" for key in odd]
    return told


def _at_comparison(row: dict) -> str:
    against = f"{row['variant']} against {row['baseline']}"
    return f"{row['model']}: {dataset_name(row['dataset'])}, {against}"


def _at_control(row: dict) -> str:
    return f"{row['model']}: control {row['variant']}"


def _differences(rows: list[dict], published: list[dict], at) -> list[str]:
    before = {at(row): row for row in published}
    after = {at(row): row for row in rows}
    told = [f"{name} was published and is none of the study's" for name in before - after.keys()]
    told += [f"{name} was not published" for name in after - before.keys()]
    for name in (n for n in after if n in before):
        for key in dict.fromkeys([*after[name], *before[name]]):
            now, then = after[name].get(key), before[name].get(key)
            if not _same(now, then):
                told.append(f"{name}: {key} is {now!r}, published {then!r}")
    return told


def _same(now, then) -> bool:
    if isinstance(now, float) and isinstance(then, float):
        return math.isclose(now, then, rel_tol=TOLERANCE, abs_tol=TOLERANCE)
    return now == then


def _table(study: Study, rows: list[dict]) -> str:
    """One line a comparison, the declared ones first, as they are in the summary."""
    cells = [("model", "dataset", "variant", "lost", "gained", "points", "Holm p", "verdict")]
    for row in rows:
        against = "" if row["baseline"] == study.baseline else f" vs {row['baseline']}"
        place = row["model"], dataset_name(row["dataset"]), f"{row['variant']}{against}"
        counts = str(row["losses"]), str(row["gains"]), points(row["delta"])
        cells.append((*place, *counts, p_value(row["holm_p"]), row["verdict"]))
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) for line in cells)
    return "\n".join(line.rstrip() for line in lines)


def main(argv: list[str] | None = None) -> int:
    """The command line; see `--help`."""
    parser = argparse.ArgumentParser(prog="python -m helpers.report.recompute", description=__doc__)
    parser.add_argument("study", help="a study's name in params/, or the path of its YAML file")
    given = parser.parse_args(argv)
    try:
        table, differing = recompute(given.study)
    except StudyError as error:
        print(error, file=sys.stderr)
        return 2
    print(table)
    if differing:
        print(f"\nNOT AS PUBLISHED, in {len(differing)} places:", file=sys.stderr)
        print("\n".join(f"  {line}" for line in differing), file=sys.stderr)
        return 1
    print(f"\n{table.count(chr(10))} verdicts made again from the answers: all as published")
    return 0


if __name__ == "__main__":
    sys.exit(main())
