"""What a model's folder may hold: weights that are only numbers, and no code to run.

Safetensors are read, and GGUF where a source says so. A pickle can run anything while it
is loaded, so none is ever opened; where there is nothing else it is refused by name.
Pickles that lie beside (an optimizer's state, a second copy of the weights) are let lie.
"""

import json
from pathlib import Path
from typing import Any

from helpers.core.errors import StudyError
from helpers.core.weight_files import INDEX_FILE
from helpers.study.model_folders import TOKENIZERS, weights_problem

SETTINGS = ("config.json", "generation_config.json", "tokenizer_config.json")


def check_model_safety(folder: Path) -> None:
    """Check that loading a folder runs no code from it.

    Raises:
        StudyError: it holds only pickles, or a file names a pickle, code to fetch, or another
            model to load.
    """
    for name in SETTINGS:
        _json(folder / name)
    if problem := weights_problem(path.name for path in folder.iterdir()):
        raise StudyError(f"{folder.name}: {problem}")
    _check_index(folder)
    _check_tokenizer(folder)
    _check_attention_code(folder)


def _check_index(folder: Path) -> None:
    weight_map = _json(folder / INDEX_FILE).get("weight_map", {})
    files = (
        sorted(set(map(str, weight_map.values())))
        if isinstance(weight_map, dict)
        else [str(weight_map)]
    )
    for name in files:
        if not name.endswith(".safetensors") or Path(name).name != name:
            raise StudyError(
                f"{folder.name}: {INDEX_FILE} names {name!r}, which is no safetensors file of this "
                "folder; save the model again"
            )


def _check_tokenizer(folder: Path) -> None:
    pickles = [p.name for p in sorted(folder.iterdir()) if p.suffix in (".pkl", ".pickle")]
    if pickles and not any((folder / name).is_file() for name in TOKENIZERS):
        raise StudyError(
            f"{folder.name}: its tokenizer is {pickles[0]}, a pickle, which may run anything; "
            "save the tokenizer as tokenizer.json"
        )


def _check_attention_code(folder: Path) -> None:
    """Refuse an attention implementation named like a repository: transformers would fetch it."""
    config = _json(folder / "config.json")
    for key in ("attn_implementation", "_attn_implementation"):
        if "/" in str(config.get(key, "")):
            raise StudyError(
                f"{folder.name}: config.json asks for attention code to be fetched and run "
                f"({key} = {config[key]!r}); remove that line"
            )


def _json(path: Path) -> dict[str, Any]:
    """A JSON file's mapping; empty if the file is not there."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise StudyError(f"{path.parent.name}: {path.name} is not JSON ({error})") from None
    if not isinstance(content, dict):
        raise StudyError(f"{path.parent.name}: {path.name} is no mapping; save the model again")
    return content
