"""Rows of tables: CSV, parquet and Arrow files, folders saved by `datasets`; and their columns.

The libraries read: `csv`, `pyarrow` and `datasets`. What they would pass over in silence is an
error here: a row with more or fewer cells than the header, two columns of one name, a quote that is
not closed. A cell of CSV is text; an empty one is empty text, not a missing value.

A study says which column of a user's file holds which field of its adapter (`columns`). The rows
that come out are in the Hub's schema, so that adapters know one shape only.
"""

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from string import ascii_uppercase
from typing import Any

from helpers.core.errors import StudyError, one_line
from helpers.core.records import sha256_text
from helpers.study.schema import FIELDS, FileDataset, FolderDataset

SEPARATORS = {",": "comma", ";": "semicolon", "\t": "tab"}
FIELDS_OF_ROWS = {field for fields in FIELDS.values() for field in fields}


def csv_rows(text: str, place: str, *, separators: Sequence[str] = tuple(SEPARATORS)) -> list[dict]:
    r"""The rows of a table in CSV whose first row names its columns; blank lines are skipped.

    A cell that holds the separator, a quote or a line end stands in double quotes, a quote in it is
    doubled. The separator is the one that divides the header; a header of one column has none.

    Raises:
        StudyError: the header is missing, ambiguous or names a column twice; a row is no CSV, or
            has another number of cells.
    """
    separator = _separator(text, place, separators)
    records = _records(text, separator)
    header: list[str] | None = None
    rows: list[dict] = []
    try:
        for cells in records:
            if not cells:
                continue
            if header is None:
                header = _checked_header(cells, place)
                continue
            if len(cells) != len(header):
                raise StudyError(
                    f"{place}: row {len(rows) + 1} has {len(cells)} cell{'s' * (len(cells) != 1)} "
                    f"but the header names {len(header)} columns ({_listed(header)}); quote cells "
                    f"that hold a {SEPARATORS[separator]} or a line break, or correct the row"
                )
            rows.append(dict(zip(header, cells, strict=True)))
    except csv.Error as error:
        raise StudyError(
            f"{place}: row {len(rows) + 1} is not CSV ({one_line(error)}); close every quote, and "
            "double the quotes inside a quoted cell"
        ) from None
    if header is None:
        raise StudyError(f"{place}: is empty; its first row must name the columns")
    return rows


def _records(text: str, separator: str):
    # The csv module needs the line ends as they are: cells may hold them.
    return csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)


def _separator(text: str, place: str, separators: Sequence[str]) -> str:
    """The separator that divides the header into columns."""
    dividing = []
    for separator in separators:
        try:
            header = next(filter(None, _records(text, separator)), [])
        except csv.Error:
            continue
        if len(header) > 1:
            dividing.append(separator)
    if len(dividing) > 1:
        names = " and ".join(SEPARATORS[separator] for separator in dividing)
        raise StudyError(
            f"{place}: its header may be divided by {names}; leave one of them out of the "
            "columns' names, or quote the names"
        )
    return (*dividing, separators[0])[0]


def _checked_header(header: list[str], place: str) -> list[str]:
    if repeated := sorted({name for name in header if header.count(name) > 1}):
        raise StudyError(
            f"{place}: names the column {one_line(repr(repeated[0]))} more than once; rename one"
        )
    return header


def _listed(names: Sequence[str]) -> str:
    shown = [one_line(repr(name))[:40] for name in names[:12]]
    return ", ".join([*shown, f"{len(names) - 12} more"] if len(names) > 12 else shown)


def parquet_rows(path: Path, place: str) -> list[dict]:
    """The rows of a parquet file.

    Raises:
        StudyError: it is no parquet, or two of its columns have one name.
    """
    import pyarrow
    import pyarrow.parquet

    try:
        return _table_rows(pyarrow.parquet.ParquetFile(path).read(), place)
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise _unreadable(error, place, "parquet") from None


def arrow_rows(path: Path, place: str) -> list[dict]:
    """The rows of an Arrow file: a stream, as `datasets` writes it, or a file, as Feather.

    Raises:
        StudyError: as `parquet_rows`.
    """
    import pyarrow

    try:
        with pyarrow.memory_map(str(path)) as content:
            try:
                table = pyarrow.ipc.open_stream(content).read_all()
            except pyarrow.ArrowInvalid:
                content.seek(0)
                table = pyarrow.ipc.open_file(content).read_all()
            return _table_rows(table, place)
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise _unreadable(error, place, "Arrow") from None


def saved_rows(folder: Path, place: str) -> list[dict]:
    """The rows of a dataset that `save_to_disk` wrote into a folder.

    Raises:
        StudyError: `datasets` cannot load it, or two of its columns have one name.
    """
    import datasets

    try:
        saved = datasets.load_from_disk(str(folder))
        return _table_rows(saved.with_format("arrow")[:], place)
    except StudyError:
        raise
    except Exception as error:  # pyarrow, fsspec and datasets each have their own
        raise _unreadable(error, place, "a dataset that save_to_disk wrote") from None


