"""Rows as people have them: used, or refused in a line with the shape seen and the shape wanted."""

import json

import pytest

from helpers.core.errors import StudyError
from helpers.evaluation.prompts import loglikelihood_prompt
from helpers.sources.chat import user_turn
from helpers.sources.items import EXPECTED_ROWS, describe_value
from helpers.sources.sampling import load_items
from helpers.study.loading import load_study
from helpers.study.schema import FileDataset
from test_datasets import ROWS

ARC = json.dumps(ROWS["arc"])
OTHER = json.dumps(ROWS["arc"] | {"id": "a2", "question": "Which one is wet?"})
MMLU = {"question": "How?", "choices": ["a", "b", "c", "d"], "answer": 2, "subject": "x"}
OWN_SQUAD = {k: v for k, v in ROWS["squad_v2"].items()} | {"answers": []}
LISTED = OWN_SQUAD | {"answers": [{"text": "a metal", "answer_start": 8}]}


def refusal(tmp_path, content: str | bytes, adapter: str = "arc") -> str:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(StudyError) as caught:
        load_items(FileDataset(file=str(path)), adapter=adapter)
    line = str(caught.value)
    assert line.startswith(f"{path}: ")
    assert line.isprintable()
    assert "; " in line
    return line


@pytest.mark.parametrize(
    ("content", "seen"),
    [
        (f"[{ARC}, {OTHER}]", "one JSON array of 2 values, the first {id: text, question: text"),
        (json.dumps([ROWS["arc"]], indent=1), "one JSON array of 1 values"),
        (json.dumps(ROWS["arc"], indent=1), "one JSON value over several lines, {id: text"),
        ("question,answer\nwhy,because\n", "is a table in CSV (question,answer)"),
        ("question\tanswer\nwhy\tbecause\n", "is a table in TSV (question answer)"),
        (f'{ARC}\n["a", 1]\n', "line 2 is [text]"),
        (f"{ARC}\nnothing\n", "line 2 is not JSON"),
        ("", "line 1 is empty"),
    ],
)
def test_other_shapes_are_named_beside_the_one_wanted(tmp_path, content, seen):
    line = refusal(tmp_path, content)
    assert seen in line
    assert "expected JSON lines: one object per line" in line


@pytest.mark.parametrize("codec", ["utf-16", "utf-16-le", "utf-16-be"])
def test_utf_16_is_named(tmp_path, codec):
    assert "is in UTF-16; save it in UTF-8" in refusal(tmp_path, f"{ARC}\n".encode(codec))


def test_another_codec_is_named_by_its_line(tmp_path):
    line = refusal(tmp_path, f'{ARC}\n{{"id": "café"}}\n'.encode("latin-1"))
    assert "line 2 is not UTF-8" in line
    assert "save it in UTF-8" in line


@pytest.mark.parametrize(
    "content",
    [
        f"{ARC}\n\n{OTHER}\n",
        f"\n{ARC}\n   \n{OTHER}\n\n",
        f"\ufeff{ARC}\n{OTHER}",
        f"{ARC}\r\n\r\n{OTHER}\r\n",
    ],
)
def test_blank_lines_and_a_byte_order_mark_hold_no_rows(tmp_path, content):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content.encode())
    items = load_items(FileDataset(file=str(path)), adapter="arc")
    assert [item.id for item in items] == ["a1", "a2"]


@pytest.mark.parametrize(
    ("adapter", "row", "seen"),
    [
        ("arc", MMLU, "{question: text, choices: [text], answer: number, subject: text}"),
        ("squad_v2", OWN_SQUAD, "answers: []}"),
        ("squad_v2", LISTED, "answers: [{…}]}"),
        ("boolq", ROWS["boolq"] | {"answer": "so"}, "{question: text, answer: text, passage: te"),
        ("openmath", ROWS["openmath"] | {"expected_answer": 5}, "expected_answer: number"),
    ],
)
def test_a_row_of_another_schema_is_shown_beside_the_one_wanted(tmp_path, adapter, row, seen):
    line = refusal(tmp_path, json.dumps(row), adapter)
    assert f"row 1 is no {adapter} item" in line
    assert seen in line
    assert f"expected {EXPECTED_ROWS[adapter]}" in line
    assert "indices must be" not in line


def test_the_shape_of_a_large_row_is_short():
    row = {f"a key that is long {i}" * 9: {"x": [{"y": "z" * 999}]} for i in range(99)}
    assert len(describe_value(row)) < 700
    assert "91 more" in describe_value(row)


@pytest.mark.parametrize(("adapter", "key"), [("squad_v2", "title"), ("openmath", "generated_so")])
def test_what_may_be_empty_may_be_missing(write_rows, adapter, key):
    (whole,) = [k for k in ROWS[adapter] if k.startswith(key)]
    row = {k: v for k, v in ROWS[adapter].items() if k != whole}
    bare, empty = (
        load_items(FileDataset(file=write_rows([r])), adapter=adapter)
        for r in (row, row | {whole: ""})
    )
    assert bare == empty


@pytest.mark.parametrize(
    ("file", "seen"),
    [
        ("rows.xlsx", "is a spreadsheet; expected JSON lines"),
        ("rows.json", "is one JSON document, or JSON lines by another name (.jsonl); expected"),
        ("rows.txt", "is none of the formats that are read; expected"),
        ("rows", "is none of the formats"),
    ],
)
def test_files_of_another_format_are_refused_by_their_key(study_settings, write_study, file, seen):
    study_settings["evaluation"]["datasets"]["arc"]["source"] = {"file": file}
    with pytest.raises(StudyError, match=r"evaluation\.datasets\.arc\.source") as caught:
        load_study(write_study(study_settings))
    (line,) = str(caught.value).splitlines()
    assert seen in line


@pytest.mark.parametrize("question", ["is iron a metal", "is iron a metal?", "is iron a metal? "])
def test_a_question_has_one_mark(write_rows, question):
    rows = write_rows([ROWS["boolq"] | {"question": question}])
    (item,) = load_items(FileDataset(file=rows), adapter="boolq")
    for text in (loglikelihood_prompt(item, "boolq").text, user_turn(item, "boolq")):
        assert text.count("?") == 1
        assert "is iron a metal?" in text
