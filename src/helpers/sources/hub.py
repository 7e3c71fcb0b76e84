"""What is asked of a Hub, and every way it can fail as one line with its remedy.

The ordinary client does the asking, with the endpoint, token and cache its environment
variables give it. Added here: no wait is without end, a server's trouble is waited out a
few times, and what arrived is compared with the hashes the Hub names. Only safetensors are
fetched, and never code.
"""

import time
from collections.abc import Callable, Iterable
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

from helpers.core.errors import StudyError
from helpers.core.hashing import sha256_file
from helpers.core.weight_files import stored_tensors
from helpers.study.model_folders import config_problem, model_files_problem

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
