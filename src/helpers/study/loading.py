"""Loading a study file: YAML, validation, messages; and the study, model and variant of one run.

Checks the file itself, the references inside it, and that local files it names exist and can be
what they are named as; refuses, in one line each, whatever is wrong: the key as the file has it,
the value, the limit and the remedy. Nothing is downloaded and no model is touched.

The YAML is plain and bounded. Only plain values are made (safe loading: no tag makes an object). A
repeated key is an error, not the last one's win. Aliases are counted as often as they are used, so
that a few lines cannot stand for a billion values.
"""

import difflib
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from operator import attrgetter
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError
from pydantic_core import ErrorDetails

from helpers.core.errors import StudyError, one_line, valid_unicode
from helpers.core.files import PROJECT, StudyPaths, relative_to_project
from helpers.core.records import read_json
from helpers.study.inputs import (
    missing_local_files,
    path_is,
    read_pins,
    with_found_schemes,
    with_pinned_commits,
)
from helpers.study.schema import (
    FIELDS,
    LIST_FIELDS,
    PATTERN,
    RESERVED_NAMES,
    RESERVED_STUDIES,
    ROTATED,
    RULE,
    SOURCE_TAGS,
    Calibration,
    DatasetSource,
    EvaluationSet,
    FileDataset,
    FineTunedModel,
    FolderDataset,
    RandomModel,
    RotatedModel,
    Study,
    TaskSet,
    Variant,
    name_problem,
)
from helpers.study.tasks import recorded_definitions, with_task_definitions

# The choices of smoothing and of `protect`, in the folder of the quantization.
ALPHA, PROTECTED = "alpha.json", "protected.json"
MOST_BYTES = 256 * 1024
MOST_VALUES = 50_000  # aliases written out
MOST_LEVELS = 24  # mappings and lists inside one another
MOST_CHARACTERS = 2_000  # characters; its number then has fewer digits than Python refuses


class _Loader(yaml.SafeLoader):
    def construct_mapping(self, node, deep=False):
        if isinstance(node, yaml.MappingNode):
            keys = Counter(str(key.value) for key, _ in node.value)
            for name, count in keys.items():
                if count > 1:
                    line = node.start_mark.line + 1
                    raise yaml.YAMLError(f"{name} is repeated, from line {line} on")
        return super().construct_mapping(node, deep)


def read_yaml(content: bytes) -> Any:
    """The plain data of one YAML document.

    PyYAML alone bounds neither aliases nor nesting and lets the last of repeated keys win.

    Raises:
        ValueError: it is no YAML, or exceeds a limit; the message is one line.
    """
    if len(content) > MOST_BYTES:
        raise ValueError(f"it has more than {MOST_BYTES:,} bytes; no study needs so many")
    try:
        loader = _Loader(content.decode("utf-8"))
        node = loader.get_single_node()
        if node is None:
            return None
        _check_size(node)
        return loader.construct_document(node)
    except RecursionError:
        raise ValueError(_TOO_DEEP) from None
    except (AttributeError, IndexError, KeyError, TypeError) as error:
        # PyYAML's constructors raise these if a tag does not fit its value.
        raise ValueError(f"a tag and its value do not fit ({type(error).__name__})") from None
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from None


_TOO_DEEP = f"mappings and lists are nested more than {MOST_LEVELS} deep; no study needs that"


def _check_size(root: yaml.Node) -> None:
    """Check the number, nesting and length of values; refuse a value inside itself."""
    sizes: dict[int, tuple[int, int]] = {}
    open_nodes: set[int] = set()

    def measure(node: yaml.Node) -> tuple[int, int]:
        """(values, depth) of a node with its aliases expanded."""
        if id(node) in open_nodes:
            raise ValueError("an alias stands inside its own anchor; write the value out")
        if id(node) not in sizes:
            open_nodes.add(id(node))
            part_sizes = [measure(part) for part in _parts(node)]
            sizes[id(node)] = (
                1 + sum(size for size, _ in part_sizes),
                1 + max((depth for _, depth in part_sizes), default=0),
            )
            open_nodes.discard(id(node))
        return sizes[id(node)]

    values, depth = measure(root)
    if values > MOST_VALUES:
        raise ValueError(f"with its aliases expanded it has more than {MOST_VALUES:,} values")
    if depth > MOST_LEVELS:
        raise ValueError(_TOO_DEEP)


