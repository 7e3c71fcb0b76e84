"""Where everything a run reads and writes lies. Creates nothing."""

import os
from collections.abc import Iterator
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


@dataclass(frozen=True)
class StudyPaths:
    """The folders of one study under `outputs/<study>/`."""

    study: str

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

    def finetuned_model(self, model: str) -> Path:
        return self.root / model / "model"

    def calibration(self, model: str) -> Path:
        return self.root / model / "calibration"

    def cost(self, model: str) -> Path:
        return self.root / model / "cost"

    def variant(self, model: str, variant: str) -> Path:
        return self.root / model / variant

    def checkpoint(self, model: str, variant: str) -> Path:
        return self.variant(model, variant) / "checkpoint"

    def quantization(self, model: str, variant: str) -> Path:
        return self.variant(model, variant) / "quantization"

    def evaluation(self, model: str, variant: str) -> Path:
        return self.variant(model, variant) / "evaluation"
