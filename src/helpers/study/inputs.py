"""Inputs that a study file names: model folders, weight files, local data, commits on a Hub.

A folder must hold what a model needs before anything is loaded from it. Its weights are those that
transformers reads: `model.safetensors`, or else the shards that the index names; other safetensors
beside them are not read. The loader and every check take the tensors from here. Headers only: no
weight is touched, and torch is not needed.

A branch on a Hub moves; a study must not. The first fetch writes the commit behind every revision
to `outputs/<study>/sources.json`, and from then on a loaded study holds that commit wherever its
file names the revision. Of a dataset the rows that were read are on record too, by number and
hash. To follow a branch that has moved is a decision: fetch with `--renew`, or name another
revision. Nothing is looked up here; that is `helpers.sources.fetching`.
"""

import json
import math
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, get_args

from pydantic import BaseModel, Field, ValidationError

from helpers.core.architectures import HEAD
from helpers.core.errors import StudyError, one_line
from helpers.core.files import PROJECT, StudyPaths, vllm_python
from helpers.core.records import read_json, write_json
from helpers.study.schema import (
    OTHER_FORMATS,
    PATTERN_MARK,
    ROW_FORMATS,
    Activations,
    Count,
    DatasetSource,
    FileDataset,
    FineTunedModel,
    FolderDataset,
    FolderModel,
    GgufModel,
    HubDataset,
    HubModel,
    Stream,
    Strict,
    Study,
    TaskSet,
    Variant,
    Weights,
    is_ignored,
    name_or_pattern,
)

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
SAVE_AGAIN = "save the model again (model.save_pretrained)"
DOWNLOAD_AGAIN = "download it again"
LFS_POINTER = (
    b"version https://git-lfs"  # git writes it in place of a large file that it did not fetch
)
GGUF_MAGIC = b"GGUF"
MOST_HEADER_BYTES = 100_000_000  # safetensors' own limit
SHARD = re.compile(r"model-(\d{5})-of-(\d{5})\.safetensors")


@dataclass(frozen=True)
class StoredTensor:
    """The file, shape and dtype of a stored tensor; `dtype` as safetensors names it (`BF16`)."""

    path: Path
    shape: tuple[int, ...]
    dtype: str


def missing_shards(names: Iterable[str]) -> list[str]:
    """The shards missing among files of these names, by the numbers in the names."""
    names = set(names)
    counts = {int(match[2]) for match in map(SHARD.fullmatch, names) if match}
    shards = {f"model-{i:05}-of-{n:05}.safetensors" for n in counts for i in range(1, n + 1)}
    return sorted(shards - names)


def is_lfs_pointer(path: Path) -> bool:
    """Whether a file is a git-lfs pointer instead of the large file itself."""
    with open(path, "rb") as stream:
        return stream.read(len(LFS_POINTER)) == LFS_POINTER


def weight_files(folder: Path) -> list[Path]:
    """The files from which transformers reads a folder's weights.

    Raises:
        StudyError: a file is missing; the message continues the folder's name.
    """
    if (folder / WEIGHTS_FILE).is_file():
        return [folder / WEIGHTS_FILE]
    if not (folder / INDEX_FILE).is_file():
        raise StudyError(f"holds neither {WEIGHTS_FILE} nor {INDEX_FILE}; {SAVE_AGAIN}")
    names = sorted(set(_weight_map(folder).values()))
    for name in names:
        if not name.endswith(".safetensors") or Path(name).name != name:
            raise StudyError(
                f"has an index ({INDEX_FILE}) that names {name!r}, which is no safetensors file of "
                f"this folder; {SAVE_AGAIN}"
            )
    if missing := [name for name in names if not (folder / name).is_file()]:
        raise StudyError(
            f"lacks {missing[0]} ({len(missing)} of the {len(names)} files that {INDEX_FILE} "
            f"names); {DOWNLOAD_AGAIN}"
        )
    return [folder / name for name in names]


def stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Every tensor of the folder's weights by its name in the files.

    Raises:
        StudyError: as `weight_files`, or a file is truncated or lacks a tensor of the index.
    """
    stored = {n: t for path in weight_files(folder) for n, t in _header(path).items()}
    if not (folder / WEIGHTS_FILE).is_file():
        for name, file in _weight_map(folder).items():
            if name not in stored or stored[name].path.name != file:
                raise StudyError(
                    f"lacks {name} in {file}, where {INDEX_FILE} has it; {DOWNLOAD_AGAIN}"
                )
    return stored


def _weight_map(folder: Path) -> dict[str, str]:
    try:
        weight_map = json.loads((folder / INDEX_FILE).read_bytes())["weight_map"]
        names = {str(tensor): str(file) for tensor, file in weight_map.items()}
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError):
        names = {}
    if not names:
        raise StudyError(f"has an index ({INDEX_FILE}) of no tensors; {DOWNLOAD_AGAIN}")
    return names


def _header(path: Path) -> dict[str, StoredTensor]:
    """The tensors of one file by name.

    Raises:
        StudyError: it is a git-lfs pointer, truncated, or no safetensors file.
    """
    size = path.stat().st_size
    if is_lfs_pointer(path):
        raise StudyError(
            f"holds a git-lfs pointer in place of {path.name}; run git lfs pull, or "
            f"{DOWNLOAD_AGAIN}"
        )
    with open(path, "rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > min(size - 8, MOST_HEADER_BYTES):
            raise StudyError(f"holds {path.name}, which is no safetensors file; {DOWNLOAD_AGAIN}")
        text = stream.read(length)
    try:
        rows = {k: v for k, v in json.loads(text).items() if k != "__metadata__"}
        end = max((v["data_offsets"][1] for v in rows.values()), default=0)
        tensors = {k: StoredTensor(path, tuple(v["shape"]), v["dtype"]) for k, v in rows.items()}
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError, IndexError):
        raise StudyError(
            f"holds {path.name}, which is no safetensors file; {DOWNLOAD_AGAIN}"
        ) from None
    if size != 8 + length + end:
        raise StudyError(
            f"holds {size} bytes of {path.name}, whose header promises {8 + length + end}; "
            f"{DOWNLOAD_AGAIN}"
        )
    return tensors


# A pickle can run anything while it is loaded, so none is ever opened.
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib")
OTHER_WEIGHTS = (".gguf", ".h5", ".msgpack", ".onnx")
TOKENIZERS = ("tokenizer.json", "vocab.json", "vocab.txt")
SENTENCEPIECE = (
    "tokenizer.model",
    "spiece.model",
)  # reading it takes a library that is not used here
ADAPTER = "adapter_config.json"
SAVE = "give one with safetensors (save_pretrained of a model you trust writes them)"


def weights_problem(names: Iterable[str]) -> str | None:
    """Why files of these names hold no readable weights, with the remedy; None if they do."""
    names = sorted(names)
    has_weights = WEIGHTS_FILE in names or INDEX_FILE in names
    if ADAPTER in names and has_weights:
        return (
            f"holds an adapter ({ADAPTER}) beside a whole model, and transformers would apply it "
            "once more; remove the adapter's files (adapter_*)"
        )
    if ADAPTER in names:
        return (
            f"holds an adapter ({ADAPTER}), not a whole model; merge it into its model (PEFT's "
            "merge_and_unload) and save that"
        )
    if WEIGHTS_FILE in names:
        return None
    if has_weights and (missing := missing_shards(names)):
        return f"lacks {missing[0]} ({len(missing)} of its shards in all); download it again"
    if has_weights:
        return None
    if stray := [name for name in names if name.endswith(".safetensors")]:
        absent = f"neither {WEIGHTS_FILE} nor {INDEX_FILE}"
        return f"holds {stray[0]}, but {absent}; {SAVE_AGAIN}, or {DOWNLOAD_AGAIN}"
    if pickles := [name for name in names if name.endswith(PICKLES)]:
        return f"holds only {pickles[0]}, a pickle, which may run anything; {SAVE}"
    if others := [name for name in names if name.endswith(OTHER_WEIGHTS)]:
        return f"holds only {others[0]}, a format not read here; {SAVE}"
    return f"holds no weights; {SAVE}"


def model_files_problem(names: Iterable[str]) -> str | None:
    """Why files of these names are no model with a tokenizer; None if they are one."""
    names = set(names)
    if problem := weights_problem(names):
        return problem
    if "config.json" not in names:
        return "has no config.json; name what model.save_pretrained wrote"
    if not names & {*TOKENIZERS, *SENTENCEPIECE}:
        return "has no tokenizer; save it beside the model (tokenizer.save_pretrained)"
    if not names & set(TOKENIZERS):
        return (
            f"has {min(names & set(SENTENCEPIECE))} as its tokenizer, which is not read here; add "
            "tokenizer.json (where sentencepiece is installed, save_pretrained of the tokenizer "
            "writes it)"
        )
    return None


def folder_problem(folder: Path) -> str | None:
    """As `model_files_problem` for a local folder; also reads config.json and weight headers."""
    if problem := model_files_problem(path.name for path in folder.iterdir()):
        return problem
    if config_error := config_problem((folder / "config.json").read_bytes()):
        return config_error
    for name in TOKENIZERS:
        if (folder / name).is_file() and is_lfs_pointer(folder / name):
            return (
                f"holds a git-lfs pointer in place of {name}; run git lfs pull, or {DOWNLOAD_AGAIN}"
            )
    try:
        stored_tensors(folder)
    except StudyError as error:
        return str(error)
    return None


def config_problem(content: bytes) -> str | None:
    """Why a model with this config.json cannot be studied; None if it can.

    It must name its family and its weights must be float: a quantized model is no reference.
    Whether the family can be studied is found out on a tiny twin (`helpers.runtime.discovery`).
    """
    try:
        config = json.loads(content)
    except (ValueError, RecursionError) as error:
        return f"has a config.json that is not JSON ({one_line(error)}); save the model again"
    if not isinstance(config, dict):
        return "has a config.json that is no mapping; save the model again"
    if scheme := config.get("quantization_config"):
        method = scheme.get("quant_method", "") if isinstance(scheme, dict) else ""
        return f"is quantized already ({method or 'config.json says so'}); give the float model"
    if not config.get("model_type"):
        return "has a config.json without model_type; save the model again"
    return None


NO_PATH = (OSError, RuntimeError, ValueError)  # a path too long, an unknown user's home, a NUL


def resolve_path(path: str) -> Path:
    """A path of the study file; a relative one starts at the project's root."""
    expanded = Path(path).expanduser()
    return expanded if expanded.is_absolute() else PROJECT / expanded