def _parts(node: yaml.Node) -> Iterable[yaml.Node]:
    if isinstance(node, yaml.MappingNode):
        return [part for pair in node.value for part in pair]
    if isinstance(node, yaml.SequenceNode):
        return node.value
    line = node.start_mark.line + 1
    if len(node.value) > MOST_CHARACTERS:
        raise ValueError(f"line {line}: a value has more than {MOST_CHARACTERS:,} characters")
    if node.value != valid_unicode(node.value):
        raise ValueError(
            f"line {line}: a value holds half a character (an unpaired surrogate); correct it"
        )
    return []


UNION_TAGS = SOURCE_TAGS | {"loglikelihood", "generate", "own items", "harness task"}


def error_lines(error: ValidationError, data: dict, place: str) -> list[str]:
    """Each pydantic error as a line `file: dotted.key = value message`."""
    lines = []
    for problem in error.errors():
        key, value = _locate(problem, data)
        if problem["type"] == "too_short" and value:
            continue  # its members have errors of their own
        if problem["type"] == "missing":
            lines.append(f"{place}: {key} is missing; add it (params/demo.yaml has an example)")
        elif problem["type"].startswith("union_tag"):
            tags = problem.get("ctx", {}).get("expected_tags")
            remedy = f"use one of {tags}" if tags else "give a mapping as in params/demo.yaml"
            lines.append(f"{place}: {key} = {_short(value)} names no known kind; {remedy}")
        else:
            lines.append(f"{place}: {key} = {_short(value)} {_message(problem)}")
    return lines


def unknown_name_line(key: str, value: str, kind: str, known: Iterable[str]) -> str:
    """The error line for a name that the study does not define."""
    matches = difflib.get_close_matches(value, known, n=1)
    hint = f"; did you mean {matches[0]!r}?" if matches else ""
    return f"{key} = {value!r} is not a {kind} of this study ({', '.join(known)}){hint}"


def _locate(problem: ErrorDetails, data: Any) -> tuple[str, Any]:
    """The dotted key and the value in the file, without pydantic's union tags."""
    keys: list[str] = []
    value, tag_seen = data, False
    location = list(problem["loc"])
    if problem["type"] == "unknown_key":
        location.append(problem["ctx"]["key"])
    for part in location:
        if part in UNION_TAGS and _is_union(keys) and not tag_seen:
            tag_seen = True  # the same word may follow as a key
            continue
        tag_seen = False
        is_member = isinstance(value, dict) and part in value
        is_member |= isinstance(value, list) and isinstance(part, int) and part < len(value)
        if is_member:
            keys.append(_short_key(part))
            value = value[part]
    if problem["type"] == "missing":
        keys.append(_short_key(location[-1]))
    return ".".join(keys) or "the file", value


def _short_key(key: object) -> str:
    return one_line(key)[:80]


def _is_union(keys: list[str]) -> bool:
    """Whether pydantic's location has a union tag after these keys."""
    is_model = len(keys) == 2 and keys[0] == "models"
    is_evaluation_set = len(keys) == 3 and keys[:2] == ["evaluation", "datasets"]
    is_source = keys[-1:] in (["dataset"], ["source"], ["ask"])
    return is_model or is_evaluation_set or is_source


def _message(problem: ErrorDetails) -> str:
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


PROTOCOLS = {
    "arc": {"loglikelihood", "generate"},
    "boolq": {"loglikelihood", "generate"},
    "squad_v2": {"generate"},
    "openmath": {"generate"},
}
PLAIN_SHOTS = {"boolq": 6}  # worked examples that there are for protocol loglikelihood


def broken_references(study: Study) -> list[str]:
    """The contradictions among a study file's own names, one line each."""
    problems = _baseline(study) + _float_types(study) + _reserved_names(study)
    for name, model in study.models.items():
        if isinstance(model, FineTunedModel):
            problems += _start(study, f"models.{name}.finetune.start", model.start)
        if isinstance(model, RotatedModel):
            problems += _rotation(study, f"models.{name}.rotate", model.start)
    for name, dataset in study.evaluation.datasets.items():
        if isinstance(dataset, TaskSet):
            continue
        prompting = _prompting_problems(dataset, thinking=bool(study.enable_thinking))
        problems += [f"evaluation.datasets.{name}.{problem}" for problem in prompting]
    problems += _calibrations(study) + _kv_caches(study) + _protections(study)
    return problems + _columns(study) + _comparisons(study) + _old_rules(study)


