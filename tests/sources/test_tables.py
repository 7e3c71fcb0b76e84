"""A user's table gives the items of its twin in the Hub's schema, or one line; no cell is lost."""

import csv
import io
import json

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.core.errors import StudyError
from helpers.evaluation.checks.item_gates import item_digest, raw_digests
from helpers.sources.items import csv_rows, load_rows
from helpers.sources.sampling import evaluation_items, load_items
from helpers.study import stages
from helpers.study.inputs import dataset_files
from helpers.study.loading import load_study
from helpers.study.schema import FileDataset, FolderDataset
from test_datasets import ROWS, put, refusal

repeatable = settings(derandomize=True, deadline=None, max_examples=40)

# For each adapter a user's table, the map from its columns, and the same rows in the Hub's schema.
TABLES = {
    "arc": (
        [
            {"nr": "7", "prompt": "Which is\na metal?", "o1": "wood", "o2": 'an "iron"', "o3": "x"},
            {"nr": "8", "prompt": "Which, if any, is wet?", "o1": "water", "o2": "salt", "o3": ""},
        ],
        ["B", "A"],
        {"id": "nr", "question": "prompt", "choices": ["o1", "o2", "o3"], "answerKey": "gold"},
        [
            {
                "id": "7",
                "question": "Which is\na metal?",
                "choices": {"label": ["A", "B", "C"], "text": ["wood", 'an "iron"', "x"]},
                "answerKey": "B",
            },
            {
                "id": "8",
                "question": "Which, if any, is wet?",
                "choices": {"label": ["A", "B"], "text": ["water", "salt"]},
                "answerKey": "A",
            },
        ],
    ),
    "boolq": (
        [{"q": "is iron a metal", "text": "Iron; it rusts."}, {"q": "is it wet", "text": "No."}],
        ["True", "no"],
        {"question": "q", "passage": "text", "answer": "gold"},
        [
            {"question": "is iron a metal", "passage": "Iron; it rusts.", "answer": True},
            {"question": "is it wet", "passage": "No.", "answer": False},
        ],
    ),
    "squad_v2": (
        [
            {"nr": "a", "q": "When?", "text": "In 1904."},
            {"nr": "b", "q": "Who?", "text": "In 1904."},
        ],
        ["1904", ""],
        {"id": "nr", "question": "q", "context": "text", "answers": "gold"},
        [
            {"id": "a", "question": "When?", "context": "In 1904.", "answers": {"text": ["1904"]}},
            {"id": "b", "question": "Who?", "context": "In 1904.", "answers": {"text": []}},
        ],
    ),
    "openmath": (
        [{"q": "What is 1 + 1?"}, {"q": "What is 007 + 0,5?"}],
        ["2", "7.50"],
        {"problem": "q", "expected_answer": "gold"},
        [
            {"problem": "What is 1 + 1?", "expected_answer": "2"},
            {"problem": "What is 007 + 0,5?", "expected_answer": "7.50"},
        ],
    ),
}


def user_table(adapter: str) -> tuple[pd.DataFrame, dict]:
    rows, golds, columns, _ = TABLES[adapter]
    return pd.DataFrame([row | {"gold": g} for row, g in zip(rows, golds, strict=True)]), columns


def written(folder, frame: pd.DataFrame, kind: str) -> dict:
    """The table in one of the formats; the source's settings without its columns."""
    path = folder / f"mine.{kind.partition(' ')[0]}"
    match kind:
        case "csv":
            frame.to_csv(path, index=False)
        case "csv from Excel":
            frame.to_csv(path, index=False, sep=";", encoding="utf-8-sig", lineterminator="\r\n")
        case "csv with index":
            frame.to_csv(path)
        case "tsv":
            frame.to_csv(path, index=False, sep="\t")
        case "parquet":
            frame.to_parquet(path)
        case "jsonl":
            frame.to_json(path, orient="records", lines=True)
        case "arrow":
            frame.to_feather(path, compression="uncompressed")
    return {"file": str(path)}


