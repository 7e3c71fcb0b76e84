"""Marks, counts and sample answers of report.md held to the answers.

None of the code that writes the report is used.
"""

import html
import re
from collections.abc import Iterator

from helpers.core.gates import WHOLE_VARIANT
from helpers.report.checks.published_numbers import Table, cell_differs, plain_text, read_tables
from helpers.report.checks.recomputed_tables import DATASET_NAMES, RecomputedFigures
from helpers.statistics.checks.recomputed_scores import best_fixed_score
from helpers.statistics.checks.recomputed_verdicts import is_informative

DIFFERING_ITEMS = re.compile(r"^Items of `(.*?)`.*\((\d+) of (\d+) differ\)", re.M)
SAMPLE_TABLES = re.compile(r"^Items of `(.*?)`.*?$(.*?)(?=^Items of|\Z)", re.M | re.S)
COMPARED_CHARACTERS = 40  # characters of an answer; what is shown may be cut after them


def wrong_chapters(markdown: str, figures: RecomputedFigures) -> list[str]:
    """Every mark, count and sample that differs from the recomputed one, with its place."""
    report_tables = read_tables(markdown)
    lines = [
        *_wrong_marks(report_tables, figures),
        *_wrong_counts(markdown, figures),
        *_wrong_samples(markdown, figures),
    ]
    lines += [
        *_wrong_gate_rows(report_tables, figures),
        *_wrong_uninformative_sets(markdown, figures),
        *_wrong_fixed_answers(figures),
    ]
    return [f"report.md, {line}" for line in lines]


def _fails_gate(figures: RecomputedFigures, at: tuple[str, str], guarded: tuple[str, ...]) -> bool:
    failed = figures.variants[at].failed_gates
    return any(gate.get("invalidates", WHOLE_VARIANT) in guarded for gate in failed)


def _expected_mark(figures: RecomputedFigures, at: tuple[str, str], name: str) -> str:
    """✗ if a variant is invalid on a set, ○ if the set is uninformative."""
    for c, row in figures.rows.items():
        if (c.model, c.variant, c.dataset, c.baseline) == (*at, name, figures.study.baseline):
            return {"invalid": "✗", "uninformative": "○"}.get(row["verdict"], "")
    adapter = figures.study.evaluation.datasets[name].adapter
    rows = figures.variants[at].predictions[name]
    if not is_informative(adapter, rows, figures.bootstrap):
        return "○"
    return "✗" if _fails_gate(figures, at, (WHOLE_VARIANT, name)) else ""


def _wrong_marks(report_tables: list[Table], figures: RecomputedFigures) -> Iterator[str]:
    for table in report_tables:
        if not {"checks", "perplexity", "top-1"} <= set(table.columns):
            continue
        for row in map(table.by_column, table.rows):
            at = plain_text(row["model"]), plain_text(row["variant"]).partition(" (")[0]
            if at not in figures.variants:
                continue
            expected = "✗" if figures.variants[at].failed_gates else ""
            if ("✗" in row["checks"]) != bool(expected):
                yield f"headline, {'/'.join(at)}: checks marked {plain_text(row['checks'])!r}"
            for name in figures.study.evaluation.datasets:
                cell = plain_text(row[DATASET_NAMES.get(name, name)])
                published = cell[-1] if cell[-1] in "✗○" else ""
                if published != (expected := _expected_mark(figures, at, name)):
                    place = f"headline, {'/'.join(at)}, {name}"
                    yield f"{place}: marked {published!r}, expected {expected!r}"


def _dataset_chapters(markdown: str, figures: RecomputedFigures) -> Iterator[tuple[str, str]]:
    """(evaluation set, text of its chapter)."""
    for name in figures.study.evaluation.datasets:
        title = re.escape(DATASET_NAMES.get(name, name))
        if part := re.search(rf"^### 5\.\d+ {title}$(.*?)(?=^#)", markdown + "\n#", re.M | re.S):
            yield name, part[1]


def _side_by_side(figures: RecomputedFigures) -> list[str]:
    """The variants whose answers the samples show: no repetition, no noise floor."""
    study = figures.study
    return [
        v
        for v, recipe in study.variants.items()
        if v == study.baseline or recipe.recipe == "seed" or (recipe.quantized and not recipe.dtype)
    ]


def _answers_by_item(
    figures: RecomputedFigures, model: str, name: str
) -> dict[str, dict[str, dict]]:
    """Item id → variant → row."""
    rows_by_item: dict[str, dict[str, dict]] = {}
    for variant in _side_by_side(figures):
        for row in figures.variants[model, variant].predictions[name]:
            rows_by_item.setdefault(row["id"], {})[variant] = row
    return rows_by_item