SAVED, SAVED_SPLITS = "state.json", "dataset_dict.json"  # written by save_to_disk
SPLITS = ("train", "training", "validation", "valid", "val", "dev", "test", "eval", "evaluation")
# Files beside the data that say nothing about questions.
NOT_ROWS = re.compile(
    r"\..*|(readme|license|citation)\b.*|dataset_infos?\.json|.*\.(md|py|lock)", re.I
)


def saved_dataset(source: FolderDataset) -> Path | None:
    """The folder of the dataset that `save_to_disk` wrote; None if the folder holds plain files."""
    folder = resolve_path(source.folder)
    if (folder / SAVED_SPLITS).is_file():
        return folder / (source.split or "")
    return folder if (folder / SAVED).is_file() else None


def dataset_files(source: FileDataset | FolderDataset) -> list[Path]:
    """The files that a local dataset names, sorted by name; empty if there are none."""
    if isinstance(source, FolderDataset):
        return _files_of_folder(source)
    try:
        path = resolve_path(source.file)
        matches = path.parent.glob(path.name) if any(c in path.name for c in "*?[") else [path]
        return sorted(file for file in matches if file.is_file())
    except NO_PATH:
        return []


def _files_of_folder(source: FolderDataset) -> list[Path]:
    try:
        saved = saved_dataset(source)
        files = sorted(p for p in (saved or resolve_path(source.folder)).iterdir() if p.is_file())
    except NO_PATH:
        return []
    if saved:
        return files
    rows_files = [path for path in files if path.suffix[1:].lower() in ROW_FORMATS]
    return [p for p in rows_files if source.split is None or _is_of_split(p, source.split)]


