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
# Copies in other programs' layouts, and whatever lies in folders.
NOT_MODEL_FILES = ["*/*", "consolidated*.safetensors", "adapter_*"]
ANSWER_S = 10.0  # the longest wait for a first answer
WAITS_S = (1.0, 3.0)  # before asking again a server that had trouble
ELSEWHERE = "connect, set HF_ENDPOINT to a mirror, or name local files in the study"
NO_ANSWER = httpx.TransportError | OfflineModeIsEnabled
Answer = TypeVar("Answer")


class Unreachable(StudyError):
    """There is no Hub to ask; what lies in the cache may do."""


def with_retries(ask: Callable[[], Answer]) -> Answer:
    """The answer, asked for again while the server has trouble.

    Raises:
        StudyError: there is none; says why and what to do.
    """
    for wait_s in (*WAITS_S, None):
        try:
            return ask()
        except Exception as error:  # clients raise many kinds; each means there is no answer
            if wait_s is None or not _is_transient(error):
                raise readable_error(error) from None
            time.sleep(wait_s)
    raise AssertionError("the last attempt returns or raises")


def _is_transient(error: BaseException) -> bool:
    """Whether the same question may be answered a moment later."""
    error = _root(error)
    broken_off = (httpx.RemoteProtocolError, httpx.ReadError)
    return _is_server_error(_status(error)) or isinstance(error, broken_off)


def _root(error: BaseException) -> BaseException:
    """The Hub's own answer, or the lack of one, in what a client made of it."""
    inner: BaseException | None = error
    while inner and not isinstance(inner, StudyError | HfHubHTTPError | NO_ANSWER):
        inner = inner.__cause__ or inner.__context__
    return inner or error


def _status(error: BaseException) -> int | None:
    return error.response.status_code if isinstance(error, HfHubHTTPError) else None


def _is_server_error(status: int | None) -> bool:
    return status is not None and (status in (408, 429) or status >= 500)


def readable_error(error: BaseException) -> StudyError:
    """Why there is no answer, and what to do about it, in one line."""
    error = _root(error)
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
            return Unreachable(f"the Hub cannot be reached ({reason}); {ELSEWHERE}")
    return StudyError(f"could not be fetched ({reason}); run again, or name local files instead")


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def commit_of(kind: str, name: str, revision: str) -> str:
    """The commit a revision of a `model` or `dataset` repository is now.

    Without a Hub, what it was when this machine's cache last heard of it.

    Raises:
        StudyError: there is no such repository or revision, or none that may be read.
    """
    api = HfApi(library_name="smoothquant-study")
    where = {"repo_type": kind, "revision": revision}
    try:
        with_retries(lambda: api.repo_info(name, timeout=ANSWER_S, **where))
    except Unreachable:
        try:
            return api.resolve_revision(name, local_files_only=True, **where).resolved
        except RevisionResolutionError:
            pass
        raise
    # Asked once more, since this call leaves what it hears in the cache.
    return with_retries(lambda: api.resolve_revision(name, **where)).resolved


def cached_model(name: str, commit: str) -> Path | None:
    """The folder of a model that is in the cache whole; None if it is not. Asks no Hub.

    Whole: every file that the index names is there, as long as its header says.
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
        StudyError: it cannot be had, is no safetensors model of a known family, is not whole
            in the repository, or arrived damaged.
    """
    api = HfApi(library_name="smoothquant-study")
    tree = with_retries(lambda: list(api.list_repo_tree(name, revision=commit)))
    names = [entry.path for entry in tree]
    if lacking := model_files_problem(_fetched_names(names)):
        raise StudyError(model_files_problem(names) or lacking)
    config = with_retries(lambda: hf_hub_download(name, "config.json", revision=commit))
    if unfit := config_problem(Path(config).read_bytes()):
        raise StudyError(unfit)
    folder = Path(with_retries(lambda: _snapshot(name, commit)))
    for entry in tree:
        path, large = folder / entry.path, getattr(entry, "lfs", None)
        if large and path.is_file() and sha256_file(path) != large.sha256:
            path.resolve().unlink()  # the file itself: the folder holds links to it
            path.unlink(missing_ok=True)
            raise StudyError(f"{entry.path} arrived damaged and was removed; run again")
    try:
        stored_tensors(folder)
    except StudyError as error:  # the repository itself is not whole
        raise StudyError(f"{str(error).partition(';')[0]}; name another revision") from None
    return folder


def _fetched_names(paths: Iterable[str]) -> list[str]:
    """The files of a repository that matter: copies in other layouts, and adapters, do not."""
    return [p for p in paths if not any(fnmatch(p, pattern) for pattern in NOT_MODEL_FILES)]


def _snapshot(name: str, commit: str, **options) -> str:
    return snapshot_download(
        name,
        revision=commit,
        allow_patterns=MODEL_FILES,
        ignore_patterns=NOT_MODEL_FILES,
        etag_timeout=ANSWER_S,
        **options,
    )
