"""One family of each kind from end to end on a tiny twin; `make families` runs all there are."""

import pytest
from benchmarks.families import run_family

from helpers.core.errors import StudyError

KINDS = {  # family: whether [attention input, attention output, MLP input, MLP down] fold, engine
    "llama": ([True, True, True, True], "packed rows"),
    "gemma": ([True, True, True, True], "packed rows"),  # norms of 1 + w
    "phi": ([True, True, True, False], "packed rows"),  # one norm for attention and MLP
    "olmo2": ([False, True, False, True], "packed rows"),  # norms after the parts of a block
    "qwen2_moe": ([True, True, True, True], "packed rows"),
    "bloom": ([True, False, True, False], "one text at a time"),  # ALiBi
    "gemma2": ([True, False, True, True], "one text at a time"),  # scores and logits with a cap
    "deepseek_v3": ([True, False, True, True], "packed rows"),  # latent attention
}


@pytest.fixture(autouse=True)
def own_outputs(tmp_path, monkeypatch):
    monkeypatch.setenv("STUDY_OUTPUTS", str(tmp_path / "outputs"))


# Other quick tests cover the rest in part: known families, norms of 1 + w, norms after a block.
QUICK = ("bloom", "phi", "qwen2_moe")


@pytest.mark.parametrize(
    "family", [f if f in QUICK else pytest.param(f, marks=pytest.mark.long) for f in sorted(KINDS)]
)
def test_a_family_of_each_kind_passes_from_end_to_end(family, tmp_path):
    row = run_family(family, tmp_path, layers=2)
    folds, engine = KINDS[family]
    assert ([bool(count) for count in row["groups"].values()], row["engine"]) == (folds, engine)
    assert bool(row["shared_norms"]) == (family == "phi")
    assert row["offsets"] == ([1.0] if "gemma" in family else [])


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        ("gpt2", "no Linear but its head"),
        ("prophetnet", "not the product of head"),
        ("mixtral", "renames or converts on loading"),
        ("mamba", "without calling it"),
        ("falcon", "is a FalconLinear"),
    ],
)
def test_a_family_that_cannot_be_studied_has_a_reason(family, reason, tmp_path):
    with pytest.raises(StudyError, match=reason):
        run_family(family, tmp_path, layers=2)
