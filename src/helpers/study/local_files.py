"""The local files and folders a study file names: where they are, and whether they are there."""

from collections.abc import Callable
from pathlib import Path

from helpers.core.paths import PROJECT, vllm_python
from helpers.study.model_folders import folder_problem
from helpers.study.schema import Study
from helpers.study.schema_sources import FileDataset, FineTunedModel, FolderModel

NO_PATH = (OSError, RuntimeError, ValueError)  # too long, no such user's home, a NUL


def resolve_path(path: str) -> Path:
    """A path of the study file; relative ones start at the project's root."""
    given = Path(path).expanduser()
    return given if given.is_absolute() else PROJECT / given


def dataset_files(source: FileDataset) -> list[Path]:
    """The files a local dataset names, in order of their names; empty if there are none."""
    try:
        path = resolve_path(source.file)
        named = path.parent.glob(path.name) if any(c in path.name for c in "*?[") else [path]
        return sorted(file for file in named if file.is_file())
    except NO_PATH:
        return []


def path_is(path: str, kind: Callable[[Path], bool]) -> bool:
    """Whether a path of the study file is there; one that cannot be a path is not."""
    try:
        return kind(resolve_path(path))
    except NO_PATH:
        return False


def missing_local_files(study: Study) -> list[str]:
    """A line for each that is not there, or cannot be what it is named as."""
    problems = []
    if study.runtime.quantized == "vllm" and not vllm_python().is_file():
        problems.append(
            "runtime.quantized = 'vllm' but vLLM is not set up; run make .venv-vllm/.study-ready"
        )
    for key, source in study_sources(study):
        if isinstance(source, FileDataset) and not dataset_files(source):
            problems.append(f"{key}.file = {source.file!r} does not exist; correct the path")
        if isinstance(source, FolderModel) and (wrong := _folder_problem(source)):
            problems.append(f"{key}.folder = {source.folder!r} {wrong}")
    return problems


def _folder_problem(source: FolderModel) -> str | None:
    if not path_is(source.folder, Path.is_dir):
        return "is not a folder; correct the path"
    return folder_problem(resolve_path(source.folder))


def study_sources(study: Study) -> list[tuple[str, object]]:
    """(key, source) of every model and every set of rows that a study names."""
    found: list[tuple[str, object]] = []
    for name, model in study.models.items():
        if isinstance(model, FineTunedModel):
            found.append((f"models.{name}.finetune.dataset", model.finetune.dataset))
        found.append((f"models.{name}", model))
    found.append(("calibration.dataset", study.calibration.dataset))
    found.append(("evaluation.shared_text.dataset", study.evaluation.shared_text.dataset))
    for name, dataset in study.evaluation.datasets.items():
        found.append((f"evaluation.datasets.{name}.source", dataset.source))
    return found
