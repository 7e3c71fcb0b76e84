"""Every model of a study as a local folder in the Hub's layout, and loading from it.

A folder is the one form the later stages know: config, safetensors, tokenizer. Remote
code is never run and pickled weights are never read.
"""

import shutil
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from helpers.sources import chat_template
from helpers.sources.bundled import bundled_model_folder
from helpers.sources.hub import cached_model
from helpers.sources.random_model import random_model_folder
from helpers.study.errors import StudyError
from helpers.study.loading import resolve
from helpers.study.paths import StudyPaths
from helpers.study.pins import FETCH, is_commit
from helpers.study.schema import (
    BundledModel,
    FolderModel,
    HubModel,
    RandomModel,
    Runtime,
    Study,
)


def model_folder(study: Study, model: str, paths: StudyPaths) -> Path:
    """The folder of one model of the study, converted where that is needed.

    Raises:
        StudyError: the model cannot be had; says what to do.
    """
    match study.models[model]:
        case BundledModel():
            return bundled_model_folder()
        case RandomModel(random=family):
            return random_model_folder(family, seed=study.seed)
        case FolderModel(folder=folder):
            return resolve(folder)
        case HubModel() as source:
            return _fetched(source, paths.study)
    folder = paths.finetuned_model(model)
    if not (folder / "record.json").is_file():
        raise StudyError(f"model {model!r} is not trained yet; run 00_finetuning first")
    return folder


def _fetched(source: HubModel, study: str) -> Path:
    """The folder of a model in the client's cache; no Hub is asked."""
    remedy = f"run {FETCH} STUDY={study}"
    if not is_commit(source.revision):
        raise StudyError(f"{source.hub} at {source.revision!r} is not pinned; {remedy}")
    if (folder := cached_model(source.hub, source.revision)) is None:
        raise StudyError(f"{source.hub} is not on this machine; {remedy}")
    return folder


def load_model(folder: Path, runtime: Runtime):
    """The float model of a folder in evaluation mode, at the study's dtype and device.

    Raises:
        StudyError: the folder holds no readable safetensors model.
    """
    try:
        model = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=getattr(torch, runtime.dtype),
            use_safetensors=True,
            local_files_only=True,
        )
    except OSError as error:
        reason = str(error).strip().splitlines()[0]
        raise StudyError(f"{folder.name}: no model can be loaded from it ({reason})") from None
    return model.to(runtime.device).eval()


def save_model(model, tokenizer, folder: Path, **options) -> None:
    """Write model and tokenizer to a new folder of that name; an old one is replaced whole."""
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    model.save_pretrained(temporary, **options)
    tokenizer.save_pretrained(temporary)
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)


def load_tokenizer(folder: Path, *, enable_thinking: bool | None):
    """The tokenizer of a folder, its chat template looked at and its thinking switch set.

    Raises:
        StudyError: it has no end-of-text token, without which generation cannot stop; or
            its chat template cannot be used as the study asks.
    """
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    if tokenizer.eos_token_id is None:
        raise StudyError(
            f"{folder.name}: the tokenizer has no eos token; set eos_token in tokenizer_config.json"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    chat_template.settle_(tokenizer, enable_thinking=enable_thinking, place=folder.name)
    return tokenizer


def prepare(runtime: Runtime, *, seed: int) -> None:
    """Set threads and seeds for one job.

    Raises:
        StudyError: the study asks for a device this machine lacks.
    """
    if runtime.device == "cuda" and not torch.cuda.is_available():
        raise StudyError("runtime.device = 'cuda' but no CUDA device is found; use 'cpu'")
    torch.set_num_threads(runtime.threads)
    torch.manual_seed(seed)


def bytes_by_part(folder: Path) -> dict[str, int]:
    """Bytes on disk of a model's Linears, embeddings (a tied head is in them), and the rest."""
    from safetensors import safe_open

    parts = {"Linears": 0, "embeddings and head": 0, "norms and others": 0}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - the reader is not iterable itself
                shape = tensors.get_slice(name)
                count = torch.Size(shape.get_shape()).numel()
                size = count * torch.empty(0, dtype=SIZES[shape.get_dtype()]).element_size()
                parts[_part(name)] += size
    return parts


SIZES = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I8": torch.int8,
    "I64": torch.int64,
}


def _part(tensor: str) -> str:
    if "embed_tokens" in tensor or "lm_head" in tensor:
        return "embeddings and head"
    return "Linears" if "_proj" in tensor else "norms and others"
