"""Adapters, prompts and scores on real rows, where the shared data folder is at hand.

Only a developer's machine has it; elsewhere every test here is skipped and says so.
"""

import os
import re
import subprocess
import sys

import pytest

from helpers.core.files import PROJECT
from helpers.evaluation.prompts import loglikelihood_prompt, render_prompt
from helpers.evaluation.scoring import score_options, score_text, set_metrics
from helpers.sources.chat import configure_chat_template_
from helpers.sources.items import load_rows, normalized_text
from helpers.sources.sampling import is_numeric, load_items
from helpers.study.loading import load_study
from helpers.study.schema import EvaluationSet, FileDataset
from hub_repositories import qwen3_tokenizer
from hub_standin import Hub

DATA = PROJECT.parent / "shared" / "data"
FILES = {
    "arc": "ai2_arc-challenge-test.parquet",
    "boolq": "boolq-validation.parquet",
    "squad_v2": "squad_v2-validation.parquet",
    "openmath": "openmath-heldout.parquet",
}
pytestmark = pytest.mark.skipif(
    not all((DATA / name).is_file() for name in FILES.values()),
    reason=f"real rows are not at {DATA}; only needed to develop the adapters",
)


def source(adapter: str) -> FileDataset:
    return FileDataset(file=str(DATA / FILES[adapter]))


def rows(adapter: str) -> list[dict]:
    return load_rows(source(adapter))


def items(adapter: str):
    return load_items(source(adapter), adapter=adapter)


def generated(adapter: str, texts) -> dict:
    """Metrics of one text for each item."""
    scored = [
        score_text(item, adapter, text, answer="boxed", finish="stop")
        | {"prompt_tokens": 1, "output_tokens": 1}
        for item, text in zip(items(adapter), texts, strict=True)
    ]
    return set_metrics(adapter, scored)


def evaluation_set(adapter: str) -> EvaluationSet:
    ask = {
        "protocol": "generate",
        "answer": "boxed",
        "stop": "answer",
        "shots": 1,
        "max_new_tokens": 8,
    }
    return EvaluationSet(adapter=adapter, source=source(adapter), items=1, ask=ask)


@pytest.mark.parametrize("adapter", FILES)
def test_every_row_adapts_once(adapter):
    assert len(items(adapter)) == len(rows(adapter))
    assert len({item.id for item in items(adapter)}) == len(rows(adapter))


@pytest.mark.parametrize("adapter", FILES)
@pytest.mark.parametrize("thoughts", [None, False])
def test_every_item_renders_with_its_question(adapter, thoughts, tokenizer):
    """In a plain chat format, and in Qwen3's with an empty thought before the answer."""
    chat = tokenizer if thoughts is None else qwen3_tokenizer()
    configure_chat_template_(chat, enable_thinking=thoughts, place="x")
    texts = set()
    for item in items(adapter):
        text = render_prompt(item, evaluation_set(adapter), chat).text
        assert text.startswith("<|im_start|>system\n")
        assert item.question in text
        assert item.passage in text
        assert text.endswith("<think>\n\n</think>\n\n") is (thoughts is False)
        texts.add(text)
    assert len(texts) == len(items(adapter))