def _is_of_split(path: Path, split: str) -> bool:
    """Whether the split is a word of the file's name, as in `test.csv` and `my-test-0.csv`."""
    return bool(re.search(rf"(?:^|[-_. ]){re.escape(split)}(?:[-_. ]|$)", path.stem))


def dataset_folder_problem(source: FolderDataset) -> str | None:
    """Why a folder is no dataset; None if it is one. The message continues the folder's name."""
    if not path_is(source.folder, Path.is_dir):
        return "is not a folder; correct the path"
    folder, split = resolve_path(source.folder), source.split
    if (folder / SAVED_SPLITS).is_file():
        names = sorted(path.parent.name for path in folder.glob(f"*/{SAVED}"))
        if split not in names:
            return f"holds the splits {', '.join(names) or '(none)'}; name one of them as split"
        return None
    if (folder / SAVED).is_file():
        return f"holds one dataset and no splits; remove split: {split}" if split else None
    names = sorted(path.name for path in folder.iterdir() if path.is_file())
    rows_files = [name for name in names if name.rpartition(".")[2].lower() in ROW_FORMATS]
    if not rows_files:
        folders = sorted(path.name for path in folder.iterdir() if path.is_dir())
        inside = f"; it holds the folders {', '.join(folders[:8])}" if folders else ""
        return (
            f"holds no files of rows ({', '.join(ROW_FORMATS)}){inside}; name the folder with them"
        )
    if lfs := [name for name in rows_files if is_lfs_pointer(folder / name)]:
        return f"holds a git-lfs pointer in place of {lfs[0]}; run git lfs pull"
    if split and not _files_of_folder(source):
        return f"holds no file with {split!r} in its name ({', '.join(rows_files[:8])}); rename one"
    if split:
        return None
    if others := [n for n in names if n not in rows_files and not NOT_ROWS.fullmatch(n)]:
        description = OTHER_FORMATS.get(others[0].rpartition(".")[2].lower(), "not read here")
        return f"holds {others[0]}, which is {description}; move it, or name the files with file:"
    splits = {s for s in SPLITS if any(_is_of_split(Path(name), s) for name in rows_files)}
    if len(splits) > 1:
        return f"holds files of the splits {', '.join(sorted(splits))}; name one of them as split"
    return None


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
        if isinstance(source, FolderDataset) and (problem := dataset_folder_problem(source)):
            problems.append(f"{key}.folder = {source.folder!r} {problem}")
        if isinstance(source, FolderModel) and (problem := _folder_problem(source)):
            problems.append(f"{key}.folder = {source.folder!r} {problem}")
        if isinstance(source, GgufModel) and (problem := _gguf_problem(source)):
            problems.append(f"{key}.gguf = {source.gguf!r} {problem}")
    return problems


