"""Reads a study file and refuses, in one line each, whatever is wrong with it.

Checks the file itself, the references inside it, and that local files it names exist and
can be what they are named as. Nothing is downloaded and no model is touched.
"""

import difflib
import re
from collections.abc import Callable
from operator import attrgetter
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from helpers.study.errors import StudyError
from helpers.study.model_folders import folder_problem
from helpers.study.names import PATTERN, RULE, TAKEN, TAKEN_STUDIES, trouble_with
from helpers.study.paths import PROJECT, StudyPaths, vllm_python
from helpers.study.pins import pinned, read_pins
from helpers.study.plain_text import one_line
from helpers.study.schema import (
    EvaluationSet,
    FileDataset,
    FineTunedModel,
    FolderModel,
    Study,
)
from helpers.study.yaml_text import MOST_BYTES, read_yaml

UNION_TAGS = {"bundled", "hub", "folder", "random", "finetune", "shipped", "file"}
UNION_TAGS |= {"loglikelihood", "generate"}
NO_PATH = (OSError, RuntimeError, ValueError)  # too long, no such user's home, a NUL
PROTOCOLS = {
    "arc": {"loglikelihood", "generate"},
    "boolq": {"loglikelihood", "generate"},
    "squad_v2": {"generate"},
    "openmath": {"generate"},
}


def study_file(study: str | Path) -> Path:
    """The path of a study given by name (`demo`) or by path (`params/demo.yaml`)."""
    text = str(study)
    if text.endswith((".yaml", ".yml")):
        path = Path(text)
        return path if path.is_absolute() else PROJECT / path
    return PROJECT / "params" / f"{text}.yaml"


def load_study(study: str | Path, *, with_sources: bool = True) -> Study:
    """The validated study, its names on a Hub pinned to the commits on record.

    Args and raises: as `read_study`; a damaged record of commits is refused too.
    """
    read = read_study(study, with_sources=with_sources)
    return pinned(read, read_pins(StudyPaths(study_file(study).stem)))


def read_study(study: str | Path, *, with_sources: bool = True) -> Study:
    """The validated study as its file has it.

    Args:
        study: a name in `params/`, or the path of a YAML file.
        with_sources: whether the local files it names have to be there; its results can be
            looked at without them.

    Raises:
        StudyError: one line for each thing wrong, naming file, key, value, limit and remedy.
    """
    path, place = study_file(study), place_of(study)
    if not _found(str(path), Path.is_file):
        known = sorted(p.stem for p in (PROJECT / "params").glob("*.yaml"))
        raise StudyError(f"{place}: there is no such study file; use one of: {', '.join(known)}")
    _refuse_name(path.stem, place)
    try:
        with open(path, "rb") as stream:
            data = read_yaml(stream.read(MOST_BYTES + 1))
    except (ValueError, OSError) as error:
        raise StudyError(f"{place}: is not readable YAML: {one_line(error)}") from None
    if not isinstance(data, dict):
        raise StudyError(f"{place}: is not a mapping of settings; start from params/demo.yaml")
    try:
        loaded = Study.model_validate(data)
    except ValidationError as error:
        raise StudyError("\n".join(_lines(error, data, place))) from None
    found = _references(loaded) + (_missing_files(loaded) if with_sources else [])
    problems = [f"{place}: {line}" for line in found]
    if problems:
        raise StudyError("\n".join(problems))
    return loaded


def place_of(study: str | Path) -> str:
    """A study's file as messages name it."""
    return _shown(study_file(study))


def _refuse_name(study: str, place: str) -> None:
    """A study's outputs lie in a folder of its file's name, which must not lead elsewhere."""
    if not re.fullmatch(PATTERN, study):
        raise StudyError(f"{one_line(place)}: {study!r} names no folder; rename the file ({RULE})")
    if study in TAKEN_STUDIES:
        raise StudyError(f"{place}: {study!r} is a folder of outputs/ already; rename the file")
    if trouble := trouble_with(study):
        raise StudyError(f"{place}: {study!r} {trouble}")


def _shown(path: Path) -> str:
    return str(path.relative_to(PROJECT)) if path.is_relative_to(PROJECT) else str(path)


