"""The tables of report.md held to figures made again from the answers, cell by cell.

None of the code that writes the report is used: a table is known by its columns, a row by
its names, and the numbers in a cell are held to the figures it must show.
"""

from collections.abc import Iterator

from helpers.core.gates import WHOLE_VARIANT
from helpers.evaluation.trivial_answers import best_fixed_answer
from helpers.report.checks.published_numbers import Table, differs, numbers, plain, tables
from helpers.statistics.checks.recomputed_comparisons import drawing_of
from helpers.statistics.checks.recomputed_scores import (
    Figure,
    dataset_figures,
    loss_change,
    shared_text_figures,
)
from helpers.statistics.published_answers import Published
from helpers.study.schema import Comparison, Study

NAMES = {"arc": "ARC", "squad_v2": "SQuAD v2", "openmath": "OpenMath", "boolq": "BoolQ"}
WORDS = {
    "worse": "worse",
    "better": "better",
    "equivalent": "equivalent",
    "inconclusive": "inconclusive",
    "uninformative": "uninformative",
    "invalid": "invalid",
}
METRICS = {
    "accuracy": "accuracy",
    "macro-F1": "macro_f1",
    "exact match": "exact_match",
    "F1": "f1",
    "HasAns EM": "has_answer_exact_match",
    "HasAns F1": "has_answer_f1",
    "NoAns EM": "no_answer_exact_match",
    "median absolute difference": "median_absolute_difference",
    "over this share of items": "median_absolute_difference_coverage",
}
STATUSES = ("answered", "abstained", "unparsed")

Cell = tuple[str, list[float | None]]  # a column, and the numbers its cell must show


class Recomputed:
    """All figures of a study, made again from its answers.

    Args:
        published: the answers.
        rows: by comparison, its row of summary.json made again.
        summary: summary.json as published, for what no answer tells.
    """

    def __init__(self, published: Published, rows: dict[Comparison, dict], summary: dict):
        self.study: Study = published.study
        self.asked, self.rows, self.duties = published.asked, rows, published.duties
        self.summary = summary
        self.drawing = drawing_of(self.study)
        self.shared = {
            at: shared_text_figures(a.passages, self.drawing) for at, a in self.asked.items()
        }
        self.sets = {
            (*at, name): dataset_figures(wanted.adapter, a.predictions[name], self.drawing)
            for at, a in self.asked.items()
            for name, wanted in self.study.evaluation.datasets.items()
        }

    @property
    def fixed(self) -> dict[str, tuple[str, float]]:
        """Of every set, the best fixed answer and what it scores."""
        first = self.asked[next(iter(self.study.models)), self.study.baseline]
        found = {
            name: best_fixed_answer(wanted.adapter, first.predictions[name])
            for name, wanted in self.study.evaluation.datasets.items()
        }
        return {name: (best.answer, best.score) for name, best in found.items()}

    @property
    def noise_floor(self) -> str | None:
        """The baseline in another float type."""
        named = (v for v, recipe in self.study.variants.items() if recipe.dtype)
        return next((v for v in named if v != self.study.baseline), None)


def wrong_cells(markdown: str, figures: Recomputed) -> list[str]:
    """Every cell of a known table that does not show its figures: row, column, both values."""
    told = []
    for table in tables(markdown):
        for row, expected in _expected(table, figures):
            where = f"report.md, {table.heading}, row {_row_name(row)}"
            told += [
                f"{where}, column {column}: published {plain(row[column])!r}, "
                f"recomputed {_shown(values)}"
                for column, values in expected
                if column in row and differs(row[column], values)
            ]
            told += _wrong_words(table, row, figures, where)
    return told


def _row_name(row: dict[str, str]) -> str:
    return " / ".join(plain(cell) for cell in list(row.values())[:2])


def _shown(values: list[float | None]) -> str:
    return ", ".join("none" if v is None else f"{v:.6g}" for v in values) or "no number"


def _expected(table: Table, figures: Recomputed) -> Iterator[tuple[dict[str, str], list[Cell]]]:
    """The rows of a table with the numbers each must show; none of a table not known here."""
    columns = set(table.columns)
    makers = (maker for known, maker in MAKERS.items() if known <= columns)
    maker = next(makers, _set_cells if columns & METRICS.keys() else None)
    if maker is None:
        return
    for row in map(table.by_column, table.rows):
        yield row, maker(table, row, figures)


def _at(row: dict[str, str], figures: Recomputed, model: str = "") -> tuple[str, str] | None:
    """(model, variant) that a row is about; a control's role follows its name."""
    model = model or plain(row.get("model", ""))
    variant = plain(row["variant"]).partition(" (")[0].partition(" vs ")[0]
    return (model, variant) if (model, variant) in figures.asked else None


def _percents(figure: Figure) -> list[float | None]:
    return [None if x is None else 100 * x for x in figure[:3]]


