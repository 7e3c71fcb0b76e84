"""Rows become items or a one-line refusal; draws are seeded, apart, and blind to file order."""

import copy
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.core.errors import StudyError
from helpers.sources.items import ADAPTERS, Item, item_key, normalized_text
from helpers.sources.sampling import (
    calibration_items,
    draw_items,
    evaluation_items,
    load_items,
    shared_passages,
    training_items,
)
from helpers.study.loading import load_study
from helpers.study.schema import FileDataset, ShippedDataset

repeatable = settings(derandomize=True, deadline=None, max_examples=60)

ROWS = {
    "arc": {
        "id": "a1",
        "question": "Which is a metal?",
        "choices": {"text": ["wood", "iron", "glass"], "label": ["1", "2", "3"]},
        "answerKey": "2",
    },
    "boolq": {"question": "is iron a metal", "answer": True, "passage": "Iron is a metal."},
    "squad_v2": {
        "id": "s1",
        "title": "Iron",
        "context": "Iron is a metal. It rusts.",
        "question": "What is iron?",
        "answers": {"text": ["a metal", "metal", "a metal"], "answer_start": [8, 10, 8]},
    },
    "openmath": {
        "problem": "What is 1/2 of 3?",
        "generated_solution": r"\boxed{3/2}",
        "expected_answer": "3/2",
        "problem_source": "x",
    },
}


def put(row: dict, path: str, value) -> dict:
    """A copy of the row with the value at a slash-separated path."""
    changed_row = copy.deepcopy(row)
    inner, keys = changed_row, path.split("/")
    for key in keys[:-1]:
        inner = inner[key]
    inner[keys[-1]] = value
    return changed_row


def refusal(call, *args, **kwargs) -> str:
    with pytest.raises(StudyError) as caught:
        call(*args, **kwargs)
    line = str(caught.value)
    assert len(line.splitlines()) == 1, line
    assert "Traceback" not in line
    return line


def test_arc_keeps_labels_and_options_in_order():
    item = ADAPTERS["arc"](ROWS["arc"])
    assert dict(zip(item.labels, item.options, strict=True)) == {
        "1": "wood",
        "2": "iron",
        "3": "glass",
    }
    assert item.golds == ("2",)


@pytest.mark.parametrize(("answer", "gold"), [(True, "yes"), (False, "no")])
def test_boolq_answers_are_yes_and_no(answer, gold):
    item = ADAPTERS["boolq"](put(ROWS["boolq"], "answer", answer))
    assert item.golds == (gold,)
    assert gold in item.labels


def test_boolq_items_about_one_passage_are_one_cluster():
    first = ADAPTERS["boolq"](ROWS["boolq"])
    second = ADAPTERS["boolq"](put(ROWS["boolq"], "question", "does iron rust"))
    other = ADAPTERS["boolq"](put(ROWS["boolq"], "passage", "Wood burns."))
    assert first.cluster == second.cluster != other.cluster
    assert len({first.id, second.id, other.id}) == 3


def test_squad_keeps_every_gold_once():
    item = ADAPTERS["squad_v2"](ROWS["squad_v2"])
    assert item.golds == ("a metal", "metal")
    assert ADAPTERS["squad_v2"](put(ROWS["squad_v2"], "answers/text", [])).golds == ()


def test_openmath_keeps_the_answer_as_written():
    item = ADAPTERS["openmath"](ROWS["openmath"])
    assert item.golds == ("3/2",)
    assert item.solution == r"\boxed{3/2}"


REQUIRED = {
    "arc": ["id", "question", "choices", "choices/text", "choices/label", "answerKey"],
    "boolq": ["question", "answer", "passage"],
    "squad_v2": ["id", "context", "question", "answers", "answers/text"],
    "openmath": ["problem", "expected_answer"],
}


@pytest.mark.parametrize(("adapter", "path"), [(a, p) for a in REQUIRED for p in REQUIRED[a]])
def test_a_row_without_a_key_is_refused_by_number_and_key(write_rows, adapter, path):
    row = copy.deepcopy(ROWS[adapter])
    inner, keys = row, path.split("/")
    for key in keys[:-1]:
        inner = inner[key]
    del inner[keys[-1]]
    file = write_rows([ROWS[adapter], row])
    line = refusal(load_items, FileDataset(file=file), adapter=adapter)
    assert line.startswith(f"{file}: row 2 is no {adapter} item")
    assert f"'{keys[-1]}'" in line


