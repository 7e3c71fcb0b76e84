"""Compares published graded scores with those recomputed from the answers.

Three blocks of summary.json value by value, three tables of report.md cell by cell, and the
two bullets of the executive summary. None of the code that writes the report is used.
"""

import re
from collections.abc import Iterator, Mapping

from helpers.report.checks.recomputed_tables import (
    DATASET_NAMES,
    ExpectedNumbers,
    RecomputedFigures,
    Table,
    cell_differs,
    code_names,
    equal_values,
    plain_text,
    read_tables,
)

BLOCKS = ("graded", "pooled", "finetuning_cost")
PLACE_KEYS = ("model", "start", "finetuned", "dataset", "baseline", "variant")
COST_WORDS = {"worse": "higher cost", "better": "lower cost"}
COST_CLAUSES = {
    "worse": "higher cost",
    "better": "lower cost",
    "equivalent": "the same cost within the margin",
    "inconclusive": "no difference detected",
}


def wrong_graded_blocks(published: dict, figures: RecomputedFigures) -> list[str]:
    """Values of the three blocks that differ; a block that the answers give has to be there."""
    stored = {name: published[name] for name in BLOCKS if name in published}
    if figures.graded_blocks and not stored:
        return ["summary.json has no graded scores, and the answers have"]
    return list(_differing("summary.json", figures.graded_blocks, stored))


def _differing(place: str, expected, stored) -> Iterator[str]:
    """Every nested value that differs, by its path; list entries by the names they hold."""
    if isinstance(expected, list) and expected and isinstance(expected[0], Mapping):
        expected = {_entry_name(row): row for row in expected}
        if isinstance(stored, list) and all(isinstance(row, Mapping) for row in stored):
            stored = {_entry_name(row): row for row in stored}
    if isinstance(expected, Mapping) and isinstance(stored, Mapping):
        for key in dict.fromkeys([*expected, *stored]):
            yield from _differing(f"{place}, {key}", expected.get(key), stored.get(key))
    elif not equal_values(expected, stored):
        yield f"{place}: published {stored!r}, recomputed {expected!r}"


def _entry_name(row: Mapping) -> str:
    return " / ".join(str(row[key]) for key in PLACE_KEYS if key in row)


def wrong_graded_cells(markdown: str, figures: RecomputedFigures) -> list[str]:
    """Cells of the chapter's tables whose numbers or verdict differ."""
    lines = []
    for table in read_tables(markdown):
        first = table.columns[0]
        if (rows_of := TABLES.get(first)) is None:
            continue
        for row in map(table.by_column, table.rows):
            place = f"{plain_text(row[first])} / {plain_text(row['variant'])}"
            expected = rows_of(table, row, figures)
            if expected is None:
                lines.append(f"report.md, {table.heading}: row {place} is none of the study's")
                continue
            for column, (values, word) in expected.items():
                cell = plain_text(row.get(column, ""))
                if cell_differs(row.get(column, ""), values) or word not in cell:
                    numbers = ", ".join(f"{v:.6g}" for v in values) or "no number"
                    lines.append(
                        f"report.md, {table.heading}, row {place}, column {column}: "
                        f"published {cell!r}, recomputed {numbers} {word}"
                    )
    return lines


Expected = dict[str, tuple[list[float], str]]  # by column: numbers, and a word


def _expected_cell(row: Mapping | None, words: Mapping = COST_WORDS) -> tuple[list[float], str]:
    if row is None:
        return [], "–"
    numbers = [100 * row[key] for key in ("delta", "low", "high")] if "delta" in row else []
    return numbers, words.get(row["verdict"], row["verdict"])


def _dataset_columns(table: Table, figures: RecomputedFigures) -> dict[str, str]:
    """Evaluation set by column, `ARC [points]`."""
    titles = {DATASET_NAMES.get(n, n): n for n in figures.study.evaluation.datasets}
    names = {column: titles.get(column.rpartition(" [")[0]) for column in table.columns}
    return {column: name for column, name in names.items() if name}


def _variant_and_baseline(row: Mapping[str, str], figures: RecomputedFigures) -> tuple[str, str]:
    variant, _, against = plain_text(row["variant"]).partition(" vs ")
    return variant.partition(" (")[0], against or figures.study.baseline


def _comparison_cells(table: Table, row: dict, figures: RecomputedFigures) -> Expected | None:
    model, (variant, baseline) = (
        plain_text(row["graded scores"]),
        _variant_and_baseline(row, figures),
    )
    by_set = {
        c["dataset"]: c
        for c in figures.graded_blocks.get("graded", {}).get("comparisons", ())
        if (c["model"], c["variant"], c["baseline"]) == (model, variant, baseline)
    }
    if not by_set:
        return None
    columns = _dataset_columns(table, figures).items()
    return {column: _expected_cell(by_set.get(name), {}) for column, name in columns}