def _score_cells(table: Table, row: dict[str, str], figures: Recomputed) -> list[Cell]:
    named = {NAMES.get(name, name): name for name in figures.study.evaluation.datasets}
    if plain(row["variant"]) == "best fixed answer":
        fixed = figures.fixed
        answers = {c: numbers(fixed[n][0]) for c, n in named.items()}
        return [(c, [100 * fixed[n][1], *map(float, answers[c])]) for c, n in named.items()]
    if (at := _at(row, figures)) is None:
        return [("checks", [])]
    shared, gates = figures.shared[at], figures.asked[at].gates
    cells: list[Cell] = [
        ("checks", [sum(g["passed"] for g in gates), len(gates)]),
        ("perplexity", [shared["perplexity"][0]]),
        ("KL [nats]", [shared["kl"][0]]),
        ("top-1", _percents(shared["top1_agreement"])[:1]),
    ]
    main = {column: next(iter(figures.sets[*at, name].values())) for column, name in named.items()}
    return cells + [(column, _percents(figure)) for column, figure in main.items()]


def _comparison(table: Table, row: dict[str, str], figures: Recomputed) -> dict | None:
    """The comparison that a row of the table of items is about, made again."""
    model = table.heading.removeprefix("Model ").partition(":")[0]
    variant, _, against = plain(row["variant"]).partition(" vs ")
    for c, again in figures.rows.items():
        named = NAMES.get(c.dataset, c.dataset) == plain(row["dataset"])
        sides = c.variant == variant.partition(" (")[0] and c.baseline == (
            against or figures.study.baseline
        )
        if named and sides and c.model == model:
            return again
    return None


def _comparison_cells(table: Table, row: dict[str, str], figures: Recomputed) -> list[Cell]:
    if (again := _comparison(table, row, figures)) is None:
        return [("items", [])]
    units = [again["clusters"]] if again["clusters"] < again["n"] else []
    cells: list[Cell] = [
        ("items", [again["n"], *units]),
        ("lost", [again["losses"]]),
        ("gained", [again["gains"]]),
        ("Δ [points]", [100 * again[key] for key in ("delta", "low", "high")]),
        ("Holm p", _p_shown(again["holm_p"])),
        ("p", _p_shown(again["p_drawn"])),
    ]
    loss = again["smallest_detectable_loss"]
    cells.append(("detectable loss", [None if loss is None else 100 * loss]))
    repeated = plain(row["verdict"]).endswith("as above")
    told = numbers(again["reason"]) if again["verdict"] in ("invalid", "uninformative") else []
    if told and not repeated:
        cells.append(("verdict", [float(n) for n in told]))
    return cells


def _p_shown(p: float | None) -> list[float | None]:
    """Below a thousandth only that is shown."""
    return [0.001] if p is not None and p < 0.001 else [p]


def _token_cells(table: Table, row: dict[str, str], figures: Recomputed) -> list[Cell]:
    model = table.heading.removeprefix("Model ").partition(":")[0]
    if (at := _at(row, figures, model)) is None:
        return [("perplexity", [])]
    shared, baseline = figures.shared[at], (model, figures.study.baseline)
    cells: list[Cell] = [("perplexity", [shared["perplexity"][0]])]
    if at == baseline:
        cells += [("KL [nats/token]", [0.0]), ("top-1 agreement", [100.0])]
        return [*cells, ("KL / noise floor", [0.0])]
    before, after = (figures.asked[x].passages for x in (baseline, at))
    cells.append(("Δ loss [nats/token]", list(loss_change(before, after, figures.drawing)[:3])))
    cells.append(("KL [nats/token]", list(shared["kl"][:3])))
    cells.append(("top-1 agreement", _percents(shared["top1_agreement"])))
    if figures.noise_floor:
        floor, kl = (figures.shared[x]["kl"][0] for x in ((model, figures.noise_floor), at))
        cells.append(("KL / noise floor", [kl / floor if floor and kl is not None else None]))
    return cells


def _set_of(table: Table, figures: Recomputed) -> str | None:
    """The evaluation set of a chapter, `5.3 OpenMath`."""
    title = table.heading.partition(" ")[2]
    datasets = figures.study.evaluation.datasets
    return next((name for name in datasets if NAMES.get(name, name) == title), None)


def _set_cells(table: Table, row: dict[str, str], figures: Recomputed) -> list[Cell]:
    at, name = _at(row, figures), _set_of(table, figures)
    if at is None or name is None:
        return []
    found, cells = figures.sets[*at, name], []
    for column, key in METRICS.items():
        if key in found:
            plain_number = key == "median_absolute_difference"
            cells.append((column, [found[key][0]] if plain_number else _percents(found[key])))
    return cells


def _conduct_cells(table: Table, row: dict[str, str], figures: Recomputed) -> list[Cell]:
    at, name = _at(row, figures), _set_of(table, figures)
    if at is None or name is None:
        return []
    rows = figures.asked[at].predictions[name]
    counts = {status: sum(r["status"] == status for r in rows) for status in STATUSES}
    ends = sorted({r["finish_reason"] for r in rows})
    cells: list[Cell] = [(status, [n]) for status, n in counts.items()]
    cells.append(("readable", [100 * (1 - counts["unparsed"] / len(rows))]))
    cells.append(("ended by", [sum(r["finish_reason"] == end for r in rows) for end in ends]))
    return [*cells, ("output tokens", [sum(r["output_tokens"] for r in rows)])]