BAD_VALUES = [
    ("arc", "answerKey", "B"),
    ("arc", "answerKey", 2),
    ("arc", "id", 7),
    ("arc", "question", None),
    ("arc", "question", ["Which?"]),
    ("arc", "question", "  "),
    ("arc", "choices", "wood, iron"),
    ("arc", "choices/text", "abc"),
    ("arc", "choices/text", ["wood", "iron"]),
    ("arc", "choices/text", ["wood", "iron", ""]),
    ("arc", "choices/text", ["wood", "iron", None]),
    ("arc", "choices/label", ["1", "2", "2"]),
    ("arc", "choices/label", [1, 2, 3]),
    ("boolq", "answer", "maybe"),
    ("boolq", "answer", 1),
    ("boolq", "answer", None),
    ("boolq", "passage", None),
    ("boolq", "question", 3),
    ("squad_v2", "answers", None),
    ("squad_v2", "answers", ["a metal"]),
    ("squad_v2", "answers/text", "a metal"),
    ("squad_v2", "answers/text", None),
    ("squad_v2", "answers/text", [3]),
    ("squad_v2", "context", None),
    ("squad_v2", "id", None),
    ("openmath", "problem", 5),
    ("openmath", "expected_answer", None),
    ("openmath", "expected_answer", 5),
    ("openmath", "expected_answer", ""),
]


@pytest.mark.parametrize(("adapter", "path", "value"), BAD_VALUES)
def test_a_row_with_a_wrong_value_is_refused_by_number(write_rows, adapter, path, value):
    file = write_rows([ROWS[adapter], put(ROWS[adapter], path, value)])
    line = refusal(load_items, FileDataset(file=file), adapter=adapter)
    assert line.startswith(f"{file}: row 2 is no {adapter} item (")
    assert line.endswith("give the Hub's schema, columns or another adapter")


@pytest.mark.parametrize("row", [None, 3, "text", ["a"], {}])
@pytest.mark.parametrize("adapter", ROWS)
def test_a_row_that_is_no_mapping_is_refused(write_rows, adapter, row):
    refusal(load_items, FileDataset(file=write_rows([row])), adapter=adapter)


@pytest.mark.parametrize("adapter", ROWS)
def test_rows_of_another_dataset_are_refused(write_rows, adapter):
    for other in ROWS:
        if other != adapter:
            file = write_rows([ROWS[other]])
            refusal(load_items, FileDataset(file=file), adapter=adapter)


def test_two_questions_with_one_id_are_refused(write_rows):
    """Predictions are paired by id, so the clash has to show before the model runs."""
    file = write_rows([ROWS["arc"], put(ROWS["arc"], "question", "Which one melts?")])
    assert "row 2 repeats the id 'a1'" in refusal(load_items, FileDataset(file=file), adapter="arc")


def test_one_question_twice_is_one_item(write_rows):
    again = put(put(ROWS["arc"], "id", "a2"), "question", "which IS a metal")
    source = FileDataset(file=write_rows([ROWS["arc"], again]))
    assert [item.id for item in load_items(source, adapter="arc")] == ["a1"]


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "line 1"), (b'{"id": 1}\n{"id"', "line 2"), (b'{"id": "\xff"}\n', "line 1")],
)
def test_a_torn_file_is_refused_by_line(tmp_path, content, message):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    assert message in refusal(load_items, FileDataset(file=str(path)), adapter="arc")


def test_a_parquet_file_that_is_none_is_refused(tmp_path):
    path = tmp_path / "rows.parquet"
    path.write_bytes(b"no parquet")
    line = refusal(load_items, FileDataset(file=str(path)), adapter="arc")
    assert "is not parquet" in line


