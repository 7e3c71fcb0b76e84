"""Every model of a study as a local folder in the Hub's layout, and loading from it.

A folder is the one form the later stages know: config, safetensors, tokenizer. Remote
code is never run and pickled weights are never read.
"""

from collections.abc import Iterable
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.initialization import no_init_weights

from helpers.core.activity import set_activity
from helpers.core.architectures import HEAD, architecture, linear_names
from helpers.core.checksums import RECORD, check_checksums
from helpers.core.errors import StudyError
from helpers.core.file_writing import replace_folder
from helpers.core.paths import StudyPaths
from helpers.runtime.devices import place_on_device, return_to_input_device
from helpers.runtime.linears import use_onednn
from helpers.runtime.moe_experts import linear_experts
from helpers.sources import chat_template
from helpers.sources.bundled_model import bundled_model_folder
from helpers.sources.hub import cached_model
from helpers.sources.model_config import load_config, loading_error
from helpers.sources.model_safety import check_model_safety
from helpers.sources.model_tensors import TensorFiles
from helpers.sources.random_model import random_model_folder
from helpers.study.local_files import resolve_path
from helpers.study.pins import FETCH, is_commit
from helpers.study.schema import Runtime, Study
from helpers.study.schema_sources import BundledModel, FolderModel, HubModel, RandomModel

GENERATION_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def model_folder(study: Study, model: str, paths: StudyPaths) -> Path:
    """The folder of one model of the study, converted if necessary.

    Raises:
        StudyError: the model is missing, would run code of its own, or has a damaged file.
    """
    folder = _folder_of(study, model, paths)
    check_model_safety(folder)
    return folder


def _folder_of(study: Study, model: str, paths: StudyPaths) -> Path:
    match study.models[model]:
        case BundledModel():
            return bundled_model_folder()
        case RandomModel(random=family, size=size):
            return random_model_folder(family, size=size, seed=study.seed)
        case FolderModel(folder=folder):
            return resolve_path(folder)
        case HubModel() as source:
            return _fetched(source, paths.study)
    folder = paths.finetuned_model(model)
    if not (folder / RECORD).is_file():
        raise StudyError(f"model {model!r} is not trained yet; run 00_finetuning first")
    check_checksums(folder, made_by="00_finetuning")
    return folder


def _fetched(source: HubModel, study: str) -> Path:
    """The folder of a Hub model in the client's cache; sends no request."""
    remedy = f"run {FETCH} STUDY={study}"
    if not is_commit(source.revision):
        raise StudyError(f"{source.hub} at {source.revision!r} is not pinned; {remedy}")
    if (folder := cached_model(source.hub, source.revision)) is None:
        raise StudyError(f"{source.hub} is not on this machine; {remedy}")
    return folder


def load_model(folder: Path, runtime: Runtime):
    """The float model of a folder in evaluation mode, in the runtime's dtype and device.

    Its configuration is corrected to say whether head and embeddings are tied.

    Raises:
        StudyError: the folder holds no readable safetensors model of a known family, needs
            custom code, lacks tensors (transformers would initialize them at random), or
            holds tensors that no module reads.
    """
    check_model_safety(folder)
    set_activity("loading a model")
    try:
        with linear_experts(load_config(folder)):
            model, report = AutoModelForCausalLM.from_pretrained(
                folder,
                dtype=getattr(torch, runtime.dtype),
                device_map=runtime.device_map,
                use_safetensors=True,
                local_files_only=True,
                trust_remote_code=False,
                output_loading_info=True,
            )
    except StudyError:
        raise
    except Exception as error:  # of many kinds; each is a fault of the folder
        raise loading_error(folder, "model", error) from None
    if problem := tensor_problem(report["missing_keys"], report["unexpected_keys"]):
        raise StudyError(f"{folder.name}: {problem}")
    record_tied_head_(model)
    remove_sampling_settings_(model)
    if runtime.device_map:  # transformers has placed the parts already
        return return_to_input_device(model).eval()
    return use_onednn(place_on_device(model, runtime)).eval()


