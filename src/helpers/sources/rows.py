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

EXPECTED_FORMAT = "expected JSON lines: one object per line, as {…}"


def load_rows(source: DatasetSource) -> list[dict]:
    """All rows of a source in its order; several files are read in the order of their names.

    Raises:
        StudyError: the source cannot be read.
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
    """The objects of JSON lines; blank lines are skipped."""
    text, rows = _decoded(data, place), []
    if not text.strip():
        raise StudyError(f"{place}: line 1 is empty, and so are all; {EXPECTED_FORMAT}")
    # Only \n ends a line: texts may hold other separators that splitlines() would cut at.
    for number, line in enumerate(text.rstrip().split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            description = _describe_document(text) or (_describe_table(line) if number == 1 else "")
            problem = f"is {description}" if description else f"line {number} is not JSON ({error})"
            raise StudyError(f"{place}: {problem}; {EXPECTED_FORMAT}") from None
        if not isinstance(row, dict):
            description = _describe_document(text) or f"line {number} is {describe_value(row)}"
            raise StudyError(f"{place}: {description}; {EXPECTED_FORMAT}")
        rows.append(row)
    return rows


def _decoded(data: bytes, place: str) -> str:
    """The bytes decoded from UTF-8.

    Raises:
        StudyError: they are in UTF-16 or not UTF-8.
    """
    is_utf16 = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    if is_utf16 or (b"\0" in data[:64] and b"{" in data[:4]):
        raise StudyError(f"{place}: is in UTF-16; save it in UTF-8")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise StudyError(f"{place}: line {line} is not UTF-8 ({error}); save it in UTF-8") from None


def _describe_document(text: str) -> str:
    """A description of a text that is one JSON value; empty if it is none."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return ""
    if isinstance(value, list):
        return f"one JSON array of {len(value)} values, the first {describe_value(value[:1])[1:-1]}"
    return f"one JSON value over several lines, {describe_value(value)}"


def _describe_table(line: str) -> str:
    """A description of the first line if it looks like a table header; else empty."""
    for separator, name in (("\t", "TSV"), (",", "CSV"), (";", "CSV")):
        if separator in line and not line.lstrip().startswith(("{", "[")):
            return f"a table in {name} ({one_line(line)[:80]})"
    return ""