@pytest.mark.parametrize("adapter", ROWS)
def test_parquet_and_jsonl_give_the_same_items(tmp_path, write_rows, adapter):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path = tmp_path / "rows.parquet"
    parquet.write_table(pyarrow.Table.from_pylist([ROWS[adapter]]), path)
    sources = [FileDataset(file=str(path)), FileDataset(file=write_rows([ROWS[adapter]]))]
    first, second = (load_items(source, adapter=adapter) for source in sources)
    assert first == second


def test_a_text_with_a_line_separator_stays_one_row(tmp_path):
    """U+2028 is no line end in JSON lines, though str.splitlines() takes it for one."""
    path = tmp_path / "rows.jsonl"
    path.write_text(
        '{"question": "is\u2028it\x85so", "answer": true, "passage": "x"}\n', encoding="utf-8"
    )
    (item,) = load_items(FileDataset(file=str(path)), adapter="boolq")
    assert item.question == "is\u2028it\x85so"


@repeatable
@given(st.text())
def test_normalising_twice_changes_nothing_more(text):
    once = normalized_text(text)
    assert normalized_text(once) == once


@pytest.mark.parametrize(
    "other",
    ["the  CAFE, is open", "The café is open!", "the cafe\u0301\tis open", "“The café” is open"],
)
def test_texts_that_differ_in_dress_only_are_one(other):
    assert normalized_text(other) == normalized_text("The café is open.")


def test_texts_that_differ_in_a_word_or_a_number_are_two():
    texts = ["he has 12 apples", "he has 1 2 apples", "he has 13 apples", "she has 12 apples"]
    assert len(set(map(normalized_text, texts))) == len(texts)


def numbered(count: int, title=lambda i: "") -> list[Item]:
    return [Item(f"i{i}", f"question number {i}", ("x",), title=title(i)) for i in range(count)]


@repeatable
@given(st.integers(0, 40), st.integers(0, 2**32 - 1), st.randoms(use_true_random=False))
def test_a_draw_is_seeded_and_blind_to_order(count, seed, shuffler):
    items = numbered(40, title=lambda i: f"t{i % 3}")
    drawn = draw_items(items, count, seed=seed, excluding=(), label="x")
    mixed = items.copy()
    shuffler.shuffle(mixed)
    assert draw_items(mixed, count, seed=seed, excluding=(), label="x") == drawn
    assert len({item.id for item in drawn}) == count


def test_a_draw_changes_with_the_seed_and_not_with_the_file():
    items = numbered(60)
    firsts = [
        tuple(i.id for i in draw_items(items, 10, seed=s, excluding=(), label="x"))
        for s in range(8)
    ]
    assert len(set(firsts)) == 8
    assert any(first != tuple(i.id for i in items[:10]) for first in firsts)


def test_a_smaller_draw_is_the_beginning_of_a_larger_one():
    items = numbered(30, title=lambda i: f"t{i % 4}")
    drawn = [draw_items(items, n, seed=3, excluding=(), label="x") for n in (5, 30)]
    assert drawn[1][:5] == drawn[0]


@pytest.mark.parametrize("count", [3, 9, 14, 16, 20])
def test_titles_take_turns(count):
    """20, 5 and 5 items: no title is ahead of another that still has items."""
    items = numbered(30, title=lambda i: "big" if i < 20 else f"small{i % 2}")
    drawn = draw_items(items, count, seed=1, excluding=(), label="x")
    items_by_title = {"big": 20, "small0": 5, "small1": 5}
    taken = {title: sum(item.title == title for item in drawn) for title in items_by_title}
    assert sum(taken.values()) == count
    for title, size in items_by_title.items():
        assert taken[title] == size or max(taken.values()) - taken[title] <= 1


def test_what_is_excluded_is_not_drawn():
    items = numbered(20)
    barred = [item_key(item) for item in items[:15]]
    drawn = draw_items(items, 5, seed=1, excluding=barred, label="x")
    assert {item.id for item in drawn} == {item.id for item in items[15:]}


def test_too_few_items_are_refused_with_the_most_there_are():
    items = numbered(20)
    barred = [item_key(item) for item in items[:15]]
    line = refusal(draw_items, items, 6, seed=1, excluding=barred, label="calibration")
    assert line.startswith("calibration: 6 items asked for but 5")
    assert line.endswith("ask for at most 5")