def saved(folder, frame: pd.DataFrame, kind: str) -> dict:
    """The table in a folder: saved by `datasets`, or as files."""
    datasets = pytest.importorskip("datasets")
    dataset = datasets.Dataset.from_pandas(frame)
    place = folder / "set"
    match kind:
        case "saved":
            dataset.save_to_disk(place)
        case "saved, two shards":
            dataset.save_to_disk(place, num_shards=2)
        case "saved, reordered":
            dataset.select([1, 0]).select([1, 0]).save_to_disk(place)
        case "saved splits":
            other = datasets.Dataset.from_dict({"x": [1]})
            datasets.DatasetDict({"test": dataset, "train": other}).save_to_disk(place)
            return {"folder": str(place), "split": "test"}
        case "files":
            place.mkdir()
            frame[:1].to_csv(place / "test-0.csv", index=False)
            frame[1:].to_json(place / "test-1.jsonl", orient="records", lines=True)
            (place / "train.csv").write_text("x\n1\n")
            (place / "README.md").write_text("about")
            return {"folder": str(place), "split": "test"}
    return {"folder": str(place)}


FILES = ["csv", "csv from Excel", "csv with index", "tsv", "parquet", "jsonl", "arrow"]
FOLDERS = ["saved", "saved, two shards", "saved, reordered", "saved splits", "files"]


@pytest.mark.parametrize("adapter", TABLES)
@pytest.mark.parametrize("kind", [*FILES, *FOLDERS])
def test_a_table_gives_the_items_of_its_twin_in_the_hubs_schema(
    tmp_path, write_rows, adapter, kind
):
    """So does the reader of the gate, by another library and with a map of its own."""
    frame, columns = user_table(adapter)
    write, of_kind = (written, FileDataset) if kind in FILES else (saved, FolderDataset)
    source = of_kind(**write(tmp_path, frame, kind), columns=columns)
    items = load_items(source, adapter=adapter)
    twin = FileDataset(file=write_rows(TABLES[adapter][3], "twin.jsonl"))
    assert items == load_items(twin, adapter=adapter)
    assert len(items) == len(frame)
    digests = {item.id: {item_digest(item, item.golds)} for item in items}
    assert raw_digests(source, adapter=adapter) == digests


@pytest.mark.parametrize("adapter", ["arc", "squad_v2"])
def test_rows_without_an_id_get_one_by_their_content(tmp_path, adapter):
    frame, columns = user_table(adapter)
    del columns["id"]
    sources = []
    for name, rows in (("one", frame), ("other", frame[::-1])):
        (tmp_path / name).mkdir()
        sources.append(FileDataset(**written(tmp_path / name, rows, "csv"), columns=columns))
    first, second = (load_items(source, adapter=adapter) for source in sources)
    assert first == second[::-1]
    assert len({item.id for item in first}) == len(frame)
    digests = {item.id: {item_digest(item, item.golds)} for item in first}
    assert raw_digests(sources[0], adapter=adapter) == digests


cells = st.text(st.characters(exclude_categories=["Cs"]), max_size=12) | st.sampled_from(
    [
        "",
        '"',
        '""',
        "a\nb",
        "a\r\nb",
        ",",
        ";",
        "\t",
        " x ",
        "NA",
        "null",
        "007",
        "1e5",
        "\ufeff",
        "#",
    ]
)


@repeatable
@given(st.lists(st.tuples(cells, cells), max_size=5), st.sampled_from(",;\t"))
def test_every_cell_arrives_as_it_was_written(rows, separator):
    frame = pd.DataFrame(rows, columns=["one", "two"])
    text = frame.to_csv(index=False, sep=separator, quoting=csv.QUOTE_ALL)
    assert csv_rows(text, "x") == [{"one": a, "two": b} for a, b in rows]


@repeatable
@given(st.text(st.sampled_from('ab",;\n\r\t '), max_size=25))
def test_any_text_is_all_of_its_cells_or_one_line(text):
    """As the lax reader of the standard library splits it, wherever no line refuses it."""
    try:
        rows = csv_rows(f"x,y\n{text}", "x")
    except StudyError:
        return
    lax = csv.reader(io.StringIO(f"x,y\n{text}", newline=""))
    assert [list(row.values()) for row in rows] == [row for row in lax if row][1:]


