"""An evaluation that was cut short goes on from what it made, and from nothing else."""

import errno
import json
import os
import shutil
from dataclasses import replace

import pytest

from helpers.core.errors import StudyError
from helpers.evaluation import predictions
from helpers.evaluation.predictions import Progress, SavedPredictions, read_saved
from helpers.study.loading import open_job

OWNER = {"dataset": "arc", "files": "f" * 64}
PACKAGES = {"torch": "2", "vllm (serving)": "0.9"}
PROMPTS = {f"item{i}": f"hash{i}" for i in range(5)}
# Separators that str.splitlines would cut at, and the checksum's own blank.
ROWS = [
    {"id": f"item{i}", "prompt_hash": f"hash{i}", "output": text, "score": i / 3}
    for i, text in enumerate(["a b", "two\nlines", "a\u2028b\x85c", "é 三", ""])
]


@pytest.fixture
def path(tmp_path):
    return tmp_path / ".partial" / "arc.jsonl"


def keep(path, rows, owner=OWNER):
    known, whole, _ = read_saved(path, owner, PROMPTS)
    return list(SavedPredictions(path, owner, known, whole).appending(rows))


def test_what_was_kept_is_read(path):
    assert keep(path, ROWS[:3]) == ROWS[:3]
    keep(path, ROWS[3:])
    rows, whole, other = read_saved(path, OWNER, PROMPTS)
    assert list(rows.values()) == ROWS
    assert (whole, other) == (path.stat().st_size, [])


def test_a_file_cut_anywhere_loses_its_last_line_and_no_other(path):
    """A kill or a power cut leaves a beginning of the file, of any length."""
    keep(path, ROWS)
    data = path.read_bytes()
    ends = [i + 1 for i, byte in enumerate(data) if byte == ord("\n")]
    for length in range(len(data)):
        path.write_bytes(data[:length])
        rows, whole, _ = read_saved(path, OWNER, PROMPTS)
        lines = sum(end <= length for end in ends)
        assert list(rows.values()) == ROWS[: max(0, lines - 1)]
        assert whole == max([0, *(end for end in ends if end <= length)])
        if length % 97 == 0:  # and appending after it gives the file of an undisturbed run
            keep(path, [row for row in ROWS if row["id"] not in rows])
            assert path.read_bytes() == data


def test_any_other_change_is_an_error_naming_the_line(path):
    keep(path, ROWS)
    data = path.read_bytes()
    starts = [0, *(i + 1 for i, byte in enumerate(data) if byte == ord("\n"))]
    for place in range(0, len(data), 7):
        if data[place] == ord("\n"):
            continue
        path.write_bytes(data[:place] + bytes([data[place] ^ 4]) + data[place + 1 :])
        if path.read_bytes()[place] == ord("\n"):
            continue
        line = sum(start <= place for start in starts)
        with pytest.raises(StudyError, match=rf"arc\.jsonl: line {line} .*; delete the file"):
            read_saved(path, OWNER, PROMPTS)


@pytest.mark.parametrize("edit", ["twice", "removed line end", "another prompt", "no item"])
def test_lines_that_are_whole_but_wrong_are_errors(path, edit):
    rows = list(ROWS[:2])
    if edit == "another prompt":
        rows[1] = ROWS[1] | {"prompt_hash": "other"}
    if edit == "no item":
        rows[1] = ROWS[1] | {"id": "other"}
    keep(path, rows)
    data = path.read_bytes()
    if edit == "twice":
        path.write_bytes(data + data.split(b"\n")[2] + b"\n")
    if edit == "removed line end":
        path.write_bytes(data.replace(b"\n", b"", 1))
    with pytest.raises(StudyError, match=r"line [1-4] "):
        read_saved(path, OWNER, PROMPTS)


def test_answers_of_another_setting_are_not_used(path):
    keep(path, ROWS)
    for key in OWNER:
        rows, whole, other = read_saved(path, OWNER | {key: "another"}, PROMPTS)
        assert (rows, whole, other) == ({}, 0, [key])
    keep(path, ROWS[:1], OWNER | {"files": "another"})
    assert len(path.read_bytes().splitlines()) == 2


def test_a_full_disk_is_named_and_what_was_kept_goes_on(path, monkeypatch):
    """The disk takes half a line and then no more; with room again, nothing is lost."""
    keep(path, ROWS[:2])
    known, whole, _ = read_saved(path, OWNER, PROMPTS)
    kept = SavedPredictions(path, OWNER, known, whole)
    real, taken = kept._stream, []

    class Full:
        fileno = real.fileno

        def write(self, line):
            if taken:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            taken.append(real.write(bytes(line[:10])))
            return 10

    kept._stream = Full()
    with pytest.raises(OSError, match=r"No space left on device: .*arc\.jsonl"):
        list(kept.appending(ROWS[2:]))
    assert len(read_saved(path, OWNER, PROMPTS)[0]) == 2
    keep(path, ROWS[2:])
    assert list(read_saved(path, OWNER, PROMPTS)[0].values()) == ROWS