def tensor_problem(missing: Iterable[str], unexpected: Iterable[str]) -> str | None:
    """The error message for missing or unread tensors; None if there are none."""
    if missing_names := sorted(missing):
        return (
            f"{missing_names[0]} is not in its files ({len(missing_names)} tensors in all); save "
            "the whole model with model.save_pretrained"
        )
    if unexpected_names := sorted(unexpected):
        return (
            f"{unexpected_names[0]} is in its files ({len(unexpected_names)} tensors in all), but "
            "config.json describes a model that has no such tensor; correct config.json, or save "
            "the model again"
        )
    return None


def record_tied_head_(model) -> None:
    """Set `tie_word_embeddings` to whether head and embeddings share their tensor."""
    head, table = model.get_output_embeddings(), model.get_input_embeddings()
    model.config.tie_word_embeddings = head.weight is table.weight


def remove_sampling_settings_(model) -> None:
    """Remove sampling settings that contradict `do_sample`; answers are greedy anyway.

    transformers reads such a file but refuses to save it.
    """
    try:
        model.generation_config.validate(strict=True)
    except ValueError:
        settings = model.generation_config
        ids = {name: getattr(settings, name) for name in GENERATION_IDS}
        model.generation_config = GenerationConfig(**ids)


def load_generation_config_(model, folder: Path) -> None:
    """Load the folder's generation config, with its end-of-text tokens, into a model."""
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)
    remove_sampling_settings_(model)


def empty_model(config, *, dtype: torch.dtype):
    """The model of a configuration in evaluation mode, its weights uninitialized."""
    with no_init_weights(), linear_experts(config):
        return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def load_head(folder: Path, *, dtype: torch.dtype, device) -> torch.Tensor:
    """(vocabulary, hidden) weight of a folder's head, or of the embeddings it is tied to.

    Raises:
        StudyError: the folder holds neither.
    """
    files, table = TensorFiles(folder, dtype=None), architecture(load_config(folder)).embeddings[0]
    name = f"{table if files.tied else HEAD}.weight"
    if name not in files:
        raise StudyError(f"{folder.name}: {name} is not in its files; name a language model")
    return files[name].to(device, dtype)


def save_model(model, tokenizer, folder: Path, **options) -> None:
    """Write model and tokenizer to a folder; an existing folder is replaced as a whole."""

    def fill(temporary: Path) -> None:
        model.save_pretrained(temporary, **options)
        tokenizer.save_pretrained(temporary)

    replace_folder(folder, fill)


def load_tokenizer(folder: Path, *, enable_thinking: bool | None):
    """The tokenizer of a folder, its chat template configured if it has one.

    Raises:
        StudyError: it needs custom code, has no end-of-text token, without which generation
            cannot stop, or has a chat template that the study's settings do not fit.
    """
    check_model_safety(folder)
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # of many kinds; each is a fault of the folder
        raise loading_error(folder, "tokenizer", error) from None
    if tokenizer.eos_token_id is None:
        raise StudyError(
            f"{folder.name}: the tokenizer has no eos token; set eos_token in tokenizer_config.json"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    chat_template.configure_chat_template_(
        tokenizer, enable_thinking=enable_thinking, place=folder.name
    )
    return tokenizer


def bytes_by_part(folder: Path) -> dict[str, int]:
    """Bytes on disk of a model's Linears, embeddings (with a tied head), and the rest."""
    config, files = load_config(folder), TensorFiles(folder, dtype=None)
    linears, tables = set(linear_names(config)), {*architecture(config).embeddings, HEAD}
    parts = {"Linears": 0, "embeddings and head": 0, "norms and others": 0}
    for name in files:
        parts[_part(name, linears, tables)] += files.size_bytes(name)
    return parts


def _part(tensor: str, linears: set[str], tables: set[str]) -> str:
    module = tensor.rpartition(".")[0]
    if module in tables:
        return "embeddings and head"
    return "Linears" if module in linears else "norms and others"
