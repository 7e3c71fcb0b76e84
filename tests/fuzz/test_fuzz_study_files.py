"""A study file of any content is a study or one clear line for each thing wrong with it."""

import copy
import time

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import STUDY
from helpers.core.errors import StudyError
from helpers.study import loading
from helpers.study.loading import load_study
from helpers.study.schema import Study
from test_loading import JARGON

repeatable = settings(derandomize=True, deadline=None, max_examples=200)
SECONDS = 3.0


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz") / "study.yaml"


def outcome(path, content: bytes) -> Study | list[str]:
    """The study, or the lines it is refused with; nothing else may come of a file."""
    path.write_bytes(content)
    started = time.process_time()
    try:
        loaded = load_study(path)
    except StudyError as error:
        lines = str(error).split("\n")
        assert lines
        for line in lines:
            assert line.startswith(f"{path}: "), line
            assert line.isprintable(), ascii(line)
            assert len(line) < 1000
            message = line.lower().removeprefix(f"{path}: ")
            assert not any(word in message for word in JARGON if "=" not in word), line
        loaded = lines
    assert time.process_time() - started < SECONDS
    return loaded


def scalars():
    return (
        st.none()
        | st.booleans()
        | st.integers()
        | st.floats()
        | st.text(max_size=8)
        | st.dates()
        | st.datetimes()
        | st.binary(max_size=4)
        | st.sampled_from(["llama", "shipped", "hub", "../up", "con", ".inf", "~x/y.jsonl", "a\0"])
    )


values = st.recursive(
    scalars(),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(max_size=6) | st.integers() | st.none(), inner, max_size=3)
    ),
    max_leaves=6,
)


def paths(data, path=()):
    """Every place in nested mappings and lists."""
    items = data.items() if isinstance(data, dict) else enumerate(data)
    for key, value in items:
        yield (*path, key)
        if isinstance(value, dict | list):
            yield from paths(value, (*path, key))


SOUND = yaml.safe_load(STUDY)
PLACES = sorted(paths(SOUND), key=str)


def changed(changes) -> dict:
    """The valid study with values put, keys renamed or taken out at some places."""
    edited = copy.deepcopy(SOUND)
    for where, how, value in changes:
        inner = edited
        try:
            for key in where[:-1]:
                inner = inner[key]
            old = inner[where[-1]]
        except (KeyError, IndexError, TypeError):
            continue  # an earlier change took the place away
        if how == "put":
            inner[where[-1]] = value
        elif how == "take":
            del inner[where[-1]]
        elif isinstance(inner, dict):
            inner[value if isinstance(value, str | int | None) else str(value)] = old
            del inner[where[-1]]
    return edited


change = st.tuples(st.sampled_from(PLACES), st.sampled_from(["put", "take", "name"]), values)


@repeatable
@given(st.lists(change, min_size=1, max_size=3))
def test_a_changed_study_is_a_study_or_one_line_a_mistake(place, changes):
    content = yaml.safe_dump(changed(changes), sort_keys=False, allow_unicode=True)
    outcome(place, content.encode("utf-8", "surrogatepass"))


@repeatable
@given(st.binary(max_size=200) | st.text(max_size=200).map(lambda t: t.encode("utf-8", "replace")))
def test_any_bytes_are_refused_in_a_line(place, content):
    assert not isinstance(outcome(place, content), Study)


YAML_PIECES = [
    *"[]{}:,-?&*!|>#%@`'\"",
    "\n",
    "\n  ",
    "\n    ",
    ": ",
    "- ",
    "&a ",
    "*a",
    "<<: ",
    "...",
]
YAML_PIECES += [
    "!!int ",
    "!!timestamp ",
    "!!float ",
    "!!map ",
    "!!seq ",
    "!!set ",
    "!!omap ",
    "!!binary ",
]
YAML_PIECES += [
    "!!python/object/apply:os.system ",
    "title",
    "0x",
    "1_0",
    "2001-99-99",
    "1:60",
    "~",
    "---\n",
]


@repeatable
@given(st.lists(st.sampled_from(YAML_PIECES), max_size=30).map("".join))
def test_any_yaml_is_refused_in_a_line(place, content):
    assert not isinstance(outcome(place, content.encode()), Study)


