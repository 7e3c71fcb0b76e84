"""Paths of a study, atomic file and folder writes, and locks.

`StudyPaths` says where everything lies that a run reads or writes, and creates nothing.

A file or folder is filled under a temporary name beside its own, handed to the disk, and renamed;
then the rename is handed to the disk. What has its final name is therefore whole, even after a
kill or a power cut. The temporary name of a killed writer says who it was, so that a living
writer's is told apart.

Locks are the operating system's and end with the process that holds them: nothing has to be
unlocked after a crash. A lock is a file beside what it guards; the file stays and means nothing by
itself. On a file system without locks (some clusters have one) nothing is held, and two runs at
once are not noticed.
"""

import errno
import fcntl
import os
import shutil
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from helpers.core.errors import StudyError

PROJECT = Path(__file__).resolve().parents[3]


def outputs_root() -> Path:
    """The folder all studies write to; `STUDY_OUTPUTS` moves it (the tests do)."""
    return Path(os.environ.get("STUDY_OUTPUTS", PROJECT / "outputs"))


def cache_root() -> Path:
    """The folder of converted models, shared by all studies; `STUDY_CACHE` moves it."""
    return Path(os.environ.get("STUDY_CACHE", PROJECT / ".cache"))


def vllm_python() -> Path:
    """The interpreter of vLLM's environment, which `STUDY_VLLM` names."""
    return Path(os.environ.get("STUDY_VLLM", PROJECT / ".venv-vllm")) / "bin" / "python"


def relative_to_project(path: Path) -> str:
    """The path relative to the project if it lies in it, else unchanged."""
    return os.path.relpath(path, PROJECT) if path.is_relative_to(PROJECT) else str(path)


def short_path(path: Path) -> str:
    """The last five parts of a path, for messages."""
    return "/".join(path.parts[-5:])


def draw_name(name: str, draw: int) -> str:
    """A name with the number of its draw from the second on, `smoothquant_w8a8~2`.

    No model or variant has a `~` in its name.
    """
    return name if draw == 1 else f"{name}~{draw}"


@dataclass(frozen=True)
class StudyPaths:
    """The folders of one study under `outputs/<study>/`.

    Attributes:
        draw: the draw of a variant's checkpoint whose folders these are; from the second on,
            they lie beside those of the first, as `calibration~2` and `<variant>~2`.
        drawn: that variant; other variants have their first draw's folders.
        calibrated: the named calibration whose folder `calibration` is, `calibration+short`;
            empty for the study's own.
    """

    study: str
    draw: int = 1
    drawn: str = ""
    calibrated: str = ""

    @property
    def root(self) -> Path:
        return outputs_root() / self.study

    def check_links(self) -> None:
        """Make sure that no link in the study's folder leads out of the outputs folder.

        Raises:
            StudyError: a link leads out of it.
        """
        root = outputs_root().resolve()
        for path in self._everything():
            if path.is_symlink() and not Path(os.path.realpath(path)).is_relative_to(root):
                raise StudyError(
                    f"{path} is a link that leads out of {outputs_root()}; remove it, or "
                    "move the whole folder with STUDY_OUTPUTS=/another/folder"
                )

    def _everything(self) -> Iterator[Path]:
        """The study's folder and every file and folder in it, without following links."""
        yield self.root
        for folder, folders, files in os.walk(self.root):
            yield from (Path(folder) / name for name in (*folders, *files))

    @property
    def notebooks(self) -> Path:
        """Executed notebooks, one per job."""
        return self.root / "notebooks"

    @property
    def report(self) -> Path:
        """Tables, figures and the summary; report.md and report.html lie beside it."""
        return self.root / "report"

    def made_model(self, model: str) -> Path:
        """A model that the study makes itself, by fine-tuning or rotation."""
        return self.root / model / "model"

    def calibration(self, model: str) -> Path:
        named = f"calibration+{self.calibrated}" if self.calibrated else "calibration"
        return self.root / model / draw_name(named, self.draw)

    def cost(self, model: str) -> Path:
        return self.root / model / "cost"

    def variant(self, model: str, variant: str) -> Path:
        draw = self.draw if variant == self.drawn else 1
        return self.root / model / draw_name(variant, draw)

    def checkpoint(self, model: str, variant: str) -> Path:
        return self.variant(model, variant) / "checkpoint"

    def quantization(self, model: str, variant: str) -> Path:
        return self.variant(model, variant) / "quantization"

    def evaluation(self, model: str, variant: str) -> Path:
        return self.variant(model, variant) / "evaluation"


