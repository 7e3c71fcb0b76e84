"""Checkpoints made elsewhere in a study file: what their files say, and what is refused."""

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from helpers.core.errors import StudyError
from helpers.core.files import StudyPaths
from helpers.core.records import write_json
from helpers.statistics.verdicts import is_unsmoothed_twin
from helpers.study.loading import load_study
from helpers.study.schema import Variant
from helpers.study.stages import Run, dependency_text

Q, V = "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.v_proj"
INTEGERS = {"num_bits": 8, "type": "int", "symmetric": True}
GROUP = {
    "targets": ["Linear"],
    "weights": INTEGERS | {"strategy": "channel", "dynamic": False},
    "input_activations": INTEGERS | {"strategy": "token", "dynamic": True},
}
SCHEME = {"quant_method": "compressed-tensors", "format": "int-quantized"}


@pytest.fixture
def given(tmp_path):
    """A folder with the parts of a W8A8 checkpoint that are looked at before anything is loaded."""
    folder = tmp_path / "given"
    folder.mkdir()
    tensors = {"model.embed_tokens.weight": np.ones((6, 4), "float32"), f"{V}.weight": np.eye(4)}
    tensors |= {f"{Q}.weight": np.eye(4, dtype="int8"), f"{Q}.weight_scale": np.ones((4, 1))}
    save_file(tensors, folder / "model.safetensors")
    (folder / "tokenizer.json").write_text("{}", "utf-8")
    quantization = SCHEME | {"config_groups": {"group_0": GROUP}, "ignore": ["lm_head", V]}
    write_json(folder / "config.json", {"model_type": "llama", "quantization_config": quantization})
    return folder


@pytest.fixture
def study_with(study_settings, write_study):
    """Write a study of one model whose variant `theirs` has these settings."""

    def write(theirs, models=("base",)):
        settings = study_settings | {"variants": {"noquant": {}, "theirs": theirs}}
        settings["models"] = {n: m for n, m in settings["models"].items() if n in models}
        settings["statistics"]["primary"] = []
        return write_study(settings)

    return write


def test_the_scheme_is_read_from_the_files(given, study_with):
    plain, by_model = {"folder": str(given)}, {"base": {"folder": str(given)}}
    for checkpoint in (plain, by_model):
        variant = load_study(study_with({"checkpoint": checkpoint})).variants["theirs"]
        assert (variant.scheme, variant.ignore) == (("channel", "token_dynamic"), ("lm_head", V))
        assert variant.quantized
        assert not variant.reads_calibration
        smoothed = Variant(
            preset="w8a8",
            ignore=variant.ignore,
            smooth={"alpha": 0.5, "targets": ["mlp_input"]},
        )
        assert not is_unsmoothed_twin(variant, smoothed)  # it may be smoothed itself


def test_a_variant_of_the_study_is_dumped_as_ever():
    assert "checkpoint" not in Variant(preset="w8a8").model_dump()


@pytest.mark.parametrize(
    "more",
    [
        {"preset": "w8a8"}, {"weights": "channel", "activations": "token_dynamic"},
        {"smooth": {"alpha": 0.5, "targets": ["mlp_input"]}}, {"rounding": "gptq"},
        {"repeats": 2}, {"ignore": []}, {"dtype": "bfloat16"}, {"recipe": "seed"},
    ],
    ids=lambda more: next(iter(more)),
)  # fmt: skip
def test_nothing_of_it_can_be_chosen(more, given, study_with):
    with pytest.raises(StudyError) as error:
        load_study(study_with({"checkpoint": {"folder": str(given)}} | more))
    [line] = str(error.value).splitlines()
    assert f"{next(iter(more))}" in line
    assert line.endswith("cannot be chosen; give checkpoint alone, or with kv")


def test_an_int8_cache_may_stand_beside_it(given, study_with):
    path = study_with({"checkpoint": {"folder": str(given)}, "kv": "int8"})
    assert load_study(path).variants["theirs"].kv == "int8"


@pytest.mark.parametrize(
    ("models", "checkpoint", "words"),
    [
        (["base", "tuned"], {}, "names no model, and the study has several (base, tuned)"),
        (["base", "tuned"], {"base": {}}, "has none of the model 'tuned'; give one for each"),
        (["base"], {"bose": {}}, "names 'bose', which is not a model of this study (base)"),
    ],
)
def test_every_model_has_one_of_its_own(models, checkpoint, words, given, study_with):
    folder = {"folder": str(given)}
    theirs = {"checkpoint": {model: folder for model in checkpoint} or folder}
    with pytest.raises(StudyError) as error:
        load_study(study_with(theirs, models))
    [line] = str(error.value).splitlines()
    assert "variants.theirs.checkpoint" in line
    assert words in line


def test_a_checkpoint_on_the_hub_is_to_be_downloaded(study_with):
    with pytest.raises(StudyError) as error:
        load_study(study_with({"checkpoint": {"hub": "their/w8a8", "revision": "main"}}))
    [line] = str(error.value).splitlines()
    assert "names a Hub, and a checkpoint is read from a folder; download it" in line


def edited(folder, **changes) -> None:
    config = json.loads((folder / "config.json").read_text("utf-8"))
    config["quantization_config"] |= changes
    write_json(folder / "config.json", config)


def with_group(folder, part: str, **changes) -> None:
    group = {**GROUP, part: GROUP[part] | changes}
    edited(folder, config_groups={"group_0": group})


