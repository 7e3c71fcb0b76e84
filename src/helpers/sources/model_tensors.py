"""The tensors of a model's folder, read from its safetensors files one at a time.

They are those that transformers gives the model, under the model's names: what it passes
over is not among them, and the head is one of them only if it is not the embeddings.
Whether it is, the tensors decide, not the configuration. A model's weights need not be in
memory twice for two of its files to be compared.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from helpers.core.errors import StudyError
from helpers.core.weight_files import StoredTensor, stored_tensors
from helpers.sources.model_config import load_config
from helpers.sources.model_skeleton import Skeleton, skeleton

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
COMPARED_ROWS = 8192  # of two tables at a time


class TensorFiles(Mapping[str, Tensor]):
    """The tensors of a folder by name, as a model loaded from it has them.

    Args:
        folder: `model.safetensors` or its shards, and the configuration beside them.
        dtype: dtype of the returned tensors; None for that of the file.

    Attributes:
        tied: whether head and embeddings are one tensor: the configuration ties them, and
            the head is not in the files or equals the embeddings.

    Raises:
        StudyError: weights are missing or truncated.
    """

    def __init__(self, folder: Path, *, dtype: torch.dtype | None):
        self.folder, self.dtype, self.tied = Path(folder), dtype, False
        try:
            stored = stored_tensors(self.folder)
        except StudyError as error:
            raise StudyError(f"{self.folder.name}: {error}") from None
        for name, tensor in stored.items():
            if tensor.dtype not in DTYPES:
                raise StudyError(
                    f"{self.folder.name}: {name} is {tensor.dtype}, which is not read here; give "
                    f"a model in {', '.join(DTYPES)}"
                )
        self._tensors: dict[str, StoredTensor] = stored
        self._stored_names = {name: name for name in stored}
        if (self.folder / "config.json").is_file():
            config = load_config(self.folder)
            self._take_as_the_model_does(skeleton(config), says_tied=config.tie_word_embeddings)

    def _take_as_the_model_does(self, model: Skeleton, *, says_tied: bool) -> None:
        read = {n: t for n, t in self._tensors.items() if not model.is_ignored(n)}
        self._stored_names = {model.name_of(name): name for name in read}
        self._tensors = {name: read[stored] for name, stored in self._stored_names.items()}
        head, table = model.head in self._tensors, model.table in self._tensors
        if not says_tied:
            return
        if head and not table:  # the model reads either of the two
            self._stored_names[model.table] = self._stored_names[model.head]
            self._tensors[model.table] = self._tensors[model.head]
        self.tied = not (head and table) or self._equal(model.head, model.table)
        if self.tied:
            self._tensors.pop(model.head, None)

    def _equal(self, one: str, other: str) -> bool:
        """Whether two tensors are equal in the returned dtype, compared part by part."""
        if self.shape(one) != self.shape(other):
            return False
        if self.stored_dtype(one) != self.stored_dtype(other) and self.dtype is None:
            return False
        for start in range(0, self.shape(one)[0], COMPARED_ROWS):
            parts = (self._rows(n, start, start + COMPARED_ROWS) for n in (one, other))
            if not torch.equal(*parts):
                return False
        return True

    def _rows(self, name: str, start: int, end: int) -> Tensor:
        with safe_open(self._tensors[name].path, framework="pt") as file:
            return self._given(file.get_slice(self._stored_names[name])[start:end])

    def _given(self, tensor: Tensor) -> Tensor:
        return tensor if self.dtype is None else tensor.to(self.dtype)

    def __getitem__(self, name: str) -> Tensor:
        with safe_open(self._tensors[name].path, framework="pt") as file:
            return self._given(file.get_tensor(self._stored_names[name]))

    def load_all(self) -> dict[str, Tensor]:
        """Every tensor by name, each file opened once."""
        tensors: dict[str, Tensor] = {}
        for path in sorted({tensor.path for tensor in self._tensors.values()}):
            with safe_open(path, framework="pt") as file:
                for name, tensor in self._tensors.items():
                    if tensor.path == path:
                        tensors[name] = self._given(file.get_tensor(self._stored_names[name]))
        return tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def __contains__(self, name: object) -> bool:
        return name in self._tensors  # Mapping.__contains__ would read the tensor

    def shape(self, name: str) -> tuple[int, ...]:
        """The tensor's shape, without reading it."""
        return self._tensors[name].shape

    def stored_dtype(self, name: str) -> torch.dtype:
        """The dtype in the file, without reading the tensor."""
        return DTYPES[self._tensors[name].dtype]

    def size_bytes(self, name: str) -> int:
        """The tensor's size in the file."""
        return torch.Size(self.shape(name)).numel() * self.stored_dtype(name).itemsize