ENDING = ".tmp"


def temporary_name(path: Path) -> Path:
    """A hidden neighbour of `path` that names this machine and process."""
    return path.with_name(f".{path.name}.{socket.gethostname()}-{os.getpid()}{ENDING}")


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary neighbour, then give it the name `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_name(path)
    try:
        write(temporary)
        flush_to_disk(temporary)
        _rename(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def replace_folder(folder: Path, fill: Callable[[Path], None]) -> None:
    """Let `fill` write a temporary folder, then give it the name `folder`.

    An old folder of that name is renamed before: for a moment neither exists, but a mixture
    of the two never does. Libraries for atomic writes replace single files only.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_name(folder)
    aside = temporary_name(folder.with_name(f"{folder.name}.old"))
    for path in (temporary, aside):
        shutil.rmtree(path, ignore_errors=True)
    try:
        temporary.mkdir()
        fill(temporary)
        _flush_folder(temporary)
        if folder.exists():
            os.replace(folder, aside)
        _rename(temporary, folder)
    finally:
        for path in (temporary, aside):
            shutil.rmtree(path, ignore_errors=True)


def _flush_folder(folder: Path) -> None:
    for below, _, files in os.walk(folder):
        for name in files:
            flush_to_disk(Path(below, name))
        flush_to_disk(Path(below))


def _rename(temporary: Path, final: Path) -> None:
    os.replace(temporary, final)
    flush_to_disk(final.parent)


def flush_to_disk(path: Path) -> None:
    """Flush a file, or the names in a folder, to the disk, so that a power cut loses nothing."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_leftovers(folder: Path) -> None:
    """Remove the temporary files of writers that were killed on this machine.

    Temporary files of running processes and of other machines stay.
    """
    for path in list(_temporary(folder)):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def _temporary(folder: Path) -> Iterator[Path]:
    here = f".{socket.gethostname()}-"
    for path in folder.rglob(f".*{ENDING}"):
        _, at, process = path.name.removesuffix(ENDING).rpartition(here)
        if at and process.isdigit() and not _is_alive(int(process)):
            yield path


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # it runs as another user
        return True
    return True


NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)

_open_locks: dict[Path, int] = {}  # of this process, which may acquire a lock twice


def acquire_lock(path: Path, description: str) -> int:
    """Hold the lock until this process ends or releases it; return the file descriptor.

    The library filelock neither names the holder nor hands its descriptor to a child process,
    with which Snakemake keeps the lock of a killed `make study`.

    Raises:
        StudyError: another process holds it; the message names the process.
    """
    if path not in _open_locks:
        descriptor = _open(path)
        if not _flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB):
            holder = _holder(descriptor)
            os.close(descriptor)
            raise StudyError(f"{description} by {holder}; wait for it or stop it")
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()} {socket.gethostname()}".encode(), 0)
        _open_locks[path] = descriptor
    return _open_locks[path]


def _holder(descriptor: int) -> str:
    """The process whose id stands in the lock file."""
    process, _, machine = os.pread(descriptor, 300, 0).decode("utf-8", "replace").partition(" ")
    if not process.isdigit():
        return "another process"
    return f"process {process}" + (f" on {machine}" if machine != socket.gethostname() else "")


def release_lock(path: Path) -> None:
    """Release a lock that `acquire_lock` took; do nothing if this process does not hold it."""
    if path in _open_locks:
        os.close(_open_locks.pop(path))


@contextmanager
def wait_for_lock(path: Path) -> Iterator[None]:
    """Inside the context, hold the lock; wait while another process holds it."""
    descriptor = _open(path)
    try:
        _flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _open(path: Path) -> int:
    path.parent.mkdir(parents=True, exist_ok=True)
    return os.open(path, os.O_RDWR | os.O_CREAT, 0o666)


def _flock(descriptor: int, operation: int) -> bool:
    try:
        fcntl.flock(descriptor, operation)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
    return True
