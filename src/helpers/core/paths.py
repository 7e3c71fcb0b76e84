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
    """Where converted models are kept between studies; `STUDY_CACHE` moves it."""
    return Path(os.environ.get("STUDY_CACHE", PROJECT / ".cache"))


def vllm_python() -> Path:
    """vLLM's own interpreter; `STUDY_VLLM` names the environment it is in."""
    return Path(os.environ.get("STUDY_VLLM", PROJECT / ".venv-vllm")) / "bin" / "python"


def relative_to_project(path: Path) -> str:
    """The path from the project's folder if it lies in it: such results can be moved."""
    return os.path.relpath(path, PROJECT) if path.is_relative_to(PROJECT) else str(path)


@dataclass(frozen=True)
class StudyPaths:
    """The folders of one study under `outputs/<study>/`."""

    study: str

    @property
    def root(self) -> Path:
        return outputs_root() / self.study

    def check_links(self) -> None:
        """Make sure that what is written below the study's folder lies there.

        Raises:
            StudyError: a link leads out of the folder all studies write to.
        """
        inside = outputs_root().resolve()
        for path in self._everything():
            if path.is_symlink() and not Path(os.path.realpath(path)).is_relative_to(inside):
                raise StudyError(
                    f"{path} is a link that leads out of {outputs_root()}; remove it, or "
                    "move the whole folder with STUDY_OUTPUTS=/another/folder"
                )

    def _everything(self) -> Iterator[Path]:
        """The study's folder and all that is in it; links are not followed."""
        yield self.root
        for folder, folders, files in os.walk(self.root):
            yield from (Path(folder) / name for name in (*folders, *files))

    @property
    def notebooks(self) -> Path:
        """Executed notebooks, one a job."""
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
