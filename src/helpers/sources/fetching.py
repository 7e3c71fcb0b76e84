"""`make fetch`: everything a study names on a Hub, pinned to commits and brought to this machine.

The one place where a network is used. `make study` does it before its first job, and asks no Hub
if all is here already; the jobs themselves read from the cache alone. What a branch or tag meant
when it was first fetched is written to the study's `sources.json` and is meant ever after;
`--renew` asks anew, and says what moved.

A split is streamed; nothing but its own files is read. Of one too large for that (the 14 million
rows of OpenMathInstruct-2) only pieces are. A piece is a row group of a parquet file, often a
thousand neighbouring rows. Drawn with the source's seed are first pieces, from all files of the
split alike, then rows within each. The first rows of the first file would be one corner of the
data; this is a cluster sample, in which rows of one piece may be more alike than any two rows are.
How many pieces of how many were read is on record.
"""

import argparse
import random
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import TypeVar

import httpx
from huggingface_hub import HfApi, hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    RevisionResolutionError,
)
from huggingface_hub.utils import logging as client_logging
from tqdm import tqdm

from helpers.core.errors import StudyError
from helpers.core.files import StudyPaths
from helpers.core.processes import allow_interrupts
from helpers.core.records import sha256_file
from helpers.sources.items import cache_rows, cached_rows_info
from helpers.study.inputs import (
    HubSource,
    PinnedDataset,
    PinnedModel,
    Pins,
    config_problem,
    hub_sources,
    model_files_problem,
    read_pins,
    stored_tensors,
    write_pins,
)
from helpers.study.loading import read_study, study_file, study_file_label
from helpers.study.schema import HubDataset, HubModel, Stream, Study

MODEL_FILES = ["*.json", "*.safetensors", "*.jinja", "tokenizer.model", "merges.txt", "vocab.txt"]
# Copies in other programs' layouts, and files in subfolders.
NOT_MODEL_FILES = ["*/*", "consolidated*.safetensors", "adapter_*"]
TIMEOUT_S = 10.0  # until the first byte of a response
WAITS_S = (1.0, 3.0)  # before each retry after a server error
OFFLINE_REMEDY = "connect, set HF_ENDPOINT to a mirror, or name local files in the study"
ConnectionFailure = httpx.TransportError | OfflineModeIsEnabled
Answer = TypeVar("Answer")


class Unreachable(StudyError):
    """The Hub cannot be reached; the cache may suffice."""


def with_retries(request: Callable[[], Answer]) -> Answer:
    """The result of a request, repeated after each server error.

    huggingface_hub retries only downloads of files, and its errors have several lines and no
    remedy.

    Raises:
        StudyError: the request failed; the message is one line with the remedy.
    """
    for wait_s in (*WAITS_S, None):
        try:
            return request()
        except Exception as error:  # clients raise many kinds; each means a failed request
            if wait_s is None or not _is_transient(error):
                raise readable_error(error) from None
            time.sleep(wait_s)
    raise AssertionError("the last attempt returns or raises")


def _is_transient(error: BaseException) -> bool:
    """Whether the same request may succeed a moment later."""
    error = _root_cause(error)
    broken_off = (httpx.RemoteProtocolError, httpx.ReadError)
    return _is_server_error(_status(error)) or isinstance(error, broken_off)


def _root_cause(error: BaseException) -> BaseException:
    """The Hub's error or the connection failure that caused a client's error."""
    inner: BaseException | None = error
    while inner and not isinstance(inner, StudyError | HfHubHTTPError | ConnectionFailure):
        inner = inner.__cause__ or inner.__context__
    return inner or error


def _status(error: BaseException) -> int | None:
    return error.response.status_code if isinstance(error, HfHubHTTPError) else None


def _is_server_error(status: int | None) -> bool:
    return status is not None and (status in (408, 429) or status >= 500)


