"""Compares chapters of report.md with the answers: marks, counts, samples, costs, calibration.

None of the code that writes the report is used. No answer tells a speed: what the ratios, the
amounts and the sentences say of one has to agree. What the report says of calibrations, recipes
and outliers is held to the notebooks that made them, which are published as they ran, with what
they printed. Where one is not kept nothing is checked.
"""

import html
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path

from helpers.core.records import WHOLE_VARIANT
from helpers.report.checks.recomputed_tables import (
    DATASET_NAMES,
    RecomputedFigures,
    Table,
    cell_differs,
    plain_text,
    read_tables,
    written_numbers,
)
from helpers.statistics.checks.recomputed_statistics import best_fixed_score
from helpers.statistics.checks.recomputed_verdicts import is_informative

_ITEMS_OF = r"^(?:<details><summary>)?Items of (?:`|<code>)"  # older reports fold nothing
DIFFERING_ITEMS = re.compile(_ITEMS_OF + r"(.*?)(?:`|</code>).*\((\d+) of (\d+) differ\)", re.M)
SAMPLE_TABLES = re.compile(
    _ITEMS_OF + rf"(.*?)(?:`|</code>).*?$(.*?)(?={_ITEMS_OF}|\Z)", re.M | re.S
)
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
        if v == study.baseline
        or any((recipe.recipe, recipe.preset, recipe.weights, recipe.checkpoint, recipe.kv))
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
    expected = {
        (DATASET_NAMES.get(c.dataset, c.dataset), c.model)
        for c, row in figures.rows.items()
        if row["verdict"] == "uninformative" and c.baseline == figures.study.baseline
    }
    sentence = re.search(r"no ability can be measured on (.*?): there", markdown)
    published = {
        (name, model)
        for name, models in re.findall(
            r"([^`,]+?) of ((?:`[^`]+`(?:, | and )?)+)", sentence[1] if sentence else ""
        )
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


RATIO_COLUMNS = {
    "reading": "reading [tokens/s]",
    "writing": "writing [tokens/s]",
    "Linears in memory": "Linears in memory",
    "peak memory": "peak memory [MB]",
    "load time": "load time [s]",
}
SPEED = re.compile(r"(reads|writes) ([\d,]+) tokens per second, (.*?) float32\W* \(([\d.]+)×\)")


def wrong_costs(markdown: str) -> list[str]:
    """Every time, ratio and speed that contradicts another one, with its place."""
    report_tables = read_tables(markdown)
    lines = [
        *_wrong_jobs(report_tables),
        *_wrong_ratios(report_tables),
        *_wrong_cost_sentences(markdown, report_tables),
    ]
    return [f"report.md, {line}" for line in lines]


def _wrong_jobs(report_tables: list[Table]) -> Iterator[str]:
    """Stages whose total time contradicts the number and the longest of their jobs."""
    for table in report_tables:
        if not {"stage", "total time", "longest job"} <= set(table.columns):
            continue
        for row in map(table.by_column, table.rows):
            total, longest, jobs = (
                float(written_numbers(row[c])[0]) for c in ("total time", "longest job", "jobs")
            )
            alone = jobs > 1 and longest >= 10 and total <= longest  # no other took a second
            if alone or total < longest - 1 or total > jobs * longest + jobs:
                stage = plain_text(row["stage"])
                yield f"jobs, {stage}: {total:g} s in all, the longest {longest:g} s"


def _cost_tables(report_tables: list[Table]) -> Iterator[tuple[dict, dict]]:
    """(ratios, amounts) of one model, rows by name."""
    ratios = [t for t in report_tables if "against float32" in t.columns]
    amounts = [t for t in report_tables if RATIO_COLUMNS["reading"] in t.columns]
    for one, other in zip(ratios, amounts, strict=False):
        rows = [{plain_text(row[0]): t.by_column(row) for row in t.rows} for t in (one, other)]
        yield rows[0], rows[1]


def _wrong_ratios(report_tables: list[Table]) -> Iterator[str]:
    """Ratios outside the range given by the smallest and largest rounds of the amounts."""
    for ratios, amounts in _cost_tables(report_tables):
        reference = next(iter(amounts.values()))
        for name, row in list(ratios.items())[1:]:
            for column, amount in RATIO_COLUMNS.items():
                published = float(written_numbers(row[column])[0])
                variant_range, reference_range = (
                    _value_range(r[amount]) for r in (amounts[name], reference)
                )
                low, high = (
                    variant_range[0] / reference_range[1],
                    variant_range[1] / reference_range[0],
                )
                if not 0.98 * low - 0.01 <= published <= 1.02 * high + 0.01:
                    expected = f"{low:.2f} to {high:.2f}"
                    yield f"costs, {name}, {column}: {published:g}×, by the amounts {expected}"
            parts = [
                sum(float(written_numbers(v)[0]) for k, v in r.items() if k.endswith(", file"))
                for r in (amounts[name], reference)
            ]
            if abs(float(written_numbers(row["file"])[0]) - parts[0] / parts[1]) > 0.01:
                yield f"costs, {name}: file {row['file']}, by its parts {parts[0] / parts[1]:.3f}"


def _value_range(cell: str) -> tuple[float, float]:
    """The smallest and the largest value that round to the numbers of a cell."""
    halves = [(float(n), 0.5 * 10.0 ** -len(n.partition(".")[2])) for n in written_numbers(cell)]
    low, high = min(v - half for v, half in halves), max(v + half for v, half in halves)
    return max(low, 1e-9), high


def _wrong_cost_sentences(markdown: str, report_tables: list[Table]) -> Iterator[str]:
    """Sentences whose speeds and shares differ from those of the tables."""
    lines = re.findall(r"^- `(\S+)` \(.*\) takes ([\d.]+) % of (.*)$", markdown, re.M)
    for ratios, amounts in _cost_tables(report_tables):
        for variant, share, text in lines:
            if variant not in ratios:
                continue
            row, amount = ratios[variant], amounts[variant]
            if abs(float(share) / 100 - float(written_numbers(row["file"])[0])) > 0.006:
                in_table = plain_text(row["file"])
                yield f"costs, {variant}: {share} % of the bytes, in the table {in_table}"
            for verb, tokens, word, times in SPEED.findall(text):
                column = {"reads": "reading", "writes": "writing"}[verb]
                values = [float(n) for n in written_numbers(row[column])]
                faster = "faster" if values[1] > 1 else "slower" if values[2] < 1 else "within"
                same_numbers = (
                    times == f"{values[0]:.2f}"
                    and tokens.replace(",", "") == written_numbers(amount[RATIO_COLUMNS[column]])[0]
                )
                if not same_numbers or (faster not in word and 1 not in values):
                    yield f"costs, {variant}: {verb} {tokens} ({times}×), in the tables otherwise"


CALIBRATION_LINE = re.compile(r"^(\d[\d,]*) items, (\d[\d,]*) tokens, the longest", re.M)
OUTLIER_LINE = re.compile(r"^\S+ +(\S+) +(\d+) +(\d[\d.]*) +(\d[\d.]*) ", re.M)
OUTLIER_SENTENCE = re.compile(
    r"^(?:- )?In `([^`]+)`, one outlier channel dominates in (\d+) of \S+ Linear inputs?: (.*)$",
    re.M,
)
DESCRIBED_INPUT = re.compile(
    r"`([^`]+)` \(channel (\d+) reaches ([\d.,]+), (?:([\d.,]+) times|and) the median"
)
PROTECTION_LINE = re.compile(
    r"^(\d+) of (\d+) Linears stay float for (\S+) %.* KL is (\S+) nats.* int8, (\S+) with these "
    r"float, (\S+) to (\S+) with \d+ random choices.* rank (\d+) of (\d+), p = (\S+)$",
    re.M,
)
PROTECTION_COLUMNS = ["Linears", "bytes", "KL, all in int8", "KL, these float"]
PROTECTION_COLUMNS += ["KL, random choices", "rank", "p"]
ROUNDING_STEP = 0.05  # of what the notebook shows, which has one decimal


def wrong_records(markdown: str, figures: RecomputedFigures, notebooks: Path) -> list[str]:
    """Every cell that differs from the output of its notebook, with its place."""
    lines = []
    for table in read_tables(markdown):
        columns, rows = set(table.columns), map(table.by_column, table.rows)
        if {"model", "items", "tokens", "Linear inputs"} <= columns:
            lines += [line for row in rows for line in _wrong_calibration(row, notebooks)]
        elif table.columns == ("variant", "recipe"):
            lines += [line for row in rows for line in _wrong_recipe(row, figures, notebooks)]
        elif {"protected", "left float", "rank"} <= columns:
            lines += [line for row in rows for line in _wrong_protection(row, notebooks)]
        elif {"Linear", "median channel", "ratio"} <= columns:
            model = table.heading.removeprefix("Model ")
            lines += [
                line
                for row in rows
                for line in _wrong_outlier(row, plain_text(row.get("model", model)), notebooks)
            ]
    lines += [
        line
        for match in OUTLIER_SENTENCE.findall(markdown)
        for line in _wrong_outlier_sentence(*match, notebooks)
    ]
    return [f"report.md, {line}" for line in lines]


def _printed_text(path: Path) -> str:
    """All text outputs of a notebook; empty if the notebook is not there."""
    if not path.is_file():
        return ""
    cells = json.loads(path.read_text("utf-8"))["cells"]
    outputs = [output for cell in cells for output in cell.get("outputs", ())]
    texts = [output.get("text", output.get("data", {}).get("text/plain", "")) for output in outputs]
    return "\n".join("".join(text) for text in texts)


def _wrong_calibration(row: dict[str, str], notebooks: Path) -> Iterator[str]:
    model = plain_text(row["model"])
    printed = CALIBRATION_LINE.search(_printed_text(notebooks / f"01_calibration.{model}.ipynb"))
    published = [written_numbers(row[column])[0] for column in ("items", "tokens")]
    if printed and published != [n.replace(",", "") for n in printed.groups()]:
        counts = f"{' items, '.join(published)} tokens"
        yield f"calibration of {model}: {counts}, it printed {printed[0]!r}"


def _wrong_recipe(
    row: dict[str, str], figures: RecomputedFigures, notebooks: Path
) -> Iterator[str]:
    variant = plain_text(row["variant"])
    paths = notebooks.glob(f"02_quantization.*.{variant}.ipynb")
    printed = [
        line
        for path in paths
        if path.name.split(".")[1] in figures.study.models
        for line in _printed_text(path).splitlines()
        if " weights" in line and "activations" in line
    ]
    published = plain_text(row["recipe"])
    if printed and not any(line.strip() in published for line in printed):
        yield f"recipe of {variant}: {published[:80]!r}, it printed {printed[0][:80]!r}"


def _wrong_protection(row: dict[str, str], notebooks: Path) -> Iterator[str]:
    """A protected variant's Linears, bytes, KLs and rank that its quantization did not print."""
    model, variant = plain_text(row["model"]), plain_text(row["protected"])
    printed = _printed_text(notebooks / f"02_quantization.{model}.{variant}.ipynb")
    if not printed:
        return
    line = PROTECTION_LINE.search(printed)
    values = [float(v) for v in line.groups() if v != "inf"] if line else []
    cells = [float(n) for column in PROTECTION_COLUMNS for n in written_numbers(row[column])]
    agrees = len(cells) == len(values) > 0 and all(
        abs(cell - value) <= 0.006 * value for cell, value in zip(cells, values, strict=True)
    )
    named, words = plain_text(row["left float"]).split(", "), set(printed.split())
    unknown = [n for n in named if not any(f".{w}".endswith(f".{n}") for w in words)]
    if not agrees or len(named) != cells[0] or (unknown and "..." not in words):
        yield (
            f"protected Linears of {model}/{variant}: {cells}, {len(named)} named, "
            f"{len(unknown)} of them not printed; it printed {values}"
        )


def _wrong_outlier(row: dict[str, str], model: str, notebooks: Path) -> Iterator[str]:
    printed = _printed_text(notebooks / f"01_calibration.{model}.ipynb")
    for name, channel, largest, median in OUTLIER_LINE.findall(printed):
        if name != plain_text(row["Linear"]):
            continue
        pairs = ((row["largest"], largest), (row["median channel"], median))
        values = [(float(written_numbers(cell)[0]), float(recorded)) for cell, recorded in pairs]
        agrees = all(abs(a - b) <= ROUNDING_STEP + 0.006 * abs(b) for a, b in values)
        if written_numbers(row["channel"])[0] != channel or not agrees:
            yield f"Model {model}, {name}: {values}, channel {channel} in its calibration"


def _wrong_outlier_sentence(model: str, count: str, text: str, notebooks: Path) -> Iterator[str]:
    """The sentence on inputs that one channel dominates: their count and their numbers."""
    inputs = DESCRIBED_INPUT.findall(text)
    if len(inputs) != int(count):
        yield f"{model}: {count} Linear inputs are dominated by one channel, {len(inputs)} named"
    printed_rows = OUTLIER_LINE.findall(_printed_text(notebooks / f"01_calibration.{model}.ipynb"))
    for name, *published in inputs:
        channel, largest, ratio = (float(x.replace(",", "") or "nan") for x in published)
        for _, *printed in (row for row in printed_rows if row[0].endswith(name)):
            at, printed_largest, median = map(float, printed)
            agrees = abs(largest - printed_largest) <= 0.006 * printed_largest
            if at != channel or not agrees or not _is_ratio(ratio, printed_largest, median):
                yield f"{model}, {name}: {published}, in its calibration {printed}"


def _is_ratio(ratio: float, largest: float, median: float) -> bool:
    """Whether a ratio fits two numbers rounded to one decimal; NaN fits a median of 0."""
    if math.isnan(ratio):
        return median == 0
    upper = (
        (largest + ROUNDING_STEP) / (median - ROUNDING_STEP) if median > ROUNDING_STEP else math.inf
    )
    return 0.994 * (largest - ROUNDING_STEP) / (median + ROUNDING_STEP) <= ratio <= 1.006 * upper