def _gguf_problem(source: GgufModel) -> str | None:
    if not path_is(source.gguf, Path.is_file):
        return "does not exist; correct the path"
    path = resolve_path(source.gguf)
    if is_lfs_pointer(path):
        return "is a git-lfs pointer; run git lfs pull"
    with open(path, "rb") as stream:
        is_gguf = stream.read(len(GGUF_MAGIC)) == GGUF_MAGIC
    return None if is_gguf else "is no GGUF file; name one, or give the model as a folder"


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
    for name, settings in study.calibrations.items():
        sources.append((f"calibrations.{name}.dataset", settings.dataset))
    sources.append(("evaluation.shared_text.dataset", study.evaluation.shared_text.dataset))
    for name, dataset in study.evaluation.datasets.items():
        key = f"evaluation.datasets.{name}"
        if not isinstance(dataset, TaskSet):
            sources.append((f"{key}.source", dataset.source))
        elif dataset.definition:
            sources += [(f"{key}.task", source) for source in task_sources(dataset)]
    return sources


def task_sources(task_set: TaskSet) -> list[DatasetSource]:
    """The sources of a task: the evaluated rows, and those of its worked examples."""
    shots_source = task_set.read.shots_source
    return [task_set.source, *([shots_source] if shots_source else [])]


class FoundScheme(Strict):
    """What the files of a checkpoint say of their quantization, in the study file's words."""

    weights: Weights
    activations: Activations
    ignore: tuple[str, ...]


UNKNOWN_ORIGIN = (
    "made elsewhere: calibration items unknown, so leakage from evaluation items cannot be excluded"
)
COMPRESSED = "give a W8A8 checkpoint that llmcompressor saved (compressed-tensors, int-quantized)"
NUMBERS = {"num_bits": 8, "type": "int", "symmetric": True}
SCALES = ("weight_scale", "input_scale")
FLOATS = ("F64", "F32", "F16", "BF16")


def with_found_schemes(study: Study, recorded: StudyPaths | None) -> tuple[Study, list[str]]:
    """(the study with the scheme of every checkpoint made elsewhere, a line for each problem).

    Args:
        recorded: where the study's results lie, if they may speak for a folder that is not on
            this machine.
    """
    problems, variants = [], dict(study.variants)
    for name, variant in study.variants.items():
        if variant.checkpoint is None:
            continue
        key = f"variants.{name}.checkpoint"
        folders, schemes = dict(variant.checkpoint), {}
        if set(folders) == {""} and len(study.models) == 1:
            folders = {next(iter(study.models)): folders[""]}
        if problem := _models_problem(folders, study):
            problems.append(f"{key} {problem}")
            continue
        for model, source in folders.items():
            try:
                schemes[model] = found_scheme(source)
            except StudyError as error:
                if scheme := recorded and _recorded_scheme(recorded, model, name):
                    schemes[model] = scheme
                    continue
                at = key if "" in variant.checkpoint else f"{key}.{model}"
                problems.append(f"{at}.folder = {source.folder!r} {error}")
        if len(set(schemes.values())) > 1:
            first, other, *_ = (f"{m}: {_scheme_text(found)}" for m, found in schemes.items())
            problems.append(
                f"{key} has checkpoints of two schemes ({first}; {other}); one variant has one "
                "scheme, so compare them in studies of their own"
            )
        for found in schemes.values():
            filled_in = {field: getattr(found, field) for field in FoundScheme.model_fields}
            variants[name] = variant.model_copy(update={"checkpoint": folders, **filled_in})
    return study.model_copy(update={"variants": variants}), problems


def _models_problem(folders: dict[str, FolderModel], study: Study) -> str | None:
    """Why checkpoints are not one for each model of the study."""
    models = ", ".join(study.models)
    if "" in folders:
        return (
            f"names no model, and the study has several ({models}); give one for each, as "
            f"{{{next(iter(study.models))}: {{folder: …}}, …}}"
        )
    if unknown := sorted(set(folders) - set(study.models)):
        return f"names {unknown[0]!r}, which is not a model of this study ({models}); correct it"
    if missing := [model for model in study.models if model not in folders]:
        return f"has none of the model {missing[0]!r}; give one for each model ({models})"
    return None


