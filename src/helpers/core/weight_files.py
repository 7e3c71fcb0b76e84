"""Which files of a model's folder hold its weights, and which tensors lie in them.

As transformers decides it: `model.safetensors`, or else the shards that the index names;
whatever other safetensors lie beside them are not read. Headers only: no weight is
touched, and torch is not needed. The loader and every check take the tensors from here.
"""

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from helpers.core.errors import StudyError

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
SAVE_AGAIN = "save the model again (model.save_pretrained)"
DOWNLOAD_AGAIN = "download it again"
LFS_POINTER = (
    b"version https://git-lfs"  # git writes it in place of a large file that it did not fetch
)
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
