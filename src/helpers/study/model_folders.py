"""What a model's folder, or its repository, must hold: told before anything is loaded."""

import json
from collections.abc import Iterable
from pathlib import Path

from helpers.core.architectures import unknown_family_message
from helpers.core.errors import StudyError
from helpers.core.plain_text import one_line
from helpers.core.weight_files import (
    DOWNLOAD_AGAIN,
    INDEX_FILE,
    SAVE_AGAIN,
    WEIGHTS_FILE,
    is_lfs_pointer,
    missing_shards,
    stored_tensors,
)

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

    Its family must be known and its weights float: a quantized model is no reference.
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
    return unknown_family_message(str(config.get("model_type", "")))
