"""Qwen3-0.6B's configuration, and what `make scale` recorded of a model of that size."""

import pytest
from transformers import AutoConfig

from helpers.core.architectures import HEAD
from helpers.core.errors import StudyError
from helpers.core.files import PROJECT
from helpers.core.records import read_json
from helpers.runtime.discovery import linear_names
from helpers.sources.models import QWEN3_06B
from helpers.study.loading import load_study

GIB = 2**30
MEMORY = 16 * GIB


def test_the_census_of_qwen3_06b():
    """28 blocks of 7 Linears, and the tied head."""
    config = AutoConfig.for_model("qwen3", **QWEN3_06B)
    names = linear_names(config)
    assert len(names) == 28 * 7 + 1
    assert names[-1] == HEAD
    assert config.tie_word_embeddings


def test_only_qwen3_has_that_size(study_settings, write_study):
    study_settings["models"]["base"] = {"random": "qwen3", "size": "0.6b"}
    assert load_study(write_study(study_settings)).models["base"].size == "0.6b"
    study_settings["models"]["base"] = {"random": "llama", "size": "0.6b"}
    with pytest.raises(StudyError, match=r"'0.6b' is that of random: qwen3"):
        load_study(write_study(study_settings))


def test_the_published_run_passed_every_gate_in_16_gib():
    account = read_json(PROJECT / "outputs" / "scale" / "sizes.json", made_by="make scale")
    large = [row for row in account["stages"] if row["model"] == "qwen3-0.6b-random"]
    assert {row["weights"] for row in large} == {596_049_920}
    stages = ["calibration", "quantization", "verification", "evaluation"]
    assert {row["stage"] for row in large} >= set(stages)
    assert all(row["peak_bytes"] < MEMORY for row in large)
    (verified,) = (row for row in large if row["stage"] == "verification")
    assert verified["gates_passed"] == verified["gates"] > 10
    assert verified["census"].startswith("196 of 197 Linears are int8 on disk; 0 missing")
