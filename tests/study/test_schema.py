"""A study file says everything, says it once, and nothing it says is bent to fit."""

import pytest
from pydantic import ValidationError

from helpers.study.loading import load_study
from helpers.study.schema import Study, Variant, is_ignored

# SmoothQuant, arXiv:2211.10438, table 2; w8a8 is llmcompressor's W8A8 scheme.
GRANULARITY = {
    "o1": ("tensor", "token_dynamic"),
    "o2": ("tensor", "tensor_dynamic"),
    "o3": ("tensor", "tensor_static"),
    "w8a8": ("channel", "token_dynamic"),
}


def leaves(data, path=()):
    """Every (path, value) of nested mappings that is not a mapping."""
    for key, value in data.items():
        if isinstance(value, dict) and value:
            yield from leaves(value, (*path, key))
        else:
            yield (*path, key), value


def without(data: dict, path) -> dict:
    """The data with one leaf taken out, in place."""
    inner = data
    for key in path[:-1]:
        inner = inner[key]
    del inner[path[-1]]
    return data


def test_a_valid_study_loads_as_written(study_path, study_settings):
    """Dumping the loaded study gives back every setting of the file."""
    loaded = load_study(study_path).model_dump(mode="json")
    for path, value in leaves(study_settings):
        actual = loaded
        for key in path:
            actual = actual[key]
        if path == ("statistics", "primary"):  # without a score, both judge
            value = [row | {"score": None} for row in value]
        if value != {}:
            assert actual == value, path


def test_loading_twice_gives_equal_studies(study_path):
    assert load_study(study_path) == load_study(study_path)


def test_a_loaded_study_cannot_be_edited(study):
    with pytest.raises(ValidationError):
        study.seed = 8
    with pytest.raises(ValidationError):
        study.calibration.items = 8


def test_no_scientific_setting_has_a_default(study_settings):
    """Whatever is left out is missed, but for what a variant may leave float."""
    import copy

    for path, _ in leaves(study_settings):
        if path[0] == "variants" and path[-1] != "alpha":
            continue
        with pytest.raises(ValidationError):
            Study.model_validate(without(copy.deepcopy(study_settings), path))


@pytest.mark.parametrize(("preset", "scheme"), GRANULARITY.items())
def test_presets_are_the_papers_levels(preset, scheme):
    weights, activations = scheme
    assert Variant(preset=preset).scheme == scheme
    assert Variant(weights=weights, activations=activations).scheme == scheme


def test_what_a_variant_changes():
    smooth = {"alpha": 0.5, "targets": ["mlp_input"]}
    properties = {
        name: (variant.quantized, variant.needs_checkpoint, variant.is_unmodified)
        for name, variant in {
            "float": Variant(),
            "other float": Variant(dtype="bfloat16"),
            "rounded": Variant(preset="o1"),
            "smoothed": Variant(smooth=smooth),
            "both": Variant(preset="o3", smooth=smooth),
        }.items()
    }
    assert properties == {
        "float": (False, False, True),
        "other float": (False, False, False),
        "rounded": (True, True, False),
        "smoothed": (False, True, False),
        "both": (True, True, False),
    }


def test_the_head_is_left_float_unless_said():
    assert Variant(preset="w8a8").ignore == ("lm_head",)
    assert Variant(preset="w8a8", ignore=[]).ignore == ()


LINEARS = ["model.layers.1.mlp.down_proj", "model.layers.11.mlp.down_proj", "lm_head"]


@pytest.mark.parametrize("entry", ["lm_head", "re:.*layers\\.1\\.", "re:layers", "re:.*down"])
def test_patterns_match_as_compressed_tensors_matches_them(entry):
    from compressed_tensors.utils.match import match_name

    for name in LINEARS:
        assert is_ignored(name, [entry]) == match_name(name, entry)


def test_names_match_whole_or_by_their_last_parts():
    assert is_ignored(LINEARS[0], ["down_proj"])
    assert is_ignored(LINEARS[0], ["mlp.down_proj"])
    assert not is_ignored(LINEARS[0], ["proj"])
    assert not is_ignored(LINEARS[1], ["1.mlp.down_proj"])
    assert not is_ignored(LINEARS[0], [])


@pytest.mark.parametrize("alpha", [0, 1, 0.0, 1.0, 0.85])
def test_alpha_may_be_either_end(study_settings, alpha):
    study_settings["variants"]["smoothquant_w8a8"]["smooth"]["alpha"] = alpha
    loaded = Study.model_validate(study_settings)
    assert loaded.variants["smoothquant_w8a8"].smooth.alpha == alpha


def test_the_seed_recipe_is_a_float_checkpoint_that_claims_to_be_w8a8():
    smooth = {"alpha": 0.5, "targets": ["mlp_input"]}
    seed = Variant(recipe="seed", smooth=smooth)
    assert (seed.quantized, seed.needs_checkpoint) == (False, True)
    assert seed.claim.scheme == ("tensor", "token_dynamic")
    assert seed.claim.smooth == seed.smooth
    assert Variant(preset="o1").claim == Variant(preset="o1")


@pytest.mark.parametrize(
    "wrong",
    [
        {},
        {"preset": "w8a8", "smooth": {"alpha": 0.5, "targets": ["mlp_input"]}},
        {"smooth": {"alpha": 0.5, "targets": ["mlp_input"]}, "recipe": "sead"},
    ],
)
def test_the_seed_recipe_takes_smooth_and_nothing_else(wrong):
    with pytest.raises(ValidationError):
        Variant(**{"recipe": "seed"} | wrong)


def test_a_variant_that_protects_nothing_is_dumped_as_before():
    assert "protect" not in Variant(preset="w8a8").model_dump()
    protecting = Variant(preset="w8a8", protect={"bytes": 0.03})
    assert protecting.model_dump()["protect"] == {"bytes": 0.03}
    assert protecting.reads_calibration
    assert protecting.leaving_float(["a.b"]).ignore == ("lm_head", "a.b")
