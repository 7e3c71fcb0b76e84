"""Compares every cell of the tables of report.md with the recomputed number.

None of the code that writes the report is used: what is published is read as text, a table is
known by its columns, a row by its names, and the numbers in a cell are held to the figures it must
show.
"""

import html
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from helpers.core.records import WHOLE_VARIANT
from helpers.statistics.checks.recomputed_graded_study import (
    DrawsBlock,
    GradedBlocks,
    calibrations_block,
    decompositions_block,
)
from helpers.statistics.checks.recomputed_statistics import (
    Figure,
    dataset_figures,
    loss_change,
    shared_text_figures,
)
from helpers.statistics.checks.recomputed_verdicts import (
    PublishedAnswers,
    best_constant,
    bootstrap_settings,
)
from helpers.study.schema import Comparison, Study

MISSING = "–"
_CODE = re.compile(r"<code>.*?</code>|`[^`]*`", re.DOTALL)
_NUMBER = re.compile(r"(?<![\w.])[+\-]?\d[\d,]*(?:\.\d+)?(?:e[+\-]?\d+)?")

TOLERANCE = 1e-6  # relative, of figures made another way or by another version of a library
ExpectedNumbers = tuple[str, list[float | None]]  # (text, its expected numbers)


def equal_values(now, then) -> bool:
    """Equal up to the last digits of numbers."""
    if isinstance(now, float) and isinstance(then, float | int) and not isinstance(then, bool):
        return math.isclose(now, then, rel_tol=TOLERANCE, abs_tol=1e-9)
    return now == then


def code_names(text: str) -> list[str]:
    """The names between backticks, in order."""
    return re.findall(r"`([^`]+)`", text)


@dataclass(frozen=True)
class Table:
    """One pipe table.

    Attributes:
        heading: the nearest title above it: of a section, of what is folded, or in bold.
        section: the nearest title of a section.
    """

    heading: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    section: str = ""

    def row(self, **cells: str) -> dict[str, str] | None:
        """The first row whose named columns hold these plain texts, by column; None if none."""
        for row in map(self.by_column, self.rows):
            if all(plain_text(row.get(name, "")) == text for name, text in cells.items()):
                return row
        return None

    def by_column(self, row: tuple[str, ...]) -> dict[str, str]:
        return dict(zip(self.columns, row, strict=False))


def read_tables(markdown: str) -> list[Table]:
    """Every pipe table of a Markdown text, in order."""
    parsed, heading, section, lines = [], "", "", []
    for line in [*markdown.splitlines(), ""]:
        if line.startswith("|"):
            lines.append(_split_cells(line))
            continue
        if len(lines) > 2:
            columns = tuple(map(plain_text, lines[0]))
            parsed.append(Table(heading, columns, tuple(lines[2:]), section))
        lines = []
        if line.startswith("#"):
            heading = section = plain_text(line.lstrip("# "))
        elif line.startswith(("**", "<details>")):
            heading = plain_text(line)
    return parsed


def _split_cells(line: str) -> tuple[str, ...]:
    return tuple(cell.strip() for cell in line.strip().strip("|").split("|"))


def plain_text(cell: str) -> str:
    """A cell's text: entities resolved, marks of code and emphasis removed."""
    text = html.unescape(re.sub(r"<[^>]*>", "", cell)).replace("\u00a0", " ")
    return text.replace("`", "").replace("**", "").strip()


def written_numbers(cell: str) -> list[str]:
    """The numbers written in a cell, without those in names and quotations."""
    text = html.unescape(_CODE.sub(" ", cell)).replace("−", "-").replace("\u00a0", " ")
    return [match.replace(",", "") for match in _NUMBER.findall(text)]


def rounds_to(written: str, value: float) -> bool:
    """Whether the value, rounded to the decimals of the written number, equals it."""
    mantissa, _, exponent = written.partition("e")
    decimals = len(mantissa.partition(".")[2])
    step = 10.0 ** (int(exponent or 0) - decimals)
    return abs(float(written) - value) <= 0.5 * step * (1 + 1e-6) + 1e-9 * abs(value)


def cell_differs(cell: str, values: list[float | None]) -> bool:
    """Whether the numbers of a cell differ from these, in their order; None counts as missing."""
    expected = [v for v in values if v is not None and not math.isnan(v)]
    written = written_numbers(cell)
    if len(written) != len(expected):
        return True
    return not all(rounds_to(w, v) for w, v in zip(written, expected, strict=True))