def _wrong_words(table: Table, row: dict[str, str], figures: Recomputed, where: str) -> list[str]:
    """A verdict in other words than the one made again."""
    if "Holm p" not in row or (again := _comparison(table, row, figures)) is None:
        return []
    words = WORDS.get(again["verdict"], "")
    said = plain(row["verdict"])
    if said.startswith(words) or not words:
        return []
    return [f"{where}, column verdict: published {said!r}, recomputed {again['verdict']!r}"]


def _control_cells(table: Table, row: dict[str, str], figures: Recomputed) -> list[Cell]:
    duty = figures.duties.get((plain(row["model"]), plain(row["control"])))
    if duty is None:
        return [("found", [])]
    return [("found", [float(n) for n in numbers(duty.found)])]


def _outlier_cells(table: Table, row: dict[str, str], figures: Recomputed) -> list[Cell]:
    """What no answer tells is held to summary.json."""
    model = table.heading.removeprefix("Model ")
    found = figures.summary.get("models", {}).get(model, {}).get("largest_outliers", [])
    named = (i for i in found if f".{i['linear']}".endswith(f".{plain(row['Linear'])}"))
    if (one := next(named, None)) is None:
        return []
    cells = [(column, [one[column]]) for column in ("channel", "largest", "ratio")]
    cells.append(("median channel", [one["median"]]))
    return [*cells, ("channels one scale rounds to zero", [100 * one["rounded_away"]])]


def _size_cells(table: Table, row: dict[str, str], figures: Recomputed) -> list[Cell]:
    models = figures.summary.get("models", {})
    made = models.get(plain(row["model"]), {}).get("variants", {}).get(plain(row["variant"]), {})
    if "bytes_before" not in made:
        return []
    before, after = made["bytes_before"], made["bytes_after"]
    cells: list[Cell] = [(p, [before[p] / 1e6, after[p] / 1e6]) for p in before]
    cells += [("smoothed groups", [made["smoothed_groups"]])]
    share = sum(after.values()) / sum(before.values())
    return [*cells, ("all", [sum(after.values()) / 1e6]), ("of the float model", [100 * share])]


def _protocol_cells(table: Table, row: dict[str, str], figures: Recomputed) -> list[Cell]:
    named = {NAMES.get(n, n): n for n in figures.study.evaluation.datasets}
    first = figures.asked[next(iter(figures.study.models)), figures.study.baseline]
    rows = first.predictions.get(named.get(plain(row["dataset"]), ""), [])
    return [("items", [len(rows)]), ("prompt tokens", [sum(r["prompt_tokens"] for r in rows)])]


# How a table is known: the columns it has.
MAKERS = {
    frozenset({"checks", "perplexity", "top-1"}): _score_cells,
    frozenset({"lost", "gained", "Holm p"}): _comparison_cells,
    frozenset({"perplexity", "top-1 agreement"}): _token_cells,
    frozenset({"answered", "unparsed", "ended by"}): _conduct_cells,
    frozenset({"control", "must", "found"}): _control_cells,
    frozenset({"Linear", "median channel", "ratio"}): _outlier_cells,
    frozenset({"smoothed groups", "of the float model"}): _size_cells,
    frozenset({"dataset", "protocol", "prompt tokens"}): _protocol_cells,
}


def wrong_verdict_words(markdown: str, figures: Recomputed) -> list[str]:
    """Cells of the first table, a verdict in a word each, that say another one."""
    named = {NAMES.get(name, name): name for name in figures.study.evaluation.datasets}
    due = {
        (c.variant, c.baseline, c.model, c.dataset): again["verdict"]
        for c, again in figures.rows.items()
        if again["primary"]
    }
    told = []
    for table in tables(markdown):
        if table.columns[:2] != ("variant", "model") or not set(table.columns[2:]) <= set(named):
            continue
        for row in map(table.by_column, table.rows):
            variant, _, against = plain(row["variant"]).partition(" vs ")
            for column in table.columns[2:]:
                at = (variant, against or figures.study.baseline, plain(row["model"]))
                kind = due.get((*at, named[column]))
                words = WORDS.get(kind or "", "–")
                if not plain(row[column]).startswith(words):
                    told.append(
                        f"report.md, {table.heading}, row {_row_name(row)}, column {column}: "
                        f"published {plain(row[column])!r}, recomputed {kind!r}"
                    )
    return told


def checks_of(gates: list[dict]) -> tuple[bool, list[str]]:
    """Whether all hold, and the names of those that fail, as summary.json has them."""
    failed = [g for g in gates if not g["passed"]]
    guarded = [g.get("invalidates", WHOLE_VARIANT) for g in failed]
    names = [
        g["name"] if what == WHOLE_VARIANT else f"{g['name']} ({what})"
        for g, what in zip(failed, guarded, strict=True)
    ]
    return not failed, names