def readable_error(error: BaseException) -> StudyError:
    """The error of a failed request in one line, with its remedy."""
    error = _root_cause(error)
    if isinstance(error, StudyError):
        return error
    status, reason = _status(error), _first_line(error)
    match error:
        case OfflineModeIsEnabled():
            return Unreachable(
                "is not in this machine's cache, and HF_HUB_OFFLINE is set; unset it, or fetch "
                "where there is a network"
            )
        case GatedRepoError():
            return StudyError(
                "is gated; ask for access on its page, log in (hf auth login, or HF_TOKEN), and "
                "run again"
            )
        case RevisionNotFoundError():
            return StudyError("has no such revision; name a branch, tag or commit it has")
        case RepositoryNotFoundError():
            return StudyError(
                "is not on the Hub, or is private; check the name, or log in (hf auth login)"
            )
        case HFValidationError():
            return StudyError(f"is no name of a repository ({reason}); correct it")
        case EntryNotFoundError():
            return StudyError(f"lacks a file ({reason}); name another revision")
        case _ if status in (401, 403):
            return StudyError(
                f"was refused ({status}); log in with a token that may read it (hf auth login)"
            )
        case _ if _is_server_error(status):
            return Unreachable(f"the Hub has trouble ({status}); run again later")
        case httpx.TransportError():
            return Unreachable(f"the Hub cannot be reached ({reason}); {OFFLINE_REMEDY}")
    return StudyError(f"could not be fetched ({reason}); run again, or name local files instead")


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def commit_of(kind: str, name: str, revision: str) -> str:
    """The current commit of a revision of a `model` or `dataset` repository.

    If the Hub is unreachable, the commit that the cache recorded last.

    Raises:
        StudyError: the repository or revision does not exist or may not be read.
    """
    api = HfApi(library_name="smoothquant-study")
    repository = {"repo_type": kind, "revision": revision}
    try:
        with_retries(lambda: api.repo_info(name, timeout=TIMEOUT_S, **repository))
    except Unreachable:
        try:
            return api.resolve_revision(name, local_files_only=True, **repository).resolved
        except RevisionResolutionError:
            pass
        raise
    # A second request, because this call records the commit in the cache.
    return with_retries(lambda: api.resolve_revision(name, **repository)).resolved


def cached_model(name: str, commit: str) -> Path | None:
    """The cached folder of a model; None if it is incomplete. Sends no request.

    It is complete if every file of the index exists with the size that its header states.
    """
    try:
        folder = Path(_snapshot(name, commit, local_files_only=True))
    except (LocalEntryNotFoundError, OSError, ValueError):
        return None
    if model_files_problem(p.name for p in folder.iterdir()):
        return None
    try:
        stored_tensors(folder)
    except StudyError:  # a shard is missing, or cut short
        return None
    return folder


def fetch_model(name: str, commit: str) -> Path:
    """The folder of a model at a commit, its safetensors and tokenizer fetched.

    Raises:
        StudyError: it cannot be fetched, is no safetensors model of a known family, is
            incomplete in the repository, or arrived damaged.
    """
    api = HfApi(library_name="smoothquant-study")
    tree = with_retries(lambda: list(api.list_repo_tree(name, revision=commit)))
    names = [entry.path for entry in tree]
    if problem := model_files_problem(_fetched_names(names)):
        raise StudyError(model_files_problem(names) or problem)
    config = with_retries(lambda: hf_hub_download(name, "config.json", revision=commit))
    if config_error := config_problem(Path(config).read_bytes()):
        raise StudyError(config_error)
    folder = Path(with_retries(lambda: _snapshot(name, commit)))
    for entry in tree:
        path, lfs = folder / entry.path, getattr(entry, "lfs", None)
        if lfs and path.is_file() and sha256_file(path) != lfs.sha256:
            path.resolve().unlink()  # the file itself: the folder holds a link to it
            path.unlink(missing_ok=True)
            raise StudyError(f"{entry.path} arrived damaged and was removed; run again")
    try:
        stored_tensors(folder)
    except StudyError as error:  # the repository itself is incomplete
        raise StudyError(f"{str(error).partition(';')[0]}; name another revision") from None
    return folder


def _fetched_names(paths: Iterable[str]) -> list[str]:
    """The files of a repository without copies in other layouts and without adapters."""
    return [p for p in paths if not any(fnmatch(p, pattern) for pattern in NOT_MODEL_FILES)]


def _snapshot(name: str, commit: str, **options) -> str:
    return snapshot_download(
        name,
        revision=commit,
        allow_patterns=MODEL_FILES,
        ignore_patterns=NOT_MODEL_FILES,
        etag_timeout=TIMEOUT_S,
        **options,
    )


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


