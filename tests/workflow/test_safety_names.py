"""No name of a study, model, variant or data set, and no link, leads out of outputs/."""

import os
import re
import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

import toy_project
from helpers.core.errors import StudyError
from helpers.core.files import StudyPaths, outputs_root
from helpers.study.loading import load_study, open_job
from helpers.study.schema import RESERVED_NAMES, Name

repeatable = settings(derandomize=True, deadline=None, max_examples=300)
ESCAPES = ["", ".", "..", "../up", "a/b", "a\\b", "/etc", "c:", "~", "a b", "a\n", "a\0", ".hidden"]
ESCAPES += [
    "con",
    "nul.txt",
    "com1",
    "lpt9.a",
    "aux",
    "prn",
    "a.",
    "a..",
    "Base",
    "BASE",
    "ä",
    "ａ",
]
ESCAPES += [
    "-rf",
    "_x",
    "x" * 65,
    "a\u202eb",
    "a*",
    "a?",
    "a|b",
    "a<b>",
    "a:b",
    'a"b',
    "$(x)",
    "`x`",
]
names = TypeAdapter(Name)


def accepted(name: str) -> bool:
    try:
        return names.validate_python(name) == name
    except ValidationError:
        return False


@pytest.mark.parametrize("name", ESCAPES)
def test_a_name_that_is_not_one_folder_everywhere_is_refused(name):
    assert not accepted(name)


@pytest.mark.parametrize(
    "name", ["base", "qwen3-0.6b", "o3", "a.b", "1", "x" * 64, "console", "a_b"]
)
def test_what_people_call_things_is_accepted(name):
    assert accepted(name)


@repeatable
@given(st.text(alphabet="ab1._-/\\: A\0~Ⅷ", max_size=8), st.text(alphabet="ab1._-/", max_size=6))
def test_whatever_is_accepted_stays_inside(model, variant):
    if not (accepted(model) and accepted(variant)):
        return
    paths = StudyPaths("study")
    inside = os.path.normpath(paths.root)
    checkpoint_path = os.path.normpath(paths.checkpoint(model, variant))
    assert checkpoint_path == f"{inside}/{model}/{variant}/checkpoint"
    assert unicodedata.normalize("NFKC", model).casefold() == model  # one spelling, one folder


@pytest.mark.parametrize("kind", RESERVED_NAMES)
def test_what_every_run_writes_is_no_name(write_study, study_settings, kind):
    inner = study_settings
    for key in kind.split("."):
        inner = inner[key]
    for name in RESERVED_NAMES[kind]:
        inner[name] = {"random": "llama"} if kind == "models" else next(iter(inner.values()))
    with pytest.raises(StudyError) as caught:
        load_study(write_study(study_settings))
    lines = str(caught.value).splitlines()
    errors = {
        name
        for name in RESERVED_NAMES[kind]
        if any(f"{kind}.{name} names what" in x for x in lines)
    }
    assert errors == RESERVED_NAMES[kind]


FILES = [
    "..yaml",
    "...yaml",
    ". .yaml",
    "con.yaml",
    "Demo.yaml",
    ".demo.yaml",
    "a b.yaml",
    "-n.yaml",
]
FILES += [
    "demo..yaml",
    "ä.yaml",
    "x" * 65 + ".yaml",
    "$(touch owned).yaml",
    "a\nb.yaml",
    "\x1b[2J.yaml",
]


@pytest.mark.parametrize("file", FILES, ids=ascii)
def test_a_study_file_whose_name_is_no_folder_is_refused(write_study, study_settings, file):
    path = write_study(study_settings, file)
    for use in (load_study, open_job):
        with pytest.raises(StudyError) as caught:
            use(path)
        assert str(caught.value).isprintable()
        assert "rename" in str(caught.value)
    assert not outputs_root().exists() or not list(outputs_root().glob("**/*"))


@pytest.fixture
def outputs(tmp_path, monkeypatch):
    """An outputs folder, and a folder beside it that nothing may write to."""
    root, elsewhere = tmp_path / "outputs", tmp_path / "elsewhere"
    root.mkdir()
    elsewhere.mkdir()
    monkeypatch.setenv("STUDY_OUTPUTS", str(root))
    return root, elsewhere


@pytest.mark.parametrize("place", ["study", "study/base", "study/base/rtn_w8a8/checkpoint"])
@pytest.mark.parametrize("target", ["elsewhere", "nowhere", "/", ".."])
def test_a_link_that_leads_out_is_refused(outputs, study_path, place, target):
    root, elsewhere = outputs
    link = root / place
    link.parent.mkdir(parents=True, exist_ok=True)
    link.symlink_to(target if target in ("/", "..") else elsewhere.parent / target)
    if target == ".." and place != "study":
        return  # still inside
    with pytest.raises(StudyError, match="is a link that leads out of"):
        open_job(study_path, model="base")
    assert not list(elsewhere.iterdir())


def test_a_linked_file_and_a_loop_are_refused_and_a_link_inside_is_not(outputs, study_path):
    root, elsewhere = outputs
    (root / "study" / "base").mkdir(parents=True)
    (root / "study" / "base" / "inside").symlink_to(root / "study")
    (root / "study" / "base" / "loop").symlink_to(root / "study" / "base" / "loop")
    assert open_job(study_path)
    (elsewhere / "secret").write_text("mine")
    (root / "study" / "summary.json").symlink_to(elsewhere / "secret")
    with pytest.raises(StudyError, match=re.escape("summary.json is a link")):
        open_job(study_path)


def test_the_outputs_folder_itself_may_be_a_link(outputs, study_path, monkeypatch, tmp_path):
    """To another disk, say: that is the user's own choice."""
    root, _ = outputs
    (tmp_path / "link").symlink_to(root)
    monkeypatch.setenv("STUDY_OUTPUTS", str(tmp_path / "link"))
    (root / "study").mkdir()
    assert open_job(study_path)


def test_the_front_door_refuses_too_and_starts_nothing(tmp_path):
    folder = toy_project.make(tmp_path / "project", kernels=False)
    (folder / "params" / "toy.yaml").rename(folder / "params" / "...yaml")
    result = toy_project.jobs(folder, "study", "params/...yaml", "--cores", "1")
    assert result.returncode == 2
    assert result.stderr.startswith("params/...yaml: '..' names no folder; rename the file")
    assert len(result.stderr.splitlines()) == 1
    whole = ["Snakefile", "notebooks", "params", "profiles", "src"]
    assert sorted(p.name for p in folder.iterdir()) == whole
