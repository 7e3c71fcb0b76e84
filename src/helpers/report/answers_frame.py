"""All answers of a study as one pandas frame, to be sliced in a notebook."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pandas as pd

from helpers.core.plain_text import one_line

if TYPE_CHECKING:
    from helpers.report.results import Results

# As in helpers.report.notebook_tables: "$5 and $6" in an answer is no formula.
pd.set_option("display.html.use_mathjax", False)

COLUMNS = (
    "model",
    "variant",
    "dataset",
    "id",
    "cluster",
    "question",
    "golds",
    "output",
    "parsed",
    "status",
    "finish_reason",
    "score",
    "f1",
    "prompt_tokens",
    "output_tokens",
    "valid",
)
# Texts stay Python's, so that None is None and any text of a model or a data set fits.
NUMBERS = {"score": float, "f1": float, "prompt_tokens": int, "output_tokens": int, "valid": bool}


def answers_frame(results: "Results") -> pd.DataFrame:
    """One row an answer; see `Results.frame`."""
    rows = (row for evaluated in results.evaluations.values() for row in _rows(results, evaluated))
    return pd.DataFrame(rows, columns=COLUMNS, dtype=object).astype(NUMBERS)


def _rows(results: "Results", evaluated) -> Iterator[dict]:
    owner = {"model": evaluated.model, "variant": evaluated.variant}
    for dataset, predictions in evaluated.predictions.items():
        valid = evaluated.failed_check_on(dataset) is None
        questions = results.questions.get(dataset, {})
        for row in predictions:
            question = questions.get(row["id"])
            yield row | owner | {"dataset": dataset, "question": question, "valid": valid}


def readable(frame: pd.DataFrame) -> pd.DataFrame:
    """The frame with texts of models and data sets in one line each, safe to be shown."""
    return frame.map(lambda value: one_line(value) if isinstance(value, str | list) else value)
