"""summary.json and summary.csv held to figures made again from the answers.

Also the rest of report.md: a table line that the executed analysis does not have was edited.
"""

import csv
import json
import math
from pathlib import Path

from helpers.report.checks.published_numbers import plain_text, read_tables
from helpers.report.checks.recomputed_tables import (
    DATASET_NAMES,
    RecomputedFigures,
    failed_gate_names,
)
from helpers.study.schema import Comparison

TOLERANCE = 1e-6  # relative, of figures made another way or by another version of a library
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


def equal_values(now, then) -> bool:
    """Equal up to the last digits of numbers."""
    if isinstance(now, float) and isinstance(then, float | int) and not isinstance(then, bool):
        return math.isclose(now, then, rel_tol=TOLERANCE, abs_tol=1e-9)
    return now == then


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
    return {"passed": passed, "failed_gates": failed, SHARED: shared, "datasets": sets}


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
