"""What the stand-in Hub holds: a tiny random Qwen3, and the four datasets in their Hub layouts."""

import io
import json
import tempfile
from pathlib import Path

import pyarrow
from pyarrow import parquet

from helpers.sources.items import load_rows
from helpers.study.schema import ShippedDataset
from hub_standin import Hub

MODEL = "Qwen/Qwen3-0.6B"
SEED = 20260419
# As Qwen3's: a system turn is rendered where it stands, thoughts of earlier answers are
# left out, and without thinking an empty thought is put before the answer.
QWEN3_TEMPLATE = (
    "{%- for m in messages %}"
    "{%- set said = m['content'] %}"
    "{%- if m['role'] == 'assistant' and '</think>' in said %}"
    "{%- set said = said.split('</think>')[-1].lstrip('\\n') %}{%- endif %}"
    "{%- if m['role'] == 'assistant' and loop.last %}"
    "{%- set said = '<think>\\n\\n</think>\\n\\n' + said %}{%- endif %}"
    "{{- '<|im_start|>' + m['role'] + '\\n' + said + '<|im_end|>\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}"
    "{%- if enable_thinking is defined and enable_thinking is false %}"
    "{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}{%- endif %}"
)
SAMPLING = {"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.95}
CODE = "import pathlib\npathlib.Path('{mark}').write_text('this ran')\n"


def qwen3_tokenizer():
    """One token a byte, and a chat template that behaves as Qwen3's does."""
    from helpers.sources.models import byte_tokenizer

    tokenizer = byte_tokenizer()
    tokenizer.chat_template = QWEN3_TEMPLATE
    return tokenizer


def model_files(*, seed: int = SEED) -> dict[str, bytes]:
    """A tiny random Qwen3 as `save_pretrained` writes it, its generation settings as Qwen3's."""
    import torch

    from helpers.sources.models import random_model

    model = random_model("qwen3", seed=seed).to(torch.bfloat16)
    model.generation_config.update(eos_token_id=[2, 0], **SAMPLING)
    with tempfile.TemporaryDirectory() as name:
        model.save_pretrained(name)
        qwen3_tokenizer().save_pretrained(name)
        return {path.name: path.read_bytes() for path in Path(name).iterdir()}


def beside_the_model(mark: Path) -> dict[str, bytes]:
    """What else lies in such repositories; none of it may be fetched, let alone run."""
    return {
        "README.md": b"# A model\n",
        ".gitattributes": b"*.safetensors filter=lfs\n",
        "pytorch_model.bin": b"a pickle",
        "modeling_own.py": CODE.format(mark=mark).encode(),
        "onnx/model.onnx": b"a graph",
        "onnx/config.json": b"{}",
        "consolidated.safetensors": b"the weights once more",
    }


def table(rows: list[dict], *, group: int = 1000) -> bytes:
    """Rows as a parquet file with row groups of so many rows."""
    buffer = io.BytesIO()
    parquet.write_table(pyarrow.Table.from_pylist(rows), buffer, row_group_size=group)
    return buffer.getvalue()


def card(configs: dict[str, dict[str, str]], features: str = "") -> bytes:
    """A dataset card: which files are which split of which configuration."""
    lines = [
        {
            "config_name": name,
            "data_files": [{"split": split, "path": path} for split, path in splits.items()],
        }
        for name, splits in configs.items()
    ]
    lines[0]["default"] = True
    return f"---\nconfigs: {json.dumps(lines)}\n{features}---\n# A dataset\n".encode()


def shipped(name: str) -> list[dict]:
    return load_rows(ShippedDataset(shipped=name))


LISTS = """dataset_info:
- config_name: {config}
  features:
  - {{name: id, dtype: string}}
{before}  - {{name: question, dtype: string}}
  - name: {name}
    sequence:
{fields}{after}"""


def arc_files() -> dict[str, bytes]:
    """`allenai/ai2_arc`: two configurations of three splits."""
    rows, files, configs = shipped("arc"), {}, {}
    for config, part in (("ARC-Challenge", rows), ("ARC-Easy", rows[:3])):
        for split in ("train", "validation", "test"):
            path = f"{config}/{split}-00000-of-00001.parquet"
            files[path] = table(part if split == "test" else part[:2])
        configs[config] = {s: f"{config}/{s}-*" for s in ("train", "validation", "test")}
    fields = "    - {name: text, dtype: string}\n    - {name: label, dtype: string}\n"
    after = "  - {name: answerKey, dtype: string}\n"
    features = LISTS.format(
        config="ARC-Challenge", before="", name="choices", fields=fields, after=after
    )
    return files | {"README.md": card(configs, features)}


def squad_files() -> dict[str, bytes]:
    """`rajpurkar/squad_v2`: one configuration in a folder of its own."""
    rows = shipped("squad_v2")
    files = {"squad_v2/validation-00000-of-00001.parquet": table(rows)}
    files["squad_v2/train-00000-of-00001.parquet"] = table(rows[:3])
    before = "  - {name: title, dtype: string}\n  - {name: context, dtype: string}\n"
    fields = "    - {name: text, dtype: string}\n    - {name: answer_start, dtype: int32}\n"
    features = LISTS.format(
        config="squad_v2", before=before, name="answers", fields=fields, after=""
    )
    splits = {s: f"squad_v2/{s}-*" for s in ("train", "validation")}
    return files | {"README.md": card({"squad_v2": splits}, features)}


def boolq_files() -> dict[str, bytes]:
    """`google/boolq`: no configuration is named, so that it is called default."""
    rows = shipped("boolq")
    splits = {s: f"data/{s}-*" for s in ("train", "validation")}
    return {
        "data/validation-00000-of-00001.parquet": table(rows),
        "data/train-00000-of-00001.parquet": table(rows[:3]),
        "README.md": card({"default": splits}),
    }


def openmath_files(*, group: int = 20) -> dict[str, bytes]:
    """`nvidia/OpenMathInstruct-2`: one split over three files of several row groups each."""
    rows = shipped("openmath_train") + [
        row | {"generated_solution": "So it is."} for row in shipped("openmath_eval")
    ]
    files = {
        f"data/train-{i:05}-of-00003.parquet": table(rows[i::3], group=group) for i in range(3)
    }
    files["data/train_1M-00000-of-00001.parquet"] = table(rows[:5])
    splits = {s: f"data/{s}-*" for s in ("train", "train_1M")}
    return files | {"README.md": card({"default": splits})}


DATASETS = {
    "allenai/ai2_arc": arc_files,
    "rajpurkar/squad_v2": squad_files,
    "google/boolq": boolq_files,
    "nvidia/OpenMathInstruct-2": openmath_files,
}


def fill(hub: Hub, mark: Path) -> None:
    """Give the Hub everything a study of Qwen3-0.6B names."""
    hub.add("model", MODEL, model_files() | beside_the_model(mark))
    for name, files in DATASETS.items():
        hub.add("dataset", name, files())
