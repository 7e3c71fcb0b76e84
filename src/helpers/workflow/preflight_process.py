"""What people bring, looked at before the first job, in a process of its own.

Models, tokenizers and rows need torch, which this package does without
(`helpers.evaluation.preflight`). A study of what ships with this project is not looked at, and
nothing is looked at twice: what was sound stays so until a file, the study or the code changes.
"""

import contextlib
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

from helpers.core.hashing import sha256_data, sha256_file
from helpers.core.parent_process import die_with_parent
from helpers.core.paths import PROJECT, cache_root
from helpers.study.fingerprinted_code import HELPERS
from helpers.study.local_files import dataset_files, resolve_path, study_sources
from helpers.study.schema import Study
from helpers.study.schema_sources import (
    BundledModel,
    FileDataset,
    FolderModel,
    HubDataset,
    HubModel,
)

USER_SOURCES = FileDataset | FolderModel | HubDataset | HubModel
DOWNLOADED_SOURCES = (
    HubDataset | HubModel | BundledModel
)  # may still have to be downloaded or converted


def check_sources(study_name: str, study: Study, *, dry: bool) -> int:
    """Print the faults of models and data to stderr; 0 if there are none, else 2.

    Args:
        study_name: the study's name or file, as the user gave it.
        dry: check only the sources that are on this machine.
    """
    sources = [source for _, source in study_sources(study)]
    if not any(isinstance(source, USER_SOURCES) for source in sources):
        return 0
    is_partial = dry and any(isinstance(source, DOWNLOADED_SOURCES) for source in sources)
    stamp = cache_root() / "checked" / _state(study, sources)
    if not is_partial and stamp.is_file():
        return 0
    command = [sys.executable, "-m", "helpers.evaluation.preflight", str(study_name)]
    command += ["--dry"] if dry else []
    result = subprocess.run(command, cwd=PROJECT, preexec_fn=die_with_parent, check=False)
    if result.returncode == 0 and not is_partial:
        with contextlib.suppress(OSError):  # without the stamp the sources are checked again
            stamp.parent.mkdir(parents=True, exist_ok=True)
            stamp.touch()
    return result.returncode and 2


def _state(study: Study, sources: list) -> str:
    """Hash of the study, of its local files' sizes and times, and of the checking code."""
    files = [path for source in sources for path in _local_files(source)]
    stats = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    code = [sha256_file(path) for path in sorted(HELPERS.rglob("*.py"))]
    libraries = [version(name) for name in ("transformers", "tokenizers")]
    return sha256_data([study.model_dump(mode="json"), stats, code, libraries])


def _local_files(source) -> list[Path]:
    match source:
        case FileDataset():
            return dataset_files(source)
        case FolderModel(folder=folder):
            return sorted(path for path in resolve_path(folder).iterdir() if path.is_file())
    return []
