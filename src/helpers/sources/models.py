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
from helpers.sources.weights import refuse_unsafe
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
        StudyError: the model cannot be had, or not without running its code; says what to do.
    """
    folder = _folder_of(study, model, paths)
    refuse_unsafe(folder)
    return folder


def _folder_of(study: Study, model: str, paths: StudyPaths) -> Path:
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
        StudyError: the folder holds no readable safetensors model, or only one that comes
            with code of its own.
    """
    refuse_unsafe(folder)
    try:
        model = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=getattr(torch, runtime.dtype),
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
        )
    except Exception as error:  # of many kinds; each means that the folder is at fault
        raise _not_loaded(folder, "model", error) from None
    return model.to(runtime.device).eval()


def load_head(folder: Path, *, dtype: torch.dtype, device) -> torch.Tensor:
    """(vocabulary, hidden) weight of a folder's head, or of the embeddings it is tied to.

    Raises:
        StudyError: the folder holds neither.
    """
    from safetensors import safe_open

    for ending in ("lm_head.weight", "embed_tokens.weight"):
        for path in sorted(folder.glob("*.safetensors")):
            with safe_open(path, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118 - the reader is not iterable itself
                    if name.endswith(ending):
                        return tensors.get_tensor(name).to(device, dtype)
    raise StudyError(f"{folder.name} holds neither a head nor embeddings; name a language model")


def _not_loaded(folder: Path, what: str, error: Exception) -> StudyError:
    """Why, in one line; code that would have to be run is named as that."""
    if "trust_remote_code" in str(error):
        return StudyError(
            f"{folder.name}: the {what} comes with code of its own, which is never run here; "
            "give one that transformers itself knows"
        )
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    return StudyError(f"{folder.name}: no {what} can be loaded from it ({reason})")


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
        StudyError: it cannot be loaded without code of its own, has no end-of-text token,
            without which generation cannot stop, or a chat template that cannot be used as
            the study asks.
    """
    refuse_unsafe(folder)
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # of many kinds; each means that the folder is at fault
        raise _not_loaded(folder, "tokenizer", error) from None
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