def test_answers_belong_to_files_settings_prompts_code_and_packages(
    study_settings, write_study, monkeypatch, tmp_path
):
    """Whatever could change an answer is in the first line, so that it discards the file."""
    monkeypatch.setenv("STUDY_OUTPUTS", str(tmp_path))

    def job(model="base", variant="rtn_w8a8", **evaluation):
        study_settings["evaluation"] |= evaluation
        return open_job(write_study(study_settings), model=model, variant=variant)

    def owner(job, files="a", dataset="arc", prompts=PROMPTS, packages=PACKAGES) -> dict:
        path = job.paths.evaluation(job.model, job.variant) / ".partial" / f"{dataset}.jsonl"
        path.unlink(missing_ok=True)
        Progress(job, files=files, packages=packages).open_set(dataset, prompts)
        return json.loads(path.read_text().split(" ", 1)[1])

    def differing(other: dict) -> set[str]:
        return {key for key in first if first[key] != other[key]}

    first = owner(job())
    assert differing(owner(job())) == set()
    assert differing(owner(job(), files="b")) == {"files"}
    assert differing(owner(job(), prompts=PROMPTS | {"item0": "other"})) == {"prompts"}
    assert differing(owner(job(), dataset="squad_v2")) == {"dataset"}
    assert differing(owner(job(variant="smoothquant_w8a8"))) == {"variant", "settings"}
    assert differing(owner(job(model="tuned"))) == {"model", "settings"}
    batch = study_settings["evaluation"]["batch"]
    assert differing(owner(job(batch={"tokens": 1024, "rows": 4}))) == {"settings"}
    job(batch=batch)
    newer = PACKAGES | {"vllm (serving)": "1.0"}
    assert differing(owner(job(), packages=newer)) == {"packages"}
    monkeypatch.setattr(predictions, "sha256_file", lambda _path: "other")
    elsewhere = replace(job(), runtime={"device_name": "another"})
    assert differing(owner(elsewhere)) == {"device", "code"}


def test_what_is_discarded_or_resumed_is_said(study_path, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("STUDY_OUTPUTS", str(tmp_path))
    job = open_job(study_path, model="base", variant="rtn_w8a8")
    list(Progress(job, files="a", packages=PACKAGES).open_set("arc", PROMPTS).appending(ROWS[:2]))
    Progress(job, files="a", packages=PACKAGES).open_set("arc", PROMPTS)
    assert "arc: goes on after 2 of 5 answers" in capsys.readouterr().err
    Progress(job, files="b", packages=PACKAGES).open_set("arc", PROMPTS)
    printed = capsys.readouterr().err
    assert "arc: discarded answers of another run (files differ)" in printed


def ask(run, stop_after=None):
    """Evaluate a run's variant; return the predictions and the items asked, in that order."""
    from helpers.evaluation import engine
    from helpers.quantization.variants import load_variant

    asked = []

    def counted(*args, **more):
        for row in answer(*args, **more):
            if len(asked) == stop_after:
                raise KeyboardInterrupt
            asked.append(row["id"])
            yield row

    with run.outputs(), pytest.MonkeyPatch.context() as patch:
        job, answer = run.job, engine.answer
        patch.setattr(engine, "answer", counted)
        model, tokenizer = load_variant(job)
        kept = Progress(job, files="the same", packages=PACKAGES)
        try:
            return engine.ask_all(model, tokenizer, job.study, kept), asked
        except KeyboardInterrupt:
            return None, asked


@pytest.mark.parametrize(
    "variant",
    ["noquant", "o2", *(pytest.param(v, marks=pytest.mark.long) for v in ("rtn_w8a8", "o3"))],
)
def test_an_evaluation_cut_anywhere_ends_in_the_same_answers(sound_run, variant):
    """Byte for byte, whatever is asked beside what; and nothing is asked twice."""
    run = sound_run("llama", variant)
    run.settings["evaluation"]["batch"] = {"tokens": 512, "rows": 2}
    whole, asked = ask(run)
    folder = run.root / "outputs" / "study" / "base" / variant / "evaluation" / ".partial"
    for stop in range(1, len(asked), 2):
        shutil.rmtree(folder)
        _, first = ask(run, stop_after=stop)
        again, rest = ask(run)
        assert len(first) == stop
        assert sorted(first + rest) == sorted(asked)
        assert json.dumps(again) == json.dumps(whole)
