"""Task files of lm-evaluation-harness, read as plain data: rows, output type, metric, code.

The harness builds a task's requests and scores them (`helpers.sources.tasks`). Here its file is
read without importing the harness and without running anything: a loaded study then holds the
definition, so that a changed task changes the fingerprints, and a Hub dataset that it names is
pinned and fetched like any other source.

A name is looked up in the installed package, whose own Python code is part of that package. A
path to a YAML file is a task of one's own: Python code that it names runs only if the study file
says `trust_task_code: true`. Tasks that cannot be asked here are refused in one line: groups, tasks
written as a Python class, sampling, pictures and sounds.
"""

import importlib.util
import re
from collections.abc import Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from helpers.core.errors import StudyError, one_line
from helpers.core.files import StudyPaths, cache_root
from helpers.core.records import (
    canonical_json,
    read_json,
    sha256_data,
    sha256_file,
    sha256_text,
    write_json,
)
from helpers.study.inputs import path_is, resolve_path
from helpers.study.schema import (
    DatasetSource,
    FileDataset,
    HubDataset,
    OutputType,
    Study,
    TaskDefinition,
    TaskSet,
)

PACKAGE = "lm-eval"
REMEDY = "run pip install --no-deps -r requirements-lm-eval.txt in the environment"
TASK_LINE = re.compile(rb"^task:[ \t]*[\"']?([^\s\"'#]+)[\"']?[ \t]*(?:#.*)?\r?$", re.MULTILINE)
CODE = "!function"
MOST_BYTES, MOST_INCLUDES = 2**20, 16
OUTPUT_TYPES = ("multiple_choice", "loglikelihood", "loglikelihood_rolling", "generate_until")
DEFAULT_METRICS = {
    "multiple_choice": ["acc", "acc_norm"],
    "loglikelihood": ["perplexity", "acc"],
    "loglikelihood_rolling": [],
    "generate_until": ["exact_match"],
}
# Of a whole set, or of no single right or wrong.
NOT_RIGHT_OR_WRONG = {"perplexity", "word_perplexity", "byte_perplexity", "bits_per_byte"}
NOT_RIGHT_OR_WRONG |= {"brier_score", "likelihood", "mcc", "bleu", "chrf", "chrf++", "ter"}
NOT_RIGHT_OR_WRONG |= {"bypass", "f1"}
REFUSED = {
    "group": "is a group of tasks; name one of them",
    "class": "is written as a Python class; write it as a task file",
    "custom_dataset": "makes its rows by Python code; write them to a file",
    "use_prompt": "needs promptsource; write doc_to_text out",
    "doc_to_image": "shows pictures, and only text is asked here",
    "doc_to_audio": "plays sounds, and only text is asked here",
}
GREEDY = {"until", "do_sample", "temperature", "top_p", "top_k"}
LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
DEFAULT_LENGTH = 256  # the harness's, of an answer whose task names none


def with_task_definitions(
    study: Study, recorded: Mapping[str, TaskDefinition] | None = None
) -> tuple[Study, list[str]]:
    """(the study with the definition of every task it names, a line for each problem).

    Args:
        recorded: definitions by set, for results whose task files are not on this machine.
    """
    problems, datasets = [], dict(study.evaluation.datasets)
    for name, task_set in study.evaluation.datasets.items():
        if not isinstance(task_set, TaskSet):
            continue
        key = f"evaluation.datasets.{name}"
        if task_set.definition:
            problems.append(f"{key}.definition is filled in by the program; remove it")
            continue
        try:
            definition = read_definition(task_set)
        except StudyError as error:
            if not recorded or name not in recorded:
                problems.append(f"{key}.{error}")
                continue
            definition = recorded[name]
        if study.runtime.quantized == "vllm" and definition.output_type != "multiple_choice":
            problems.append(
                f"{key}.task = {task_set.task!r} asks for {definition.output_type}, which vLLM is "
                "not asked here; use int8"
            )
        datasets[name] = task_set.model_copy(update={"definition": definition})
    evaluation = study.evaluation.model_copy(update={"datasets": datasets})
    return study.model_copy(update={"evaluation": evaluation}), problems


def definitions_file(paths: StudyPaths) -> Path:
    """Where the definitions lie that a study's results were made with."""
    return paths.root / "tasks.json"


def record_definitions(study: Study, paths: StudyPaths) -> None:
    """Write the definitions of a study's tasks beside its results; nothing without tasks."""
    sets = study.evaluation.datasets.items()
    definitions = {n: s.read.model_dump(mode="json") for n, s in sets if isinstance(s, TaskSet)}
    if definitions:
        write_json(definitions_file(paths), definitions)


def recorded_definitions(paths: StudyPaths) -> dict[str, TaskDefinition]:
    """The recorded definitions by evaluation set; empty without a valid record."""
    path = definitions_file(paths)
    if not path.is_file():
        return {}
    try:
        content = read_json(path, made_by="03_evaluation")
        return {name: TaskDefinition.model_validate(own) for name, own in content.items()}
    except (ValidationError, AttributeError):
        raise StudyError(
            f"outputs/{paths.study}/{path.name}: is damaged; run 03_evaluation again"
        ) from None