def _lines(error: ValidationError, data: dict, place: str) -> list[str]:
    """Each pydantic complaint as `file: dotted.key = value message`."""
    lines = []
    for problem in error.errors():
        key, value = _locate(problem, data)
        if problem["type"] == "too_short" and value:
            continue  # its members were refused above
        if problem["type"] == "missing":
            lines.append(f"{place}: {key} is missing; add it (params/demo.yaml has an example)")
        elif problem["type"].startswith("union_tag"):
            tags = problem.get("ctx", {}).get("expected_tags")
            remedy = f"use one of {tags}" if tags else "give a mapping as in params/demo.yaml"
            lines.append(f"{place}: {key} = {_short(value)} names no known kind; {remedy}")
        else:
            lines.append(f"{place}: {key} = {_short(value)} {_message(problem)}")
    return lines


def _locate(problem: dict, data: Any) -> tuple[str, Any]:
    """The dotted key and value in the file; pydantic's union tags are left out."""
    keys, value, tagged = [], data, False
    loc = list(problem["loc"])
    if problem["type"] == "unknown_key":
        loc.append(problem["ctx"]["key"])
    for part in loc:
        if part in UNION_TAGS and _is_union(keys) and not tagged:
            tagged = True  # the same word may follow as a key
            continue
        tagged = False
        inside = isinstance(value, dict) and part in value
        inside |= isinstance(value, list) and isinstance(part, int) and part < len(value)
        if inside:
            keys.append(_short_key(part))
            value = value[part]
    if problem["type"] == "missing":
        keys.append(_short_key(loc[-1]))
    return ".".join(keys) or "the file", value


def _short_key(key: object) -> str:
    return one_line(key)[:80]


def _is_union(keys: list[str]) -> bool:
    """Whether pydantic puts the tag of a union's member after these keys."""
    model = len(keys) == 2 and keys[0] == "models"
    named = len(keys) == 3 and keys[:2] == ["evaluation", "datasets"]
    return model or (keys[-1:] in (["dataset"], ["source"], ["ask"]) and not named)


def _message(problem: dict) -> str:
    context = problem.get("ctx", {})
    match problem["type"]:
        case "greater_than_equal":
            return f"is below {context['ge']}; give at least {context['ge']}"
        case "less_than_equal":
            return f"is above {context['le']}; give at most {context['le']}"
        case "greater_than":
            return f"is not above {context['gt']}; give a larger number"
        case "less_than":
            return f"is not below {context['lt']}; give a smaller number"
        case "literal_error":
            return f"is not known; use one of {context['expected']}"
        case "string_pattern_mismatch":
            return f"does not match {context['pattern']}; rename it"
        case "bool_type":
            return "is neither true nor false; write one of them, without quotes"
        case "value_error":
            return f"is refused: {one_line(context['error'])}"
        case "too_short" | "string_too_short":
            return "is empty; give at least one"
        case "string_type":
            return "is not text; put it in quotes"
        case "int_type" | "int_parsing" | "int_from_float" | "int_parsing_size":
            return "is not a whole number; give one without quotes or decimals"
        case "float_type" | "float_parsing" | "finite_number":
            return "is not a finite number; give one"
        case "tuple_type":
            return "is not a list; write [a, b], or [] for none"
        case "dict_type" | "model_type" | "model_attributes_type":
            return "is not a mapping of settings; params/demo.yaml has an example"
    return one_line(problem["msg"][0].lower() + problem["msg"][1:])


def _short(value: Any) -> str:
    text = one_line(repr(value))
    return text if len(text) <= 80 else text[:77] + "..."


