"""What is no model to study is told from its files, before anything is loaded."""

import json

import pytest

from helpers.study.loading import load_study
from helpers.study.model_folders import folder_problem, missing_files

WHOLE = {"config.json", "model.safetensors", "tokenizer.json"}
SHARDS = {"model-00001-of-00002.safetensors", "model.safetensors.index.json"}
LACKING = [
    (WHOLE - {"config.json"}, "has no config.json"),
    (WHOLE - {"tokenizer.json"}, "has no tokenizer"),
    (WHOLE - {"model.safetensors"}, "holds no weights"),
    (WHOLE - {"model.safetensors"} | {"pytorch_model.bin"}, "only pytorch_model.bin, a pickle"),
    (WHOLE - {"model.safetensors"} | {"model.Q4.gguf"}, "only model.Q4.gguf, a format not read"),
    ({"adapter_config.json", "adapter_model.safetensors", "tokenizer.json"}, "holds an adapter"),
    (WHOLE | {"adapter_config.json"}, "holds an adapter"),
    (set(), "holds no weights"),
]


@pytest.mark.parametrize(("names", "said"), LACKING)
def test_what_is_lacking_is_named_with_the_remedy(names, said):
    told = missing_files(names)
    assert said in told
    assert "; " in told


@pytest.mark.parametrize(
    "names",
    [WHOLE, WHOLE | {"pytorch_model.bin", "README.md"}, WHOLE - {"model.safetensors"} | SHARDS],
)
def test_a_whole_model_lacks_nothing(names):
    assert missing_files(names) is None


@pytest.fixture
def folder(tmp_path):
    made = tmp_path / "my-model"
    made.mkdir()
    for name in WHOLE:
        (made / name).write_text('{"model_type": "qwen3"}', encoding="utf-8")
    return made


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"quantization_config": {"quant_method": "gptq"}}, "is quantized already (gptq)"),
        ({"quantization_config": "?"}, "is quantized already"),
        ({"model_type": "mamba"}, "architecture 'mamba' is not among gemma3_text, llama"),
        ({}, "architecture '' is not among"),
        ([], "is no mapping"),
        ("no json", "is not JSON"),
    ],
)
def test_a_study_of_such_a_folder_is_refused_by_its_key(
    folder, study_settings, write_study, config, said
):
    study_settings["models"]["base"] = {"folder": str(folder)}
    study = write_study(study_settings)
    assert folder_problem(folder) is None
    load_study(study)
    text = config if isinstance(config, str) else json.dumps(config)
    (folder / "config.json").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=r"study\.yaml: models\.base\.folder = ") as caught:
        load_study(study)
    assert said in str(caught.value)