def openmath_rows(count: int) -> list[dict]:
    """Problems, and every second one again in other dress."""
    rows = []
    for i in range(count):
        text = f"A shelf holds {i} books; how many is that?"
        dressed = [text] if i % 2 else [text, text.upper().replace(";", " -")]
        rows += [put(ROWS["openmath"], "problem", each) for each in dressed]
    return rows


@pytest.fixture
def crowded_study(study_settings, write_study, write_rows):
    """Evaluation, calibration and training all draw from one file of 40 problems."""

    def load(rows):
        source = {"file": write_rows(rows)}
        study_settings["calibration"] |= {"dataset": source, "items": 8}
        study_settings["models"]["tuned"]["finetune"] |= {
            "dataset": source,
            "items": 12,
            "heldout_items": 5,
        }
        study_settings["evaluation"]["datasets"]["openmath"] = {
            "adapter": "openmath",
            "source": source,
            "items": 15,
            "ask": {
                "protocol": "generate",
                "answer": "boxed",
                "stop": "answer",
                "shots": 0,
                "max_new_tokens": 8,
            },
        }
        return load_study(write_study(study_settings))

    return load


def all_draws(study) -> dict[str, list[Item]]:
    training, heldout = training_items(study, "tuned")
    return {
        "evaluation": evaluation_items(study, "openmath"),
        "calibration": calibration_items(study),
        "training": training,
        "heldout": heldout,
    }


def test_no_question_is_used_twice(crowded_study):
    """15 + 8 + 12 + 5 items exhaust the 40 problems, so any leak would show."""
    drawn = all_draws(crowded_study(openmath_rows(40)))
    assert {name: len(items) for name, items in drawn.items()} == {
        "evaluation": 15,
        "calibration": 8,
        "training": 12,
        "heldout": 5,
    }
    texts = [normalized_text(item.question) for items in drawn.values() for item in items]
    assert len(set(texts)) == 40


def test_the_order_of_the_file_does_not_change_any_draw(crowded_study):
    rows = openmath_rows(40)
    expected = all_draws(crowded_study(rows))
    random.Random(5).shuffle(rows)
    draws = all_draws(crowded_study(rows))
    for name, items in expected.items():
        assert [normalized_text(i.question) for i in items] == [
            normalized_text(i.question) for i in draws[name]
        ]


def test_a_problem_too_few_is_refused_by_the_stage_that_lacks_it(crowded_study):
    study = crowded_study(openmath_rows(39))
    line = refusal(training_items, study, "tuned")
    assert line.startswith("models.tuned.finetune: 17 items asked for but 16")


def test_evaluation_does_not_move_when_training_does(crowded_study, study_settings, write_study):
    """What a model is asked is the same for every model and variant."""
    study = crowded_study(openmath_rows(40))
    expected = evaluation_items(study, "openmath")
    study_settings["models"]["tuned"]["finetune"]["items"] = 3
    study_settings["calibration"]["items"] = 2
    assert evaluation_items(load_study(write_study(study_settings)), "openmath") == expected


def test_shared_passages_are_distinct_and_seeded(study):
    passages = shared_passages(study)
    assert len(set(passages)) == len(passages) == study.evaluation.shared_text.passages
    assert shared_passages(study) == passages


@pytest.mark.parametrize(
    ("source", "passages", "message"),
    [({"shipped": "squad_v2"}, 10**6, "passages = 1000000"), ({"shipped": "arc"}, 2, "row 1")],
)
def test_shared_text_that_is_not_there_is_refused(
    study_settings, write_study, source, passages, message
):
    settings = study_settings["evaluation"]["shared_text"]
    settings |= {"dataset": source, "passages": passages}
    assert message in refusal(shared_passages, load_study(write_study(study_settings)))


@pytest.mark.parametrize("adapter", ["arc", "boolq", "squad_v2"])
def test_shipped_items_are_adapted_by_their_own_adapter(adapter):
    assert load_items(ShippedDataset(shipped=adapter), adapter=adapter)
