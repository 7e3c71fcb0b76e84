"""The study files that are shipped: valid, and right in what their comments compute."""

import re
import subprocess
import sys

import pytest
from tools.sample_size import equivalence_power, items_for_loss

from helpers.core.errors import StudyError
from helpers.core.files import PROJECT
from helpers.statistics.intervals import detectable_loss
from helpers.study import inputs, stages
from helpers.study.loading import load_study
from helpers.study.schema import FineTunedModel

FILES = sorted((PROJECT / "params").glob("*.yaml"))
QWEN3 = [path for path in FILES if path.stem.startswith("qwen3")]
SIZE = re.compile(r"#\s+(\d+)\s+([\d.]+) / ([\d.]+)\s+(\d+) % / (\d+) %")
TAKES = re.compile(r"loss of 3 points takes (\d+) items if 2 % are gained, (\d+) if 5 %")


NOT_SHIPPED = "gemma3-270m"  # the model of this study: its terms forbid it


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_a_shipped_study_is_valid(path):
    assert stages.runs(load_study(path, with_sources=path.stem != NOT_SHIPPED))


def test_a_model_that_is_not_shipped_is_asked_for_by_its_file(monkeypatch, tmp_path):
    monkeypatch.setattr(inputs, "PROJECT", tmp_path)
    with pytest.raises(StudyError, match=r"models\.base\.gguf = '\.gemma/.*' does not exist"):
        load_study(PROJECT / "params" / f"{NOT_SHIPPED}.yaml")
    (tmp_path / ".gemma").mkdir()
    file = tmp_path / ".gemma" / "gemma-3-270m-q4_k_m.gguf"
    file.write_bytes(b"PK")
    with pytest.raises(StudyError, match=r"is no GGUF file"):
        load_study(PROJECT / "params" / f"{NOT_SHIPPED}.yaml")
    file.write_bytes(b"GGUF")
    assert load_study(PROJECT / "params" / f"{NOT_SHIPPED}.yaml").models["base"].gguf


def test_make_asks_whether_the_terms_are_accepted():
    command = ["make", "-s", "-o", f"{sys.prefix}/.study-ready", "study"]
    command += [f"VENV={sys.prefix}", f"STUDY={NOT_SHIPPED}", "GEMMA=/nowhere/gemma.gguf"]
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "Gemma Terms of Use" in done.stderr
    assert "ACCEPT=gemma" in done.stderr


@pytest.mark.parametrize("path", QWEN3, ids=lambda p: p.stem)
def test_the_sizes_of_samples_find_what_the_comments_say(path):
    """By the project's own power functions, at the level of Holm's first step."""
    study, text = load_study(path), path.read_text("utf-8")
    level = (1 - study.statistics.confidence) / len(study.statistics.primary)
    power, margin = study.statistics.power, study.statistics.margin
    stated = {int(n): tuple(map(float, rest)) for n, *rest in SIZE.findall(text)}
    sizes = {dataset.items for dataset in study.evaluation.datasets.values()}
    assert set(stated) == sizes | {20}  # the original's beside ours
    for n, figures in stated.items():
        losses = [detectable_loss(n, gain_rate=g, alpha=level, power=power) for g in (0.02, 0.05)]
        shown = [
            equivalence_power(n, margin=margin, flip_rate=f, alpha=2 * (1 - 0.975))
            for f in (0.05, 0.1)
        ]
        assert figures[:2] == tuple(round(100 * loss, 1) for loss in losses)
        assert figures[2:] == tuple(round(100 * share) for share in shown)
    needed = [items_for_loss(0.03, gain_rate=g, alpha=level, power=power) for g in (0.02, 0.05)]
    assert [int(n) for n in TAKES.search(text).groups()] == needed
    assert max(sizes) >= needed[1]  # all but the set that has no more items
    assert sum(n < needed[1] for n in (d.items for d in study.evaluation.datasets.values())) <= 1
    assert min(sizes) >= needed[0]


@pytest.mark.parametrize("path", QWEN3, ids=lambda p: p.stem)
def test_a_study_of_qwen3_says_all_it_has_to(path):
    study = load_study(path)
    assert study.enable_thinking is False
    assert isinstance(study.models["finetuned"], FineTunedModel)
    assert study.models["finetuned"].finetune.items == 1000
    assert study.calibration.items == 100
    assert {d.adapter for d in study.evaluation.datasets.values()} == {
        "arc",
        "squad_v2",
        "boolq",
        "openmath",
    }
    assert study.evaluation.datasets["openmath"].source.stream
    alphas = [v.smooth.alpha for v in study.variants.values() if v.smooth and v.preset == "w8a8"]
    assert alphas == [0.5, (0.3, 0.5, 0.65, 0.8, 0.9), "auto"]
    assert {v.preset for v in study.variants.values()} == {None, "w8a8", "o1", "o2", "o3"}
    controls = {v.smooth is not None for v in study.variants.values() if not v.quantized}
    assert controls == {True, False}  # smoothed alone, and not at all


def test_the_two_studies_of_qwen3_differ_by_the_checkpoint_alone():
    first, second = (load_study(path) for path in QWEN3)
    differing = {
        name for name in type(first).model_fields if getattr(first, name) != getattr(second, name)
    }
    assert differing == {"title", "models"}
    trained = [study.models["finetuned"] for study in (first, second)]
    assert trained[0] == trained[1]