DATASET_NAMES = {"arc": "ARC", "squad_v2": "SQuAD v2", "openmath": "OpenMath", "boolq": "BoolQ"}
VERDICT_WORDS = {
    "worse": "worse",
    "better": "better",
    "equivalent": "equivalent",
    "inconclusive": "inconclusive",
    "uninformative": "uninformative",
    "invalid": "invalid",
}
METRIC_COLUMNS = {
    "accuracy": "accuracy",
    "macro-F1": "macro_f1",
    "exact match": "exact_match",
    "F1": "f1",
    "HasAns EM": "has_answer_exact_match",
    "HasAns F1": "has_answer_f1",
    "NoAns EM": "no_answer_exact_match",
    "median absolute difference": "median_absolute_difference",
    "items with a number": "median_absolute_difference_coverage",
}
STATUSES = ("answered", "abstained", "unparsed")

Cell = tuple[str, list[float | None]]  # a column, and the numbers its cell must show


class RecomputedFigures:
    """All figures of a study, recomputed from its answers.

    Args:
        published: the answers.
        rows: by comparison, its recomputed row of summary.json.
        summary: summary.json as published, for figures that do not follow from answers.
    """

    def __init__(self, published: PublishedAnswers, rows: dict[Comparison, dict], summary: dict):
        self.study: Study = published.study
        self.draws = published.draws
        self.variants, self.rows, self.control_outcomes = (
            published.variants,
            rows,
            published.control_outcomes,
        )
        self.summary = summary
        self.bootstrap = bootstrap_settings(self.study)
        self.shared = {
            at: shared_text_figures(a.passages, self.bootstrap) for at, a in self.variants.items()
        }
        self.sets = {
            (*at, name): dataset_figures(
                evaluation_set.adapter, a.predictions[name], self.bootstrap
            )
            for at, a in self.variants.items()
            for name, evaluation_set in self.study.evaluation.datasets.items()
        }

    @property
    def fixed(self) -> dict[str, tuple[str, float]]:
        """The best constant answer of every set and its score."""
        first = self.variants[next(iter(self.study.models)), self.study.baseline]
        return {
            name: best_constant(evaluation_set.adapter, first.predictions[name])
            for name, evaluation_set in self.study.evaluation.datasets.items()
        }

    @cached_property
    def graded_blocks(self) -> dict:
        """The blocks of graded scores, as summary.json holds them; empty without any.

        With repeated variants, also the block of their draws; with named calibrations, theirs.
        """
        graded = GradedBlocks(self.study, self.variants, self.rows)
        calibrations = calibrations_block(self.study, self.variants, self.draws)
        parts = decompositions_block(graded, self.draws)
        return (
            graded.blocks()
            | self._draws_block(graded)
            | ({"calibrations": calibrations} if calibrations else {})
            | ({"decompositions": parts} if parts else {})
        )

    def _draws_block(self, graded: GradedBlocks) -> dict:
        return {"draws": DrawsBlock(graded, self.draws).rows()} if self.draws else {}

    @property
    def noise_floor(self) -> str | None:
        """The baseline in another float type."""
        candidates = (v for v, recipe in self.study.variants.items() if recipe.dtype)
        return next((v for v in candidates if v != self.study.baseline), None)


def wrong_cells(markdown: str, figures: RecomputedFigures) -> list[str]:
    """Every cell of a known table that differs from its figures: row, column, both values."""
    lines = []
    for table in read_tables(markdown):
        for row, expected in _expected_rows(table, figures):
            where = f"report.md, {table.heading}, row {_row_name(row)}"
            lines += [
                f"{where}, column {column}: published {plain_text(row[column])!r}, "
                f"recomputed {_numbers_text(values)}"
                for column, values in expected
                if column in row and cell_differs(row[column], values)
            ]
            lines += _wrong_verdict_cell(table, row, figures, where)
    return lines


def _row_name(row: dict[str, str]) -> str:
    names = [plain_text(cell) for cell in list(row.values())[:2]]
    model = plain_text(row.get("model", ""))
    return " / ".join(names if model in ("", *names) else [*names, model])