def _scheme_text(found: FoundScheme) -> str:
    kept = ", ".join(found.ignore[:3]) or "nothing"
    more = f" and {len(found.ignore) - 3} more" if len(found.ignore) > 3 else ""
    activations = found.activations.replace("_", " ")
    return f"weights per {found.weights}, activations {activations}, kept {kept}{more}"


def _recorded_scheme(paths: StudyPaths, model: str, variant: str) -> FoundScheme | None:
    """What a checkpoint was found to be when it was verified; None without a valid record."""
    try:
        content = json.loads((paths.variant(model, variant) / "verification.json").read_bytes())
        return FoundScheme.model_validate(content["found"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def found_scheme(source: FolderModel) -> FoundScheme:
    """The scheme of an int8 checkpoint, on which its config and its tensors agree.

    Which tensors belong to a Linear, and whether they fit the study's model, is checked where the
    architecture is known (`helpers.evaluation.preflight`, `helpers.verification`).

    Raises:
        StudyError: it is no checkpoint that can be studied; the message continues its name.
    """
    if not path_is(source.folder, Path.is_dir):
        raise StudyError("is not a folder; correct the path")
    folder = resolve_path(source.folder)
    if problem := model_files_problem(path.name for path in folder.iterdir()):
        raise StudyError(problem)
    try:
        config = json.loads((folder / "config.json").read_bytes())
        declared = config.get("quantization_config")
    except (ValueError, RecursionError, AttributeError):
        raise StudyError(f"has a config.json that is no JSON mapping; {DOWNLOAD_AGAIN}") from None
    if not isinstance(declared, dict):
        raise StudyError(f"is not quantized (no quantization_config in config.json); {COMPRESSED}")
    weights, activations = _declared_scheme(declared)
    tensors = stored_tensors(folder)
    weights_by_name = {n: t for n, t in tensors.items() if n.endswith(".weight")}
    int8 = {n.removesuffix(".weight") for n, t in weights_by_name.items() if t.dtype == "I8"}
    floats = {n.removesuffix(".weight") for n, t in weights_by_name.items() if t.dtype in FLOATS}
    _check_int8_tensors(tensors, int8, weights, activations)
    entries = declared.get("ignore") or []
    ignore = tuple(sorted({e for e in entries if _keeps(e, {HEAD, *floats} - int8)}))
    if ignored := sorted(name for name in int8 if is_ignored(name, ignore)):
        raise StudyError(
            f"ignores {ignored[0]} by config.json and holds it in int8 ({len(ignored)} Linears); "
            f"{DOWNLOAD_AGAIN}, or correct its config.json"
        )
    return FoundScheme(weights=weights, activations=activations, ignore=ignore)


def _keeps(entry: Any, modules: set[str]) -> bool:
    """Whether an entry of `ignore` names one of these modules; others it lists are no Linears."""
    try:
        entry = name_or_pattern(entry)
    except (ValueError, AttributeError):  # pydantic's errors in validators are ValueErrors
        text = one_line(repr(entry))[:80]
        raise StudyError(
            f"ignores {text} by config.json, which is no name or pattern; {DOWNLOAD_AGAIN}"
        ) from None
    if entry.startswith(PATTERN_MARK):
        return any(is_ignored(name, [entry]) for name in modules)
    return entry in modules


def _declared_scheme(declared: dict) -> tuple[str, str]:
    """(weights, activations) granularity of a quantization_config of the supported kind."""
    settings = {"quant_method": "compressed-tensors", "format": "int-quantized"}
    for key, supported in settings.items():
        if (value := declared.get(key)) != supported:
            raise StudyError(f"has {key} = {value!r}, and {supported!r} is read; {COMPRESSED}")
    sparsity = declared.get("sparsity_config") or {}
    for key, value in (
        ("kv_cache_scheme", declared.get("kv_cache_scheme")),
        ("transform_config", declared.get("transform_config")),
        ("sparsity_config", sparsity if sparsity.get("format", "dense") != "dense" else None),
    ):
        if value:
            raise StudyError(f"has a {key} beside its int8 Linears, not read here; {COMPRESSED}")
    groups = declared.get("config_groups")
    if not isinstance(groups, dict) or len(groups) != 1:
        number = len(groups) if isinstance(groups, dict) else "no"
        raise StudyError(f"has {number} quantization groups, and one is read; {COMPRESSED}")
    [group] = groups.values()
    try:
        if group["targets"] != ["Linear"] or group.get("output_activations"):
            raise StudyError(
                f"quantizes {one_line(group['targets'])[:80]} or their outputs, and the inputs of "
                f"['Linear'] are read; {COMPRESSED}"
            )
        parts = {"weights": group["weights"], "activations": group["input_activations"]}
        for name, part in parts.items():
            numbers = {key: (part or {}).get(key) for key in NUMBERS}
            if numbers != NUMBERS:
                raise StudyError(f"has {name} of {numbers}, and {NUMBERS} are read; {COMPRESSED}")
        timing = "dynamic" if parts["activations"]["dynamic"] else "static"
        granularities = {
            "weights": parts["weights"]["strategy"],
            "activations": f"{parts['activations']['strategy']}_{timing}",
        }
    except (KeyError, TypeError, AttributeError):
        raise StudyError(f"has a quantization group of another form; {COMPRESSED}") from None
    for name, kinds in (("weights", get_args(Weights)), ("activations", get_args(Activations))):
        if granularities[name] not in kinds:
            value = granularities[name]
            raise StudyError(f"has {name} per {value}, not one of {', '.join(kinds)}; {COMPRESSED}")
    return granularities["weights"], granularities["activations"]


def _check_int8_tensors(
    tensors: dict[str, StoredTensor], int8: set[str], weights: str, activations: str
) -> None:
    """Check that shapes and scales are those of the declared scheme."""
    if not int8:
        raise StudyError(f"declares int8 weights and holds none; {COMPRESSED}")
    scales = {f"{name}.{part}" for name in int8 for part in SCALES}
    for name, tensor in tensors.items():
        is_int8 = name.endswith(".weight") and name.removesuffix(".weight") in int8
        if tensor.dtype not in FLOATS and not is_int8:
            raise StudyError(f"holds {name} in {tensor.dtype}, not read here; {COMPRESSED}")
        if name.rpartition(".")[2] in SCALES and name not in scales:
            raise StudyError(f"holds {name} and no int8 weight of it; {DOWNLOAD_AGAIN}")
    for name in sorted(int8):
        rows = tensors[f"{name}.weight"].shape[0]
        expected = {"weight_scale": rows if weights == "channel" else 1}
        if activations == "tensor_static":
            expected["input_scale"] = 1
        for part in SCALES:
            scale = tensors.get(f"{name}.{part}")
            stored = math.prod(scale.shape) if scale else 0
            if stored != expected.get(part, 0):
                raise StudyError(
                    f"declares weights per {weights} and activations {activations} in config.json, "
                    f"and {name}.{part} has {stored} numbers, not {expected.get(part, 0)}; "
                    f"{DOWNLOAD_AGAIN}, or correct its config.json"
                )


def checkpoint_folder(variant: Variant, model: str) -> Path:
    """The folder of a checkpoint that was made elsewhere.

    Raises:
        KeyError: the variant has none of this model.
    """
    return resolve_path((variant.checkpoint or {})[model].folder)


COMMIT = r"^[0-9a-f]{40}$"
FETCH = "make fetch"
HubSource = HubModel | HubDataset


class PinnedModel(Strict):
    """A model repository, and the commit of its revision at the first fetch."""

    hub: str
    revision: str
    commit: Annotated[str, Field(pattern=COMMIT)]


class PinnedDataset(Strict):
    """One split of a dataset, the commit of its revision, and the rows that were read.

    `rows` of the split's `of_rows` were read; if `stream` drew them, `pieces` holds the number
    of pieces that were read and the number in the split.
    """

    hub: str
    revision: str
    commit: Annotated[str, Field(pattern=COMMIT)]
    config: str | None
    split: str
    stream: Stream | None
    rows: Count
    of_rows: Count
    pieces: tuple[int, int] | None
    sha256: str


class Pins(Strict):
    """The content of a study's `sources.json`."""

    models: tuple[PinnedModel, ...] = ()
    datasets: tuple[PinnedDataset, ...] = ()

    def commit(self, source: HubSource) -> str | None:
        """The commit of a source that the study file names; None if it is not pinned."""
        if is_commit(source.revision):
            return source.revision
        pins = self.models if isinstance(source, HubModel) else self.datasets
        names = (source.hub, source.revision)
        return next((pin.commit for pin in pins if (pin.hub, pin.revision) == names), None)

    def pinned_rows(self, source: HubDataset) -> PinnedDataset | None:
        """The record of the rows of one split; `source` has the revision of the study file."""
        settings = source.model_dump()
        for pin in self.datasets:
            if pin.model_dump(include=set(settings)) == settings:
                return pin
        return None


def is_commit(revision: str) -> bool:
    """Whether a revision is a commit already, which needs no lookup."""
    return re.match(COMMIT, revision) is not None


def pins_file(paths: StudyPaths) -> Path:
    return paths.root / "sources.json"


def read_pins(paths: StudyPaths) -> Pins:
    """The pins of a study; empty before its first fetch.

    Raises:
        StudyError: the file is damaged, or pins one name to two commits.
    """
    path = pins_file(paths)
    place = f"outputs/{paths.study}/{path.name}"
    if not path.is_file():
        return Pins()
    remedy = f"restore it, or delete it and run {FETCH} STUDY={paths.study} to pin again"
    try:
        pins = Pins.model_validate(read_json(path, made_by=FETCH))
    except ValidationError as error:
        key = ".".join(map(str, error.errors()[0]["loc"])) or "the file"
        raise StudyError(f"{place}: {key} is damaged; {remedy}") from None
    for kind in (pins.models, pins.datasets):
        commits: dict = {}
        for pin in kind:
            if commits.setdefault((pin.hub, pin.revision), pin.commit) != pin.commit:
                raise StudyError(f"{place}: {pin.hub} at {pin.revision} has two commits; {remedy}")
    return pins


def write_pins(paths: StudyPaths, pins: Pins) -> None:
    write_json(pins_file(paths), pins.model_dump(mode="json"))


def hub_sources(study: Study) -> list[tuple[str, HubSource]]:
    """Every source on a Hub with its dotted key in the study file, each source once."""
    sources: dict[HubSource, str] = {}
    for key, source in _walk(study, ""):
        sources.setdefault(source, key)
    return [(key, source) for source, key in sources.items()]


def _walk(value: Any, key: str) -> Iterator[tuple[str, HubSource]]:
    if isinstance(value, HubSource):
        yield key, value
        return
    members = value if isinstance(value, dict) else {n: getattr(value, n) for n in _fields(value)}
    for name, member in members.items():
        yield from _walk(member, f"{key}.{name}".lstrip("."))


def _fields(value: Any) -> tuple[str, ...]:
    return tuple(type(value).model_fields) if isinstance(value, BaseModel) else ()


def with_pinned_commits(study: Study, pins: Pins) -> Study:
    """The study with every known revision replaced by its commit."""

    def pin(source: HubSource) -> HubSource:
        return source.model_copy(update={"revision": pins.commit(source) or source.revision})

    return _mapped(study, pin)


def _mapped(value: Any, change: Callable[[HubSource], HubSource]) -> Any:
    if isinstance(value, HubSource):
        return change(value)
    if isinstance(value, dict):
        return {name: _mapped(member, change) for name, member in value.items()}
    if fields := _fields(value):
        return value.model_copy(update={n: _mapped(getattr(value, n), change) for n in fields})
    return value
