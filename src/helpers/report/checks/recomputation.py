"""Recomputes every number of a study from its answers and compares it with the published one.

    python -m helpers.report.checks.recomputation demo

reads params/demo.yaml and of outputs/demo the answers, summary.json, summary.csv and report.md: no
model, no tokenizer, no torch. Every answer is read and scored again from its raw text (where its
items are at hand), every figure, comparison and correction computed by statistics of its own
(`helpers.statistics.checks`), every control looked at again, and the numbers in the report's
tables compared. A table line that the executed analysis does not have was edited. Whatever differs
is named with its place, what was published and what came out, and the exit code is 1. None of the
code that makes the report is used.
"""

import argparse
import csv
import json
import sys
from pathlib import Path
from unicodedata import normalize

from helpers.core.errors import StudyError
from helpers.core.files import StudyPaths
from helpers.core.records import read_json, sha256_file, sha256_text
from helpers.evaluation.checks.recomputed_answers import misread_part, rescored
from helpers.report.checks.recomputed_chapters import wrong_chapters, wrong_costs, wrong_records
from helpers.report.checks.recomputed_graded_report import (
    KL_TAIL,
    missing_chapter,
    ordered_token_kls,
    wrong_cards,
    wrong_graded_blocks,
    wrong_graded_cells,
    wrong_kl_tables,
)
from helpers.report.checks.recomputed_sentences import wrong_sentences
from helpers.report.checks.recomputed_tables import (
    DATASET_NAMES,
    RecomputedFigures,
    equal_values,
    failed_gate_names,
    plain_text,
    read_tables,
    wrong_cells,
    wrong_verdict_words,
)
from helpers.sources.items import load_rows
from helpers.sources.sampling import cluster_near_duplicates, set_items
from helpers.statistics.checks.recomputed_verdicts import comparison_rows
from helpers.statistics.published_answers import PublishedAnswers, read_answers
from helpers.statistics.verdicts import ControlOutcome
from helpers.study.loading import load_study, study_file
from helpers.study.schema import Comparison, HubDataset, Study

SHARED = "shared_text"
FIGURE_FIELDS = ("value", "low", "high", "n")


def wrong_comparisons(rows: dict[Comparison, dict], published: list[dict]) -> list[str]:
    """Comparisons of summary.json that differ from the recomputed ones, value by value."""
    before = {comparison_place(row): row for row in published}
    after = {comparison_place(row): row for row in rows.values()}
    lines = [f"{name} was published and is none of the study's" for name in before - after.keys()]
    lines += [f"{name} was not published" for name in after - before.keys()]
    for name in (n for n in after if n in before):
        recomputed = {k: v for k, v in after[name].items() if k not in ("p_tolerance", "family_p")}
        recomputed["p"] = after[name]["family_p"]
        for key in dict.fromkeys([*recomputed, *before[name]]):
            now, then = recomputed.get(key), before[name].get(key)
            if not equal_values(now, then):
                lines.append(f"summary.json, {name}: {key} is {now!r}, published {then!r}")
    return lines


def comparison_place(row: dict) -> str:
    """A comparison's name in messages."""
    against = f"{row['variant']} against {row['baseline']}"
    return f"{row['model']}: {DATASET_NAMES.get(row['dataset'], row['dataset'])}, {against}"


def wrong_headlines(published: dict, figures: RecomputedFigures) -> list[str]:
    """Values of summary.json on the study, the constant answers and every variant that differ."""
    study, s = figures.study, figures.study.statistics
    expected = {"title": study.title, "seed": study.seed, "baseline": study.baseline}
    expected["statistics"] = {
        "confidence": s.confidence,
        "power": s.power,
        "margin": s.margin,
        "resamples": s.resamples,
        "primary_comparisons": len(s.primary),
    }
    expected["best_fixed_answers"] = {
        name: {"answer": answer, "score": score} for name, (answer, score) in figures.fixed.items()
    }
    lines = _differing_values(
        "summary.json", expected, {key: published.get(key) for key in expected}
    )
    for model, variant in figures.variants:
        stored = published.get("models", {}).get(model, {}).get("variants", {}).get(variant, {})
        recomputed = _variant_fields(figures, (model, variant))
        place = f"summary.json, {model}/{variant}"
        lines += _differing_values(place, recomputed, {key: stored.get(key) for key in recomputed})
    return lines


def _variant_fields(figures: RecomputedFigures, at: tuple[str, str]) -> dict:
    passed, failed = failed_gate_names(figures.variants[at].gates)
    sets = {
        name: _figure_fields(figures.sets[*at, name]) for name in figures.study.evaluation.datasets
    }
    shared = _figure_fields(figures.shared[at])
    fields = {"passed": passed, "failed_gates": failed, SHARED: shared, "datasets": sets}
    if not (tokens := ordered_token_kls(figures.variants[at].passages)):
        return fields | {"kl_by_token": None}
    names = ("passage", "token", "kl")
    tail = [dict(zip(names, token, strict=True)) for token in tokens[:KL_TAIL]]
    nonfinite = sum(kl is None for _, _, kl in tokens)
    return fields | {"kl_by_token": {"nonfinite": nonfinite, "tail": tail}}


def _figure_fields(figures: dict) -> dict:
    return {name: dict(zip(FIGURE_FIELDS, figure, strict=True)) for name, figure in figures.items()}