def read_definition(task_set: TaskSet) -> TaskDefinition:
    """What the task's file says.

    Raises:
        StudyError: the harness or the task is missing, or cannot be asked; the message begins
            with the key in the evaluation set.
    """
    label = f"task = {task_set.task!r}"
    file = task_file(task_set.task)
    code: list[Path] = []
    try:
        config = read_task_file(file, code)
        output_type = _output_type(config)
        _check_answerable(config)
        source, shots_source, splits = _sources(config, task_set.shots)
        metric = _metric(config, output_type, task_set.metric)
    except ValueError as error:
        raise StudyError(f"{label} {one_line(error)}") from None
    trusted = task_set.trust_task_code or not is_own_file(task_set.task)
    if not trusted and CODE in canonical_json(config):
        raise StudyError(
            f"{label} names Python code ({code[0].name if code else CODE}), which runs only "
            "with trust_task_code: true; add it if you trust the file"
        )
    return TaskDefinition(
        harness=version(PACKAGE),
        output_type=output_type,
        source=source,
        shots_source=shots_source,
        splits=splits,
        metric=metric,
        max_new_tokens=_longest_answer(config),
        settings=canonical_json(config),
        code_sha256=sha256_data({p.name: sha256_file(p) for p in code}) if code else "",
        file=str(file),
    )


def is_own_file(task: str) -> bool:
    """Whether a task is named by the path of a file instead of a registered name."""
    return task.endswith((".yaml", ".yml"))


def task_file(task: str) -> Path:
    """The YAML file of a task.

    Raises:
        StudyError: lm-evaluation-harness is not installed, or has no such task.
    """
    spec = importlib.util.find_spec("lm_eval")
    try:
        installed = version(PACKAGE)
    except PackageNotFoundError:
        installed = ""
    if spec is None or not spec.submodule_search_locations or not installed:
        raise StudyError(f"task = {task!r} needs lm-evaluation-harness ({PACKAGE}); {REMEDY}")
    if is_own_file(task):
        if not path_is(task, Path.is_file):
            raise StudyError(f"task = {task!r} does not exist; correct the path")
        return resolve_path(task)
    root = Path(spec.submodule_search_locations[0]) / "tasks"
    registered = _registered_tasks(root, installed)
    if task not in registered:
        raise StudyError(
            f"task = {task!r} is no task of {PACKAGE} {installed}; lm-eval ls tasks lists them "
            "(a group is none: name one of its tasks), or give the path of a YAML file"
        )
    return root / registered[task]


def _registered_tasks(root: Path, installed: str) -> dict[str, str]:
    """File of every registered task by name; looked up once for an installed version.

    The harness's own index parses all 14 thousand files, which takes ten seconds.
    """
    cache = cache_root() / f"lm-eval-{installed}-{sha256_text(str(root))[:8]}.json"
    if cache.is_file():
        return read_json(cache, made_by="make study")
    names: dict[str, str] = {}
    for path in sorted(root.rglob("*.yaml")):
        for match in TASK_LINE.finditer(path.read_bytes()):
            names.setdefault(match[1].decode(), str(path.relative_to(root)))
    write_json(cache, names)
    return names


class _TaskLoader(yaml.SafeLoader):
    """Plain values; `!function module.name` becomes a mapping that names it."""