@repeatable
@given(st.integers(0, len(STUDY) - 1), st.sampled_from(YAML_PIECES), st.integers(0, 3))
def test_a_study_with_a_slip_of_the_pen(place, at, piece, gone):
    outcome(place, f"{STUDY[:at]}{piece}{STUDY[at + gone :]}".encode())


BOMB = "\n".join(
    ["a0: &a0 [x]"] + [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 30)]
)
TOO_MUCH = {
    "aliases that multiply": (BOMB, "values"),
    "merges that multiply": (
        "a0: &a0 {x: 1}\n"
        + "\n".join(f"a{i}: &a{i} {{y: [*a{i - 1}, *a{i - 1}]}}" for i in range(1, 60)),
        "values",
    ),
    "itself": ("a: &a [*a]", "inside its own anchor"),
    "itself as a key": ("a: &a {*a : 1}", "inside its own anchor"),
    "deep lists": ("a: " + "[" * 5000, "are nested more than 24 deep"),
    "deep mappings": ("a: " + "{b: " * 5000, "are nested more than 24 deep"),
    "deep blocks": ("- " * 5000 + "a", "are nested more than 24 deep"),
    "quite deep": ("a: " + "[" * 40 + "]" * 40, "are nested more than 24 deep"),
    "a megabyte": ("a: " + "x" * 10**6, "bytes"),
    "a long value": ("title: " + "x" * 10_000, "characters"),
    "a long number": ("seed: " + "9" * 5000, "characters"),
    "a number in hexadecimal": ("seed: 0x" + "f" * 1900, ""),
    "many keys": ("\n".join(f"k{i}: 1" for i in range(20_000)), ""),
    "a tag on nothing": ("title: !!timestamp x", "do not fit"),
    "a list as a mapping": ("title: !!map [1]", ""),
    "a word as a mapping": ("title: !!map a", ""),
    "a truth value": ("title: !!bool x", "do not fit"),
    "no such day": ("title: 2001-02-31", ""),
    "a home of no one": (
        STUDY.replace("{random: llama}", "{folder: ~nobody-here/x}"),
        "not a folder",
    ),
    "a path too long": (
        STUDY.replace("{random: llama}", f"{{folder: {'x' * 1999}}}"),
        "not a folder",
    ),
    "a path with a NUL": (STUDY.replace("{random: llama}", '{folder: "a\\0b"}'), "not a folder"),
    "half a character": (STUDY.replace("A study for the tests", '"\\ud800"'), "half a character"),
    "half a character in a path": (STUDY.replace("{random: llama}", '{folder: "\\udfff"}'), "half"),
    "half a character in a key": (STUDY.replace("base: {", '"\\ud800": {'), ""),
    "a key that acts": ('"\\e]8;;http://x\\a": 1', ""),
    "a value that acts": ('title: {"\\e[2J": "\\u202e"}', ""),
    "a line in a key": ('"a\\nb: c": 1', ""),
}


@pytest.mark.parametrize("name", TOO_MUCH)
def test_what_is_too_much_is_refused_at_once(place, name):
    content, message = TOO_MUCH[name]
    errors = outcome(place, content.encode())
    assert isinstance(errors, list)
    assert message in errors[0]


def test_anchors_and_merges_are_still_of_use(place):
    """What they are for: saying a thing once."""
    text = STUDY.replace(
        "dataset: {shipped: openmath_train}", "dataset: &rows {shipped: openmath_train}", 1
    )
    text = text.replace("dataset: {shipped: openmath_train}", "dataset: *rows")
    assert text.count("*rows") == 1
    assert outcome(place, text.encode()) == outcome(place, STUDY.encode())


def test_a_study_of_a_hundred_models_is_no_bomb(place):
    many = copy.deepcopy(SOUND)
    many["models"] |= {
        f"m{i}": {"hub": f"someone/model-{i}", "revision": "main"} for i in range(100)
    }
    many["variants"] |= {
        f"v{i}": {"preset": "w8a8", "smooth": {"alpha": i / 20, "targets": ["mlp_input"]}}
        for i in range(20)
    }
    many["statistics"]["primary"] = [
        {"model": f"m{i}", "dataset": d, "baseline": "noquant", "variant": f"v{j}"}
        for i in range(100)
        for d in ("arc", "squad_v2")
        for j in range(4)
    ]
    content = yaml.safe_dump(many).encode()
    assert len(content) < loading.MOST_BYTES
    assert isinstance(outcome(place, content), Study)