def test_rows_are_the_same_by_way_of_a_hub(tmp_path, write_study, study_settings, monkeypatch):
    """The very files, in the Hub's layout, through the ordinary clients and the row cache."""
    sets = study_settings["evaluation"]["datasets"] = {}
    with Hub() as hub:
        for adapter, name in FILES.items():
            files = {"data/test-00000-of-00001.parquet": (DATA / name).read_bytes()}
            hub.add("dataset", f"real/{adapter}", files | {"README.md": b"# Rows\n"})
            origin = {"hub": f"real/{adapter}", "config": None, "split": "test"}
            sets[adapter] = evaluation_set(adapter).model_dump() | {
                "source": origin | {"revision": "main"}
            }
        study_settings["statistics"]["primary"] = []
        for name in ("STUDY_OUTPUTS", "STUDY_CACHE", "HF_HOME"):
            monkeypatch.setenv(name, str(tmp_path / name))
        study, here = write_study(study_settings), {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0"}
        command = [sys.executable, "-m", "helpers.sources.fetching", str(study)]
        subprocess.run(command, env=os.environ | here, check=True)
    loaded = load_study(study).evaluation.datasets
    for adapter in FILES:
        assert load_items(loaded[adapter].source, adapter=adapter) == items(adapter)


def test_every_answer_of_a_word_problem_is_a_number_or_told_apart():
    """So `keep: numeric_answers` leaves out what it says and no more."""
    for item in items("openmath"):
        plain = re.fullmatch(r"-?[\d,]*\.?\d+", item.golds[0])
        assert is_numeric(item) or not plain, item.golds


@pytest.mark.parametrize("adapter", FILES)
def test_every_gold_scores_as_right(adapter):
    """All golds of an item, not only the first."""
    for item in items(adapter):
        for gold in item.golds or ["unanswerable"]:
            text = rf"It is \boxed{{{gold}}}."
            scored = score_text(item, adapter, text, answer="boxed", finish="stop")
            assert scored["score"] == 1.0, (item.id, gold)
            assert scored.get("f1", 1.0) == 1.0


@pytest.mark.parametrize("adapter", ["arc", "boolq"])
def test_the_likeliest_gold_scores_as_right_and_any_other_as_wrong(adapter):
    for item in items(adapter):
        continuations = loglikelihood_prompt(item, adapter).continuations
        for label in item.labels:
            logprobs = [-0.001 if other == label else -1e6 for other in item.labels]
            scored = score_options(item, logprobs, continuations, normalize="bytes")
            assert scored["score"] == float(label in item.golds), item.id


@pytest.mark.parametrize("label", "ABCD")
def test_a_constant_letter_scores_its_share(label):
    """EVIDENCE section 7: near a quarter for every letter."""
    scored = generated("arc", [rf"\boxed{{{label}}}"] * len(rows("arc")))
    share = sum(row["answerKey"] == label for row in rows("arc")) / len(rows("arc"))
    assert scored["accuracy"] == pytest.approx(share)
    assert 0.15 < share < 0.35


@pytest.mark.parametrize("answer", ["yes", "no"])
def test_a_constant_answer_to_boolq_scores_its_share(answer):
    scored = generated("boolq", [rf"\boxed{{{answer}}}"] * len(rows("boolq")))
    share = sum(row["answer"] is (answer == "yes") for row in rows("boolq")) / len(rows("boolq"))
    assert scored["accuracy"] == pytest.approx(share)
    assert scored["macro_f1"] == pytest.approx((2 * share / (1 + share)) / 2)


def test_abstaining_on_squad_scores_the_unanswerable_share_and_silence_nothing():
    count = len(rows("squad_v2"))
    share = sum(not row["answers"]["text"] for row in rows("squad_v2")) / count
    abstained = generated("squad_v2", [r"\boxed{unanswerable}"] * count)
    assert abstained["exact_match"] == abstained["f1"] == pytest.approx(share)
    assert abstained["has_answer_exact_match"] == 0.0
    assert abstained["no_answer_exact_match"] == 1.0
    assert 0.4 < share < 0.6
    for silence in ("", "garbage", r"\boxed{"):
        scored = generated("squad_v2", [silence] * count)
        assert scored["exact_match"] == scored["f1"] == 0.0


def test_a_constant_number_scores_its_share():
    scored = generated("openmath", [r"\boxed{1}"] * len(rows("openmath")))
    golds = [row["expected_answer"].strip() for row in rows("openmath")]
    assert scored["accuracy"] == pytest.approx(golds.count("1") / len(golds))
    assert 0.02 < scored["accuracy"] < 0.15


def test_held_out_problems_are_not_in_the_training_rows():
    training = load_rows(FileDataset(file=str(DATA / "openmath-train.parquet")))
    known = {normalized_text(row["problem"]) for row in training}
    shared = [row for row in rows("openmath") if normalized_text(row["problem"]) in known]
    assert not shared