def _differing_values(place: str, expected, stored) -> list[str]:
    """Every nested value that differs, by its path."""
    if isinstance(expected, dict) and isinstance(stored, dict):
        keys = dict.fromkeys([*expected, *stored])
        return [
            line
            for key in keys
            for line in _differing_values(f"{place}, {key}", expected.get(key), stored.get(key))
        ]
    return (
        []
        if equal_values(expected, stored)
        else [f"{place}: published {stored!r}, recomputed {expected!r}"]
    )


def wrong_csv_lines(path: Path, figures: RecomputedFigures) -> list[str]:
    """Lines of summary.csv that differ from the recomputed ones."""
    if not path.is_file():
        return [f"{path.name} is missing; run make report again"]
    with path.open(newline="", encoding="utf-8") as stream:
        rows = list(csv.reader(stream))
    stored = {tuple(row[:4]): row[4:] for row in rows[1:]}
    expected = {}
    for at in figures.variants:
        figures_by_set = {SHARED: figures.shared[at]}
        figures_by_set |= {
            name: figures.sets[*at, name] for name in figures.study.evaluation.datasets
        }
        expected |= {
            (*at, part, key): f
            for part, named_figures in figures_by_set.items()
            for key, f in named_figures.items()
        }
    lines = [f"summary.csv has no row {' / '.join(key)}" for key in expected if key not in stored]
    lines += [
        f"summary.csv: row {' / '.join(k)} is none of the study's" for k in stored.keys() - expected
    ]
    if len(stored) != len(rows) - 1:
        lines.append("summary.csv has a row twice")
    for key, figure in expected.items():
        for column, value, text in zip(FIGURE_FIELDS, figure, stored.get(key, ()), strict=False):
            if not equal_values(value, _parsed_number(text)):
                where = f"summary.csv, row {' / '.join(key)}, column {column}"
                lines.append(f"{where}: published {text!r}, recomputed {value!r}")
    return lines


def _parsed_number(text: str):
    if text == "":
        return None
    try:
        return int(text) if text.lstrip("-").isdigit() else float(text)
    except ValueError:
        return text


def edited_tables(markdown: str, notebook: Path) -> list[str]:
    """Cells of report.md that differ from the executed analysis; none if it is not there."""
    if not notebook.is_file():
        return []
    cells = json.loads(notebook.read_text("utf-8"))["cells"]
    displayed = [
        "".join(output["data"].get("text/markdown", ""))
        for cell in cells
        for output in cell.get("outputs", ())
        if "data" in output
    ]
    before, after = read_tables("\n\n".join(displayed)), read_tables(markdown)
    if len(before) != len(after):
        return [f"report.md has {len(after)} tables, the executed analysis {len(before)}"]
    lines = []
    for executed, published in zip(before, after, strict=True):
        place = f"report.md, {published.heading}"
        if executed.columns != published.columns or len(executed.rows) != len(published.rows):
            lines.append(f"{place}: columns or rows are not those of the executed analysis")
            continue
        for was, now in zip(executed.rows, published.rows, strict=True):
            lines += [
                f"{place}, row {plain_text(was[0])}, column {column}: published {plain_text(b)!r}, "
                f"in the executed analysis {plain_text(a)!r}"
                for column, a, b in zip(executed.columns, was, now, strict=False)
                if a != b
            ]
    return lines


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
    differing += _misread_passages(answers)
    rows = comparison_rows(loaded, answers.answers, _published_p_values(published["comparisons"]))
    figures = RecomputedFigures(answers, rows, published)
    differing += wrong_comparisons(rows, published["comparisons"])
    differing += _wrong_controls(answers, published["controls"])
    differing += wrong_headlines(published, figures)
    differing += wrong_graded_blocks(published, figures)
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
    lines += [*wrong_cards(text, figures), *wrong_graded_cells(text, figures)]
    lines += [*missing_chapter(text, figures.summary), *wrong_kl_tables(text, figures)]
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
    items = {item.id: item for item in set_items(evaluation_set)[0]}
    lines = []
    first = next(iter(published.variants.values())).predictions[dataset]
    answered = [items[row["id"]] for row in first if row["id"] in items]
    items |= {item.id: item for item in cluster_near_duplicates(answered)} if joined else {}
    for (model, variant), variant_answers in published.every_draw.items():
        at = f"{model}/{variant}: {DATASET_NAMES.get(dataset, dataset)} item"
        for row in variant_answers.predictions.get(dataset, ()):  # a further draw lacks some sets
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


def _misread_passages(published: PublishedAnswers) -> list[str]:
    """Passages whose published tokens are not in their text; none if the texts are on a Hub."""
    source = published.study.evaluation.shared_text.dataset
    if isinstance(source, HubDataset):
        return []
    texts = {sha256_text(row["context"])[:16]: row["context"] for row in load_rows(source)}
    return [
        f"{model}/{variant}: the tokens of passage {row['id']} are not its text"
        for (model, variant), variant_answers in published.variants.items()
        for row in variant_answers.passages
        if "token_texts" in row
        and _letters("".join(row["token_texts"])) not in _letters(texts.get(row["id"], ""))
    ]


def _letters(text: str) -> str:
    """Letters and digits alone: a tokenizer may normalize a text and change its white space."""
    return "".join(c for c in normalize("NFKC", text).casefold() if c.isalnum())


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