def _unreadable(error: Exception, place: str, description: str) -> StudyError:
    if isinstance(error, StudyError):
        return error
    return StudyError(f"{place}: is not {description} ({one_line(error)[:200]}); mend it")


def _table_rows(table, place: str) -> list[dict]:
    """The rows of a table, each class label of `datasets` by its name instead of its number."""
    _checked_header(table.column_names, place)
    table.validate(full=True)  # offsets of a damaged file may lead out of it
    rows = table.to_pylist()
    for column, labels in _class_labels(table.schema).items():
        for row in rows:
            if row[column] is not None:
                # -1 stands for an unlabelled row
                row[column] = labels.int2str(row[column]) if row[column] >= 0 else None
    return rows


def _class_labels(schema) -> dict[str, Any]:
    """The columns of class labels, of a table that `datasets` wrote; else empty."""
    if b"huggingface" not in (schema.metadata or {}):
        return {}
    import datasets

    try:
        features = datasets.Features.from_arrow_schema(schema)
    except (KeyError, TypeError, AttributeError) as error:  # metadata that it did not write
        raise ValueError(f"its description is damaged: {error}") from None
    return {n: f for n, f in features.items() if isinstance(f, datasets.ClassLabel)}


def with_fields(rows: list[dict], source: FileDataset | FolderDataset, place: str) -> list[dict]:
    """Rows of a user's file with the adapter's fields, taken from the source's `columns`.

    Fields that `columns` does not name keep the column of their own name. Of `choices` and
    `answers`, a list of texts or several columns become the Hub's lists; an empty cell among
    several columns is no option or answer. Options without labels get those of `labels`, or A, B,
    C, …. Whole numbers become their digits. A row without an id gets a hash of its fields.

    Raises:
        StudyError: no row has the column, or there are more options than labels.
    """
    columns = source.columns or {}
    if source.labels:
        columns = {"choices": "choices"} | columns
    if not columns or not rows:
        return rows
    names = list(dict.fromkeys(name for row in rows for name in row))
    for field, column in columns.items():
        for name in [column] if isinstance(column, str) else column:
            if name not in names:
                raise StudyError(
                    f"{place}: has no column {one_line(repr(name))} for {field}; its columns: "
                    f"{_listed(names)}"
                )
    labels, renamed = source.labels or tuple(ascii_uppercase), []
    for number, row in enumerate(rows, start=1):
        try:
            renamed.append(_with_fields(row, columns, labels))
        except ValueError as error:
            raise StudyError(f"{place}: row {number} {error}") from None
    return renamed


def _with_fields(row: dict, columns: dict, labels: tuple[str, ...]) -> dict:
    fields = dict(row)
    for field, column in columns.items():
        if isinstance(column, str) and column not in row:
            fields.pop(field, None)
            continue
        several = not isinstance(column, str)
        value = [row.get(name) for name in column] if several else row[column]
        match field:
            case "choices":
                fields[field] = _choices(value, labels, several=several)
            case "answers":
                fields[field] = _answers(value, several=several)
            case _:
                fields[field] = _digits(value)
    if "id" not in fields:
        known = {name: value for name, value in fields.items() if name in FIELDS_OF_ROWS}
        fields["id"] = sha256_text(json.dumps(known, sort_keys=True, default=str))[:16]
    return fields


def _digits(value: Any) -> Any:
    """A whole number as text; any other value unchanged."""
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


def _is_empty(value: Any) -> bool:
    return value is None or (isinstance(value, str) and not value.strip())


def _choices(value: Any, labels: tuple[str, ...], *, several: bool) -> Any:
    """The options as {label, text}; a value of another shape unchanged, for the adapter."""
    if isinstance(value, dict) and "label" not in value:
        value = value.get("text")
    if not isinstance(value, list | tuple):
        return value
    if len(value) > len(labels):
        raise ValueError(
            f"has {len(value)} options but there are {len(labels)} labels "
            f"({', '.join(labels)}); name as many labels"
        )
    options = [(label, _digits(text)) for label, text in zip(labels, value, strict=False)]
    if several:
        options = [(label, text) for label, text in options if not _is_empty(text)]
    return {"label": [label for label, _ in options], "text": [text for _, text in options]}


def _answers(value: Any, *, several: bool) -> Any:
    """The gold answers as {text: […]}; a value of another shape unchanged, for the adapter."""
    if isinstance(value, dict):
        return value
    if not isinstance(value, list | tuple):
        value, several = [value], True
    texts = [_digits(text) for text in value]
    return {"text": [text for text in texts if not (several and _is_empty(text))]}
