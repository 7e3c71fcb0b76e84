"""What looks finished is finished: files appear whole or not at all, and say what made them."""

import json
import math
import re

import pytest

from helpers.core.errors import StudyError
from helpers.core.files import write_atomically
from helpers.core.records import (
    RECORDED_PACKAGES,
    Record,
    package_versions,
    read_json,
    read_jsonl,
    sha256_text,
    write_json,
    write_jsonl,
)


def names(folder) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_a_writer_that_fails_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "metrics.json"
    path.write_text("old")

    def write(temporary):
        temporary.write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, write)
    assert path.read_text() == "old"
    assert names(tmp_path) == {"metrics.json"}


def test_a_killed_writer_leaves_nothing_under_the_final_name(tmp_path):
    path = tmp_path / "new" / "metrics.json"

    def write(temporary):
        temporary.write_text("half")
        assert not path.exists()
        assert temporary.parent == path.parent  # a rename across file systems is a copy
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, write)
    assert names(path.parent) == set()


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("write", [write_json, lambda p, d: write_jsonl(p, [{"ok": 1}, d])])
def test_nan_is_refused_and_the_old_file_stays(tmp_path, write, value):
    path = tmp_path / "metrics.json"
    path.write_text("old")
    with pytest.raises(ValueError):
        write(path, {"accuracy": value})
    assert path.read_text() == "old"
    assert names(tmp_path) == {"metrics.json"}


def test_a_source_of_rows_that_fails_midway_writes_nothing(tmp_path):
    def rows():
        yield {"id": 1}
        raise RuntimeError("the model broke")

    with pytest.raises(RuntimeError):
        write_jsonl(tmp_path / "p.jsonl", rows())
    assert names(tmp_path) == set()


# U+2028, U+2029 and U+0085 end a line for str.splitlines, not in JSON lines.
ROWS = [
    {"id": "1", "text": 'two\nlines, a "quote" and é'},
    {"id": "2", "text": "a\u2028b\u2029c\x85d\x0be\x0cf\x1cg\r\nh"},
    {"id": "3", "nested": {"z": [1, 2.5, None, True]}},
]


def test_what_is_written_is_read(tmp_path):
    write_jsonl(tmp_path / "p.jsonl", ROWS)
    assert read_jsonl(tmp_path / "p.jsonl", made_by="03_evaluation") == ROWS
    write_json(tmp_path / "p.json", ROWS)
    assert read_json(tmp_path / "p.json", made_by="03_evaluation") == ROWS
    write_jsonl(tmp_path / "none.jsonl", [])
    assert read_jsonl(tmp_path / "none.jsonl", made_by="03_evaluation") == []


def test_the_same_rows_give_the_same_bytes(tmp_path):
    write_jsonl(tmp_path / "a", ROWS)
    write_jsonl(tmp_path / "b", [dict(reversed(row.items())) for row in ROWS])
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


@pytest.mark.parametrize(
    ("torn", "line"),
    [(b'{"id": 1}\n{"id": 2', 2), (b'{"id": 1}\n\n{"id": 2}\n', 2), (b'{"id": "\xff"}\n', 1)],
)
def test_a_torn_line_is_an_error_naming_it(tmp_path, torn, line):
    (tmp_path / "p.jsonl").write_bytes(torn)
    with pytest.raises(StudyError, match=rf"p\.jsonl: line {line} .*run 03_evaluation again"):
        read_jsonl(tmp_path / "p.jsonl", made_by="03_evaluation")


@pytest.mark.parametrize("read", [read_json, read_jsonl])
def test_a_missing_file_names_the_notebook_that_makes_it(tmp_path, read):
    with pytest.raises(StudyError, match=r"gone\.json is missing; run 01_calibration first"):
        read(tmp_path / "gone.json", made_by="01_calibration")


@pytest.mark.parametrize("damage", [b'{"a": 1', b"", b"\xff\xfe"])
def test_damaged_json_is_an_error_in_one_line(tmp_path, damage):
    (tmp_path / "p.json").write_bytes(damage)
    with pytest.raises(StudyError, match="run 02_quantization again") as caught:
        read_json(tmp_path / "p.json", made_by="02_quantization")
    assert "\n" not in str(caught.value)


def test_a_record_says_what_ran_from_what_with_what(tmp_path):
    parameters = {"study": "demo", "model": "base"}
    record = Record(tmp_path, stage="calibration", parameters=parameters)
    record.add_input("rows", sha256_text("content"))
    assert names(tmp_path) == set()
    written = json.loads(record.write({"items": 3}).read_text())
    assert names(tmp_path) == {"record.json"}
    assert written["stage"] == "calibration"
    assert written["parameters"] == parameters
    assert written["inputs"] == {"rows": sha256_text("content")}
    assert written["results"] == {"items": 3}
    assert 0 <= written["duration_s"] < 60
    assert written["peak_memory_bytes"] > 1_000_000
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", written["started"])
    assert set(written["packages"]) == {"python", *RECORDED_PACKAGES}


def test_a_job_that_begins_again_is_unfinished_again(tmp_path):
    """A record is the sign of a finished stage; a stale one would vouch for new files."""
    Record(tmp_path, stage="calibration", parameters={}).write({})
    assert names(tmp_path) == {"record.json"}
    Record(tmp_path, stage="calibration", parameters={})
    assert names(tmp_path) == set()


def test_a_record_with_nan_is_not_written(tmp_path):
    with pytest.raises(ValueError):
        Record(tmp_path, stage="evaluation", parameters={}).write({"accuracy": math.nan})
    assert names(tmp_path) == set()


def test_versions_are_those_installed():
    import numpy

    versions = package_versions()
    assert versions["numpy"] == numpy.__version__
    assert all(versions.values())
