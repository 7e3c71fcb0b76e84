"""A study in one file: the same bytes each time, nothing heavy, and the same report elsewhere."""

import gzip
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile

import pytest
from tools import archive

from helpers.core.errors import StudyError
from helpers.core.files import PROJECT
from hostile_text import PLAIN
from made_up_study import analysed

GUARDS = PROJECT / "tests" / "support" / "guards"
HEAVY = "torch transformers tokenizers llmcompressor compressed_tensors accelerate datasets pyarrow"


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """A made-up study after its analysis, with things beside it that no archive may hold."""
    folder = tmp_path_factory.mktemp("archived")
    root = analysed(folder, PLAIN)
    heavy = ["base/static/checkpoint/model.safetensors", "tuned/model/model.safetensors"]
    for place in (*heavy, "base/noquant/evaluation/states.safetensors"):
        (root / place).parent.mkdir(parents=True, exist_ok=True)
        (root / place).write_bytes(b"weights " * 1000)
    (root / "notebooks" / "03_evaluation.base.static.failed.ipynb").write_text("{}")
    (root / "base" / ".half.tmp").write_text("half")
    return folder / "study.yaml", root


@pytest.fixture(autouse=True)
def outputs(study, monkeypatch):
    monkeypatch.setenv("STUDY_OUTPUTS", str(study[1].parent))


@pytest.fixture(scope="module")
def packed(study, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STUDY_OUTPUTS", str(study[1].parent))
        return archive.pack(str(study[0]), tmp_path_factory.mktemp("packed") / "a.tar.gz")


def test_it_holds_the_results_and_no_weights(packed, study):
    with tarfile.open(packed) as opened:
        names = {m.name.removeprefix("outputs/study/"): m for m in opened}
    for name in ("summary.json", "summary.csv", "report.md", "report.html"):
        assert name in names
    for name in ("base/static/evaluation/predictions/arc.jsonl", "base/static/verification.json"):
        assert name in names
    assert "tuned/model/record.json" in names
    assert "base/calibration/activations.safetensors" in names
    assert "params/study.yaml" in names
    unwanted = re.compile(r"checkpoint|(model|states)\.safetensors|failed|\.tmp")
    assert not [name for name in names if unwanted.search(name)]
    assert all(m.isreg() and m.mtime == m.uid == m.gid == 0 for m in names.values())


def test_the_same_results_make_the_same_bytes(packed, study, tmp_path):
    """Another time, another order on disk, another mode and owner: nothing of it goes in."""
    copied = shutil.copytree(study[1], tmp_path / "outputs" / "study")
    for path in copied.rglob("*"):
        os.utime(path, (1, 1))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STUDY_OUTPUTS", str(tmp_path / "outputs"))
        again = archive.pack(str(study[0]))
    assert again == tmp_path / "outputs" / "study.tar.gz"
    assert again.read_bytes() == packed.read_bytes()
    assert sorted(p.name for p in again.parent.iterdir()) == [
        ".study.lock",
        "study",
        "study.tar.gz",
    ]


@pytest.mark.long
def test_elsewhere_without_torch_it_gives_the_same_report(packed, study, tmp_path):
    """No weights, no data, no network, none of the packages that models need."""
    study_file, root = study
    hidden = [p for p in study_file.parent.iterdir() if p.suffix == ".jsonl"]
    assert hidden
    for path in hidden:  # the study file names it; elsewhere it is not
        path.rename(path.with_suffix(".away"))
    attempts = tmp_path / "attempts"
    places = {"BLOCKED_MODULES": HEAVY, "NETWORK_ATTEMPTS": str(attempts)}
    places |= {"PYTHONPATH": f"{GUARDS}:{PROJECT / 'src'}:{PROJECT}"}
    command = [sys.executable, "-m", "tools.archive", "again", str(packed)]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("STUDY_")} | places
    done = subprocess.run(
        [*command, "--to", "new"], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    for path in hidden:
        path.with_suffix(".away").rename(path)
    assert done.returncode == 0, done.stderr
    assert "the same summary.json and summary.csv" in done.stdout
    outputs_path = tmp_path / "new" / "outputs" / "study"
    for name in ("summary.json", "summary.csv", "report.md"):
        assert (outputs_path / name).read_bytes() == (root / name).read_bytes(), name
    assert not attempts.exists()


def test_the_blocked_modules_are_blocked(tmp_path):
    """So that the test above cannot pass by a guard that guards nothing."""
    places = {"BLOCKED_MODULES": HEAVY, "PYTHONPATH": str(GUARDS)}
    code = "import torch"
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | places, capture_output=True, text=True
    )
    assert "torch is blocked in this test" in done.stderr


