"""Equal content, equal hash; any other content, another hash."""

import hashlib
import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.core.records import (
    canonical_json,
    sha256_data,
    sha256_file,
    sha256_folder,
    sha256_text,
)

repeatable = settings(derandomize=True, deadline=None, max_examples=60)
plain = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


@repeatable
@given(plain)
def test_canonical_json_loses_nothing(data):
    assert json.loads(canonical_json(data)) == data


@repeatable
@given(st.dictionaries(st.text(), plain, min_size=2, max_size=5))
def test_the_order_of_keys_does_not_matter(data):
    assert sha256_data(data) == sha256_data(dict(reversed(data.items())))


def test_the_order_of_lists_and_the_kind_of_values_do():
    shown = [[1, 2], [2, 1], ["1", 2], [[1], 2], {"1": 2}, [1.5, 2], [True, 2], [None, 2], "12"]
    assert len({sha256_data(data) for data in shown}) == len(shown)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_none_are_refused(value):
    with pytest.raises(ValueError):
        sha256_data({"a": [value]})


def test_a_text_is_hashed_in_utf8(tmp_path):
    """The published digest of `abc`, FIPS 180-2 appendix B.1, and a text beyond ASCII."""
    digest = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert sha256_text("abc") == digest
    assert sha256_text("é 三") == hashlib.sha256("é 三".encode()).hexdigest()
    (tmp_path / "f").write_bytes(b"abc")
    assert sha256_file(tmp_path / "f") == digest


def test_a_folder_changes_with_any_name_or_byte(tmp_path):
    def made(name: str, files: dict[str, str]) -> str:
        for path, text in files.items():
            (tmp_path / name / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name / path).write_text(text)
        return sha256_folder(tmp_path / name)

    first = made("a", {"x": "1", "sub/y": "2"})
    assert made("b", {"sub/y": "2", "x": "1"}) == first
    others = [
        made("c", {"x": "1", "sub/y": "3"}),
        made("d", {"x": "1", "y": "2"}),
        made("e", {"x": "2", "sub/y": "1"}),
        made("f", {"x": "1", "sub/y": "2", "z": ""}),
    ]
    assert len({first, *others}) == 5


def test_a_folders_hash_is_of_what_it_holds_not_of_when_it_was_made(tmp_path):
    (tmp_path / "weights").write_text("1")
    before = sha256_folder(tmp_path)
    (tmp_path / "record.json").write_text('{"duration_s": 2}')
    assert sha256_folder(tmp_path) == before


def test_a_folder_without_files_is_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    for folder in (tmp_path / "empty", tmp_path / "absent"):
        with pytest.raises(FileNotFoundError, match=folder.name):
            sha256_folder(folder)
