"""The rows of a dataset source, in the Hub's schemas: shipped, local files, or fetched.

No Hub is asked here: its rows were fetched to the project's cache, at one commit, by
`helpers.sources.fetching`, so that no job needs a network and all read the same rows.
"""

import codecs
import json
from importlib.resources import files
from pathlib import Path

from helpers.core.errors import StudyError
from helpers.core.plain_text import one_line
from helpers.sources.hub_rows import cached_rows
from helpers.sources.row_shapes import describe_value
from helpers.study.local_files import dataset_files
from helpers.study.schema_sources import DatasetSource, FileDataset, HubDataset, ShippedDataset

WANTED = "wanted is JSON lines: one object a line, as {…}"


def load_rows(source: DatasetSource) -> list[dict]:
    """All rows of a source, in its own order; of several files, in the order of their names.

    Raises:
        StudyError: the source cannot be read; says what to do.
    """
    match source:
        case ShippedDataset(shipped=name):
            data = files("helpers.sources").joinpath(f"data/{name}.jsonl").read_bytes()
            return _json_lines(data, name)
        case FileDataset():
            return [row for path in dataset_files(source) for row in _file_rows(path, source)]
        case HubDataset():
            return cached_rows(source)
    raise StudyError(f"{source!r} is not a kind of dataset source")


def _file_rows(path: Path, source: FileDataset) -> list[dict]:
    place = source.file if "*" not in source.file else str(path)
    if path.suffix != ".parquet":
        return _json_lines(path.read_bytes(), place)
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise StudyError(f"{place}: is not parquet ({one_line(error)}); mend it") from None


def _json_lines(data: bytes, place: str) -> list[dict]:
    """The objects of JSON lines; blank lines hold none."""
    text, rows = _text(data, place), []
    if not text.strip():
        raise StudyError(f"{place}: line 1 is empty, and so are all; {WANTED}")
    # Only \n ends a line: texts may hold other separators that splitlines() would cut at.
    for number, line in enumerate(text.rstrip().split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            seen = _document(text) or (_table(line) if number == 1 else "")
            told = f"is {seen}" if seen else f"line {number} is not JSON ({error})"
            raise StudyError(f"{place}: {told}; {WANTED}") from None
        if not isinstance(row, dict):
            seen = _document(text) or f"line {number} is {describe_value(row)}"
            raise StudyError(f"{place}: {seen}; {WANTED}")
        rows.append(row)
    return rows


def _text(data: bytes, place: str) -> str:
    """The bytes as UTF-8."""
    wide = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    if wide or (b"\0" in data[:64] and b"{" in data[:4]):
        raise StudyError(f"{place}: is in UTF-16; save it in UTF-8")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise StudyError(f"{place}: line {line} is not UTF-8 ({error}); save it in UTF-8") from None


def _document(text: str) -> str:
    """What a text is if it is one JSON value and no lines of them; empty if it is neither."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return ""
    if isinstance(value, list):
        return f"one JSON array of {len(value)} values, the first {describe_value(value[:1])[1:-1]}"
    return f"one JSON value over several lines, {describe_value(value)}"


def _table(line: str) -> str:
    """What the first line is if it heads a table; empty if it does not look so."""
    for separator, name in (("\t", "TSV"), (",", "CSV"), (";", "CSV")):
        if separator in line and not line.lstrip().startswith(("{", "[")):
            return f"a table in {name} ({one_line(line)[:80]})"
    return ""