@pytest.mark.long
def test_results_that_do_not_give_the_summary_are_told(study, tmp_path):
    changed = shutil.copytree(study[1], tmp_path / "outputs" / "study")
    summary = changed / "summary.json"
    summary.write_text(summary.read_text().replace('"seed": 7', '"seed": 8'))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STUDY_OUTPUTS", str(tmp_path / "outputs"))
        packed = archive.pack(str(study[0]))
        with pytest.raises(StudyError, match=r"summary\.json differs from the archive's"):
            archive.remake_report(packed, tmp_path / "new")


def rewritten(packed, to, edit) -> None:
    """The archive with its members changed: edit(list of (TarInfo, bytes))."""
    with tarfile.open(packed) as opened:
        members = [(m, opened.extractfile(m).read()) for m in opened]
    members = edit(members)
    with tarfile.open(to, "w:gz") as opened:
        for member, content in members:
            if member.isreg():
                member.size = len(content)
            opened.addfile(member, io.BytesIO(content))


def with_manifest(change):
    """An edit of the manifest alone."""

    def edit(members):
        about = json.loads(members[0][1])
        change(about)
        return [(members[0][0], json.dumps(about).encode()), *members[1:]]

    return edit


def extra(name: str, **attributes):
    """An edit that adds a member nobody announced."""

    def edit(members):
        member = tarfile.TarInfo(name)
        for key, value in attributes.items():
            setattr(member, key, value)
        return [*members, (member, b"x")]

    return edit


def announced(name: str):
    """An edit that announces a file of that name and adds it."""

    def edit(members):
        digest = "2d711642b726b04401627ca9fbac32f5c8530fb1903cc4db02258717921a4881"  # of "x"
        members = with_manifest(lambda m: m["files"].update({name: digest}))(members)
        return [*members, (tarfile.TarInfo(name), b"x")]

    return edit


DAMAGE = {
    "a file more": (extra("outputs/study/x"), "which its manifest does not list"),
    "a file outside": (extra("../x"), "which its manifest does not list"),
    "a link": (extra("outputs/x", type=tarfile.SYMTYPE, linkname="/etc"), "does not list"),
    "an announced way out": (announced("outputs/../../x"), "is no archive of a study"),
    "an announced root": (announced("/x"), "is no archive of a study"),
    "an announced folder": (announced("notebooks/x"), "is no archive of a study"),
    "another name": (with_manifest(lambda m: m.update(study="../x")), "is no archive of a study"),
    "another format": (with_manifest(lambda m: m.update(format=2)), "is no archive of a study"),
    "no manifest": (lambda members: members[1:], "is no archive of a study"),
    "a file less": (lambda members: members[:-1], "lacks "),
    "a file twice": (lambda members: [*members, members[-1]], "which its manifest does not list"),
    "a byte more": (lambda m: [*m[:-1], (m[-1][0], m[-1][1] + b"x")], "differs from its checksum"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_an_archive_that_was_tampered_with_is_refused(packed, tmp_path, name):
    edit, message = DAMAGE[name]
    rewritten(packed, tmp_path / "bad.tar.gz", edit)
    with pytest.raises(StudyError, match=re.escape(message)):
        archive.unpack(tmp_path / "bad.tar.gz", tmp_path / "inside" / "new")
    assert not (tmp_path / "x").exists()
    assert {p.name for p in (tmp_path / "inside").iterdir()} <= {"new"}


@pytest.mark.parametrize("content", [b"", b"no archive", gzip.compress(b"no tar", mtime=0)])
def test_what_is_no_archive_is_refused_in_a_line(tmp_path, content):
    (tmp_path / "x.tar.gz").write_bytes(content)
    with pytest.raises(StudyError) as caught:
        archive.unpack(tmp_path / "x.tar.gz", tmp_path / "new")
    assert len(str(caught.value).splitlines()) == 1


def test_half_an_archive_is_refused(packed, tmp_path):
    content = packed.read_bytes()
    (tmp_path / "half.tar.gz").write_bytes(content[: len(content) // 2])
    with pytest.raises(StudyError, match=r"half\.tar\.gz"):
        archive.unpack(tmp_path / "half.tar.gz", tmp_path / "new")


def test_what_is_too_large_is_refused_before_it_is_written(packed, tmp_path, monkeypatch):
    monkeypatch.setattr(archive, "MOST_BYTES", 20_000)
    with pytest.raises(StudyError, match=r"unpacks to more than 20,000 bytes"):
        archive.unpack(packed, tmp_path / "new")
    assert not list((tmp_path / "new").iterdir())


def test_nothing_is_overwritten(packed, tmp_path):
    (tmp_path / "mine").write_text("mine")
    with pytest.raises(StudyError, match="is not empty"):
        archive.unpack(packed, tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["mine"]


def test_a_study_without_results_has_nothing_to_pack(study, tmp_path, monkeypatch):
    monkeypatch.setenv("STUDY_OUTPUTS", str(tmp_path))
    with pytest.raises(StudyError, match="has no results yet; run make study STUDY=study"):
        archive.pack(str(study[0]))
