"""summary.json and summary.csv held to figures made again from the answers.

Also the rest of report.md: a table line that the executed analysis does not have was edited.
"""

import csv
import json
import math
from pathlib import Path

from helpers.report.checks.published_numbers import plain, tables
from helpers.report.checks.recomputed_tables import NAMES, Recomputed, checks_of
from helpers.study.schema import Comparison

CLOSE = 1e-6  # relative, of figures made another way or by another version of a library
SHARED = "shared_text"
FIGURE = ("value", "low", "high", "n")


def wrong_comparisons(rows: dict[Comparison, dict], published: list[dict]) -> list[str]:
    """Comparisons of summary.json that are not those made again, value by value."""
    before = {comparison_place(row): row for row in published}
    after = {comparison_place(row): row for row in rows.values()}
    told = [f"{name} was published and is none of the study's" for name in before - after.keys()]
    told += [f"{name} was not published" for name in after - before.keys()]
    for name in (n for n in after if n in before):
        again = {k: v for k, v in after[name].items() if k not in ("p_room", "p_drawn")}
        again["p"] = after[name]["p_drawn"]
        for key in dict.fromkeys([*again, *before[name]]):
            now, then = again.get(key), before[name].get(key)
            if not same(now, then):
                told.append(f"summary.json, {name}: {key} is {now!r}, published {then!r}")
    return told


def comparison_place(row: dict) -> str:
    """What a comparison is called in messages."""
    against = f"{row['variant']} against {row['baseline']}"
    return f"{row['model']}: {NAMES.get(row['dataset'], row['dataset'])}, {against}"


def same(now, then) -> bool:
    """Equal, but for the last digits of numbers."""
    if isinstance(now, float) and isinstance(then, float | int) and not isinstance(then, bool):
        return math.isclose(now, then, rel_tol=CLOSE, abs_tol=1e-9)
    return now == then


def wrong_headlines(published: dict, figures: Recomputed) -> list[str]:
    """What summary.json says of the study, the fixed answers and every variant."""
    study, s = figures.study, figures.study.statistics
    due = {"title": study.title, "seed": study.seed, "baseline": study.baseline}
    due["statistics"] = {
        "confidence": s.confidence,
        "power": s.power,
        "margin": s.margin,
        "resamples": s.resamples,
        "primary_comparisons": len(s.primary),
    }
    due["best_fixed_answers"] = {
        name: {"answer": answer, "score": score} for name, (answer, score) in figures.fixed.items()
    }
    told = _different("summary.json", due, {key: published.get(key) for key in due})
    for model, variant in figures.asked:
        stored = published.get("models", {}).get(model, {}).get("variants", {}).get(variant, {})
        again = _variant(figures, (model, variant))
        place = f"summary.json, {model}/{variant}"
        told += _different(place, again, {key: stored.get(key) for key in again})
    return told


def _variant(figures: Recomputed, at: tuple[str, str]) -> dict:
    passed, failed = checks_of(figures.asked[at].gates)
    sets = {name: _named(figures.sets[*at, name]) for name in figures.study.evaluation.datasets}
    shared = _named(figures.shared[at])
    return {"passed": passed, "failed_gates": failed, SHARED: shared, "datasets": sets}


def _named(found: dict) -> dict:
    return {name: dict(zip(FIGURE, figure, strict=True)) for name, figure in found.items()}


def _different(place: str, due, stored) -> list[str]:
    """Every value below that is another one, by its path."""
    if isinstance(due, dict) and isinstance(stored, dict):
        keys = dict.fromkeys([*due, *stored])
        return [
            line
            for key in keys
            for line in _different(f"{place}, {key}", due.get(key), stored.get(key))
        ]
    return [] if same(due, stored) else [f"{place}: published {stored!r}, recomputed {due!r}"]


def wrong_lines(path: Path, figures: Recomputed) -> list[str]:
    """Lines of summary.csv that are not those made again."""
    if not path.is_file():
        return [f"{path.name} is missing; run make report again"]
    with path.open(newline="", encoding="utf-8") as stream:
        rows = list(csv.reader(stream))
    stored = {tuple(row[:4]): row[4:] for row in rows[1:]}
    due = {}
    for at in figures.asked:
        found = {SHARED: figures.shared[at]}
        found |= {name: figures.sets[*at, name] for name in figures.study.evaluation.datasets}
        due |= {(*at, part, key): f for part, named in found.items() for key, f in named.items()}
    told = [f"summary.csv has no row {' / '.join(key)}" for key in due if key not in stored]
    told += [
        f"summary.csv: row {' / '.join(k)} is none of the study's" for k in stored.keys() - due
    ]
    if len(stored) != len(rows) - 1:
        told.append("summary.csv has a row twice")
    for key, figure in due.items():
        for column, value, text in zip(FIGURE, figure, stored.get(key, ()), strict=False):
            if not same(value, _number(text)):
                where = f"summary.csv, row {' / '.join(key)}, column {column}"
                told.append(f"{where}: published {text!r}, recomputed {value!r}")
    return told


def _number(text: str):
    if text == "":
        return None
    try:
        return int(text) if text.lstrip("-").isdigit() else float(text)
    except ValueError:
        return text


def edited_tables(markdown: str, notebook: Path) -> list[str]:
    """Cells of report.md that the executed analysis shows otherwise; none where it is not kept."""
    if not notebook.is_file():
        return []
    cells = json.loads(notebook.read_text("utf-8"))["cells"]
    shown = [
        "".join(output["data"].get("text/markdown", ""))
        for cell in cells
        for output in cell.get("outputs", ())
        if "data" in output
    ]
    before, after = tables("\n\n".join(shown)), tables(markdown)
    if len(before) != len(after):
        return [f"report.md has {len(after)} tables, the executed analysis {len(before)}"]
    told = []
    for one, other in zip(before, after, strict=True):
        place = f"report.md, {other.heading}"
        if one.columns != other.columns or len(one.rows) != len(other.rows):
            told.append(f"{place}: columns or rows are not those of the executed analysis")
            continue
        for was, now in zip(one.rows, other.rows, strict=True):
            told += [
                f"{place}, row {plain(was[0])}, column {column}: published {plain(b)!r}, "
                f"in the executed analysis {plain(a)!r}"
                for column, a, b in zip(one.columns, was, now, strict=False)
                if a != b
            ]
    return told