def _wrong_counts(markdown: str, figures: RecomputedFigures) -> Iterator[str]:
    first = next(iter(figures.study.models)), figures.study.baseline
    for name, text in _dataset_chapters(markdown, figures):
        rows = figures.variants[first].predictions[name]
        passages = len({row["cluster"] or row["id"] for row in rows})
        lines = (line for line in text.splitlines() if " best constant answer" in line)
        line = next(lines, "")
        values = [len(rows), *([passages] if passages < len(rows) else [])]
        values.append(100 * figures.fixed[name][1])
        if cell_differs(re.sub(r"“.*”", "", html.unescape(line)), values):
            yield f"{name}: {plain_text(line)[:80]!r}, recomputed {values}"
        for model, published, total in DIFFERING_ITEMS.findall(text):
            items = _answers_by_item(figures, model, name).values()
            expected = sum(
                len({(r["status"], r["parsed"], r["score"] > 0) for r in answers.values()}) > 1
                for answers in items
            )
            if (int(published), int(total)) != (expected, len(items)):
                place = f"{name}, items of {model}"
                yield f"{place}: {published} of {total} differ, recomputed {expected}"


def _comparable_text(text: str) -> str:
    return "".join(c for c in text if c.isalnum())[:COMPARED_CHARACTERS]


def _shown_answer(row: dict) -> str:
    texts = {"abstained": "abstained", "unparsed": f"unparsed{row['output'] or 'empty'}"}
    return _comparable_text(texts.get(row["status"], row["parsed"] or ""))


def _wrong_samples(markdown: str, figures: RecomputedFigures) -> Iterator[str]:
    """Rows of sample answers whose golds, answers and marks match no item."""
    for name, text in _dataset_chapters(markdown, figures):
        for model, part in SAMPLE_TABLES.findall(text):
            items = _answers_by_item(figures, model, name)
            for table in read_tables(part):
                variants = [v for v in table.columns if v in _side_by_side(figures)]
                expected_rows = {
                    (
                        _comparable_text("; ".join(answers[variants[0]]["golds"]) or "none"),
                        *(
                            ("✓" if answers[v]["score"] else "✗", _shown_answer(answers[v]))
                            for v in variants
                        ),
                    )
                    for answers in items.values()
                }
                for row in map(table.by_column, table.rows):
                    cells = [plain_text(row[v]) for v in variants]
                    answers = tuple((cell[0], _comparable_text(cell[1:])) for cell in cells)
                    key = (_comparable_text(plain_text(row["gold answer"])), *answers)
                    if not any(_matches(key, one) for one in expected_rows):
                        item = plain_text(row["item"])
                        yield f"{name}, items of {model}: no item has the row {item!r}"


def _matches(published: tuple, expected: tuple) -> bool:
    """Equal up to the cut of the shown text."""
    pairs = zip(published[1:], expected[1:], strict=True)
    if not expected[0].startswith(published[0][: len(expected[0])]):
        return False
    return all(a[0] == b[0] and b[1].startswith(a[1]) for a, b in pairs)


def _wrong_gate_rows(report_tables: list[Table], figures: RecomputedFigures) -> Iterator[str]:
    """Rows that state a pass for a failed gate or a failure for a passed one."""
    for table in report_tables:
        if table.columns != ("gate", "variants", "result"):
            continue
        model = re.search(r" of (\S+?)\.?$", table.heading)[1]
        for row in map(table.by_column, table.rows):
            names = [plain_text(v) for v in row["variants"].split(",")]
            variants = list(figures.study.variants) if names == ["all"] else names
            answers = [
                figures.variants[model, v] for v in variants if (model, v) in figures.variants
            ]
            failed = any(
                g["name"] == plain_text(row["gate"]) for a in answers for g in a.failed_gates
            )
            if failed != ("FAILS" in row["result"]):
                result = plain_text(row["result"])[:60]
                yield f"{table.heading}, {plain_text(row['gate'])}: {result!r}"


def _wrong_uninformative_sets(markdown: str, figures: RecomputedFigures) -> Iterator[str]:
    """The sets that the conclusions call uninformative."""
    if not (sentence := re.search(r"No ability can be measured on (.*?): there", markdown)):
        return
    expected = {
        (DATASET_NAMES.get(c.dataset, c.dataset), c.model)
        for c, row in figures.rows.items()
        if row["verdict"] == "uninformative" and c.baseline == figures.study.baseline
    }
    published = {
        (name, model)
        for name, models in re.findall(r"([^`,]+?) of ((?:`[^`]+`(?:, | and )?)+)", sentence[1])
        for name, model in ((name.strip(), m) for m in re.findall(r"`([^`]+)`", models))
    }
    if published != expected:
        sets = f"no ability can be measured on {sorted(published)}, recomputed {sorted(expected)}"
        yield f"conclusions: {sets}"


def _wrong_fixed_answers(figures: RecomputedFigures) -> Iterator[str]:
    first = figures.variants[next(iter(figures.study.models)), figures.study.baseline]
    for name, evaluation_set in figures.study.evaluation.datasets.items():
        expected = best_fixed_score(evaluation_set.adapter, first.predictions[name])
        if abs((published := figures.fixed[name][1]) - expected) > 1e-9:
            score = f"{published:.4g}, recomputed {expected:.4g}"
            yield f"{name}: the best constant answer scores {score}"