def _numbers_text(values: list[float | None]) -> str:
    return ", ".join("none" if v is None else f"{v:.6g}" for v in values) or "no number"


def _expected_rows(
    table: Table, figures: RecomputedFigures
) -> Iterator[tuple[dict[str, str], list[Cell]]]:
    """The rows of a table with their expected numbers; none for an unknown table."""
    columns = set(table.columns)
    checks = (
        check for required_columns, check in TABLE_CHECKS.items() if required_columns <= columns
    )
    check = next(checks, _dataset_cells if columns & METRIC_COLUMNS.keys() else None)
    if check is None:
        return
    for row in map(table.by_column, table.rows):
        yield row, check(table, row, figures)


def _variant_of_row(
    row: dict[str, str], figures: RecomputedFigures, model: str = ""
) -> tuple[str, str] | None:
    """(model, variant) that a row is about; a control's role follows its name."""
    model = model or plain_text(row.get("model", ""))
    variant = plain_text(row["variant"]).partition(" (")[0].partition(" vs ")[0]
    return (model, variant) if (model, variant) in figures.variants else None


def _model_of_row(table: Table, row: dict[str, str]) -> str:
    """The model that a row names; in older reports the heading names it."""
    return (
        plain_text(row.get("model", "")) or table.heading.removeprefix("Model ").partition(":")[0]
    )


def _in_percent(figure: Figure) -> list[float | None]:
    return [None if x is None else 100 * x for x in figure[:3]]


def _score_cells(table: Table, row: dict[str, str], figures: RecomputedFigures) -> list[Cell]:
    dataset_columns = {
        DATASET_NAMES.get(name, name): name for name in figures.study.evaluation.datasets
    }
    if plain_text(row["variant"]) == "best constant answer":
        fixed = figures.fixed
        answers = {c: written_numbers(fixed[n][0]) for c, n in dataset_columns.items()}
        return [
            (c, [100 * fixed[n][1], *map(float, answers[c])]) for c, n in dataset_columns.items()
        ]
    if (at := _variant_of_row(row, figures)) is None:
        return [("checks", [])]
    shared, gates = figures.shared[at], figures.variants[at].gates
    cells: list[Cell] = [
        ("checks", [sum(g["passed"] for g in gates), len(gates)]),
        ("perplexity", [shared["perplexity"][0]]),
        ("KL [nats]", [shared["kl"][0]]),
        ("top-1", _in_percent(shared["top1_agreement"])[:1]),
    ]
    main = {
        column: next(iter(figures.sets[*at, name].values()))
        for column, name in dataset_columns.items()
    }
    return cells + [(column, _in_percent(figure)) for column, figure in main.items()]


def _comparison(table: Table, row: dict[str, str], figures: RecomputedFigures) -> dict | None:
    """The recomputed comparison of a row of the table of items."""
    model = _model_of_row(table, row)
    variant, _, against = plain_text(row["variant"]).partition(" vs ")
    for c, recomputed in figures.rows.items():
        same_dataset = DATASET_NAMES.get(c.dataset, c.dataset) == plain_text(row["dataset"])
        same_variants = c.variant == variant.partition(" (")[0] and c.baseline == (
            against or figures.study.baseline
        )
        if same_dataset and same_variants and c.model == model:
            return recomputed
    return None


def _comparison_cells(table: Table, row: dict[str, str], figures: RecomputedFigures) -> list[Cell]:
    if (recomputed := _comparison(table, row, figures)) is None:
        return [("items", [])]
    units = [recomputed["clusters"]] if recomputed["clusters"] < recomputed["n"] else []
    cells: list[Cell] = [
        ("items", [recomputed["n"], *units]),
        ("lost", [recomputed["losses"]]),
        ("gained", [recomputed["gains"]]),
        ("Δ [points]", [100 * recomputed[key] for key in ("delta", "low", "high")]),
        ("Holm p", _p_shown(recomputed["holm_p"])),
        ("p", _p_shown(recomputed["family_p"])),
    ]
    loss = recomputed["smallest_detectable_loss"]
    cells.append(("detectable loss", [None if loss is None else 100 * loss]))
    repeated = plain_text(row["verdict"]).endswith("as above")
    reason_numbers = (
        written_numbers(recomputed["reason"])
        if recomputed["verdict"] in ("invalid", "uninformative")
        else []
    )
    if reason_numbers and not repeated:
        cells.append(("verdict", [float(n) for n in reason_numbers]))
    return cells