def with_tensors(folder, **changes) -> None:
    """The weights with these tensors; None removes one."""
    path = folder / "model.safetensors"
    tensors = load_file(path) | {name.replace("__", "."): t for name, t in changes.items()}
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, path)


STATIC = f"{Q}.input_scale"
REFUSED = {
    "no folder": (shutil.rmtree, "is not a folder"),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), "has no tokenizer"),
    "a float model": (
        lambda f: write_json(f / "config.json", {"model_type": "llama"}),
        "is not quantized (no quantization_config in config.json)",
    ),
    "another tool's": (lambda f: edited(f, quant_method="gptq"), "has quant_method = 'gptq'"),
    "packed": (lambda f: edited(f, format="pack-quantized"), "has format = 'pack-quantized'"),
    "int8 keys and values": (
        lambda f: edited(f, kv_cache_scheme={"num_bits": 8}), "has a kv_cache_scheme"
    ),
    "rotated": (lambda f: edited(f, transform_config={"a": 1}), "has a transform_config"),
    "two groups": (
        lambda f: edited(f, config_groups={"a": GROUP, "b": GROUP}), "has 2 quantization groups"
    ),
    "some Linears": (
        lambda f: edited(f, config_groups={"a": GROUP | {"targets": ["re:.*q_proj"]}}),
        "quantizes ['re:.*q_proj']",
    ),
    "four bits": (lambda f: with_group(f, "weights", num_bits=4), "has weights of {'num_bits': 4"),
    "weights alone": (
        lambda f: edited(f, config_groups={"a": GROUP | {"input_activations": None}}),
        "has activations of {'num_bits': None",
    ),
    "groups of a row": (
        lambda f: with_group(f, "weights", strategy="group"), "has weights per group, not one of"
    ),
    "per tensor by its config alone": (
        lambda f: with_group(f, "weights", strategy="tensor"),
        f"{Q}.weight_scale has 4 numbers, not 1",
    ),
    "static by its config alone": (
        lambda f: with_group(f, "input_activations", strategy="tensor", dynamic=False),
        f"{STATIC} has 0 numbers, not 1",
    ),
    "static by its tensors alone": (
        lambda f: with_tensors(f, **{STATIC: np.ones(1)}), f"{STATIC} has 1 numbers, not 0"
    ),
    "no int8 tensor": (
        lambda f: with_tensors(f, **{f"{Q}.weight": None, f"{Q}.weight_scale": None}),
        "declares int8 weights and holds none",
    ),
    "a zero point": (
        lambda f: with_tensors(f, **{f"{Q}.weight_zero_point": np.zeros((4, 1), "int8")}),
        f"holds {Q}.weight_zero_point in I8, not read here",
    ),
    "an ignored Linear in int8": (
        lambda f: edited(f, ignore=[r"re:.*self_attn\..*"]), f"ignores {Q} by config.json"
    ),
    "no pattern": (lambda f: edited(f, ignore=["re:("]), "ignores 're:(' by config.json"),
}  # fmt: skip


# Loaded as they are, these would be other models than their config.json describes.
SILENT = [kind for kind in REFUSED if "alone" in kind or kind == "an ignored Linear in int8"]
IN_BANK = pytest.mark.bank("brought", "a given checkpoint, {kind}", at="its files")


@pytest.mark.parametrize(
    "kind", [pytest.param(k, marks=[IN_BANK] if k in SILENT else []) for k in REFUSED]
)
def test_what_cannot_be_studied_is_refused_in_one_line(kind, given, study_with):
    path = study_with({"checkpoint": {"folder": str(given)}})
    break_, words = REFUSED[kind]
    break_(given)
    with pytest.raises(StudyError) as error:
        load_study(path)
    [line] = str(error.value).splitlines()
    assert f"variants.theirs.checkpoint.folder = '{given}' " in line
    assert words in line
    assert ";" in line  # the remedy


def test_checkpoints_of_two_schemes_are_two_variants(given, study_with):
    other = shutil.copytree(given, given.with_name("other"))
    with_group(other, "input_activations", strategy="tensor")
    folders = {"base": {"folder": str(given)}, "tuned": {"folder": str(other)}}
    with pytest.raises(StudyError, match="has checkpoints of two schemes") as error:
        load_study(study_with({"checkpoint": folders}, ["base", "tuned"]))
    assert "activations token dynamic" in str(error.value)
    assert "activations tensor dynamic" in str(error.value)


def test_a_changed_file_is_an_input_of_the_quantization(given, study_with):
    study, run = load_study(study_with({"checkpoint": {"folder": str(given)}})), "quantization"
    before = dependency_text(study, Run(run, "base", "theirs"))
    assert dependency_text(study, Run(run, "base", "theirs")) == before
    with_tensors(given, **{f"{Q}.weight_scale": np.full((4, 1), 2.0)})
    assert dependency_text(study, Run(run, "base", "theirs")) != before


def test_results_are_read_without_the_folder(given, study_with):
    path = study_with({"checkpoint": {"folder": str(given)}})
    scheme = load_study(path).variants["theirs"]
    shutil.rmtree(given)
    with pytest.raises(StudyError, match="is not a folder"):
        load_study(path, with_sources=False)
    found = {"weights": "channel", "activations": "token_dynamic", "ignore": ["lm_head", V]}
    folder = StudyPaths("study").variant("base", "theirs")
    write_json(folder / "verification.json", {"found": found})
    try:
        assert load_study(path, with_sources=False).variants["theirs"] == scheme
    finally:
        shutil.rmtree(folder)