def _calibrations(study: Study) -> list[str]:
    """Variants that name a calibration the study lacks, and calibrations no variant names."""
    problems, names = [], ", ".join(study.calibrations) or "none"
    for variant, recipe in study.variants.items():
        if recipe.calibration and recipe.calibration not in study.calibrations:
            problems.append(
                f"variants.{variant}.calibration = {recipe.calibration!r} is not one of "
                f"calibrations ({names}); add it there, or leave it out"
            )
    used = {recipe.calibration for recipe in study.variants.values()}
    return problems + [
        f"calibrations.{name} is named by no variant; give one calibration: {name}, or remove it"
        for name in study.calibrations
        if name not in used
    ]


def _columns(study: Study) -> list[str]:
    """Fields that a source's `columns` names and its adapter does not have."""
    sources: list[tuple[str, DatasetSource, str]] = [
        ("calibration.dataset", study.calibration.dataset, study.calibration.adapter)
    ]
    for name, settings in study.calibrations.items():
        sources.append((f"calibrations.{name}.dataset", settings.dataset, settings.adapter))
    shared_text = study.evaluation.shared_text.dataset
    sources.append(("evaluation.shared_text.dataset", shared_text, "shared_text"))
    for name, dataset in study.evaluation.datasets.items():
        if isinstance(dataset, EvaluationSet):
            sources.append((f"evaluation.datasets.{name}.source", dataset.source, dataset.adapter))
    for name, model in study.models.items():
        if isinstance(model, FineTunedModel):
            key = f"models.{name}.finetune.dataset"
            sources.append((key, model.finetune.dataset, "openmath"))
    return [
        f"{key}.{problem}"
        for key, source, adapter in sources
        if isinstance(source, FileDataset | FolderDataset)
        for problem in _column_problems(source, adapter)
    ]


def _column_problems(source: FileDataset | FolderDataset, adapter: str) -> list[str]:
    """Contradictions between a source's columns and its adapter; each line starts with a key."""
    fields, problems = FIELDS[adapter], []
    for field_name, column in (source.columns or {}).items():
        key = f"columns.{_short_key(field_name)}"
        if field_name not in fields:
            swapped = f"; the field comes first: {column}: {field_name}" if column in fields else ""
            problems.append(
                f"{key} = {_short(column)} names no field of {adapter} ({', '.join(fields)})"
                f"{swapped or '; name one of them, each with its column in the file'}"
            )
        elif not isinstance(column, str) and field_name not in LIST_FIELDS:
            problems.append(f"{key} = {_short(list(column))} lists several columns; name one")
    if source.labels and adapter != "arc":
        problems.append(f"labels = {_short(list(source.labels))} are for arc items; remove them")
    elif source.labels and len(set(source.labels)) < len(source.labels):
        problems.append(f"labels = {_short(list(source.labels))} repeat one; name each once")
    return problems


def _baseline(study: Study) -> list[str]:
    if study.baseline not in study.variants:
        return [unknown_name_line("baseline", study.baseline, "variant", study.variants)]
    if study.variants[study.baseline].is_unmodified:
        return []
    return [
        f"baseline = {study.baseline!r} is not the model as it was loaded; name a variant "
        "that changes nothing ({})"
    ]


def _kv_caches(study: Study) -> list[str]:
    """Simulated variants where nothing simulates them, or where their checks would be blind.

    The rounding of bfloat16 is as large as that of the cache: transformers' own pass could not
    tell whether keys and values were rounded (NOTES.md, 2026-11-28).
    """
    problems = []
    for name, variant in study.variants.items():
        if variant.ruler and study.runtime.dtype != "float32":
            problems.append(
                f"variants.{name}.preset = {variant.preset!r} is simulated, which can be checked "
                f"in float32 alone, and runtime.dtype = {study.runtime.dtype!r}; leave it out, or "
                "use runtime.dtype: float32"
            )
        at = f"variants.{name}.kv = {variant.kv!r}"
        if variant.kv and study.runtime.quantized == "vllm":
            problems.append(
                f"{at} is simulated by this project's engine alone; leave it out, or use "
                "runtime.quantized: int8"
            )
        if variant.kv and study.runtime.dtype != "float32":
            problems.append(
                f"{at} can be checked in float32 alone, and runtime.dtype = "
                f"{study.runtime.dtype!r}; leave it out, or use runtime.dtype: float32"
            )
    return problems


def _protections(study: Study) -> list[str]:
    """Variants with `protect` that vLLM would serve, or that have one calibration item alone."""
    problems = []
    for name, variant in study.variants.items():
        if variant.protect and study.runtime.quantized == "vllm":
            problems.append(
                f"variants.{name}.protect leaves Linears float that vLLM fuses with others; use "
                "runtime.quantized: int8, or ignore"
            )
        known = variant.calibration in (None, *study.calibrations)
        if variant.protect and known:
            items = study.calibration_called(variant.calibration or "").items
            if items < 2:
                problems.append(
                    f"variants.{name}.protect is chosen on the last calibration items and compared "
                    f"on others, and its calibration has items: {items}; give at least 2"
                )
    return problems


