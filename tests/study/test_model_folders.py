"""What is no model to study is told from its files, before anything is loaded."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from helpers.study.inputs import folder_problem, model_files_problem
from helpers.study.loading import load_study

WHOLE = {"config.json", "model.safetensors", "tokenizer.json"}
SHARDS = {f"model-0000{i}-of-00002.safetensors" for i in (1, 2)} | {"model.safetensors.index.json"}
ADAPTER = {"adapter_config.json", "adapter_model.safetensors"}
LACKING = [
    (WHOLE - {"config.json"}, "has no config.json"),
    (WHOLE - {"tokenizer.json"}, "has no tokenizer"),
    (WHOLE - {"model.safetensors"}, "holds no weights"),
    (WHOLE - {"model.safetensors"} | {"pytorch_model.bin"}, "only pytorch_model.bin, a pickle"),
    (WHOLE - {"model.safetensors"} | {"model.Q4.gguf"}, "only model.Q4.gguf, a format not read"),
    (ADAPTER | {"tokenizer.json"}, "not a whole model; merge it into its model"),
    (WHOLE | ADAPTER, "beside a whole model, and transformers would apply it once more; remove"),
    (WHOLE - {"model.safetensors"} | SHARDS | ADAPTER, "remove the adapter's files (adapter_*)"),
    (WHOLE - {"model.safetensors"} | {"consolidated.safetensors"}, "but neither model.safetensor"),
    (WHOLE - {"model.safetensors"} | SHARDS - {min(SHARDS)}, "lacks model-00001-of-00002.safet"),
    (WHOLE - {"tokenizer.json"} | {"tokenizer.model"}, "add tokenizer.json"),
    (set(), "holds no weights"),
]


@pytest.mark.parametrize(("names", "message"), LACKING)
def test_what_is_lacking_is_named_with_the_remedy(names, message):
    problem = model_files_problem(names)
    assert message in problem
    assert "; " in problem


@pytest.mark.parametrize(
    "names",
    [WHOLE, WHOLE | {"pytorch_model.bin", "README.md"}, WHOLE - {"model.safetensors"} | SHARDS],
)
def test_a_whole_model_lacks_nothing(names):
    assert model_files_problem(names) is None


@pytest.fixture
def folder(tmp_path):
    model_path = tmp_path / "my-model"
    model_path.mkdir()
    for name in WHOLE:
        (model_path / name).write_text('{"model_type": "qwen3"}', encoding="utf-8")
    save_file({"model.norm.weight": np.ones(4, "float32")}, model_path / "model.safetensors")
    return model_path


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"quantization_config": {"quant_method": "gptq"}}, "is quantized already (gptq)"),
        ({"quantization_config": "?"}, "is quantized already"),
        ({}, "without model_type"),
        ([], "is no mapping"),
        ("no json", "is not JSON"),
    ],
)
def test_a_study_of_such_a_folder_is_refused_by_its_key(
    folder, study_settings, write_study, config, message
):
    study_settings["models"]["base"] = {"folder": str(folder)}
    study = write_study(study_settings)
    assert folder_problem(folder) is None
    load_study(study)
    text = config if isinstance(config, str) else json.dumps(config)
    (folder / "config.json").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=r"study\.yaml: models\.base\.folder = ") as caught:
        load_study(study)
    assert message in str(caught.value)


def cut_short(folder):
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[:-3])


def longer(folder):
    with open(folder / "model.safetensors", "ab") as stream:
        stream.write(b"more")


def no_safetensors(folder):
    (folder / "model.safetensors").write_bytes(b"PK\x03\x04" + bytes(40))


def pointer(folder, name="model.safetensors"):
    text = "version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 4096\n"
    (folder / name).write_text(text, encoding="utf-8")


def pointer_to_the_tokenizer(folder):
    pointer(folder, "tokenizer.json")


def sharded(folder, files):
    """The weights in two shards and an index that names `files`."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = [f"part-{i}.safetensors" for i in (1, 2)]
    save_file(tensors, folder / names[0])
    save_file({"model.other.weight": tensors["model.norm.weight"]}, folder / names[1])
    index = {
        "weight_map": dict(zip(["model.norm.weight", "model.other.weight"], files, strict=False))
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")


def one_shard_of_two(folder):
    sharded(folder, ["part-1.safetensors", "part-3.safetensors"])


def a_tensor_in_another_shard(folder):
    sharded(folder, ["part-2.safetensors", "part-1.safetensors"])


def an_index_that_leads_out(folder):
    sharded(folder, ["../part-1.safetensors", "part-2.safetensors"])


def an_index_of_nothing(folder):
    sharded(folder, [])


NOT_WHOLE = [
    (cut_short, "whose header promises"),
    (longer, "whose header promises"),
    (no_safetensors, "holds model.safetensors, which is no safetensors file"),
    (pointer, "holds a git-lfs pointer in place of model.safetensors; run git lfs pull"),
    (pointer_to_the_tokenizer, "holds a git-lfs pointer in place of tokenizer.json"),
    (one_shard_of_two, "lacks part-3.safetensors (1 of the 2 files that"),
    (a_tensor_in_another_shard, "lacks model.norm.weight in part-2.safetensors"),
    (an_index_that_leads_out, "names '../part-1.safetensors', which is no safetensors file"),
    (an_index_of_nothing, "has an index (model.safetensors.index.json) of no tensors"),
]


@pytest.mark.parametrize(("spoil", "message"), NOT_WHOLE)
def test_weights_that_are_not_whole_are_one_line(folder, spoil, message):
    assert folder_problem(folder) is None
    spoil(folder)
    problem = folder_problem(folder)
    assert message in problem
    assert "; " in problem
    assert len(problem.splitlines()) == 1


def test_shards_and_what_lies_beside_them_are_whole(folder):
    sharded(folder, ["part-1.safetensors", "part-2.safetensors"])
    (folder / "consolidated.safetensors").write_bytes(b"another program's")
    assert folder_problem(folder) is None
