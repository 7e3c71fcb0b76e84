"""Folders as people bring them: a tiny model, saved, and then changed in one way.

Each function takes the folder of a sound model and edits it in place.
"""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

WEIGHTS = "model.safetensors"
HEAD, TABLE = "lm_head.weight", "model.embed_tokens.weight"


def edit_json(path: Path, *, drop=(), **values) -> None:
    """Set keys of a JSON file, and remove some."""
    data = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    kept = {k: v for k, v in data.items() if k not in drop}
    path.write_text(json.dumps(kept | values), encoding="utf-8")


def edit_tensors(folder: Path, change) -> None:
    """Apply a function to the dictionary of tensors and write it back."""
    tensors = {name: tensor.clone() for name, tensor in load_file(folder / WEIGHTS).items()}
    change(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def own_head(folder: Path) -> None:
    """A head of its own, while the configuration says that it is the embeddings."""

    def add(tensors):
        noise = torch.randn(tensors[TABLE].shape, generator=torch.Generator().manual_seed(9))
        tensors[HEAD] = tensors[TABLE] + 0.05 * noise

    edit_tensors(folder, add)


def equal_head(folder: Path) -> None:
    """The embeddings once more, as the head."""
    edit_tensors(folder, lambda t: t.update({HEAD: t[TABLE].clone()}))


def head_without_table(folder: Path) -> None:
    """Only the head, which the embeddings are tied to."""
    edit_tensors(folder, lambda t: t.update({HEAD: t.pop(TABLE)}))


def decoder_names(folder: Path) -> None:
    """The names of a decoder that was saved without its head."""

    def shorten(tensors):
        for name in list(tensors):
            tensors[name.removeprefix("model.")] = tensors.pop(name)

    edit_tensors(folder, shorten)


def old_buffers(folder: Path) -> None:
    """Buffers of an older transformers among the tensors."""

    def add(tensors):
        for layer in range(2):
            name = f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"
            tensors[name] = torch.arange(1, 9).float()

    edit_tensors(folder, add)


def other_layout_beside(folder: Path) -> None:
    """The weights once more, in another program's file and under its names."""
    tensors = load_file(folder / WEIGHTS)
    renamed = {f"layers.{name}": tensor.clone() for name, tensor in tensors.items()}
    renamed[TABLE] = torch.zeros_like(tensors[TABLE])
    save_file(renamed, folder / "consolidated.safetensors")


def sharded(folder: Path, shards: int = 3) -> None:
    """The weights in several files and an index."""
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    places = {}
    for number in range(shards):
        file = f"model-{number + 1:05}-of-{shards:05}.safetensors"
        names = sorted(tensors)[number::shards]
        places |= dict.fromkeys(names, file)
        save_file({name: tensors[name] for name in names}, folder / file, {"format": "pt"})
    index = {"metadata": {}, "weight_map": places}
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps(index), encoding="utf-8")


def copied(source: Path, target: Path, *changes) -> Path:
    """A copy of a folder with changes made to it."""
    shutil.copytree(source, target)
    for change in changes:
        change(target)
    return target
