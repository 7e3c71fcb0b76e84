"""The configuration of a model's folder, of a family the project knows."""

from pathlib import Path

from transformers import AutoConfig

from helpers.core.architectures import architecture
from helpers.core.errors import StudyError


def load_config(folder: Path):
    """The configuration of a folder's model.

    Raises:
        StudyError: it is missing or unusable, or its family is unknown.
    """
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError) as error:
        if "trust_remote_code" in str(error):
            raise loading_error(folder, "model", error) from None
        reason = str(error).strip().splitlines()[0]
        raise StudyError(f"{folder.name}: its config.json cannot be used ({reason})") from None
    architecture(config)
    return config


def loading_error(folder: Path, part: str, error: Exception) -> StudyError:
    """The error of a failed loading in one line; names custom code as the reason if it is."""
    if "trust_remote_code" in str(error):
        return StudyError(
            f"{folder.name}: the {part} comes with code of its own, which is never run here; "
            "give one that transformers itself knows"
        )
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    return StudyError(f"{folder.name}: no {part} can be loaded from it ({reason})")
