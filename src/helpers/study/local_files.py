"""The local files and folders a study file names: where they are, and whether they are there."""

from collections.abc import Callable
from pathlib import Path

from helpers.core.paths import PROJECT, vllm_python
from helpers.study.model_folders import folder_problem
from helpers.study.schema import Study
from helpers.study.schema_sources import FileDataset, FineTunedModel, FolderModel

NO_PATH = (OSError, RuntimeError, ValueError)  # a path too long, an unknown user's home, a NUL


def resolve_path(path: str) -> Path:
    """A path of the study file; a relative one starts at the project's root."""
    expanded = Path(path).expanduser()
    return expanded if expanded.is_absolute() else PROJECT / expanded


def dataset_files(source: FileDataset) -> list[Path]:
    """The files that a local dataset names, sorted by name; empty if there are none."""
    try:
        path = resolve_path(source.file)
        matches = path.parent.glob(path.name) if any(c in path.name for c in "*?[") else [path]
        return sorted(file for file in matches if file.is_file())
    except NO_PATH:
        return []


def path_is(path: str, kind: Callable[[Path], bool]) -> bool:
    """Whether a path of the study file exists and is of a kind (`Path.is_file`).

    False for a text that cannot be a path.
    """
    try:
        return kind(resolve_path(path))
    except NO_PATH:
        return False


def missing_local_files(study: Study) -> list[str]:
    """A line for each local source that is missing or unusable."""
    problems = []
    if study.runtime.quantized == "vllm" and not vllm_python().is_file():
        problems.append(
            "runtime.quantized = 'vllm' but vLLM is not set up; run make .venv-vllm/.study-ready"
        )
    for key, source in study_sources(study):
        if isinstance(source, FileDataset) and not dataset_files(source):
            problems.append(f"{key}.file = {source.file!r} does not exist; correct the path")
        if isinstance(source, FolderModel) and (problem := _folder_problem(source)):
            problems.append(f"{key}.folder = {source.folder!r} {problem}")
    return problems


def _folder_problem(source: FolderModel) -> str | None:
    if not path_is(source.folder, Path.is_dir):
        return "is not a folder; correct the path"
    return folder_problem(resolve_path(source.folder))


def study_sources(study: Study) -> list[tuple[str, object]]:
    """(key, source) of every model and every dataset that a study names."""
    sources: list[tuple[str, object]] = []
    for name, model in study.models.items():
        if isinstance(model, FineTunedModel):
            sources.append((f"models.{name}.finetune.dataset", model.finetune.dataset))
        sources.append((f"models.{name}", model))
    sources.append(("calibration.dataset", study.calibration.dataset))
    sources.append(("evaluation.shared_text.dataset", study.evaluation.shared_text.dataset))
    for name, dataset in study.evaluation.datasets.items():
        sources.append((f"evaluation.datasets.{name}.source", dataset.source))
    return sources
