"""What a model's folder, or its repository, must hold: told before anything is loaded."""

import json
from collections.abc import Iterable
from pathlib import Path

# Weights that are read by running what is in the file, or by other programs. Never read here.
OTHER_WEIGHTS = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".h5", ".msgpack", ".gguf")
TOKENIZERS = {"tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt"}
IN_SAFETENSORS = "save them as safetensors (model.save_pretrained writes them) in a folder"


def missing_files(names: Iterable[str]) -> str | None:
    """What the files of these names do not make a model for, with the remedy; None if nothing."""
    names = set(names)
    if "config.json" not in names:
        if "adapter_config.json" in names:
            return "is only an adapter; merge it into its base model and save that whole"
        return "has no config.json; name a folder that model.save_pretrained wrote"
    weights = [name for name in names if name.endswith(".safetensors")]
    if not [name for name in weights if not name.startswith("adapter_")]:
        others = sorted(name for name in names if name.endswith(OTHER_WEIGHTS))
        if others:
            return f"has its weights only as {others[0]}, which is never read; {IN_SAFETENSORS}"
        return f"has no weights (*.safetensors); {IN_SAFETENSORS}"
    if not names & TOKENIZERS:
        return "has no tokenizer; save it beside the model (tokenizer.save_pretrained)"
    return None


def folder_problem(folder: Path) -> str | None:
    """The same for a local folder, its configuration read too.

    A model that is quantized already is no float model to compare with.
    """
    if lacking := missing_files(path.name for path in folder.iterdir()):
        return lacking
    try:
        config = json.loads((folder / "config.json").read_text("utf-8"))
    except ValueError as error:
        return f"has a config.json that is no JSON ({error}); save the model again"
    if isinstance(config, dict) and (scheme := config.get("quantization_config")):
        how = scheme.get("quant_method", "") if isinstance(scheme, dict) else ""
        return f"is quantized already ({how or 'config.json says so'}); give the float model"
    return None
