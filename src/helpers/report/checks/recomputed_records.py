"""What report.md says of calibrations, recipes and outliers held to the notebooks that made them.

The notebooks are published as they ran, with what they printed. Where one is not kept nothing
is checked.
"""

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path

from helpers.report.checks.published_numbers import plain_text, read_tables, written_numbers
from helpers.report.checks.recomputed_tables import RecomputedFigures

CALIBRATION_LINE = re.compile(r"^(\d[\d,]*) items, (\d[\d,]*) tokens, the longest", re.M)
OUTLIER_LINE = re.compile(r"^\S+ +(\S+) +(\d+) +(\d[\d.]*) +(\d[\d.]*) ", re.M)
OUTLIER_SENTENCE = re.compile(
    r"^(?:- )?In `([^`]+)`, one outlier channel dominates in (\d+) of \S+ Linear inputs?: (.*)$",
    re.M,
)
DESCRIBED_INPUT = re.compile(
    r"`([^`]+)` \(channel (\d+) reaches ([\d.,]+), (?:([\d.,]+) times|and) the median"
)
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
        elif {"Linear", "median channel", "ratio"} <= columns:
            model = table.heading.removeprefix("Model ")
            lines += [line for row in rows for line in _wrong_outlier(row, model, notebooks)]
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
