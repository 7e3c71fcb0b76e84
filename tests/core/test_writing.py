"""What has its final name is whole: killed at any step, cut off from power, or failing."""

import os
import shutil
import signal
import socket
import subprocess
import sys

import pytest

from helpers.core import files
from helpers.core.files import PROJECT, remove_leftovers, replace_folder, write_atomically

# Kills itself at the given call of what writing does to the disk.
KILLED = """
import os, signal, sys
kind, path, left = sys.argv[1], sys.argv[2], int(sys.argv[3])

def counted(real):
    def call(*args, **more):
        global left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **more)
    return call

import shutil
from pathlib import Path
from helpers.core.files import replace_folder, write_atomically
for place, name in ((os, "fsync"), (os, "replace"), (os, "close"), (shutil, "rmtree")):
    setattr(place, name, counted(getattr(place, name)))

def fill(folder):
    (folder / "a").write_text("new a")
    (folder / "sub").mkdir()
    (folder / "sub" / "b").write_text("new b")

if kind == "file":
    write_atomically(Path(path), lambda p: p.write_text("new"))
else:
    replace_folder(Path(path), fill)
"""


def killed_at(step: int, kind: str, path) -> int:
    return subprocess.run(
        [sys.executable, "-c", KILLED, kind, str(path), str(step)],
        env=os.environ | {"PYTHONPATH": str(PROJECT / "src")},
        check=False,
    ).returncode


def content(folder) -> dict[str, str]:
    return {str(p.relative_to(folder)): p.read_text() for p in folder.rglob("*") if p.is_file()}


def test_a_file_whose_writer_is_killed_is_the_old_one_or_the_new_one(tmp_path):
    path, seen, step = tmp_path / "metrics.json", set(), 0
    code = -signal.SIGKILL
    while code == -signal.SIGKILL:
        step += 1
        path.write_text("old")
        code = killed_at(step, "file", path)
        seen.add(path.read_text())
        remove_leftovers(tmp_path)
        assert [p.name for p in tmp_path.iterdir()] == ["metrics.json"]
    assert code == 0
    assert step > 4
    assert seen == {"old", "new"}


def test_a_folder_whose_writer_is_killed_is_never_a_mixture(tmp_path):
    folder, seen, step = tmp_path / "checkpoint", [], 0
    new = {"a": "new a", "sub/b": "new b"}
    code = -signal.SIGKILL
    while code == -signal.SIGKILL:
        step += 1
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        (folder / "a").write_text("old a")
        (folder / "c").write_text("old c")
        code = killed_at(step, "folder", folder)
        actual = content(folder) if folder.is_dir() else None
        assert actual in ({"a": "old a", "c": "old c"}, None, new)
        seen.append(actual)
        remove_leftovers(tmp_path)
        assert {p.name for p in tmp_path.iterdir()} <= {"checkpoint"}
    assert code == 0
    assert None in seen
    assert seen[-1] == new


def test_content_is_on_the_disk_before_its_name_and_the_name_before_it_returns(
    tmp_path, monkeypatch
):
    """What a power cut leaves follows from the order of what was handed to the disk."""
    done = []

    def handed(path):
        done.append(path)

    def renamed(old, new):
        done.append("rename")
        os.rename(old, new)

    monkeypatch.setattr(files, "flush_to_disk", handed)
    monkeypatch.setattr(files.os, "replace", renamed)

    def fill(folder):
        (folder / "weights").write_text("1")

    replace_folder(tmp_path / "checkpoint", fill)
    weights, folder, rename, parent = done
    assert (weights.name, weights.parent) == ("weights", folder)
    assert (rename, parent) == ("rename", tmp_path)
    done.clear()
    write_atomically(tmp_path / "record.json", lambda p: p.write_text("{}"))
    assert done[1:] == ["rename", tmp_path]
    assert done[0].name.startswith(".record.json.")


def test_a_folder_that_cannot_be_filled_leaves_the_old_one(tmp_path):
    folder = tmp_path / "checkpoint"
    replace_folder(folder, lambda p: (p / "weights").write_text("old"))

    def fill(temporary):
        (temporary / "weights").write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        replace_folder(folder, fill)
    assert content(tmp_path) == {"checkpoint/weights": "old"}


def test_leftovers_of_the_dead_are_removed_and_no_others(tmp_path):
    ended = subprocess.run(
        [sys.executable, "-c", "import os; print(os.getpid())"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    here = socket.gethostname()
    dead = tmp_path / "sub" / f".checkpoint.{here}-{ended}.tmp"
    dead.mkdir(parents=True)
    (dead / "weights").write_text("half")
    stay = [f".x.{here}-{os.getpid()}.tmp", f".x.another-host-{ended}.tmp", ".x.tmp", "x.tmp"]
    for name in stay:
        (tmp_path / name).write_text("")
    remove_leftovers(tmp_path)
    assert not dead.exists()
    assert {p.name for p in tmp_path.iterdir()} == {"sub", *stay}