def _named_function(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> dict[str, str]:
    return {CODE: str(loader.construct_scalar(node))}


_TaskLoader.add_constructor(CODE, _named_function)


def read_task_file(file: Path, code: list[Path], _open: tuple[Path, ...] = ()) -> dict:
    """The settings of a task file over those of the files that it includes.

    Args:
        code: Python files that the settings name are added to it.

    Raises:
        ValueError: a file is missing or no task file; the message continues its name.
    """
    if file in _open or len(_open) > MOST_INCLUDES:
        raise ValueError(f"includes {file.name} inside itself; take it out")
    if not file.is_file():
        raise ValueError(f"includes {file.name}, which does not exist; correct the path")
    content = file.read_bytes()
    if len(content) > MOST_BYTES:
        raise ValueError(f"has more than {MOST_BYTES:,} bytes; no task needs so many")
    try:
        own = yaml.load(content.decode("utf-8"), _TaskLoader)
    except (yaml.YAMLError, ValueError, RecursionError, TypeError, AttributeError) as error:
        raise ValueError(f"is not readable YAML: {one_line(error)}") from None
    if not isinstance(own, dict):
        raise ValueError("is not a mapping of settings; give a task file of lm-evaluation-harness")
    for named in _functions(own):
        module = file.parent / f"{named.rpartition('.')[0].replace('.', '/')}.py"
        code += [module] if module.is_file() and module not in code else []
    included = own.pop("include", [])
    settings: dict[str, Any] = {}
    for path in included if isinstance(included, list) else [included]:
        settings |= read_task_file(file.parent / str(path), code, (*_open, file))
    settings |= own
    return {k: v for k, v in settings.items() if k not in ("tag", "task_list", "task_alias")}


def _functions(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        if set(value) == {CODE}:
            yield value[CODE]
        for member in value.values():
            yield from _functions(member)
    elif isinstance(value, list):
        for member in value:
            yield from _functions(member)


def _function_name(value: dict) -> str:
    return next(_functions(value), "").rpartition(".")[2]


def _output_type(config: Mapping) -> OutputType:
    for key, reason in REFUSED.items():
        if config.get(key) is not None:
            raise ValueError(reason)
    if not isinstance(config.get("task"), str):
        raise ValueError("names no task; add a line like task: my_task")
    output_type = config.get("output_type", "generate_until")
    if output_type not in OUTPUT_TYPES:
        raise ValueError(f"has output_type = {output_type!r}; use one of {', '.join(OUTPUT_TYPES)}")
    return output_type


def _check_answerable(config: Mapping) -> None:
    """Refuse what is not asked here: sampling, several answers, metrics that are downloaded."""
    if config.get("repeats", 1) != 1:
        raise ValueError(
            "samples several answers to an item (repeats), and answers are greedy here"
        )
    settings = config.get("generation_kwargs") or {}
    if settings.get("do_sample") or float(settings.get("temperature") or 0) > 0:
        raise ValueError(
            "samples its answers (do_sample, temperature), and answers are greedy here"
        )
    if unknown := sorted(set(settings) - GREEDY - set(LENGTHS)):
        raise ValueError(f"sets {unknown[0]} in generation_kwargs, which is not known here")
    for metric in config.get("metric_list") or []:
        if isinstance(metric, dict) and metric.get("hf_evaluate"):
            raise ValueError("downloads its metric's code (hf_evaluate); name a metric it has")


def _longest_answer(config: Mapping) -> int:
    settings = config.get("generation_kwargs") or {}
    return next((int(settings[key]) for key in LENGTHS if settings.get(key)), DEFAULT_LENGTH)


def _metric(config: Mapping, output_type: str, chosen: str | None) -> str | None:
    """`metric,filter` of the metric that decides right or wrong."""
    listed = config.get("metric_list")
    names = DEFAULT_METRICS[output_type]
    if listed:
        named = [m["metric"] for m in listed if isinstance(m, dict) and "metric" in m]
        names = [_function_name(n) if isinstance(n, dict) else str(n) for n in named]
    filters = [f["name"] for f in config.get("filter_list") or []] or ["none"]
    if chosen is not None:
        name, _, filter_name = chosen.partition(",")
        if name not in names or (filter_name or filters[0]) not in filters:
            raise ValueError(
                f"has no metric {chosen!r}; use one of "
                + ", ".join(f"{n},{f}" for n in names for f in filters)
            )
        return f"{name},{filter_name or filters[0]}"
    if output_type == "loglikelihood_rolling":
        return None
    deciding = [name for name in names if name not in NOT_RIGHT_OR_WRONG]
    if not deciding:
        raise ValueError(
            f"has no metric that says right or wrong ({', '.join(names)}); name one with metric:"
        )
    return f"{deciding[0]},{filters[0]}"


Sources = tuple[DatasetSource, DatasetSource | None, tuple[str, str | None]]


def _sources(config: Mapping, shots: int) -> Sources:
    """(rows of the evaluated split, rows of the worked examples, names of both splits)."""
    split = config.get("test_split") or config.get("validation_split")
    if not split:
        raise ValueError("names neither test_split nor validation_split; add one")
    source = _source(config, split)
    own = config.get("fewshot_config") or {}
    given = own.get("samples") if isinstance(own, dict) else None
    if not shots or (given is not None and not own.get("split")):
        return source, None, (split, None)
    named = [own.get("split") if isinstance(own, dict) else None]
    named += [config.get(f"{kind}_split") for kind in ("fewshot", "training", "validation")]
    shots_split = next(filter(None, named), split)
    return source, _source(config, shots_split), (split, shots_split)


def _source(config: Mapping, split: str) -> DatasetSource:
    """The rows of one split, as a source of this project."""
    path, settings = config.get("dataset_path"), dict(config.get("dataset_kwargs") or {})
    files = settings.pop("data_files", None)
    revision = settings.pop("revision", "main")
    settings.pop("trust_remote_code", None)
    if not isinstance(path, str) or not isinstance(split, str):
        raise ValueError("names no dataset_path; add one")
    if settings:
        raise ValueError(f"sets {min(settings)} in dataset_kwargs, which is not known here")
    if path in ("json", "parquet"):
        named = files.get(split) if isinstance(files, dict) else files if split == "train" else None
        if isinstance(named, list):
            named = named[0] if len(named) == 1 else None
        if not isinstance(named, str):
            raise ValueError(
                f"names no file for split {split!r}; write dataset_kwargs: {{data_files: "
                f"{{{split}: rows.jsonl}}}}"
            )
        return FileDataset(file=named)
    if files is not None:
        raise ValueError("names data_files of a Hub dataset; name a configuration (dataset_name)")
    if "[" in split:
        raise ValueError(f"takes a slice of a split ({split}); name the split")
    return HubDataset(hub=path, config=config.get("dataset_name"), split=split, revision=revision)
