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

RETRIES = 2  # after a broken stream, besides the client's own per request
MOST_BYTES = 512 * 2**20  # read for a sample; of larger pieces fewer are read


@dataclass(frozen=True)
class SplitRows:
    """The rows that were read from a split.

    Attributes:
        of_rows: number of rows of the split.
        pieces: (read, in the split) if only pieces were read, else None.
    """

    rows: list[dict]
    of_rows: int
    pieces: tuple[int, int] | None


def read_split(source: HubDataset) -> SplitRows:
    """The rows of a source that is pinned to a commit.

    Raises:
        StudyError: the configuration or split does not exist or cannot be read.
    """
    builder = with_retries(lambda: _dataset_builder(source))
    files = builder.config.data_files
    if source.split not in files:
        raise StudyError(f"split = {source.split!r} is none of {', '.join(files)}; correct it")
    try:
        if source.stream:
            return _sample(list(files[source.split]), source.stream)
        rows = list(builder.as_streaming_dataset(split=source.split))
    except Exception as error:  # pyarrow, fsspec and httpx each have their own
        raise readable_error(error) from None
    return SplitRows(rows, len(rows), None)


def _dataset_builder(source: HubDataset):
    """The reader that `datasets` builds for a configuration at the pinned commit."""
    import datasets

    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # errors are reported here
    datasets.config.STREAMING_READ_MAX_RETRIES = RETRIES
    datasets.config.STREAMING_OPEN_MAX_RETRIES = RETRIES
    try:
        builder = datasets.load_dataset_builder(source.hub, source.config, revision=source.revision)
    except (
        ValueError
    ) as error:  # an unknown or missing configuration; the message lists the known ones
        raise StudyError(f"config = {source.config!r}: {' '.join(str(error).split())}") from None
    if builder.hash != source.revision:  # offline, the client falls back to its cache
        raise Unreachable("the Hub cannot be reached, and the cache holds another commit; connect")
    return builder


@dataclass(frozen=True)
class _Piece:
    file: str
    group: int
    rows: int
    size_bytes: int


def _sample(urls: list[str], stream: Stream) -> SplitRows:
    """Rows from every drawn piece, equally many, in the order of the draw.

    `datasets` can stream and shuffle, but through a buffer: its sample is not uniform over the
    files, and its download is not bounded.
    """
    opened = dict(_open_parquet(urls))
    pieces = [piece for url, file in opened.items() for piece in _pieces(url, file.metadata)]
    rng = random.Random(stream.seed)
    drawn = rng.sample(pieces, min(stream.pieces, stream.rows, len(pieces)))
    while len(drawn) > 1 and sum(piece.size_bytes for piece in drawn) > MOST_BYTES:
        drawn.pop()
    rows: list[dict] = []
    for index, piece in enumerate(tqdm(drawn, unit="piece", disable=None)):
        count = (stream.rows - len(rows)) // (len(drawn) - index)
        row_indices = sorted(rng.sample(range(piece.rows), min(count, piece.rows)))
        rows += opened[piece.file].read_row_group(piece.group).take(row_indices).to_pylist()
    return SplitRows(rows, sum(piece.rows for piece in pieces), (len(drawn), len(pieces)))


def _open_parquet(urls: list[str]) -> Iterator[tuple[str, object]]:
    """Each parquet file, opened; only its metadata is read."""
    from huggingface_hub import HfFileSystem
    from pyarrow.parquet import ParquetFile

    for url in urls:
        if not url.endswith(".parquet"):
            raise StudyError(
                f"{url} is not parquet, the only format that stream reads; drop stream"
            )
        # One request for exactly a row group: read-ahead would be most of the download.
        yield url, ParquetFile(HfFileSystem().open(url, cache_type="none"), pre_buffer=True)


def _pieces(url: str, metadata) -> Iterator[_Piece]:
    for group in range(metadata.num_row_groups):
        row_group = metadata.row_group(group)
        size = sum(row_group.column(i).total_compressed_size for i in range(row_group.num_columns))
        yield _Piece(url, group, row_group.num_rows, size)
