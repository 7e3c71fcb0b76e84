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

    `runtime` is what the machine at hand made of the study file's runtime, for the record;
    helpers.runtime.devices settles it.
    """

    name: str
    study: Study
    paths: StudyPaths
    model: str = ""
    variant: str = ""
    runtime: dict = field(default_factory=dict)

    @property
    def recipe(self) -> Variant:
        """What the study file says of this job's variant."""
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
    """The validated study with one of its models and variants.

    Without a model the job reads records only, so that models and data may be elsewhere.

    Raises:
        StudyError: the study file is wrong, it has no such model or variant, or a link
            under its outputs leads elsewhere.
    """
    loaded, name = load_study(study, with_sources=bool(model)), study_file(study).stem
    for kind, value, known in (
        ("model", model, loaded.models),
        ("variant", variant, loaded.variants),
    ):
        if value and value not in known:
            raise StudyError(f"{name}: {kind} = {value!r} is not one of {', '.join(known)}")
    paths = StudyPaths(name)
    paths.check_links()
    return Job(name, loaded, paths, model, variant)
