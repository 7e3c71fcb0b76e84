"""Where everything a run reads and writes lies. Creates nothing."""

import os
from dataclasses import dataclass
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[3]


def outputs_root() -> Path:
    """The folder all studies write to; `STUDY_OUTPUTS` moves it (the tests do)."""
    return Path(os.environ.get("STUDY_OUTPUTS", PROJECT / "outputs"))


def cache_root() -> Path:
    """Where converted models are kept between studies; `STUDY_CACHE` moves it."""
    return Path(os.environ.get("STUDY_CACHE", PROJECT / ".cache"))


@dataclass(frozen=True)
class StudyPaths:
    """The folders of one study under `outputs/<study>/`."""

    study: str

    @property
    def root(self) -> Path:
        return outputs_root() / self.study

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

    def variant(self, model: str, variant: str) -> Path:
        return self.root / model / variant

    def checkpoint(self, model: str, variant: str) -> Path:
        return self.variant(model, variant) / "checkpoint"

    def quantization(self, model: str, variant: str) -> Path:
        return self.variant(model, variant) / "quantization"

    def evaluation(self, model: str, variant: str) -> Path:
        return self.variant(model, variant) / "evaluation"
