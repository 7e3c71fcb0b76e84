"""One family of each kind from end to end on a tiny twin; `make families` runs all there are."""

import re

import pytest
import torch
from benchmarks.families import TARGETS, FamilyRun, discovered, family_config, run_family
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from helpers.core.errors import StudyError
from helpers.runtime import discovery
from helpers.runtime.discovery import architecture, linear_names
from helpers.sources import model_files
from helpers.sources.model_files import TensorFiles, load_config

KERNEL = "int8 layers match the reference"
KINDS = {  # family: whether [attention input, attention output, MLP input, MLP down] fold, engine
    "llama": ([True, True, True, True], "packed rows"),
    "gemma": ([True, True, True, True], "packed rows"),  # norms of 1 + w
    "phi": ([True, True, True, False], "packed rows"),  # one norm for attention and MLP
    "olmo2": ([False, True, False, True], "packed rows"),  # norms after the parts of a block
    "qwen2_moe": ([True, True, True, True], "packed rows"),
    "bloom": ([True, False, True, False], "one text at a time"),  # ALiBi
    "gemma2": ([True, False, True, True], "one text at a time"),  # scores and logits with a cap
    "deepseek_v3": ([True, False, True, True], "packed rows"),  # latent attention
    "mixtral": ([True, False, True, True], "packed rows"),  # files with names of their own
    "falcon": ([True, False, True, False], "one text at a time"),  # its own class of Linears
    "bart": ([False, True, False, False], "one text at a time"),  # Linears that are never called
    "mamba": ([True, False, False, False], "one text at a time, no cache"),
    "hunyuan_v1_moe": ([True, True, True, True], "packed rows"),  # a weight that others read
}


@pytest.fixture(autouse=True)
def own_outputs(tmp_path, monkeypatch):
    monkeypatch.setenv("STUDY_OUTPUTS", str(tmp_path / "outputs"))


# Other quick tests cover the rest in part: known families, norms of 1 + w, norms after a block.
QUICK = ("bloom", "phi", "mixtral")


@pytest.mark.parametrize(
    "family", [f if f in QUICK else pytest.param(f, marks=pytest.mark.long) for f in sorted(KINDS)]
)
def test_a_family_of_each_kind_passes_from_end_to_end(family, tmp_path):
    row = run_family(family, tmp_path, layers=2)
    folds, engine = KINDS[family]
    assert ([bool(count) for count in row["groups"].values()], row["engine"]) == (folds, engine)
    assert bool(row["shared_norms"]) == (family in ("falcon", "phi"))
    assert row["offsets"] == ([1.0] if "gemma" in family else [])


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        ("gpt2", "no Linear but its head"),
        ("prophetnet", "not the product of head"),
        ("granitemoe", "no tensor of one Linear"),
        ("olmo_hybrid", "converts on loading"),
    ],
)
def test_a_family_that_cannot_be_studied_has_a_reason(family, reason, tmp_path):
    with pytest.raises(StudyError, match=reason):
        run_family(family, tmp_path, layers=2)


def quantized_family(family: str, root) -> FamilyRun:
    config = family_config(family, layers=2)
    groups = discovered(config)["groups"]
    run = FamilyRun(config, root, [target for target in TARGETS if groups[target]])
    run.calibrate()
    run.quantize()
    return run


def stored_names(folder) -> set[str]:
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        return set(file.keys())


def test_files_keep_the_names_that_other_programs_know(tmp_path):
    """Mixtral's experts are w1, w3 and w2 in every file, and transformers itself reads them."""
    run = quantized_family("mixtral", tmp_path)
    saved = stored_names(run.job(run.variant).paths.checkpoint("base", run.variant))
    source = tmp_path / "source"
    assert stored_names(source) <= saved
    expert = "model.layers.1.block_sparse_moe.experts.3"
    assert {f"{expert}.w{i}.weight{part}" for i in (1, 2, 3) for part in ("", "_scale")} <= saved
    own = AutoModelForCausalLM.from_pretrained(source).state_dict()
    files, block = TensorFiles(source, dtype=None), "model.layers.1.mlp.experts"
    for expert in range(4):
        names = [f"{block}.{expert}.{part}_proj.weight" for part in ("gate", "up", "down")]
        gate, up, down = (files[name] for name in names)
        assert torch.equal(own[f"{block}.gate_up_proj"][expert], torch.cat([gate, up]))
        assert torch.equal(own[f"{block}.down_proj"][expert], down)


def exchanged(names: dict[str, str]) -> dict[str, str]:
    """The names, those of an expert's gate and up projection exchanged."""
    other = {"gate_proj": "up_proj", "up_proj": "gate_proj"}
    swap = lambda match: other[match[0]]  # noqa: E731
    return {
        stored: re.sub("gate_proj|up_proj", swap, own) if ".experts." in own else own
        for stored, own in names.items()
    }


@pytest.mark.bank("checkpoint", "an expert's gate and up projection exchanged", KERNEL)
def test_exchanged_names_of_tensors(tmp_path, monkeypatch):
    run = quantized_family("mixtral", tmp_path)
    assert run.failed_gates() == []
    sound = model_files.names_in_files
    monkeypatch.setattr(model_files, "names_in_files", lambda model: exchanged(sound(model)))
    model_files._skeleton.cache_clear()
    try:
        run.quantize()
        assert KERNEL in {gate.split(":")[0] for gate in run.failed_gates()}
    finally:
        model_files._skeleton.cache_clear()


def test_names_are_proved_by_what_transformers_saves(monkeypatch):
    """Discovery sees the fault too: a tensor of the files is not the one that is read as such."""
    config = family_config("mixtral", layers=2)
    sound = discovery.names_in_files
    monkeypatch.setattr(discovery, "names_in_files", lambda model: exchanged(sound(model)))
    with pytest.raises(StudyError, match=r"w1\.weight of its files is not the tensor"):
        discovery.discover(config)


@pytest.mark.parametrize(
    ("family", "left_float"),
    [
        ("bart", "encoder_attn.k_proj"),  # never called
        ("mamba", "mixer.dt_proj"),  # its weight is multiplied, and it is never called
        ("hunyuan_v1_moe", "mlp.gate.wg"),  # another module asks for the type of its weight
        ("phimoe", "mlp.router"),  # of a class of its own
    ],
)
def test_linears_that_int8_cannot_replace_stay_float(family, left_float, tmp_path):
    run = quantized_family(family, tmp_path)
    config = load_config(tmp_path / "source")
    kept = [name for name in architecture(config).matrices if name.endswith(left_float)]
    assert kept
    assert not {*kept} & {*linear_names(config)}
    saved = stored_names(run.job(run.variant).paths.checkpoint("base", run.variant))
    assert not any(f"{name}.weight_scale" in saved for name in kept)
    assert run.failed_gates() == []
