"""Limits that do not move with a broken baseline."""

import math
from dataclasses import replace

import pytest
import torch

from helpers.core.records import sha256_text
from helpers.evaluation.checks import evaluation_data
from helpers.evaluation.checks.integrity import (
    compressed_bytes,
    end_gate,
    is_random,
    loop_gate,
    plain_text_gate,
    trained_on_gate,
    training_gate,
)
from helpers.evaluation.checks.numeric_gates import reference_gates
from helpers.inference import perplexity
from helpers.sources.models import load_model, load_tokenizer, model_folder
from helpers.sources.sampling import shared_passages
from helpers.statistics.verdicts import VariantPredictions, decision_rules, uninformative_reason
from helpers.study.loading import open_job
from helpers.study.schema import FolderModel, Variant

PASSAGES, TRAINING = "rows of the passages", "the record of the training"


def rows_of(texts: dict[str, str], bits: float) -> list[dict]:
    """Rows of passages whose loss is so many bits a byte."""
    sizes = {key: len(text.encode()) for key, text in texts.items()}
    return [{"id": k, "tokens": 50, "nll": bits * math.log(2) * n} for k, n in sizes.items()]


@pytest.fixture
def texts(study) -> dict[str, str]:
    return {sha256_text(t)[:16]: t[:600] for t in shared_passages(study)}


@pytest.fixture
def trained(study):
    """The study with a model of trained weights."""
    models = study.models | {"base": FolderModel(folder="somewhere")}
    return study.model_copy(update={"models": models})


KNOWS_NOTHING = pytest.mark.bank("limits", "a baseline that knows no language", at=PASSAGES)


@pytest.mark.parametrize(
    ("bits", "passes"),
    [(0.8, True), (2.0, True), *(pytest.param(b, False, marks=KNOWS_NOTHING) for b in (6.0, 9.0))],
)
def test_a_baseline_that_knows_no_language_is_caught(trained, texts, bits, passes):
    """2 bits a byte is a poor model; a loss on other tokens takes any model far above."""
    for model in ("base", "tuned"):
        assert plain_text_gate(trained, model, rows_of(texts, bits), texts).passed == passes


def test_random_weights_are_asked_nothing_and_a_missing_text_holds_nothing(study, trained, texts):
    assert [is_random(study, model) for model in ("base", "tuned")] == [True, True]
    assert [is_random(trained, model) for model in ("base", "tuned")] == [False, False]
    assert plain_text_gate(study, "tuned", rows_of(texts, 9.0), texts).passed
    assert not plain_text_gate(trained, "base", rows_of(texts, 1.0), {}).passed
    assert not plain_text_gate(trained, "base", [], texts).passed


def test_text_of_a_language_takes_three_to_five_bits_a_byte_without_one(texts):
    share = sum(map(compressed_bytes, texts.values())) / sum(
        len(t.encode()) for t in texts.values()
    )
    assert 3 < 8 * share < 5


NOT_TRAINED = pytest.mark.bank("model", "a training that changed nothing", at=TRAINING)


@pytest.mark.parametrize(
    ("before", "after", "passes"),
    [
        (2.5, 1.5, True),
        (1.5, 1.6, True),
        *(pytest.param(2.5, x, False, marks=NOT_TRAINED) for x in (2.5, 2.50001, math.nan)),
    ],
)
def test_training_that_changed_no_more_than_rounding_is_caught(before, after, passes):
    results = {"heldout_loss_before": before, "heldout_loss_after": after}
    assert training_gate(results).passed == passes


@pytest.mark.bank("model", "training on other items than those drawn", at=TRAINING)
def test_training_on_other_items_than_those_drawn_is_caught():
    """What is looked through for leaks has to be what was trained on."""
    record = {"items": {"training": ["a", "b"], "heldout": ["c"]}}
    assert trained_on_gate(record, ["a", "b", "c"]).passed
    for drawn in (["a", "b", "d"], ["a", "b"], ["b", "a", "c"], []):
        assert not trained_on_gate(record, drawn).passed