def _pooled_cells(table: Table, row: dict, figures: RecomputedFigures) -> Expected | None:
    del table
    at = plain_text(row["pooled"]), _variant_and_baseline(row, figures)[0]
    pooled = (
        r for r in figures.graded_blocks.get("pooled", ()) if (r["model"], r["variant"]) == at
    )
    if (difference := next(pooled, None)) is None:
        return None
    share = difference["recovery"]
    recovery = [100 * share[k] for k in ("value", "low", "high")] if share else []
    sets = ", ".join(DATASET_NAMES.get(n, n) for n in difference["sets"])
    cells = {"difference [points]": _expected_cell(difference, {})}
    cells["recovery"] = (recovery, "%" if share else "–")
    return cells | {"informative sets": ([], sets)}


def _cost_cells(table: Table, row: dict, figures: RecomputedFigures) -> Expected | None:
    at = plain_text(row["fine-tuned − start"]), _variant_and_baseline(row, figures)[0]
    costs = figures.graded_blocks.get("finetuning_cost", ())
    cost = next((r for r in costs if (r["finetuned"], r["variant"]) == at), None)
    if cost is None:
        return None
    columns = _dataset_columns(table, figures).items()
    cells = {column: _expected_cell(cost["sets"].get(name)) for column, name in columns}
    cells["pooled [points]"] = _expected_cell(cost["pooled"])
    return cells | {"KL [0.01 nats]": _expected_cell(cost["kl"])}


TABLES = {
    "graded scores": _comparison_cells,
    "pooled": _pooled_cells,
    "fine-tuned − start": _cost_cells,
}


def _check_score_bullet(text: str, figures: RecomputedFigures) -> Iterator[ExpectedNumbers | str]:
    """Where the variant is found worse, by how much, and which pooled losses are excluded."""
    variant, blocks = code_names(text)[0], figures.graded_blocks
    mine = [
        c
        for c in blocks.get("graded", {}).get("comparisons", ())
        if (c["variant"], c["baseline"]) == (variant, figures.study.baseline)
    ]
    worse = [c for c in mine if c["verdict"] == "worse"]
    silent = all(c["verdict"] in ("invalid", "uninformative") for c in mine)
    places = [f"{DATASET_NAMES.get(c['dataset'], c['dataset'])} of `{c['model']}`" for c in worse]
    published = text.partition(" Pooled")[0].partition(" No set can")[0]
    nothing = "no conclusion is possible" if silent else "no loss detected"
    expected = "worse on " if worse else nothing
    if expected not in published or not all(place in published for place in places):
        yield f"recomputed {', '.join(places) or nothing}"
    pooled = [r for r in blocks.get("pooled", ()) if r["variant"] == variant and "delta" in r]
    models = code_names(text.partition(" Pooled")[2])
    if models != [row["model"] for row in pooled]:
        yield f"recomputed pooled differences of {[row['model'] for row in pooled]}"
    excluded = [100 * max(0.0, -row["low"]) for row in pooled]
    yield text, [*(100 * c["delta"] for c in worse), *excluded]


def _check_cost_bullet(text: str, figures: RecomputedFigures) -> Iterator[ExpectedNumbers | str]:
    """The words and numbers on fine-tuning, of the pooled score and of the KL."""
    variant, finetuned, start = code_names(text)[:3]
    costs = figures.graded_blocks.get("finetuning_cost", ())
    at = (variant, finetuned, start)
    cost = next((r for r in costs if (r["variant"], r["finetuned"], r["start"]) == at), None)
    if cost is None:
        yield f"no such cost of `{variant}` was computed"
        return
    rows = [("score pooled", cost["pooled"]), ("KL", cost["kl"])]
    rows = [(what, row) for what, row in rows if row and "delta" in row]
    for what, row in rows:
        clause = f"by {what}, {COST_CLAUSES[row['verdict']]} ("
        if clause not in text:
            yield f"recomputed {clause[:-2]!r}"
    yield text, [100 * row[key] for _, row in rows for key in ("delta", "low", "high")]


def _check_reading(text: str, figures: RecomputedFigures) -> Iterator[ExpectedNumbers | str]:
    margins = figures.study.statistics.graded_margins
    confidence = figures.study.statistics.confidence
    yield text, [100 * confidence, 100 * margins.probability, 100 * margins.nats]


GRADED_SENTENCE_CHECKS = (
    (r"^\*\*Graded scores\*\* of `", _check_score_bullet),
    (r"^\*\*Fine-tuning\*\* and the cost of `", _check_cost_bullet),
    (r"^Option sets: the right option's probability, in points", _check_reading),
)


def missing_chapter(markdown: str, published: dict) -> Iterator[str]:
    """A report without the chapter whose numbers the summary holds."""
    if any(name in published for name in BLOCKS) and not re.search(
        r"^## Graded scores$", markdown, re.M
    ):
        yield "report.md has no chapter on graded scores, and summary.json has their numbers"