Say = Callable[[str], None]


def fetch(study: Study, pins: Pins, *, place: str, renew: bool, say: Say) -> Pins:
    """Fetch every Hub source of a study to this machine; return their pins.

    Args:
        study: as its file has it, with revisions instead of commits.
        pins: the recorded commits; kept unless they are renewed or no longer named.
        place: the study file, for messages.
        renew: whether to look up recorded revisions again.
        say: prints a line about each step.

    Raises:
        StudyError: a line for each source that cannot be fetched; if the Hub is
            unreachable, only for the first.
    """
    fetched: list[PinnedModel | PinnedDataset] = []
    problems: list[str] = []
    commits: dict[tuple, str] = {}  # one commit per name, even if the branch moves meanwhile
    for key, source in hub_sources(study):
        name = (type(source), source.hub, source.revision)
        commit = commits.get(name) or (None if renew else pins.commit(source))
        try:
            fetched.append(_fetch_and_pin(source, commit, pins, say))
        except StudyError as error:
            source_label = f"{key} = {source.hub!r} at {source.revision!r}"
            problems.append(f"{place}: {source_label}: {error}")
            if isinstance(error, Unreachable):
                break
            continue
        commits[name] = fetched[-1].commit
    if problems:
        raise StudyError("\n".join(problems))
    return Pins(
        models=tuple(pin for pin in fetched if isinstance(pin, PinnedModel)),
        datasets=tuple(pin for pin in fetched if isinstance(pin, PinnedDataset)),
    )


def _fetch_and_pin(source: HubSource, recorded_commit: str | None, pins: Pins, say: Say):
    """Fetch one source if necessary; returns its pin."""
    kind = "model" if isinstance(source, HubModel) else "dataset"
    commit = recorded_commit or commit_of(kind, source.hub, source.revision)
    old_commit = pins.commit(source)
    if old_commit != commit:
        note = f" (was {old_commit[:12]})" if old_commit else ""
        say(f"pinned   {source.hub}  {source.revision} is {commit[:12]}{note}")
    if isinstance(source, HubModel):
        _fetch_model_once(source.hub, commit, say)
        return PinnedModel(hub=source.hub, revision=source.revision, commit=commit)
    rows = _fetch_rows_once(source.model_copy(update={"revision": commit}), say)
    pin = PinnedDataset(**source.model_dump(), commit=commit, **rows)
    recorded = pins.pinned_rows(source)
    if recorded and recorded.commit == commit and recorded.sha256 != pin.sha256:
        raise StudyError(
            f"its {pin.rows} rows of commit {commit[:12]} are not the {recorded.rows} that "
            "sources.json has on record; remove it from there to accept them"
        )
    return pin


def _fetch_model_once(name: str, commit: str, say: Say) -> None:
    if cached_model(name, commit):
        return
    say(f"fetch    {name}  {commit[:12]}")
    fetch_model(name, commit)


def _fetch_rows_once(source: HubDataset, say: Say) -> dict:
    if (info := cached_rows_info(source)) is None:
        note = f", a sample of at most {source.stream.rows} rows" if source.stream else ""
        say(f"fetch    {source.hub}  {source.revision[:12]} ({source.split}{note})")
        split = read_split(source)
        info = cache_rows(source, split.rows, of_rows=split.of_rows, pieces=split.pieces)
    return info


def main(argv: list[str] | None = None) -> int:
    """The command line: 0 if all sources are here, 2 after a line for each that is not."""
    parser = argparse.ArgumentParser(prog="python -m helpers.sources.fetching", description=__doc__)
    parser.add_argument("study")
    parser.add_argument(
        "--renew", action="store_true", help="look up the commits of all revisions again"
    )
    args = parser.parse_args(argv)
    client_logging.set_verbosity_error()  # hides retries; an error is one line
    paths = StudyPaths(study_file(args.study).stem)
    try:
        allow_interrupts()
        study, pins = read_study(args.study), read_pins(paths)
        place = study_file_label(args.study)
        fetched = fetch(study, pins, place=place, renew=args.renew, say=_say)
        if fetched != pins:
            write_pins(paths, fetched)
    except StudyError as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
