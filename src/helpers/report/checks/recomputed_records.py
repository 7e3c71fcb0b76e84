"""What report.md says of calibrations, recipes and outliers held to the notebooks that made them.

The notebooks are published as they ran, with what they printed. Where one is not kept nothing
is checked.
"""

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path

from helpers.report.checks.published_numbers import numbers, plain, tables
from helpers.report.checks.recomputed_tables import Recomputed

PRINTED = re.compile(r"^(\d[\d,]*) items, (\d[\d,]*) tokens, the longest", re.M)
OUTLIER = re.compile(r"^\S+ +(\S+) +(\d+) +(\d[\d.]*) +(\d[\d.]*) ", re.M)
RULED = re.compile(r"^(?:- )?In `([^`]+)`, (\d+) of \S+ Linear inputs (?:is|are) ruled (.*)$", re.M)
INPUT = re.compile(
    r"`([^`]+)` \(channel (\d+) reaches ([\d.,]+), (?:([\d.,]+) times|and) the median"
)
STEP = 0.05  # of what the notebook shows, which has one decimal


def wrong_records(markdown: str, figures: Recomputed, notebooks: Path) -> list[str]:
    """Every cell that is not what its notebook printed, with its place."""
    told = []
    for table in tables(markdown):
        columns, rows = set(table.columns), map(table.by_column, table.rows)
        if {"model", "items", "tokens", "Linear inputs"} <= columns:
            told += [line for row in rows for line in _calibration(row, notebooks)]
        elif table.columns == ("variant", "recipe"):
            told += [line for row in rows for line in _recipe(row, figures, notebooks)]
        elif {"Linear", "median channel", "ratio"} <= columns:
            model = table.heading.removeprefix("Model ")
            told += [line for row in rows for line in _outlier(row, model, notebooks)]
    told += [line for found in RULED.findall(markdown) for line in _ruled(*found, notebooks)]
    return [f"report.md, {line}" for line in told]


def _outputs(path: Path) -> str:
    """All that a notebook printed or showed as text; empty where it is not kept."""
    if not path.is_file():
        return ""
    cells = json.loads(path.read_text("utf-8"))["cells"]
    found = [output for cell in cells for output in cell.get("outputs", ())]
    texts = [output.get("text", output.get("data", {}).get("text/plain", "")) for output in found]
    return "\n".join("".join(text) for text in texts)


def _calibration(row: dict[str, str], notebooks: Path) -> Iterator[str]:
    model = plain(row["model"])
    printed = PRINTED.search(_outputs(notebooks / f"01_calibration.{model}.ipynb"))
    said = [numbers(row[column])[0] for column in ("items", "tokens")]
    if printed and said != [n.replace(",", "") for n in printed.groups()]:
        yield f"calibration of {model}: {' items, '.join(said)} tokens, it printed {printed[0]!r}"


def _recipe(row: dict[str, str], figures: Recomputed, notebooks: Path) -> Iterator[str]:
    variant = plain(row["variant"])
    paths = notebooks.glob(f"02_quantization.*.{variant}.ipynb")
    printed = [
        line
        for path in paths
        if path.name.split(".")[1] in figures.study.models
        for line in _outputs(path).splitlines()
        if " weights" in line and "activations" in line
    ]
    said = plain(row["recipe"])
    if printed and not any(line.strip() in said for line in printed):
        yield f"recipe of {variant}: {said[:80]!r}, it printed {printed[0][:80]!r}"


def _outlier(row: dict[str, str], model: str, notebooks: Path) -> Iterator[str]:
    shown = _outputs(notebooks / f"01_calibration.{model}.ipynb")
    for name, channel, largest, median in OUTLIER.findall(shown):
        if name != plain(row["Linear"]):
            continue
        pairs = ((row["largest"], largest), (row["median channel"], median))
        values = [(float(numbers(cell)[0]), float(due)) for cell, due in pairs]
        near = all(abs(a - b) <= STEP + 0.006 * abs(b) for a, b in values)
        if numbers(row["channel"])[0] != channel or not near:
            yield f"Model {model}, {name}: {values}, channel {channel} in its calibration"


def _ruled(model: str, count: str, text: str, notebooks: Path) -> Iterator[str]:
    """The sentence on inputs that single channels rule: how many, and each one's numbers."""
    named = INPUT.findall(text)
    if len(named) != int(count):
        yield f"{model}: {count} Linear inputs are ruled by single channels, {len(named)} named"
    shown = OUTLIER.findall(_outputs(notebooks / f"01_calibration.{model}.ipynb"))
    for name, *said in named:
        channel, largest, ratio = (float(x.replace(",", "") or "nan") for x in said)
        for _, *printed in (row for row in shown if row[0].endswith(name)):
            at, most, median = map(float, printed)
            near = abs(largest - most) <= 0.006 * most
            if at != channel or not near or not _is_ratio(ratio, most, median):
                yield f"{model}, {name}: {said}, in its calibration {printed}"


def _is_ratio(ratio: float, most: float, median: float) -> bool:
    """Whether a ratio is that of two numbers shown with one decimal; NaN is that of a median 0."""
    if math.isnan(ratio):
        return median == 0
    largest = (most + STEP) / (median - STEP) if median > STEP else math.inf
    return 0.994 * (most - STEP) / (median + STEP) <= ratio <= 1.006 * largest