def _float_types(study: Study) -> list[str]:
    """The float type of a control must differ from the study's own."""
    problems = []
    for name, variant in study.variants.items():
        key = f"variants.{name}.dtype = {variant.dtype!r}"
        if variant.dtype == study.runtime.dtype:
            problems.append(
                f"{key} is runtime.dtype already; name the other one, so that the two differ "
                "by rounding"
            )
        elif variant.dtype and study.runtime.dtype == "auto":
            problems.append(
                f"{key} may equal runtime.dtype = 'auto' on some machine; name runtime.dtype too"
            )
    return problems


def _reserved_names(study: Study) -> list[str]:
    return [
        f"{kind}.{name} names what every run writes itself; rename it"
        for kind, reserved in RESERVED_NAMES.items()
        for name in sorted(reserved & set(attrgetter(kind)(study)))
    ]


def _start(study: Study, key: str, start: str) -> list[str]:
    if start not in study.models:
        return [unknown_name_line(key, start, "model", study.models)]
    if isinstance(study.models[start], FineTunedModel):
        return [f"{key} = {start!r} is itself fine-tuned by this study; start from a given model"]
    if isinstance(study.models[start], RotatedModel):
        return [f"{key} = {start!r} is itself rotated by this study; start from a given model"]
    return []


def _rotation(study: Study, key: str, start: str) -> list[str]:
    """A start that the study makes itself, or a random one of a family that cannot be rotated."""
    if problems := _start(study, f"{key}.start", start):
        return problems
    source = study.models[start]
    if isinstance(source, RandomModel) and source.random not in ROTATED:
        return [f"{key}.start = {start!r} {unrotatable(source.random)}"]
    return []


def unrotatable(family: str) -> str:
    """Why a model of a family is refused by `rotate:`."""
    return f"is of family {family}, and only {', '.join(ROTATED)} can be rotated; take one of them"