BROKEN = {
    "long row": (
        "a,b\n1,2\n1,2,3\n",
        "row 2 has 3 cells but the header names 2 columns ('a', 'b')",
    ),
    "short row": ("a,b\n1\n", "row 1 has 1 cell but"),
    "every row longer": ("a,b\n1,2,3\n4,5,6\n", "row 1 has 3 cells"),  # pandas: an index
    "open quote": ('a,b\n1,"2\n3,4\n', "row 1 is not CSV"),
    "text after a quote": ('a,b\n"1"x,2\n', "row 1 is not CSV"),
    "one name twice": ("a,b,a\n1,2,3\n", "names the column 'a' more than once"),
    "two separators": ("a;b, c\n1;2\n", "its header may be divided by comma and semicolon"),
    "empty": ("", "is empty; its first row must name the columns"),
    "blank": ("\n\n", "is empty"),
    "header only": ("problem,expected_answer\n", "holds no rows"),
    "utf-16": ("a,b\n1,2\n".encode("utf-16"), "is in UTF-16; save it in UTF-8"),
    "latin-1": ("a,b\n1,ü\n".encode("latin-1"), "line 2 is not UTF-8"),
    "empty gold": ("problem,expected_answer\nWhy?,\n", "row 1 is no openmath item"),
    "other columns": ("a,b\n1,2\n", "row 1 is no openmath item (it has no 'problem')"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_table_that_is_none_is_one_line(tmp_path, case):
    content, expected = BROKEN[case]
    path = tmp_path / "mine.csv"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    line = refusal(load_items, FileDataset(file=str(path)), adapter="openmath")
    assert line.startswith(f"{path}: ")
    assert expected in line


@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_the_separator_is_read_off_the_header(tmp_path, separator):
    path = tmp_path / "mine.csv"
    text = f'problem{separator}expected_answer\n\n"What is 1{separator} 2?"{separator}3\n'
    path.write_text(text)
    (item,) = load_items(FileDataset(file=str(path)), adapter="openmath")
    assert (item.question, item.golds) == (f"What is 1{separator} 2?", ("3",))


def test_one_column_needs_no_separator(tmp_path):
    path = tmp_path / "texts.csv"
    path.write_text('context\n"Iron, a metal."\nWood.\n')
    assert load_rows(FileDataset(file=str(path))) == [
        {"context": "Iron, a metal."},
        {"context": "Wood."},
    ]


def test_a_missing_column_is_named_beside_those_there_are(tmp_path):
    path = tmp_path / "mine.csv"
    path.write_text("prompt,gold\nWhy?,5\n")
    source = FileDataset(file=str(path), columns={"problem": "question", "expected_answer": "gold"})
    line = refusal(load_items, source, adapter="openmath")
    assert f"{path}: has no column 'question' for problem; its columns: 'prompt', 'gold'" in line


OPTIONS = {"choices": ["wood", "iron", "glass"], "question": "Which is a metal?", "answerKey": 1}


@pytest.mark.parametrize(
    ("labels", "gold"), [(["0", "1", "2"], 1), (["1", "2", "3"], 2), (None, "B"), ([0, 1, 2, 3], 1)]
)
def test_options_without_labels_get_those_of_the_study(write_rows, labels, gold):
    row = OPTIONS | {"answerKey": gold}
    columns = {"choices": "choices", "answerKey": "answerKey"}
    source = FileDataset(file=write_rows([row]), columns=columns, labels=labels)
    (item,) = load_items(source, adapter="arc")
    assert item.options[item.labels.index(item.golds[0])] == "iron"


def test_more_options_than_labels_are_refused(write_rows):
    source = FileDataset(file=write_rows([OPTIONS]), labels=["a", "b"])
    line = refusal(load_items, source, adapter="arc")
    assert "row 1 has 3 options but there are 2 labels (a, b); name as many labels" in line


def test_an_empty_gold_option_is_refused(tmp_path):
    """The label goes with the empty cell, so that the gold names no option."""
    path = tmp_path / "mine.csv"
    path.write_text("question,a,b,c,answerKey\nWhy?,x,y,,C\n")
    source = FileDataset(file=str(path), columns={"choices": ["a", "b", "c"]})
    assert "answerKey 'C' is none of the labels" in refusal(load_items, source, adapter="arc")


def test_class_labels_are_read_by_name(tmp_path):
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        {
            "question": datasets.Value("string"),
            "choices": datasets.List(datasets.Value("string")),
            "answer": datasets.ClassLabel(names=["A", "B", "C"]),
        }
    )
    rows = [OPTIONS | {"answer": 1}, OPTIONS | {"question": "Which burns?", "answer": 0}]
    rows = [{k: row[k] for k in features} for row in rows]
    dataset = datasets.Dataset.from_list(rows, features=features)
    dataset.save_to_disk(tmp_path / "set")
    dataset.to_parquet(tmp_path / "rows.parquet")
    columns = {"choices": "choices", "answerKey": "answer"}
    for source in (
        FolderDataset(folder=str(tmp_path / "set"), columns=columns),
        FileDataset(file=str(tmp_path / "rows.parquet"), columns=columns),
    ):
        assert [item.golds for item in load_items(source, adapter="arc")] == [("B",), ("A",)]


def test_two_columns_of_one_name_are_refused_in_parquet_too(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    table = pyarrow.table([["x"], ["y"]], names=["problem", "problem"])
    parquet.write_table(table, tmp_path / "rows.parquet")
    source = FileDataset(file=str(tmp_path / "rows.parquet"))
    assert "'problem' more than once" in refusal(load_items, source, adapter="openmath")


@pytest.fixture
def with_source(study_settings, write_study):
    """The study of the tests with another source of its ARC set; loads it."""

    def load(source: dict):
        return load_study(
            write_study(put(study_settings, "evaluation/datasets/arc/source", source))
        )

    return load


WRONG_COLUMNS = [
    (
        {"columns": {"prompt": "question"}},
        "columns.prompt = 'question' names no field of arc (id, question, choices, answerKey); "
        "the field comes first: question: prompt",
    ),
    ({"columns": {"text": "prompt"}}, "columns.text = 'prompt' names no field of arc"),
    (
        {"columns": {"question": ["a", "b"]}},
        "columns.question = ['a', 'b'] lists several columns; name one",
    ),
    ({"columns": {"question": 3}}, "columns.question = 3 is no column's name"),
    ({"columns": {}}, "columns = {} is empty"),
    ({"columns": "prompt"}, "columns = 'prompt' is not a mapping"),
    ({"labels": ["a", "a"]}, "labels = ['a', 'a'] repeat one"),
    ({"labels": []}, "labels = [] is empty"),
    ({"column": {"question": "prompt"}}, "is not a known key; did you mean 'columns'?"),
]


@pytest.mark.parametrize(("source", "expected"), WRONG_COLUMNS)
def test_wrong_columns_are_named_when_the_study_is_read(with_source, write_rows, source, expected):
    with pytest.raises(StudyError) as caught:
        with_source({"file": write_rows([ROWS["arc"]])} | source)
    (line,) = str(caught.value).splitlines()
    assert "evaluation.datasets.arc.source." in line
    assert expected in line


def test_labels_are_for_options_alone(study_settings, write_study, write_rows):
    source = {"file": write_rows([ROWS["squad_v2"]]), "labels": ["a", "b"]}
    study_settings["evaluation"]["datasets"]["squad_v2"]["source"] = source
    with pytest.raises(StudyError, match="are for arc items; remove them"):
        load_study(write_study(study_settings))


def folder_with(tmp_path, *names: str):
    place = tmp_path / "set"
    place.mkdir()
    for name in names:
        (place / name).write_text(json.dumps(ROWS["arc"]) + "\n")
    return place


@pytest.mark.parametrize(
    ("names", "split", "expected"),
    [
        (["train.jsonl", "test.jsonl"], None, "holds files of the splits test, train; name one of"),
        (["train.jsonl"], "test", "holds no file with 'test' in its name (train.jsonl)"),
        (["a.jsonl", "b.json"], None, "holds b.json, which is one JSON document"),
        (["a.jsonl", "b.xlsx"], None, "holds b.xlsx, which is a spreadsheet"),
        (["README.md"], None, "holds no files of rows"),
        (["latest.jsonl"], "test", "holds no file with 'test' in its name"),
    ],
)
def test_a_folder_of_files_says_what_it_holds(tmp_path, with_source, names, split, expected):
    place = folder_with(tmp_path, *names)
    with pytest.raises(StudyError) as caught:
        with_source({"folder": str(place)} | ({"split": split} if split else {}))
    (line,) = str(caught.value).splitlines()
    assert "evaluation.datasets.arc.source.folder" in line
    assert expected in line


def test_a_saved_folder_says_which_splits_it_has(tmp_path, with_source):
    datasets = pytest.importorskip("datasets")
    dataset = datasets.Dataset.from_list([ROWS["arc"]])
    datasets.DatasetDict({"validation": dataset, "test": dataset}).save_to_disk(tmp_path / "many")
    dataset.save_to_disk(tmp_path / "one")
    for source, expected in (
        ({"folder": "many"}, "holds the splits test, validation; name one of them as split"),
        ({"folder": "many", "split": "train"}, "holds the splits test, validation"),
        ({"folder": "one", "split": "test"}, "holds one dataset and no splits"),
        ({"folder": "none"}, "is not a folder; correct the path"),
    ):
        with pytest.raises(StudyError) as caught:
            with_source(source | {"folder": str(tmp_path / source["folder"])})
        assert expected in str(caught.value)


def test_a_damaged_saved_folder_is_one_line(tmp_path):
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_list([ROWS["arc"]]).save_to_disk(tmp_path / "set")
    (data,) = (tmp_path / "set").glob("*.arrow")
    data.write_bytes(data.read_bytes()[:100])
    line = refusal(load_items, FolderDataset(folder=str(tmp_path / "set")), adapter="arc")
    assert "is not a dataset that save_to_disk wrote" in line


@pytest.mark.parametrize("order", [1, -1])
def test_the_order_of_a_sources_keys_does_not_matter(tmp_path, with_source, order):
    place = folder_with(tmp_path, "test.jsonl", "train.jsonl")
    source = {"split": "test", "folder": str(place)}
    study = with_source(dict(list(source.items())[::order]))
    assert dataset_files(study.evaluation.datasets["arc"].source) == [place / "test.jsonl"]


def test_a_run_depends_on_the_content_and_on_the_columns(tmp_path, with_source):
    place = folder_with(tmp_path, "test.jsonl", "train.jsonl")
    source = {"folder": str(place), "split": "test"}
    study = with_source(source)
    run = stages.Run("evaluation", next(iter(study.models)), study.baseline)
    files = stages.source_files(study, run)
    assert place / "test.jsonl" in files
    assert place / "train.jsonl" not in files
    mapped = with_source(source | {"columns": {"question": "question"}})
    assert stages.settings_text(mapped, run) != stages.settings_text(study, run)


def test_settings_without_columns_have_the_text_they_had(with_source, write_rows):
    """Results of a study from before `columns` stay current."""
    study = with_source({"file": write_rows([ROWS["arc"]])})
    run = stages.Run("evaluation", next(iter(study.models)), study.baseline)
    assert '"columns"' not in stages.settings_text(study, run)
    assert '"labels"' not in stages.settings_text(study, run)


def test_a_study_draws_from_a_mapped_table(tmp_path, with_source):
    frame, columns = user_table("arc")
    more = pd.concat([frame] * 4, ignore_index=True)
    more["prompt"] = [f"{text} ({n})" for n, text in enumerate(more["prompt"])]
    more["nr"] = range(len(more))
    more.to_csv(tmp_path / "mine.csv", index=False)
    study = with_source({"file": str(tmp_path / "mine.csv"), "columns": columns})
    wanted = study.evaluation.datasets["arc"].items
    assert len(evaluation_items(study, "arc")) == wanted
