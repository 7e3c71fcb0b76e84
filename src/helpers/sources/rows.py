"""The rows of a dataset source, in the Hub's schemas: shipped, local files, or fetched.

No Hub is asked here: its rows were fetched to the project's cache, at one commit, by
`helpers.sources.fetching`, so that no job needs a network and all read the same rows.
"""

import json
from importlib.resources import files
from pathlib import Path

from helpers.sources.hub_rows import cached_rows
from helpers.study.errors import StudyError
from helpers.study.local_files import files_of
from helpers.study.plain_text import one_line
from helpers.study.source_settings import DatasetSource, FileDataset, HubDataset, ShippedDataset


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
            return [row for path in files_of(source) for row in _file_rows(path, source)]
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
    rows = []
    # Only \n ends a line: texts may hold other separators that splitlines() would cut at.
    for number, line in enumerate(data.rstrip().split(b"\n"), start=1):
        try:
            rows.append(json.loads(line))
        except (ValueError, RecursionError) as error:
            raise StudyError(f"{place}: line {number} is not JSON ({error}); mend it") from None
    return rows