def _p_shown(p: float | None) -> list[float | None]:
    """The report shows a p below 0.001 as `< 0.001`."""
    return [0.001] if p is not None and p < 0.001 else [p]


def _token_cells(table: Table, row: dict[str, str], figures: RecomputedFigures) -> list[Cell]:
    model = _model_of_row(table, row)
    if (at := _variant_of_row(row, figures, model)) is None:
        return [("perplexity", [])]
    shared, baseline = figures.shared[at], (model, figures.study.baseline)
    cells: list[Cell] = [("perplexity", [shared["perplexity"][0]])]
    if at == baseline:
        cells += [("KL [nats/token]", [0.0]), ("top-1 agreement", [100.0])]
        return [*cells, ("KL / noise floor", [0.0])]
    before, after = (figures.variants[x].passages for x in (baseline, at))
    cells.append(("Δ loss [nats/token]", list(loss_change(before, after, figures.bootstrap)[:3])))
    cells.append(("KL [nats/token]", list(shared["kl"][:3])))
    cells.append(("top-1 agreement", _in_percent(shared["top1_agreement"])))
    if figures.noise_floor:
        floor, kl = (figures.shared[x]["kl"][0] for x in ((model, figures.noise_floor), at))
        cells.append(("KL / noise floor", [kl / floor if floor and kl is not None else None]))
    return cells


def _dataset_of_table(table: Table, figures: RecomputedFigures) -> str | None:
    """The evaluation set of a chapter, `5.3 OpenMath`."""
    title = table.section.partition(" ")[2]
    datasets = figures.study.evaluation.datasets
    return next((name for name in datasets if DATASET_NAMES.get(name, name) == title), None)


def _dataset_cells(table: Table, row: dict[str, str], figures: RecomputedFigures) -> list[Cell]:
    at, name = _variant_of_row(row, figures), _dataset_of_table(table, figures)
    if at is None or name is None:
        return []
    figures_by_name, cells = figures.sets[*at, name], []
    for column, key in METRIC_COLUMNS.items():
        if key in figures_by_name:
            plain_number = key == "median_absolute_difference"
            cells.append(
                (
                    column,
                    [figures_by_name[key][0]]
                    if plain_number
                    else _in_percent(figures_by_name[key]),
                )
            )
    return cells


def _behavior_cells(table: Table, row: dict[str, str], figures: RecomputedFigures) -> list[Cell]:
    at, name = _variant_of_row(row, figures), _dataset_of_table(table, figures)
    if at is None or name is None:
        return []
    rows = figures.variants[at].predictions[name]
    counts = {status: sum(r["status"] == status for r in rows) for status in STATUSES}
    ends = sorted({r["finish_reason"] for r in rows})
    cells: list[Cell] = [(status, [n]) for status, n in counts.items()]
    cells.append(("readable", [100 * (1 - counts["unparsed"] / len(rows))]))
    cells.append(("finish reasons", [sum(r["finish_reason"] == end for r in rows) for end in ends]))
    return [*cells, ("output tokens", [sum(r["output_tokens"] for r in rows)])]


def _wrong_verdict_cell(
    table: Table, row: dict[str, str], figures: RecomputedFigures, where: str
) -> list[str]:
    """A verdict that differs from the recomputed one."""
    if "Holm p" not in row or (recomputed := _comparison(table, row, figures)) is None:
        return []
    words = VERDICT_WORDS.get(recomputed["verdict"], "")
    published = plain_text(row["verdict"])
    if published.startswith(words) or not words:
        return []
    return [
        f"{where}, column verdict: published {published!r}, recomputed {recomputed['verdict']!r}"
    ]


def _control_cells(table: Table, row: dict[str, str], figures: RecomputedFigures) -> list[Cell]:
    outcome = figures.control_outcomes.get((plain_text(row["model"]), plain_text(row["control"])))
    if outcome is None:
        return [("observed", [])]
    return [("observed", [float(n) for n in written_numbers(outcome.observed)])]


