"""What a notebook opens first: the study, its folders, and the model and variant at hand."""

from dataclasses import dataclass, field
from pathlib import Path

from helpers.core.errors import StudyError
from helpers.core.paths import StudyPaths
from helpers.study.loading import load_study, study_file
from helpers.study.schema import Study
from helpers.study.schema_variants import Variant


@dataclass(frozen=True)
class Job:
    """One run of one notebook.

    `runtime` describes, for the record, what the runtime settings of the study file mean on
    this machine; helpers.runtime.devices fills it in.
    """

    name: str
    study: Study
    paths: StudyPaths
    model: str = ""
    variant: str = ""
    runtime: dict = field(default_factory=dict)

    @property
    def recipe(self) -> Variant:
        """The settings of this job's variant."""
        return self.study.variants[self.variant]

    @property
    def parameters(self) -> dict:
        """The job's own parameters, for its record."""
        parameters = {
            "study": self.name,
            "model": self.model,
            "variant": self.variant,
            "runtime": self.runtime,
        }
        return {key: value for key, value in parameters.items() if value}


def open_job(study: str | Path, *, model: str = "", variant: str = "") -> Job:
    """The job of a validated study with one of its models and variants.

    Without a model the job reads records only, and models and data may be missing.

    Raises:
        StudyError: the study file is wrong, it has no such model or variant, or a link
            under its outputs leads elsewhere.
    """
    study_settings, name = load_study(study, with_sources=bool(model)), study_file(study).stem
    for kind, value, names in (
        ("model", model, study_settings.models),
        ("variant", variant, study_settings.variants),
    ):
        if value and value not in names:
            raise StudyError(f"{name}: {kind} = {value!r} is not one of {', '.join(names)}")
    paths = StudyPaths(name)
    paths.check_links()
    return Job(name, study_settings, paths, model, variant)
