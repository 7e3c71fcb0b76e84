"""Reads a study file and refuses, in one line each, whatever is wrong with it.

Checks the file itself, the references inside it, and that local files it names exist and
can be what they are named as. Nothing is downloaded and no model is touched.
"""

import re
from pathlib import Path

from pydantic import ValidationError

from helpers.core.errors import StudyError
from helpers.core.paths import PROJECT, StudyPaths, relative_to_project
from helpers.core.plain_text import one_line
from helpers.study.loading_yaml import MOST_BYTES, read_yaml
from helpers.study.local_files import missing_local_files, path_is
from helpers.study.pins import read_pins, with_pinned_commits
from helpers.study.schema import Study
from helpers.study.schema_names import PATTERN, RESERVED_STUDIES, RULE, name_problem
from helpers.study.validation_messages import error_lines
from helpers.study.validation_references import broken_references


def study_file(study: str | Path) -> Path:
    """The path of a study given by name (`demo`) or by path (`params/demo.yaml`)."""
    text = str(study)
    if text.endswith((".yaml", ".yml")):
        path = Path(text)
        return path if path.is_absolute() else PROJECT / path
    return PROJECT / "params" / f"{text}.yaml"


def load_study(study: str | Path, *, with_sources: bool = True) -> Study:
    """The validated study, its Hub revisions replaced by the recorded commits.

    Args and raises: as `read_study`; a damaged record of commits is an error too.
    """
    study_as_written = read_study(study, with_sources=with_sources)
    return with_pinned_commits(study_as_written, read_pins(StudyPaths(study_file(study).stem)))


def read_study(study: str | Path, *, with_sources: bool = True) -> Study:
    """The validated study, its Hub revisions as its file names them.

    Args:
        study: a name in `params/`, or the path of a YAML file.
        with_sources: whether the local files that it names must exist; reading its results
            does not need them.

    Raises:
        StudyError: one line per problem, with file, key, value, limit and remedy.
    """
    path, label = study_file(study), study_file_label(study)
    if not path_is(str(path), Path.is_file):
        study_names = sorted(p.stem for p in (PROJECT / "params").glob("*.yaml"))
        names = ", ".join(study_names)
        raise StudyError(f"{label}: there is no such study file; use one of: {names}")
    _check_name(path.stem, label)
    try:
        with open(path, "rb") as stream:
            data = read_yaml(stream.read(MOST_BYTES + 1))
    except (ValueError, OSError) as error:
        raise StudyError(f"{label}: is not readable YAML: {one_line(error)}") from None
    if not isinstance(data, dict):
        raise StudyError(f"{label}: is not a mapping of settings; start from params/demo.yaml")
    try:
        study_settings = Study.model_validate(data)
    except ValidationError as error:
        raise StudyError("\n".join(error_lines(error, data, label))) from None
    problems = broken_references(study_settings)
    if with_sources:
        problems += missing_local_files(study_settings)
    if problems:
        raise StudyError("\n".join(f"{label}: {problem}" for problem in problems))
    return study_settings


def study_file_label(study: str | Path) -> str:
    """The name of a study's file in messages."""
    return relative_to_project(study_file(study))


def _check_name(study: str, place: str) -> None:
    """Check that the study's name is a portable folder name, since its outputs lie there."""
    if not re.fullmatch(PATTERN, study):
        raise StudyError(f"{one_line(place)}: {study!r} names no folder; rename the file ({RULE})")
    if study in RESERVED_STUDIES:
        raise StudyError(f"{place}: {study!r} is a folder of outputs/ already; rename the file")
    if problem := name_problem(study):
        raise StudyError(f"{place}: {study!r} {problem}")