def _prompting_problems(dataset: EvaluationSet, *, thinking: bool) -> list[str]:
    """Contradictions in the settings of one evaluation set; each line starts with its key."""
    problems, ask = [], dataset.ask
    if ask.protocol not in PROTOCOLS[dataset.adapter]:
        problems.append(
            f"ask.protocol = {ask.protocol!r} cannot ask {dataset.adapter} items; use "
            f"{' or '.join(sorted(PROTOCOLS[dataset.adapter]))}"
        )
    examples = PLAIN_SHOTS.get(dataset.adapter, 0)
    if ask.protocol == "loglikelihood" and ask.shots > examples:
        problems.append(
            f"ask.shots = {ask.shots} but {dataset.adapter} has {examples} worked examples for "
            f"protocol: loglikelihood; use at most {examples}"
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


def _comparisons(study: Study) -> list[str]:
    problems, primary = [], study.statistics.primary
    scores_of: dict[tuple[str, ...], set[str | None]] = {}
    for index, pair in enumerate(primary):
        key = f"statistics.primary.{index}"
        defined: dict[str, Mapping[str, object]] = {
            "model": study.models,
            "dataset": study.evaluation.datasets,
            "baseline": study.variants,
            "variant": study.variants,
        }
        for setting, names in defined.items():
            value = getattr(pair, setting)
            if value not in names:
                kind = "variant" if setting == "baseline" else setting
                problems.append(unknown_name_line(f"{key}.{setting}", value, kind, names))
        if pair.variant == pair.baseline:
            problems.append(f"{key}.variant = {pair.variant!r} is its own baseline; name another")
        compared = (pair.model, pair.dataset, pair.baseline, pair.variant)
        judged_by = scores_of.setdefault(compared, set())
        if judged_by & {None, pair.score} or (judged_by and pair.score is None):
            problems.append(f"{key} repeats an earlier comparison; remove it")
        judged_by.add(pair.score)
    return problems


def _old_rules(study: Study) -> list[str]:
    problems = []
    for index, name in enumerate(study.old_rules_chapter):
        key = f"old_rules_chapter.{index}"
        if name not in study.variants:
            problems.append(unknown_name_line(key, name, "variant", study.variants))
        elif name == study.baseline:
            problems.append(
                f"{key} = {name!r} is the baseline; name a variant that is compared with it"
            )
    return problems


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
    recorded = {} if with_sources else recorded_definitions(StudyPaths(path.stem))
    study_settings, problems = with_task_definitions(study_settings, recorded)
    results = None if with_sources else StudyPaths(path.stem)
    study_settings, checkpoint_problems = with_found_schemes(study_settings, results)
    problems += checkpoint_problems + broken_references(study_settings)
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


@dataclass(frozen=True)
class Job:
    """One run of one notebook.

    `runtime` describes, for the record, what the runtime settings of the study file mean on
    this machine; helpers.runtime.devices fills it in. `draw` counts the checkpoints that the
    study makes of the variant, each from calibration items of its own. `whole` is the study with
    all its evaluation sets where `study` has only some. `calibration` names the calibration that
    the job makes or its variant is made from; it is empty for the study's own.
    """

    name: str
    study: Study
    paths: StudyPaths
    model: str = ""
    variant: str = ""
    runtime: dict = field(default_factory=dict)
    draw: int = 1
    whole: Study | None = None
    calibration: str = ""

    @property
    def calibration_settings(self) -> Calibration:
        """Which items the job's calibration reads."""
        return self.study.calibration_called(self.calibration)

    @property
    def whole_study(self) -> Study:
        """The study with all its evaluation sets, from which items are drawn."""
        return self.whole or self.study

    @property
    def of_option_sets(self) -> "Job":
        """The job with the sets that every draw answers: of the first draw, all."""
        if self.draw == 1:
            return self
        return replace(self, study=self.study.with_option_sets_only, whole=self.study)

    @property
    def recipe(self) -> Variant:
        """The settings of this job's variant."""
        return self.study.variants[self.variant]

    @property
    def claim(self) -> Variant:
        """What the variant's report declares, with what its quantization chose and recorded.

        That are the Linears of `protect`, and whether scales are folded into optional targets.

        Raises:
            StudyError: the choice is not made yet, or is none that the study file allows.
        """
        claim, folder = self.recipe.claim, self.paths.quantization(self.model, self.variant)
        if claim.smooth and claim.smooth.optional:
            chosen = read_json(folder / ALPHA, made_by="02_quantization")["targets"]
            allowed = {smooth.targets: smooth for smooth in claim.smooth.alternatives}
            if tuple(chosen) not in allowed:
                raise StudyError(
                    f"{folder / ALPHA}: targets = {', '.join(chosen)} are none that "
                    f"variants.{self.variant}.smooth allows; delete the folder and run it again"
                )
            claim = claim.smoothed_at(allowed[tuple(chosen)])
        if claim.protect is None:
            return claim
        chosen = read_json(folder / PROTECTED, made_by="02_quantization")["chosen"]
        return claim.leaving_float(chosen)

    @property
    def parameters(self) -> dict:
        """The job's own parameters, for its record."""
        parameters = {
            "study": self.name,
            "model": self.model,
            "variant": self.variant,
            "runtime": self.runtime,
            "draw": self.draw if self.draw > 1 else None,
            "calibration": None if self.variant else self.calibration,
        }
        return {key: value for key, value in parameters.items() if value}


def open_job(
    study: str | Path,
    *,
    model: str = "",
    variant: str = "",
    draw: int | str = 1,
    calibration: str = "",
) -> Job:
    """The job of a validated study with one of its models and variants.

    Without a model the job reads records only, and models and data may be missing.

    Args:
        draw: of the variant's checkpoint; of the calibration, where there is no variant.
        calibration: one of the study's `calibrations`, where there is no variant.

    Raises:
        StudyError: the study file is wrong, it has no such model, variant, calibration or draw,
            or a link under its outputs leads elsewhere.
    """
    study_settings, name = load_study(study, with_sources=bool(model)), study_file(study).stem
    for kind, value, names in (
        ("model", model, study_settings.models),
        ("variant", variant, study_settings.variants),
        ("calibration", calibration, study_settings.calibrations),
    ):
        if value and value not in names:
            known = f"is not one of {', '.join(names)}" if names else "is none: the study has none"
            raise StudyError(f"{name}: {kind} = {value!r} {known}")
    if variant:
        calibration = study_settings.calibration_of(variant)
        most = study_settings.variants[variant].repeats
    else:
        most = study_settings.calibration_draws(calibration)
    if str(draw) not in map(str, range(1, most + 1)):
        raise StudyError(f"{name}: draw = {draw!r} is not one of 1 to {most}; see repeats")
    paths = StudyPaths(name, int(draw), variant, calibration)
    paths.check_links()
    return Job(name, study_settings, paths, model, variant, draw=int(draw), calibration=calibration)