def _unknown(key: str, value: str, kind: str, known) -> str:
    near = difflib.get_close_matches(value, known, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return f"{key} = {value!r} is not a {kind} of this study ({', '.join(known)}){hint}"


def _references(study: Study) -> list[str]:
    """What the study file says about its own names that is not so."""
    problems = []
    if study.baseline not in study.variants:
        problems.append(_unknown("baseline", study.baseline, "variant", study.variants))
    elif not study.variants[study.baseline].as_loaded:
        problems.append(
            f"baseline = {study.baseline!r} is not the model as it was loaded; name a variant "
            "that changes nothing ({})"
        )
    for name, variant in study.variants.items():
        if variant.dtype == study.runtime.dtype:
            problems.append(
                f"variants.{name}.dtype = {variant.dtype!r} is runtime.dtype already; name the "
                "other one, so that the two differ by rounding"
            )
        elif variant.dtype and study.runtime.dtype == "auto":
            problems.append(
                f"variants.{name}.dtype = {variant.dtype!r} may be what runtime.dtype = 'auto' "
                "comes to; name runtime.dtype too"
            )
    for kind, taken in TAKEN.items():
        for name in sorted(taken & set(attrgetter(kind)(study))):
            problems.append(f"{kind}.{name} names what every run writes itself; rename it")
    for name, model in study.models.items():
        if isinstance(model, FineTunedModel):
            problems += _start(study, f"models.{name}.finetune.start", model.finetune.start)
    for name, dataset in study.evaluation.datasets.items():
        asked = _asking(dataset, thinking=bool(study.enable_thinking))
        problems += [f"evaluation.datasets.{name}.{problem}" for problem in asked]
    for index, pair in enumerate(study.statistics.primary):
        key = f"statistics.primary.{index}"
        named = [("model", study.models), ("dataset", study.evaluation.datasets)]
        named += [("baseline", study.variants), ("variant", study.variants)]
        for field, known in named:
            value = getattr(pair, field)
            if value not in known:
                kind = "variant" if field == "baseline" else field
                problems.append(_unknown(f"{key}.{field}", value, kind, known))
        if pair.variant == pair.baseline:
            problems.append(f"{key}.variant = {pair.variant!r} is its own baseline; name another")
        if pair in study.statistics.primary[:index]:
            problems.append(f"{key} repeats an earlier comparison; remove it")
    for index, name in enumerate(study.old_rules_chapter):
        key = f"old_rules_chapter.{index}"
        if name not in study.variants:
            problems.append(_unknown(key, name, "variant", study.variants))
        elif name == study.baseline:
            problems.append(f"{key} = {name!r} is the baseline; name what is held against it")
    return problems


def _asking(dataset: EvaluationSet, *, thinking: bool) -> list[str]:
    """What does not go together in how one set is asked, each from its key on."""
    problems, ask = [], dataset.ask
    if ask.protocol not in PROTOCOLS[dataset.adapter]:
        problems.append(
            f"ask.protocol = {ask.protocol!r} cannot ask {dataset.adapter} items; use "
            f"{' or '.join(sorted(PROTOCOLS[dataset.adapter]))}"
        )
    if dataset.keep and dataset.adapter != "openmath":
        problems.append(
            f"keep = {dataset.keep!r} is for openmath items, not for {dataset.adapter}; remove it"
        )
    if thinking and ask.protocol == "generate" and (ask.answer, ask.stop) != ("boxed", "turn"):
        problems.append(
            f"ask.answer = {ask.answer!r} with stop = {ask.stop!r} would take thoughts for the "
            "answer, since enable_thinking = true; use answer: boxed, stop: turn"
        )
    return problems


def _start(study: Study, key: str, start: str) -> list[str]:
    if start not in study.models:
        return [_unknown(key, start, "model", study.models)]
    if isinstance(study.models[start], FineTunedModel):
        return [f"{key} = {start!r} is itself fine-tuned by this study; start from a given model"]
    return []


def _missing_files(study: Study) -> list[str]:
    problems = []
    if study.runtime.quantized == "vllm" and not vllm_python().is_file():
        problems.append(
            "runtime.quantized = 'vllm' but vLLM is not set up; run make .venv-vllm/.study-ready"
        )
    for key, source in _sources(study):
        if isinstance(source, FileDataset) and not files_of(source):
            problems.append(f"{key}.file = {source.file!r} does not exist; correct the path")
        if isinstance(source, FolderModel) and (wrong := _folder_problem(source)):
            problems.append(f"{key}.folder = {source.folder!r} {wrong}")
    return problems


def _found(path: str, kind: Callable[[Path], bool]) -> bool:
    """Whether a path of the study file is there; one that cannot be a path is not."""
    try:
        return kind(resolve(path))
    except NO_PATH:
        return False


def _folder_problem(source: FolderModel) -> str | None:
    if not _found(source.folder, Path.is_dir):
        return "is not a folder; correct the path"
    return folder_problem(resolve(source.folder))


def _sources(study: Study) -> list[tuple[str, object]]:
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


def files_of(source: FileDataset) -> list[Path]:
    """The files a local dataset names, in order of their names; empty if there are none."""
    try:
        path = resolve(source.file)
        named = path.parent.glob(path.name) if any(c in path.name for c in "*?[") else [path]
        return sorted(file for file in named if file.is_file())
    except NO_PATH:
        return []


def resolve(path: str) -> Path:
    """A path of the study file; relative ones start at the project's root."""
    given = Path(path).expanduser()
    return given if given.is_absolute() else PROJECT / given
