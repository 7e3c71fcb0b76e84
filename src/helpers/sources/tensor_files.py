"""The tensors of a model's folder, read from its safetensors files one at a time.

A model's weights need not be in memory twice for two of its files to be compared.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from helpers.study.errors import StudyError

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


class TensorFiles(Mapping[str, Tensor]):
    """Tensor name to tensor, as the files of a folder have them.

    Args:
        folder: holds one or more safetensors files.
        dtype: what tensors are given in, or None for their own dtype.

    Raises:
        StudyError: there is no safetensors file.
    """

    def __init__(self, folder: Path, *, dtype: torch.dtype | None):
        self.folder, self.dtype = Path(folder), dtype
        self._places: dict[str, Path] = {}
        self._looks: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
        for path in sorted(self.folder.glob("*.safetensors")):
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 - the reader is not iterable itself
                    look = file.get_slice(name)
                    self._places[name] = path
                    self._looks[name] = (tuple(look.get_shape()), DTYPES[look.get_dtype()])
        if not self._places:
            raise StudyError(f"{self.folder.name} holds no safetensors; make it again")

    def __getitem__(self, name: str) -> Tensor:
        with safe_open(self._places[name], framework="pt") as file:
            tensor = file.get_tensor(name)
        return tensor if self.dtype is None else tensor.to(self.dtype)

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, name: object) -> bool:
        return name in self._places  # Mapping's own would read the tensor

    def shape(self, name: str) -> tuple[int, ...]:
        """The tensor's shape, without reading it."""
        return self._looks[name][0]

    def stored_dtype(self, name: str) -> torch.dtype:
        """The dtype in the file, without reading the tensor."""
        return self._looks[name][1]

    def size_bytes(self, name: str) -> int:
        """How many bytes the tensor takes in the file."""
        shape, dtype = self._looks[name]
        return torch.Size(shape).numel() * dtype.itemsize

    def leave_out(self, name: str) -> None:
        """Do as if the tensor were not there, if it is."""
        self._places.pop(name, None)
        self._looks.pop(name, None)
