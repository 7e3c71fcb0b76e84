"""Tasks of lm-evaluation-harness on the engine: answers, checks on them, what the checks catch."""

import copy

import pytest
import yaml
from benchmarks.lm_eval_tasks import ROWS, task_settings, write_tasks

from conftest import STUDY
from evaluated_run import failed, looked_at
from helpers.evaluation.checks.evaluation_data import render_items_again
from helpers.evaluation.checks.integrity import rescored_gate
from helpers.evaluation.checks.item_gates import (
    contents_gate,
    foils_gate,
    rows_gate,
    set_digests,
    unchecked_parts,
)
from helpers.evaluation.checks.second_opinion import LOGPROBS, possibly_written
from helpers.evaluation.engine import ask_all
from helpers.evaluation.predictions import check_prediction_rows
from helpers.evaluation.scoring import cut_at_stop, set_metrics
from helpers.sources.models import random_model
from helpers.study.loading import load_study

ITEMS = 4
PLAIN = [kind for kind in ROWS if kind != "hellaswag"]


@pytest.fixture(scope="module")
def asked(tmp_path_factory, tokenizer):
    """(study, predictions by set, items rendered again) of every kind of task on a tiny model."""
    import torch

    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("asked")
    settings = yaml.safe_load(STUDY)
    settings["evaluation"]["datasets"] = tasks_of(root / "tasks")
    settings["statistics"]["primary"] = []
    path = root / "study.yaml"
    path.write_text(yaml.safe_dump(settings, sort_keys=False), "utf-8")
    study = load_study(path)
    predictions = ask_all(random_model("llama", seed=3), tokenizer, study)
    return study, predictions, render_items_again(study, tokenizer, tokenizer)


def tasks_of(folder) -> dict:
    """The evaluation sets of every kind of task file in a folder."""
    files = write_tasks(folder, items=ITEMS)
    return {kind: task_settings(kind, files[kind], items=ITEMS) for kind in ROWS}


def test_rows_are_valid_and_every_check_without_the_harness_agrees(asked):
    study, predictions, rendered = asked
    for kind, task_set in study.evaluation.datasets.items():
        rows, items = predictions[kind], [shown.item for shown in rendered[kind]]
        check_prediction_rows(rows, kind="task", place=kind)
        gates = [
            rescored_gate(task_set, rows, rendered[kind]),
            contents_gate(task_set, [shown.shown for shown in rendered[kind]]),
            rows_gate(rows, items, set_digests(task_set)),
        ]
        gates += [foils_gate(task_set, items)] if task_set.ask.protocol == "target" else []
        assert failed(gates) == set()
        assert [row["prompt_hash"] for row in rows] == [shown.hash for shown in rendered[kind]]
        assert set_metrics("task", rows)["harness"]


def test_what_only_the_harness_can_say_is_said(asked):
    study, _, rendered = asked
    parts = {kind: unchecked_parts(s) for kind, s in study.evaluation.datasets.items()}
    assert not parts["boolq"]
    assert not parts["squad_v2"]
    assert not parts["wikitext"]
    assert any("Python code" in part for part in parts["hellaswag"])
    assert any("worked examples" in part for part in parts["gsm8k"])
    task_set = study.evaluation.datasets["hellaswag"]
    items = [shown.item for shown in rendered["hellaswag"]]
    assert "not checked" in rows_gate([], items, set_digests(task_set)).measured


CHANGES = {
    "score": lambda row: row | {"score": 1.0 - row["score"]},
    "parsed": lambda row: row | {"parsed": "something no model said"},
    "golds": lambda row: row | {"golds": ["another"]},
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("kind", PLAIN)
def test_a_changed_answer_does_not_follow_from_its_output(asked, kind, change):
    study, predictions, rendered = asked
    rows = copy.deepcopy(predictions[kind])
    rows[2] = CHANGES[change](rows[2])
    gate = rescored_gate(study.evaluation.datasets[kind], rows, rendered[kind])
    assert not gate.passed
    assert rows[2]["id"] in gate.measured


@pytest.mark.parametrize("kind", PLAIN)
def test_rows_of_another_file_are_no_rows_of_the_set(asked, kind, tmp_path):
    study, predictions, rendered = asked
    items = [shown.item for shown in rendered[kind]]
    task_set = study.evaluation.datasets[kind]
    digests = set_digests(task_set)
    swapped = {a: digests[b] for a, b in zip(digests, reversed(list(digests)), strict=True)}
    assert not rows_gate(predictions[kind], items, swapped).passed


@pytest.mark.bank("answers", "a task's target taken for its foil", "foils are other targets")
def test_a_foil_that_is_the_own_target_is_caught(asked):
    from dataclasses import replace

    study, _, rendered = asked
    for kind in ("lambada", "wikitext"):
        items = [shown.item for shown in rendered[kind]]
        items[1] = replace(items[1], options=(items[1].options[0],) * 2)
        assert not foils_gate(study.evaluation.datasets[kind], items).passed


def test_an_answer_ends_at_the_first_of_its_stops():
    assert cut_at_stop("12 eggs.\nQuestion: more", ("Question:", "\n")) == "12 eggs."
    assert cut_at_stop("12 eggs", ("Question:",)) == "12 eggs"


def test_a_target_is_written_if_each_of_its_tokens_is_the_likeliest():
    import torch

    logits = torch.tensor([[3.0, 1.0, 0.0], [0.0, 2.0, 1.9]], dtype=torch.float64)
    assert possibly_written(logits, [0, 1], 0.01) == {True}
    assert possibly_written(logits, [0, 2], 0.01) == {False}
    assert possibly_written(logits, [0, 2], 0.2) == {True, False}


@pytest.mark.long
def test_a_target_that_is_said_to_be_written_is_looked_at(sound_run, tmp_path, monkeypatch):
    import helpers.evaluation.scoring as scoring

    run = sound_run("llama", "noquant")
    run.settings = copy.deepcopy(run.settings)
    sets = tasks_of(tmp_path / "tasks")
    run.settings["evaluation"]["datasets"] = {"lambada": sets["lambada"]}
    whole = scoring.score_task_target
    claimed = lambda a, b, c, greedy, e: whole(a, b, c, [not g for g in greedy], e)  # noqa: E731
    monkeypatch.setattr("helpers.evaluation.engine.score_task_target", claimed)
    assert failed(gate for _, gate in looked_at(run)) == {LOGPROBS}


@pytest.mark.long
@pytest.mark.parametrize("variant", ["noquant", "rtn_w8a8"])
def test_transformers_own_forward_pass_agrees(sound_run, tmp_path, variant):
    run = sound_run("llama", variant)
    run.settings = copy.deepcopy(run.settings)
    run.settings["evaluation"]["datasets"] = tasks_of(tmp_path / "tasks")
    gates = looked_at(run)
    assert {what for what, _ in gates} >= set(ROWS)
    assert failed(gate for _, gate in gates) == set()
