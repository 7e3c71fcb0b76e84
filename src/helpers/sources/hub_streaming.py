"""Rows read from a Hub by the ordinary clients: all of a split, or a bounded sample of it.

A split is streamed; nothing but its own files is read. Of one too large for that (the 14
million rows of OpenMathInstruct-2) only pieces are. A piece is a row group of a parquet
file, often a thousand neighbouring rows. Drawn with the source's seed are first pieces, from
all files of the split alike, then rows within each. The first rows of the first file would
be one corner of the data; this is a cluster sample, in which rows of one piece may be more
alike than any two rows are. How many pieces of how many were read is on record.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass

from tqdm import tqdm

from helpers.core.errors import StudyError
from helpers.sources.hub import Unreachable, readable_error, with_retries
from helpers.study.schema_sources import HubDataset, Stream

RETRIES = 2  # of a read in mid-stream, beside the client's own for each request
MOST_BYTES = 512 * 2**20  # read for a sample; with larger pieces, fewer of them are


@dataclass(frozen=True)
class Read:
    """What was read of a split.

    Attributes:
        of_rows: how many rows the split has.
        pieces: (read, in the split) where only pieces were.
    """

    rows: list[dict]
    of_rows: int
    pieces: tuple[int, int] | None


def read_split(source: HubDataset) -> Read:
    """The rows of a source that is pinned to a commit.

    Raises:
        StudyError: there is no such configuration or split, or it cannot be read.
    """
    builder = with_retries(lambda: _builder(source))
    files = builder.config.data_files
    if source.split not in files:
        raise StudyError(f"split = {source.split!r} is none of {', '.join(files)}; correct it")
    try:
        if source.stream:
            return _sample(list(files[source.split]), source.stream)
        rows = list(builder.as_streaming_dataset(split=source.split))
    except Exception as error:  # pyarrow, fsspec and httpx each have their own
        raise readable_error(error) from None
    return Read(rows, len(rows), None)


def _builder(source: HubDataset):
    """The `datasets` client's reader of a configuration, at the very commit asked for."""
    import datasets

    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # what goes wrong is told here
    datasets.config.STREAMING_READ_MAX_RETRIES = RETRIES
    datasets.config.STREAMING_OPEN_MAX_RETRIES = RETRIES
    try:
        builder = datasets.load_dataset_builder(source.hub, source.config, revision=source.revision)
    except ValueError as error:  # an unknown or a lacking configuration, and those there are
        raise StudyError(f"config = {source.config!r}: {' '.join(str(error).split())}") from None
    if builder.hash != source.revision:  # without a Hub the client takes what its cache has
        raise Unreachable("the Hub cannot be reached, and the cache holds another commit; connect")
    return builder


@dataclass(frozen=True)
class _Piece:
    file: str
    group: int
    rows: int
    size_bytes: int


def _sample(urls: list[str], stream: Stream) -> Read:
    """Equally many rows of every piece drawn, in the order drawn."""
    opened = dict(_opened(urls))
    pieces = [piece for url, file in opened.items() for piece in _pieces(url, file.metadata)]
    rng = random.Random(stream.seed)
    drawn = rng.sample(pieces, min(stream.pieces, stream.rows, len(pieces)))
    while len(drawn) > 1 and sum(piece.size_bytes for piece in drawn) > MOST_BYTES:
        drawn.pop()
    rows: list[dict] = []
    for index, piece in enumerate(tqdm(drawn, unit="piece", disable=None)):
        due = (stream.rows - len(rows)) // (len(drawn) - index)
        places = sorted(rng.sample(range(piece.rows), min(due, piece.rows)))
        rows += opened[piece.file].read_row_group(piece.group).take(places).to_pylist()
    return Read(rows, sum(piece.rows for piece in pieces), (len(drawn), len(pieces)))


def _opened(urls: list[str]) -> Iterator[tuple[str, object]]:
    """Each parquet file, of which so far only the table of contents is read."""
    from huggingface_hub import HfFileSystem
    from pyarrow.parquet import ParquetFile

    for url in urls:
        if not url.endswith(".parquet"):
            raise StudyError(f"{url} is not parquet, of which alone pieces are read; drop stream")
        # Exactly the bytes of a row group, in one request: reading ahead would be most of it.
        yield url, ParquetFile(HfFileSystem().open(url, cache_type="none"), pre_buffer=True)


def _pieces(url: str, contents) -> Iterator[_Piece]:
    for group in range(contents.num_row_groups):
        about = contents.row_group(group)
        size = sum(about.column(i).total_compressed_size for i in range(about.num_columns))
        yield _Piece(url, group, about.num_rows, size)