def answers(n: int, **changes) -> list[dict]:
    """Right answers of an able baseline, with these values in six of ten."""
    rows = []
    for i in range(n):
        row = {"id": f"{i}", "cluster": f"{i}", "golds": [f"{i}"], "parsed": f"{i}"}
        row |= {"output": f"So it is {i}", "status": "answered", "finish_reason": "stop"}
        rows.append(row | {"score": 1.0} | (changes if i % 10 < 6 else {}))
    return rows


@pytest.mark.parametrize(
    ("changes", "told"),
    [({"finish_reason": "length"}, "60.0 % of noquant's own answers are stopped by the cap"),
     ({"output": "4 + 4 " + "+ 4 " * 30}, "60.0 % of noquant's own answers end in a loop"),
     ({"status": "unparsed"}, "only 40.0 % of noquant's own answers are readable")],
)  # fmt: skip
@pytest.mark.bank(
    "limits",
    "every answer of every variant capped",
    "a baseline that can tell",
    at="rows of the answers",
)
def test_a_baseline_whose_own_answers_are_broken_says_nothing(study, changes, told):
    """However right they are: no variant could be seen to do worse."""
    rules = decision_rules(study)
    assert (
        uninformative_reason("openmath", VariantPredictions("noquant", answers(40)), rules) is None
    )
    baseline = VariantPredictions("noquant", answers(40, **changes))
    assert uninformative_reason("openmath", baseline, rules) == told


@pytest.mark.bank(
    "answers", "every answer of a variant capped, or in a loop", at="rows of the answers"
)
def test_no_limit_lies_above_all_there_is():
    """It once read: at most 25 points above 100 %."""
    capped = answers(10, finish_reason="length", output="a" * 30)
    for gate in (end_gate(capped[:6], capped[:6]), loop_gate(capped[:6], capped[:6])):
        assert gate.passed
        assert gate.limit == "none: the baseline itself has 100.0 %"
    assert not end_gate(capped, answers(10)).passed


@pytest.fixture
def smoothed(study_path, study_settings, write_study, monkeypatch, tmp_path):
    """(job, tokenizer, model) of a variant that only smooths; the baseline's states are kept."""
    study_settings["variants"]["smooth_only"] = {
        "smooth": {"alpha": 0.5, "targets": ["attention_input", "mlp_input"]}
    }
    monkeypatch.setenv("STUDY_OUTPUTS", str(tmp_path / "outputs"))
    torch.set_num_threads(1)
    path = write_study(study_settings)
    job = open_job(path, model="base", variant="noquant")
    folder = model_folder(job.study, "base", job.paths)
    tokenizer = load_tokenizer(folder, enable_thinking=None)
    model = load_model(folder, job.study.runtime)
    perplexity.read_shared_text(job, model, tokenizer)
    return replace(job, variant="smooth_only"), tokenizer, model


@pytest.mark.bank(
    "limits", "a wrong baseline raises its own limit", at="the baseline's kept states"
)
def test_a_wrong_baseline_does_not_raise_its_own_limit(smoothed, monkeypatch):
    """Kept states that are off once made the limit as wide as what they were off by."""
    job, tokenizer, model = smoothed
    sound = evaluation_data.read_perturbed_passages(job, tokenizer)
    path = perplexity.states_path(job)
    states = perplexity.load_file(path)["hidden"]
    off = perplexity.HiddenStates(states + 0.01 * torch.randn_like(states), None)
    perplexity.save_states(path, off)
    assert [r["kl"] for r in evaluation_data.read_perturbed_passages(job, tokenizer)] == [
        r["kl"] for r in sound
    ]
    monkeypatch.setattr(perplexity, "check_checksums", lambda *_, **__: None)
    rows = perplexity.read_shared_text(job, model, tokenizer)
    (gate,) = reference_gates(
        job.recipe, rows, evaluation_data.read_perturbed_passages(job, tokenizer)
    )
    assert not gate.passed


@pytest.mark.bank("limits", "a float variant as far away as its measured noise", at=PASSAGES)
def test_what_is_far_away_is_no_rounding_whatever_was_measured():
    far = [{"id": "a", "tokens": 10, "kl": 9.0, "nll": 20.0, "top1_agreements": 3}]
    gates = reference_gates(Variant(dtype="bfloat16"), far, far)
    assert [g.name for g in gates if not g.passed] == ["outputs within rounding of float"]