def _outlier_cells(table: Table, row: dict[str, str], figures: RecomputedFigures) -> list[Cell]:
    """Outliers do not follow from answers; summary.json gives the expected numbers."""
    model = _model_of_row(table, row)
    recorded = figures.summary.get("models", {}).get(model, {}).get("largest_outliers", [])
    matching = (i for i in recorded if f".{i['linear']}".endswith(f".{plain_text(row['Linear'])}"))
    if (one := next(matching, None)) is None:
        return []
    cells = [(column, [one[column]]) for column in ("channel", "largest", "ratio")]
    cells.append(("median channel", [one["median"]]))
    return [*cells, ("channels rounded to zero by one scale", [100 * one["rounded_away"]])]


def _size_cells(table: Table, row: dict[str, str], figures: RecomputedFigures) -> list[Cell]:
    models = figures.summary.get("models", {})
    recorded = (
        models.get(plain_text(row["model"]), {})
        .get("variants", {})
        .get(plain_text(row["variant"]), {})
    )
    if "bytes_before" not in recorded:
        return []
    before, after = recorded["bytes_before"], recorded["bytes_after"]
    cells: list[Cell] = [(p, [before[p] / 1e6, after[p] / 1e6]) for p in before]
    cells += [("smoothed groups", [recorded["smoothed_groups"]])]
    share = sum(after.values()) / sum(before.values())
    return [
        *cells,
        ("all", [sum(after.values()) / 1e6]),
        ("relative to the float model", [100 * share]),
    ]


def _protocol_cells(table: Table, row: dict[str, str], figures: RecomputedFigures) -> list[Cell]:
    datasets_by_title = {DATASET_NAMES.get(n, n): n for n in figures.study.evaluation.datasets}
    first = figures.variants[next(iter(figures.study.models)), figures.study.baseline]
    rows = first.predictions.get(datasets_by_title.get(plain_text(row["dataset"]), ""), [])
    return [("items", [len(rows)]), ("prompt tokens", [sum(r["prompt_tokens"] for r in rows)])]


# The columns that identify a table, and its check.
TABLE_CHECKS = {
    frozenset({"checks", "perplexity", "top-1"}): _score_cells,
    frozenset({"lost", "gained", "Holm p"}): _comparison_cells,
    frozenset({"perplexity", "top-1 agreement"}): _token_cells,
    frozenset({"answered", "unparsed", "finish reasons"}): _behavior_cells,
    frozenset({"control", "expected", "observed"}): _control_cells,
    frozenset({"Linear", "median channel", "ratio"}): _outlier_cells,
    frozenset({"smoothed groups", "relative to the float model"}): _size_cells,
    frozenset({"dataset", "protocol", "prompt tokens"}): _protocol_cells,
}


def wrong_verdict_words(markdown: str, figures: RecomputedFigures) -> list[str]:
    """Cells of the first table whose verdict differs from the recomputed one."""
    datasets_by_title = {
        DATASET_NAMES.get(name, name): name for name in figures.study.evaluation.datasets
    }
    expected = {
        (c.variant, c.baseline, c.model, c.dataset): recomputed["verdict"]
        for c, recomputed in figures.rows.items()
        if recomputed["primary"]
    }
    lines = []
    for table in read_tables(markdown):
        if table.columns[:2] != ("variant", "model") or not set(table.columns[2:]) <= set(
            datasets_by_title
        ):
            continue
        for row in map(table.by_column, table.rows):
            variant, _, against = plain_text(row["variant"]).partition(" vs ")
            for column in table.columns[2:]:
                at = (variant, against or figures.study.baseline, plain_text(row["model"]))
                kind = expected.get((*at, datasets_by_title[column]))
                words = VERDICT_WORDS.get(kind or "", "–")
                if not plain_text(row[column]).startswith(words):
                    lines.append(
                        f"report.md, {table.heading}, row {_row_name(row)}, column {column}: "
                        f"published {plain_text(row[column])!r}, recomputed {kind!r}"
                    )
    return lines


def failed_gate_names(gates: list[dict]) -> tuple[bool, list[str]]:
    """(whether all gates pass, the names of those that fail), as in summary.json."""
    failed = [g for g in gates if not g["passed"]]
    guarded = [g.get("invalidates", WHOLE_VARIANT) for g in failed]
    names = [
        g["name"] if guard == WHOLE_VARIANT else f"{g['name']} ({guard})"
        for g, guard in zip(failed, guarded, strict=True)
    ]
    return not failed, names
